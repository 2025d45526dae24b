import pytest
from tokmerge.io import paths


@pytest.fixture
def clone(tmp_path):
    """A repository whose parameters hold a pipeline of their own."""
    for folder in (tmp_path, tmp_path / "params" / "paper"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dvc.yaml").touch()
    (tmp_path / "notebooks" / "deep").mkdir(parents=True)
    return tmp_path.resolve()


@pytest.mark.parametrize("folder", [".", "notebooks/deep", "params/paper"])
def test_root_is_found_from_any_folder_below(clone, monkeypatch, folder):
    monkeypatch.chdir(clone / folder)
    assert paths.root() == clone
    assert paths.resolve("a/b") == clone / "a/b"
    assert paths.resolve(clone / "x") == clone / "x"


def test_outside_a_clone_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="is in no clone of the repository: change into one"):
        paths.root(tmp_path)


def test_fetched_files_lie_in_the_clone_or_in_the_users_cache(clone, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(clone)
    assert paths.data() == clone / "data"
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(paths.data()) == "/somewhere/tokmerge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/me")
    assert str(paths.data()) == "/me/.cache/tokmerge"


def test_a_missing_input_names_its_notebook(clone, monkeypatch):
    monkeypatch.chdir(clone)
    with pytest.raises(FileNotFoundError, match=r"results/x\.json: run notebooks/10_inputs\.ipynb first"):
        paths.need("results/x.json", made_by="10_inputs")
    (clone / "here.json").touch()
    assert paths.need("here.json", made_by="10_inputs").name == "here.json"
