"""params/ and notebooks/ must agree: a wrong name in a file is found here, not hours into a run."""

import ast
import runpy
from types import SimpleNamespace

import pytest
import yaml
from imports import ROOT, cells, code_cells, parameter_cell
from tokmerge.data.registry import load_images, load_questions
from tokmerge.io import notebook

NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
NOTEBOOKS = pytest.mark.parametrize("name", NAMES)
FILES = sorted((ROOT / "params").glob("*/[0-9]*.yaml"))


@NOTEBOOKS
def test_parameters_cell_holds_literals_only_and_comes_first(name):
    assert notebook.literals(parameter_cell(name))
    assert "notebook.parameters(globals())" in code_cells(name)[1], "parameters are checked before any work"


@NOTEBOOKS
def test_every_parameter_is_used(name):
    nodes = [node for cell in code_cells(name)[1:] for node in ast.walk(ast.parse(cell))]
    # By name, or as the key of params[...].
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    used |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not set(notebook.literals(parameter_cell(name))) - used


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_name_in_a_params_file_is_a_parameter(path):
    known, given = notebook.literals(parameter_cell(path.stem)), yaml.safe_load(path.read_text()) or {}
    assert set(given) <= set(known), f"unknown: {set(given) - set(known)}"
    assert not any(isinstance(value, dict) for value in given.values()), "params files are flat"


@pytest.mark.parametrize("profile", ["smoke", "embedded", "laptop", "paper", "photos"])
def test_every_profile_is_whole_and_writes_below_its_own_folder(profile):
    files = sorted((ROOT / "params" / profile).glob("*.yaml"))
    names = {path.stem for path in files}
    hub = {"01_train_vit", "02_train_llava", "95_scale"}
    elsewhere = {"smoke": {"95_scale"}, "embedded": set(), "laptop": hub, "paper": hub}
    pictures = {
        "10_inputs", "20_merging", "30_search", "35_images_study", "37_images_study_adaptivity", "40_images",
        "41_baselines", "55_channel_study", "60_channel", "61_link_adaptation", "62_device_and_server",
        "65_privacy_study", "70_privacy",
    }  # fmt: skip
    assert names == (pictures if profile == "photos" else set(NAMES) - elsewhere[profile])
    for path in files:
        given = yaml.safe_load(path.read_text()) or {}
        for name in {name for name in given if name.endswith("_dir")}:
            # Figures show photographs beside the rest.
            own = "results/photos/" if name == "photos_dir" else f"results/{profile}/"
            assert given[name].startswith((own, "figures", "lib/tokmerge/assets")), given[name]
        assert given or profile == "smoke", f"{path} changes nothing"


@NOTEBOOKS
def test_notebooks_follow_the_house_rhythm(name):
    (head, *_, takeaway, last), code = (cell.source for cell in cells(name)), code_cells(name)
    assert head.startswith(f"# {name[:2]} · ")
    ids = [cell.id for cell in cells(name)]
    assert len(set(ids)) == len(ids), "two cells of one id"
    for part in ("| Reads |", "| Writes |", "| Runtime |", "?**"):
        assert part in head, f"the first cell of {name} lacks {part}"
    assert takeaway == "## Takeaway"
    assert "print(" in last
    assert any("assert " in cell for cell in code)
    lines = [line for cell in code_cells(name) for line in cell.splitlines() if line.strip()]
    assert len(lines) <= 250, f"{name} has {len(lines)} lines of code: cut it, or move definitions to the library"
    longest = max((len(cell.splitlines()), cell) for cell in code)
    assert longest[0] <= 28, f"a cell of {longest[0]} lines in {name}: {longest[1][:60]}"


@pytest.mark.parametrize("profile", ["laptop", "paper"])
def test_a_rehearsal_has_the_profiles_words_small_numbers_and_data_like_the_hubs(profile, tmp_path):
    rehearse = SimpleNamespace(**runpy.run_path(str(ROOT / "notebooks" / "rehearse.py")))
    rehearse.build_data(tmp_path, profile)
    for file in (ROOT / "params" / profile).glob("*.yaml"):
        own = notebook.literals(parameter_cell(file.stem))
        assert set(rehearse.FEWER.get(file.stem, {})) <= set(own)
        params = rehearse.values(profile, file.stem, tmp_path)
        assert set(params) == set(own)
        assert all(f"rehearsal/{profile}/" in params[name] for name in params if name in ("out_dir", "work_dir"))
    params = rehearse.values(profile, "10_inputs", tmp_path)
    images = load_images(params["dataset"], params["test_source"], path=params["data_path"])
    assert (len(images), len(images.classes)) == (80, 1000)
    params = rehearse.values(profile, "50_questions", tmp_path)
    assert params["split"] == yaml.safe_load((ROOT / "params" / profile / "50_questions.yaml").read_text())["split"]
    asked = load_questions(params["source"], params["split"], path=params["data_path"])
    assert len({question.image_id for question, _ in asked.pairs()}) == 6
