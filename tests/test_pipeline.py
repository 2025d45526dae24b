"""dvc.yaml, environment.yml, constraints.txt and the house as a whole."""

import ast
import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, metadata

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from tokmerge import paths

ROOT = paths.root()
LIB = ROOT / "lib" / "tokmerge"
MODULES = {path.stem for path in LIB.glob("*.py")}
PIPELINES = {"embedded": ROOT / "dvc.yaml", "paper": ROOT / "params" / "paper" / "dvc.yaml"}
STAGES = [
    (profile, name, stage)
    for profile, path in PIPELINES.items()
    for name, stage in yaml.safe_load(path.read_text())["stages"].items()
]
STAGE_IDS = [f"{profile}-{name}" for profile, name, _ in STAGES]


def imported(source):
    """Modules of the package that a piece of code names, through attribute access of lazy names too."""
    homes = {
        "patch": "vit",
        "unpatch": "vit",
        "unmerge": "vit",
        "Threshold": "policies",
        "TopR": "policies",
        "PiToMe": "policies",
        "load_front": "front",
        "Front": "front",
    }
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "tokmerge":
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokmerge."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tokmerge":
            found.add(homes[node.attr])
    return found


def closure(modules):
    """All modules that importing these brings in."""
    done, todo = {"__init__"}, set(modules)
    while todo:
        module = todo.pop()
        done.add(module)
        todo |= imported((LIB / f"{module}.py").read_text()) - done
    return done


def notebook_code(name):
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


@pytest.mark.parametrize(("profile", "name", "stage"), STAGES, ids=STAGE_IDS)
def test_stage_depends_on_exactly_the_modules_it_imports(profile, name, stage):
    notebook = re.search(r"papermill notebooks/(\w+)\.ipynb", stage["cmd"]).group(1)
    expected = {f"lib/tokmerge/{module}.py" for module in closure(imported(notebook_code(notebook)))}
    assert {dep for dep in stage["deps"] if dep.endswith(".py")} == expected
    assert f"notebooks/{notebook}.ipynb" in stage["deps"]
    assert f"params/{profile}/{notebook}.yaml" in stage["deps"]


@pytest.mark.parametrize(("profile", "name", "stage"), STAGES, ids=STAGE_IDS)
def test_stage_reads_and_writes_what_its_params_say(profile, name, stage):
    notebook = re.search(r"papermill notebooks/(\w+)\.ipynb", stage["cmd"]).group(1)
    params = yaml.safe_load((ROOT / "params" / profile / f"{notebook}.yaml").read_text())
    outs = [next(iter(out)) if isinstance(out, dict) else out for out in stage["outs"]]
    assert all(out == params["out_dir"] or out.startswith(params["out_dir"] + "/") for out in outs)
    read = {value for key, value in params.items() if key.endswith("_dir") and key not in ("out_dir", "work_dir")}
    assert read <= set(stage["deps"])


@pytest.mark.parametrize(("profile", "name", "stage"), STAGES, ids=STAGE_IDS)
def test_stage_depends_on_the_tables_and_the_models_it_is_given(profile, name, stage):
    notebook = re.search(r"papermill notebooks/(\w+)\.ipynb", stage["cmd"]).group(1)
    cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    params = {}
    exec(next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])), params)
    params |= yaml.safe_load((ROOT / "params" / profile / f"{notebook}.yaml").read_text())
    # A folder made by a stage is a dependency as it is; of the one that ships, every file that is read.
    for key, file in re.findall(r'need\(f"\{(\w+)\}/([\w.]+)"', notebook_code(notebook)):
        if params[key]:
            assert {params[key], f"{params[key]}/{file}"} & set(stage["deps"]), f"{params[key]}/{file}"
    given = [one for value in params.values() for one in (value if isinstance(value, list) else [value])]
    for model in {one for one in given if one in ("fashion-vit", "easy-vqa-llava", "scenes-llava")}:
        files = {f"lib/tokmerge/assets/{model.replace('-', '_')}.{ending}" for ending in ("safetensors", "json")}
        assert files <= set(stage["deps"]), model


def test_make_help_names_every_command():
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE).group(1).split())
    assert set(re.findall(r'@echo "make ([\w-]+) ', makefile)) == commands - {"help"}


def test_both_pipelines_have_the_same_stages():
    names = {
        profile: [name for p, name, stage in STAGES if p == profile and not stage.get("frozen")]
        for profile in PIPELINES
    }
    assert names["embedded"] == names["paper"]


def test_conda_environment_installs_the_same_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = next(dep for dep in environment["dependencies"] if str(dep).startswith("python="))
    assert Requirement("python" + project["requires-python"]).specifier.contains(python.split("=")[1])
    pip = next(dep["pip"] for dep in environment["dependencies"] if isinstance(dep, dict))
    assert pip == ["-c constraints.txt", "-e .[dev]"], "the project and its extras, nothing listed twice"
    assert "dev" in project["optional-dependencies"]


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_dependency_is_pinned_within_its_range(machine):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    here = {"platform_machine": machine}
    pinned = {pin.name.lower(): pin for pin in pins() if pin.marker is None or pin.marker.evaluate(here)}
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate(here):
            continue
        pin = pinned[requirement.name.lower()]
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert requirement.specifier.contains(specifier.version, prereleases=True), f"{pin} is outside {requirement}"


def test_every_pin_installs_on_the_oldest_python():
    # 3.11.2 is what Debian 12 ships; some distributions ask for a later patch release.
    for pin in pins():
        try:
            wanted = metadata(pin.name).get("Requires-Python")
        except PackageNotFoundError:
            continue  # of another machine
        assert wanted is None or SpecifierSet(wanted).contains("3.11.2"), f"{pin} needs Python {wanted}"


def test_torch_and_torchvision_are_the_tried_pair():
    on = {"platform_machine": "x86_64"}
    versions = {pin.name: str(pin.specifier) for pin in pins() if pin.marker is None or pin.marker.evaluate(on)}
    assert (versions["torch"], versions["torchvision"]) == ("==2.14.1", "==0.29.1")


def test_tests_mirror_the_library():
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert MODULES - {"__init__"} <= tests
    assert tests - MODULES == {"params", "pipeline", "contributing"}


def test_modules_stay_small():
    sizes = {path.name: len(path.read_text().splitlines()) for path in LIB.glob("*.py")}
    assert max(sizes.values()) <= 320, sizes


def test_public_api():
    import tokmerge

    for name in tokmerge.__all__:
        assert getattr(tokmerge, name).__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'merge_everything'"):
        _ = tokmerge.merge_everything


def test_drawing_figures_does_not_load_the_engine():
    code = "import sys, tokmerge.plots; sys.exit('tokmerge.vit' in sys.modules)"
    import sys

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
