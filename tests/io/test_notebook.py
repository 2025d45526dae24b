import json
import subprocess
import sys

import nbformat
import pytest
from tokmerge.io import notebook, paths


def test_parameters_are_what_the_notebook_declares():
    cells = ["", "a = 1\nb = 'x'", "import os\na = 5", "c = f(2)"]
    assert notebook.parameters({"In": cells, "a": 5, "b": "x", "c": 3}) == {"a": 5, "b": "x"}


def test_without_a_history_the_plain_values_are_the_parameters():
    namespace = {"In": [""], "Out": {}, "_i": "", "json": json, "a": 5, "b": None, "c": [0.5], "exit": exit}
    assert notebook.parameters(namespace) == {"a": 5, "b": None, "c": [0.5]}


def test_an_injected_name_that_is_not_declared_is_an_error():
    cells = ["", "a = 1  # one\nb = None", "# Parameters\na = 2\ntypo = 3\n"]
    with pytest.raises(ValueError, match="unknown parameter typo: this notebook has a, b"):
        notebook.parameters({"In": cells, "a": 2, "b": None, "typo": 3})


def test_negative_numbers_and_nested_literals_count_as_literals():
    assert notebook.literal_names("a = -1\nb = {'x': [1, None]}") == ["a", "b"]
    assert notebook.literal_names("a = b") == []
    assert notebook.literal_names("a = 1\nprint(a)") == []
    assert notebook.literal_names("a =") == []
    assert notebook.literal_names("") == []


def test_without_a_history_plain_values_are_the_parameters_and_constants_are_not():
    scope = {"In": [""], "Out": {}, "_hidden": 1, "LADDER": (object(),), "np": object(), "seed": 0, "snrs": [1.0]}
    assert notebook.parameters(scope) == {"seed": 0, "snrs": [1.0]}


@pytest.mark.parametrize("how", ["command line", "file"])
def test_papermill_run_with_an_unknown_parameter_stops_before_any_work(tmp_path, how):
    (tmp_path / "typo.yaml").write_text("tresholds: [0.9]\n")
    given = ["-p", "tresholds", "0.9"] if how == "command line" else ["-f", str(tmp_path / "typo.yaml")]
    source = paths.root() / "notebooks" / "20_merging.ipynb"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            str(source),
            str(tmp_path / "out.ipynb"),
            "--cwd",
            str(source.parent),
            *given,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "unknown parameter tresholds: this notebook has inputs_dir, thresholds" in done.stderr
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    ran = [cell for cell in executed.cells if cell.cell_type == "code" and cell.execution_count]
    assert len(ran) <= 3, json.dumps([cell.source[:60] for cell in ran])
