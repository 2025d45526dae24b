"""params/ and notebooks/ must agree: a wrong name in a file is found here, not hours into a run."""

import ast

import nbformat
import pytest
import yaml
from tokmerge.io import notebook, paths

ROOT = paths.root()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FILES = sorted((ROOT / "params").glob("*/[0-9]*.yaml"))


def parameter_cell(path):
    cells = nbformat.read(path, as_version=4).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, f"{path.name} needs exactly one cell tagged parameters"
    return tagged[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_cell_holds_literals_only_and_comes_first(path):
    assert notebook.literal_names(parameter_cell(path))
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert "parameters" in code[0].metadata.tags
    assert "notebook.parameters(globals())" in code[1].source, "parameters are checked before any work"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_is_used(path):
    _, *code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    nodes = [node for cell in code for node in ast.walk(ast.parse(cell.source))]
    # By name, or as the key of params[...].
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    used |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not set(notebook.literal_names(parameter_cell(path))) - used


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_name_in_a_params_file_is_a_parameter(path):
    known = notebook.literal_names(parameter_cell(ROOT / "notebooks" / f"{path.stem}.ipynb"))
    given = yaml.safe_load(path.read_text()) or {}
    assert set(given) <= set(known), f"unknown: {set(given) - set(known)}"
    assert not any(isinstance(value, dict) for value in given.values()), "params files are flat"


@pytest.mark.parametrize("profile", ["smoke", "embedded", "paper"])
def test_every_profile_is_whole_and_writes_below_its_own_folder(profile):
    files = sorted((ROOT / "params" / profile).glob("*.yaml"))
    names = {path.stem for path in files}
    elsewhere = {"smoke": {"95_scale"}, "embedded": set(), "paper": {"01_train_vit", "02_train_llava", "95_scale"}}
    assert names == {path.stem for path in NOTEBOOKS} - elsewhere[profile]
    for path in files:
        given = yaml.safe_load(path.read_text()) or {}
        for name in {name for name in given if name.endswith("_dir")}:
            assert given[name].startswith((f"results/{profile}/", "figures", "lib/tokmerge/assets")), given[name]
        assert given or profile == "smoke", f"{path} changes nothing"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_follow_the_house_rhythm(path):
    cells = nbformat.read(path, as_version=4).cells
    first = cells[0].source
    assert first.startswith(f"# {path.stem[:2]} · ")
    for part in ("| Reads |", "| Writes |", "| Runtime |", "?**"):
        assert part in first, f"the first cell of {path.name} lacks {part}"
    assert cells[-2].source == "## Takeaway"
    assert "print(" in cells[-1].source
    assert any("assert " in cell.source for cell in cells if cell.cell_type == "code")
    longest = max((len(cell.source.splitlines()), cell.source) for cell in cells if cell.cell_type == "code")
    assert longest[0] <= 28, f"a cell of {longest[0]} lines in {path.name}: {longest[1][:60]}"
