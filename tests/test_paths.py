import pytest
from tokmerge import paths


def test_root_is_found_from_any_folder_below(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").touch()
    deep = tmp_path / "notebooks" / "deep"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert paths.root() == tmp_path.resolve()
    assert paths.resolve("a/b") == tmp_path.resolve() / "a/b"
    assert paths.resolve(tmp_path / "x") == tmp_path / "x"


def test_outside_a_clone_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dvc\.yaml at or above"):
        paths.root(tmp_path)


def test_a_missing_input_names_its_notebook(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"results/x\.json: run notebooks/10_inputs\.ipynb first"):
        paths.need("results/x.json", made_by="10_inputs")
    (tmp_path / "here.json").touch()
    assert paths.need("here.json", made_by="10_inputs").name == "here.json"
