import pytest

from tests.helpers.train_runs import KEPT, TEXT, save_language_model


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """The folder of a tiny causal language model."""
    for needed in ("trl", "datasets"):
        pytest.importorskip(needed)
    return save_language_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A file to train on and one to keep."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "new.txt").write_text(TEXT)
    (folder / "keep.txt").write_text(KEPT)
    return folder
