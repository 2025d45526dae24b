"""`notebooks/preloaded.py`: notebooks in forks of one process do what they do in processes of their own."""

import os
import subprocess
import sys

import nbformat
import pytest
from tokmerge.io import paths

SCRIPT = paths.root() / "notebooks" / "preloaded.py"
# With one small module instead of all that it imports, which takes a quarter of a minute.
START = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import preloaded; preloaded.MODULES = ['colorsys']; "
START += "preloaded.LIBRARY = preloaded.Path('none'); sys.exit(preloaded.serve(sys.argv[1:]))"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the command just runs")


KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}


def run(folder, *command):
    return subprocess.run([sys.executable, "-c", START, *command], cwd=folder, capture_output=True, text=True)


def notebook(folder, source):
    cells = [nbformat.v4.new_code_cell(source)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), folder / "in.ipynb")


def test_a_notebook_runs_in_a_fork_in_its_folder(tmp_path):
    source = "import os, sys, matplotlib.pyplot as plt; plt.plot([1]); print('colorsys' in sys.modules, os.getcwd())"
    notebook(tmp_path, source)
    (tmp_path / "there").mkdir()
    done = run(tmp_path, "papermill", "--cwd", "there", "--no-progress-bar", "in.ipynb", "out.ipynb")
    assert done.returncode == 0, done.stderr
    text, picture = nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs[-2:]
    found = {output.output_type: output for output in (text, picture)}
    assert found["stream"].text.split() == ["True", str(tmp_path / "there")]
    assert "image/png" in found["display_data"].data


def test_a_notebook_that_fails_fails_the_command(tmp_path):
    notebook(tmp_path, "raise ValueError('of this cell')")
    done = run(tmp_path, "sh", "-c", "papermill --no-progress-bar in.ipynb out.ipynb || exit 7")
    assert done.returncode == 7
    assert "of this cell" in done.stderr


def test_a_kernel_ends_with_the_notebook(tmp_path):
    notebook(tmp_path, "import os; print(os.getpid())")
    assert run(tmp_path, "papermill", "--no-progress-bar", "in.ipynb", "out.ipynb").returncode == 0
    kernel = int(nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs[0].text)
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)
