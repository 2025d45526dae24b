import json
import subprocess
import sys

import nbformat
import pytest
from tokmerge.io import notebook, paths


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
