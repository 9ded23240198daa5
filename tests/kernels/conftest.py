import pytest
import torch

from lamella_kernels import native


@pytest.fixture(params=["compiled", "eager"])
def form(request, monkeypatch):
    """Both CPU forms of an op that has two: the compiled kernel, where it was built, and plain torch."""
    if request.param == "eager":
        monkeypatch.setattr(native, "usable", lambda *tensors: False)
    elif native.library() is None:
        pytest.skip("the compiled kernels were not built: there was no C compiler at installation")
    return request.param


@pytest.fixture
def poisoned():
    """torch.empty returns NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
