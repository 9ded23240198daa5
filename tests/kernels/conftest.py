"""Every test runs on both CPU forms: the compiled kernel, where it was built, and plain torch."""

import pytest

from lamella_kernels import native


@pytest.fixture(params=["compiled", "eager"], autouse=True)
def form(request, monkeypatch):
    if request.param == "eager":
        monkeypatch.setattr(native, "usable", lambda *tensors: False)
    elif native.library() is None:
        pytest.skip("the compiled kernels were not built: there was no C compiler at installation")
    return request.param
