"""dvc.yaml, and the house as a whole: who may import what."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
import yaml
from imports import LIB, MODULES, ROOT, closure, code_cells, imported, imports, parameter_cell, place
from tokmerge import preflight

PROFILES = ("smoke", "embedded", "laptop", "paper", "photos")
# Whose values stand in for photographs in figures that show none.
PHOTOS = ("35_images_study", "40_images", "55_channel_study", "65_privacy_study")
STAGES = {
    f"{name}@{profile}": (profile, stage)
    for profile in PROFILES
    for name, stage in preflight.stages(ROOT, profile).items()
}
every_stage = pytest.mark.parametrize(("profile", "stage"), STAGES.values(), ids=STAGES)
TRAINING = ("train_vit", "train_llava")
STUDIES = ("search_study", "images_study", "questions_study", "channel_study", "privacy_study")
# Imports go down only: from a floor to lower ones, never along it.
HOUSE = re.findall(r"^\| (\d) \| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
FLOOR = {name: int(floor) for floor, name in HOUSE}


def notebooks_of(profile, stage):
    """The notebooks a stage runs, from its commands."""
    commands = stage["cmd"] if isinstance(stage["cmd"], list) else [stage["cmd"]]
    return [re.fullmatch(rf"sh notebooks/run\.sh {profile} (\w+)", command).group(1) for command in commands]


def given(profile, notebook):
    """All parameters of a run: those of the notebook's cell, changed by the profile's file."""
    params = {}
    exec(parameter_cell(notebook), {}, params)
    return params | (yaml.safe_load((ROOT / "params" / profile / f"{notebook}.yaml").read_text()) or {})


@every_stage
def test_stage_depends_on_exactly_the_folders_it_imports(profile, stage):
    names = notebooks_of(profile, stage)
    code = {dep for dep in stage["deps"] if dep.startswith("lib/tokmerge/") and "/assets/" not in dep}
    cells = [cell for name in names for cell in code_cells(name)]
    assert code == {place(module) for module in closure(imports("\n".join(cells)))}
    given = [f"notebooks/{name}.ipynb" for name in names] + [f"params/{profile}/{name}.yaml" for name in names]
    assert given == stage["deps"][: len(given)]
    assert preflight.params_files(stage) == given[len(names) :]


@every_stage
def test_stage_reads_and_writes_what_its_params_say(profile, stage):
    each = [given(profile, name) for name in notebooks_of(profile, stage)]
    assert {params["out_dir"] for params in each} == set(preflight.outputs(stage))
    params = {key: value for one in each for key, value in one.items()}
    read = {value for key, value in params.items() if key.endswith("_dir") and key not in ("out_dir", "work_dir")}
    read |= {params["claims_file"]} if "claims_file" in params else set()
    # A study that goes on reads what it wrote before.
    read -= {None, params["out_dir"]}
    values = [one for value in params.values() for one in (value if isinstance(value, list) else [value])]
    if "fashion-vit" in values:
        read.add("lib/tokmerge/assets/train_vit")
    if "easy-vqa-llava" in values or "scenes-llava" in values:
        read.add("lib/tokmerge/assets/train_llava")
    tables = {dep for dep in stage["deps"][2 * len(each) :] if not dep.startswith("lib/tokmerge/") or "/assets/" in dep}
    # Other models come from the hub or from PyPI; a stage names the shipped ones for all profiles.
    elsewhere = profile in ("laptop", "paper", "photos")
    spare = {f"lib/tokmerge/assets/{name}" for name in TRAINING} if elsewhere else set()
    if "90_figures" in notebooks_of(profile, stage):
        spare |= {f"params/photos/{name}.yaml" for name in PHOTOS}
    assert read <= tables <= read | spare


def test_profiles_have_the_same_stages_and_what_takes_hours_is_frozen():
    names = {profile: list(preflight.stages(ROOT, profile)) for profile in PROFILES}
    assert names["embedded"] == [*TRAINING, *names["paper"]]
    assert " ".join(names["photos"]) == (
        "inputs merging search images_study images channel_study channel privacy_study privacy"
    )
    hours = {*TRAINING, *STUDIES}
    assert names["smoke"] == [f"{name}_chained" if name in hours else name for name in names["embedded"]]
    assert names["laptop"] == names["smoke"][len(TRAINING) :]
    for name, (_, stage) in STAGES.items():
        assert stage.get("frozen", False) == (name.split("@")[0] in hours), name
    used = {name for stage in STAGES.values() for name in notebooks_of(*stage)}
    # The tour makes no table; growth is measured by hand, on an idle machine.
    assert used == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - {"00_tour", "95_scale"}


def test_dvc_reads_the_same_stages():
    command = [sys.executable, "-m", "dvc", "stage", "list", "--name-only"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert sorted(listed) == sorted(STAGES)


def test_the_lanes_of_the_smoke_profile_name_its_stages():
    lanes = re.findall(r"^lane ([\w ]+)", (ROOT / "notebooks" / "smoke.sh").read_text(), re.MULTILINE)
    assert sorted([*" ".join(lanes).split(), "figures"]) == sorted(preflight.stages(ROOT, "smoke"))


def test_every_notebook_is_run_once_by_the_checks_and_after_what_it_reads():
    lanes = re.findall(r"^lane ([\d ]+)", (ROOT / "notebooks" / "nbval.sh").read_text(), re.MULTILINE)
    numbers = " ".join(lanes).split()
    assert sorted(numbers) == sorted(path.name[:2] for path in (ROOT / "notebooks").glob("*.ipynb"))
    # Two lanes run side by side, the last alone.
    rounds = [lanes[:2], lanes[2:4], lanes[4:]]
    made = {preflight.outputs(stage)[0]: stage for stage in preflight.stages(ROOT, "smoke").values()}
    for at, some in enumerate(rounds):
        for lane in some:
            for turn, number in enumerate(lane.split()):
                reads = next((stage for stage in made.values() if f"/{number}_" in stage["deps"][0]), {"deps": []})
                for stage in (made[dep] for dep in reads["deps"] if dep in made):
                    other = stage["deps"][0].split("/")[1][:2]
                    before = [one for earlier in rounds[:at] for part in earlier for one in part.split()]
                    assert other in [*before, *lane.split()[:turn]], f"{number} reads what {other} makes"


def test_the_pipeline_is_one_short_file_whose_metrics_and_plots_are_there():
    assert list(ROOT.glob("params/**/dvc.yaml")) == []
    pipeline = (ROOT / "dvc.yaml").read_text()
    assert len(pipeline.splitlines()) <= 160
    assert max(map(len, pipeline.splitlines())) <= 120
    declared = yaml.safe_load(pipeline)
    assert declared["metrics"] == ["figures/numbers.json"]
    plots = [next(iter(plot)) if isinstance(plot, dict) else plot for plot in declared["plots"]]
    assert all((ROOT / plot).is_file() for plot in plots)


def test_make_help_fits_a_screen_and_names_every_command():
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE).group(1).split())
    lines = re.findall(r'@echo "(make ([\w-]+) .*)"', makefile)
    assert {name for _, name in lines} == commands - {"help"}
    assert len(lines) <= 24
    assert max(len(line) for line, _ in lines) <= 120


def test_imports_go_down_the_floors_only():
    for name in MODULES:
        folder = name.split(".")[0]
        for used in imported(name):
            below = used.split(".")[0]
            assert below == folder or FLOOR[below] < FLOOR[folder], f"{name} imports {used}"
    assert {used.split(".")[0] for used in imported("preflight")} == {"io"}


def test_no_module_imports_itself_by_a_detour():
    TopologicalSorter({name: imported(name) for name in MODULES}).prepare()


def test_imports_of_every_kind_are_seen():
    code = """
    import tokmerge.io.store
    from tokmerge import llava, wire
    from tokmerge.merging import front
    from tokmerge.merging.policies import TopR
    def later():
        "tokmerge.cli is only talked about here"
        from tokmerge.channel import phy
        tokmerge.patch, tokmerge.data.registry.load_images, getattr(tokmerge, "ToFu")
        import_module("tokmerge.search.pareto"), [sys.executable, "-m", "tokmerge.cli"]
    """
    assert imports("if True:" + code) == {
        "io.store", "models.llava", "wire", "merging.front", "merging.policies", "channel.phy", "models.patching",
        "data", "data.registry", "merging.peers", "search.pareto", "cli",
    }  # fmt: skip
    with pytest.raises(ValueError, match="getattr"):
        imports("getattr(tokmerge, name)")


def test_tests_mirror_the_library():
    tests = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    tested = {".".join((*path.parts[:-1], path.stem.removeprefix("test_"))) for path in tests}
    house = {"contributing", "install", "names", "params", "pipeline", "preloaded", "prose", "site"}
    outside = {name for name in tested if name.startswith(("browser.", "gpu."))} | house
    assert tested - outside <= set(MODULES), "a test file without its module"
    assert house <= tested


def test_public_api():
    import tokmerge

    for name in tokmerge.__all__:
        assert getattr(tokmerge, name).__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'merge_everything'"):
        _ = tokmerge.merge_everything


def test_drawing_figures_does_not_load_the_engine():
    code = "import sys, tokmerge.plots.style; sys.exit('tokmerge.models.vit' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_folder_says_what_lives_there():
    for path in LIB.glob("*/__init__.py"):
        assert len((ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()) >= 2, path
