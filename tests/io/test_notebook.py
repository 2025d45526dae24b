import json
import subprocess
import sys

import nbformat
import pytest
from tokmerge.io import notebook, paths, store


def test_parameters_are_what_the_notebook_declares():
    cells = ["", "a = 1\nb = 'x'", "import os\na = 5", "c = f(2)"]
    assert notebook.parameters({"In": cells, "a": 5, "b": "x", "c": 3}) == {"a": 5, "b": "x"}


def test_without_a_history_plain_values_are_the_parameters_and_constants_are_not():
    plain = {"a": 5, "b": None, "c": [0.5], "seed": 0}
    others = {"In": [""], "Out": {}, "_i": "", "json": json, "exit": exit, "LADDER": (object(),), "np": object()}
    assert notebook.parameters(others | plain) == plain


def test_an_injected_name_that_is_not_declared_is_an_error():
    cells = ["", "a = 1  # one\nb = None", "# Parameters\na = 2\ntypo = 3\n"]
    with pytest.raises(ValueError, match="unknown parameter typo: this notebook has a, b"):
        notebook.parameters({"In": cells, "a": 2, "b": None, "typo": 3})


@pytest.mark.parametrize(
    ("cell", "values"),
    [("a = -1\nb = {'x': [1, None]}", {"a": -1, "b": {"x": [1, None]}})]
    + [(cell, {}) for cell in ("a = b", "a = 1\nprint(a)", "a =", "")],
)
def test_literals_are_those_of_cells_that_assign_literals_only(cell, values):
    assert notebook.literals(cell) == values


@pytest.mark.parametrize(
    ("declared", "given", "message"), [("seed = 0", "seed = '0'", "a str: this notebook takes a int"),
                                       ("taus = [0.9]", "taus = 0.9", "a float: this notebook takes a list"),
                                       ("flag = False", "flag = 1", "a int: this notebook takes a bool")]
)  # fmt: skip
def test_a_parameter_of_another_type_is_refused(declared, given, message):
    with pytest.raises(ValueError, match=message):
        notebook.parameters({"In": ["", declared, f"# Parameters\n{given}"]})
    loose = {"In": ["", "a = 1.0\nb = None", "# Parameters\na = 1\nb = 'x'"], "a": 1, "b": "x"}
    assert notebook.parameters(loose) == {"a": 1, "b": "x"}


def test_a_study_is_read_only_where_it_is_stepped_through_and_was_made_with_these_values(tmp_path, monkeypatch, capsys):
    params = {"seeds": [0], "n_workers": 1, "out_dir": str(tmp_path), "added": None}
    store.save_json({"params": {"seeds": [0], "n_workers": 8, "out_dir": "elsewhere"}}, tmp_path / "study.json")
    assert not notebook.finished(str(tmp_path), params), "papermill runs it"
    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/35_images_study.ipynb")
    assert notebook.finished(str(tmp_path), params)
    assert "is read" in capsys.readouterr().out
    assert not notebook.finished(str(tmp_path), params, "adaptivity.parquet"), "half a study"
    assert not notebook.finished(str(tmp_path), params | {"seeds": [0, 1]})
    assert "another seeds: the study is run" in capsys.readouterr().out
    assert not notebook.finished(str(tmp_path / "nothing"), params)


@pytest.fixture
def stepping(tmp_path, monkeypatch):
    """JupyterLab's kernel of a notebook, in a repository with a profile."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params" / "large").mkdir(parents=True)
    (tmp_path / "params" / "large" / "10_inputs.yaml").write_text("a: 7\nc: [1]\n")
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/10_inputs.ipynb")
    monkeypatch.setenv("TOKMERGE_PROFILE", "large")
    return {"In": ["", "a = 1\nb = 'x'\nc = []"], "a": 1, "b": "x", "c": []}


def test_stepped_through_it_takes_the_profile_of_the_environment_and_says_so(stepping, capsys):
    assert notebook.parameters(stepping) == {"a": 7, "b": "x", "c": [1]}
    assert (stepping["a"], stepping["c"]) == (7, [1])
    assert capsys.readouterr().out == "with the values of params/large/10_inputs.yaml: a, c\n"


def test_what_papermill_gives_comes_first(stepping, capsys):
    stepping["In"].append("# Parameters\na = 3")
    stepping["a"] = 3
    assert notebook.parameters(stepping) == {"a": 3, "b": "x", "c": []}
    assert not capsys.readouterr().out


def test_a_profile_without_the_notebook_or_with_other_names_is_an_error(stepping, monkeypatch):
    del stepping["c"]
    stepping["In"][1] = "a = 1\nb = 'x'"
    with pytest.raises(ValueError, match="unknown parameter c: this notebook has a, b"):
        notebook.parameters(stepping)
    monkeypatch.setenv("TOKMERGE_PROFILE", "larger")
    with pytest.raises(ValueError, match=r"TOKMERGE_PROFILE is larger, but there is no params/larger/10_inputs\.yaml"):
        notebook.parameters(stepping)


@pytest.mark.parametrize("how", ["command line", "file"])
def test_papermill_run_with_an_unknown_parameter_stops_before_any_work(tmp_path, how):
    (tmp_path / "typo.yaml").write_text("tresholds: [0.9]\n")
    given = ["-p", "tresholds", "0.9"] if how == "command line" else ["-f", str(tmp_path / "typo.yaml")]
    source = paths.root() / "notebooks" / "20_merging.ipynb"
    command = [sys.executable, "-m", "papermill", source, tmp_path / "out.ipynb", "--cwd", source.parent, *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "unknown parameter tresholds: this notebook has inputs_dir, thresholds" in done.stderr
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    ran = [cell for cell in executed.cells if cell.cell_type == "code" and cell.execution_count]
    assert len(ran) <= 3, json.dumps([cell.source[:60] for cell in ran])
