import pytest

from tests.corpus import prepare_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))
