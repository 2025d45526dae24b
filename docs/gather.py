"""`python docs/gather.py PROFILE FOLDER`: collect what the site shows, each file where it lies in the repository.

So links between texts hold. Notebooks are the executed ones, or else those that ship in docs/executed; one that was not
executed, not whole, or not in its present version says so, and which command helps.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import yaml
from tokmerge import preflight
from tokmerge.io import paths
from tokmerge.verify import rule_of

WIDGET = "application/vnd.jupyter.widget-view+json"
TEXTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "NOTICE", "docs/index.md")


def gather(root: Path, profile: str, to: Path) -> None:
    """Collect a profile's figures, texts and notebooks.

    Raises:
        FileNotFoundError: its figures were not drawn; the message names the command that draws them.
    """
    figures = yaml.safe_load((root / "params" / profile / "91_claims.yaml").read_text())["out_dir"]
    if not (root / figures / "claims.md").is_file():
        raise FileNotFoundError(f"{figures} has no claims.md: {remedy(root, '91_claims', profile)} writes it")
    shutil.rmtree(to, ignore_errors=True)
    elsewhere = shutil.ignore_patterns("index.md", "*.py", "*.css", "_*", "executed")
    shutil.copytree(root / "docs", to / "docs", ignore=elsewhere)
    shutil.copytree(root / figures, to / "figures")
    for name in TEXTS:
        (to / Path(name).name).write_text((root / name).read_text().replace("](docs/executed/", "](notebooks/"))
    (to / "notebooks").mkdir()
    for path in (root / "notebooks").glob("*.ipynb"):
        executed = root / "executed" / profile / path.name
        if not executed.is_file() and profile == "embedded":
            executed = root / "docs" / "executed" / path.name
        nbformat.write(shown(path, executed, remedy(root, path.stem, profile)), to / "notebooks" / path.name)
    numbers = json.loads((to / "figures" / "numbers.json").read_text())
    with (to / "docs" / "numbers.md").rename(to / "figures" / "numbers.md").open("a") as page:
        for key, value in numbers.items():
            page.write(f"| `{key}` | {value} | {rule_of(key).tolerance:g} |\n")


def shown(source: Path, executed: Path, command: str) -> Any:
    """A notebook as it was executed, without progress bars, and with a note where it is not whole."""
    book, note = nbformat.read(source, as_version=4), f"Not executed here: {command} does that."
    if executed.is_file():
        wanted = [cell.source for cell in book.cells if cell.cell_type == "code"]
        book, note = nbformat.read(executed, as_version=4), ""
        code = [cell for cell in book.cells if cell.cell_type == "code"]
        for cell in code:
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        if any(cell.execution_count is None for cell in code if cell.source):
            note = f"Its execution ended before the last cell: {command} goes on."
        elif wanted != [cell.source for cell in code if "injected-parameters" not in cell.metadata.get("tags", [])]:
            note = f"Executed from an earlier version of it: {command} brings it up to date."
    if note:
        book.cells.insert(1, nbformat.v4.new_markdown_cell(f"```{{warning}}\n{note}\n```"))
    return book


def remedy(root: Path, stem: str, profile: str) -> str:
    """The command that executes a notebook, by its stage in the pipeline."""
    option = "" if profile == "embedded" else f" PROFILE={profile}"
    for name, stage in preflight.stages(root, profile).items():
        if f"notebooks/{stem}.ipynb" in stage["deps"]:
            return f"`make studies{option} STUDY={name}` (hours)" if stage.get("frozen") else f"`make repro{option}`"
    return "`make lab` (run all cells)"


if __name__ == "__main__":
    try:
        gather(paths.root(), sys.argv[1], Path(sys.argv[2]))
    except FileNotFoundError as error:
        sys.exit(f"site: {error}")
