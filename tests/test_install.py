"""What is installed: pins, extras, and the library alone, without any extra."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions

import pytest
import yaml
from imports import LIB, ROOT, code_cells
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCK = (ROOT / "requirements.lock").read_text()
# Import names that come with a declared package.
BROUGHT = {"IPython": "ipywidgets", "botorch": "ax-platform", "huggingface_hub": "timm", "tokenizers": "transformers"}
# Run or read, or imported by a name that is put together.
COMMANDS_AND_DATA = {"dvc", "easy-vqa", "jupyterlab", "papermill", "pyarrow", "sionna-no-rt"}


def wanted(*extras):
    """Requirements of the library and of extras, those that extras take from each other included."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    for extra in extras:
        for requirement in map(Requirement, EXTRAS[extra]):
            found += wanted(*requirement.extras) if requirement.name == PROJECT["name"] else [requirement]
    return found


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_a_public_host_runs_what_everyone_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    (kept,) = (step["with"]["key"] for step in job["steps"] if "cache" in step.get("uses", ""))
    named = re.findall(r"hashFiles\('(.+?)'\)", kept)
    assert [name for name in named if (ROOT / name).is_file()] == ["requirements.lock"]


def test_one_version_is_released():
    assert PROJECT["version"] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]


@pytest.mark.parametrize("machine", [("x86_64", "linux"), ("aarch64", "linux"), ("arm64", "darwin")], ids="-".join)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_dependency_is_pinned_within_its_range(machine, python):
    here = {"platform_machine": machine[0], "sys_platform": machine[1], "python_version": python,
            "python_full_version": f"{python}.2"}  # fmt: skip
    fitting = [pin for pin in pins() if pin.marker is None or pin.marker.evaluate(here)]
    pinned = {canonicalize_name(pin.name): pin for pin in fitting}
    assert len(pinned) == len(fitting), "two pins of one package"
    for requirement in wanted("dev"):
        (specifier,) = pinned[canonicalize_name(requirement.name)].specifier
        assert specifier.operator == "=="
        assert requirement.specifier.contains(specifier.version, prereleases=True), f"{specifier} {requirement}"


def test_every_pin_installs_on_the_oldest_python():
    # 3.11.2 is what Debian 12 ships; some distributions ask for a later patch release.
    for pin in pins():
        try:
            needed = distribution(pin.name).metadata.get("Requires-Python")
        except PackageNotFoundError:
            continue  # of another machine
        assert needed is None or SpecifierSet(needed).contains("3.11.2"), f"{pin} needs Python {needed}"


def test_torch_and_torchvision_are_the_tried_pair():
    versions = {pin.name: str(pin.specifier) for pin in pins()}
    assert (versions["torch"], versions["torchvision"]) == ("==2.14.1", "==0.29.1")


def test_lock_holds_the_same_pins_with_hashes_and_no_address():
    entries = re.findall(r"^([a-z].*?) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", LOCK, re.MULTILINE)
    assert [text for text, _ in entries] == (ROOT / "constraints.txt").read_text().splitlines()[1:]
    assert len(entries) == len(re.findall(r"^[a-z]", LOCK, re.MULTILINE)), "a pin without a hash"
    assert "://" not in LOCK
    assert "--index" not in LOCK


def test_conda_environment_installs_the_same_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(dep for dep in environment["dependencies"] if str(dep).startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.split("=")[1])
    pip = next(dep["pip"] for dep in environment["dependencies"] if isinstance(dep, dict))
    assert pip == ["-c constraints.txt", "-e .[dev]"], "the project and its extras, nothing listed twice"


def test_what_is_imported_is_declared_and_what_is_declared_is_used():
    homes = {name: {canonicalize_name(one) for one in found} for name, found in packages_distributions().items()}
    declared = {canonicalize_name(requirement.name) for requirement in wanted("all", "ray")}
    code = [path.read_text() for path in LIB.rglob("*.py")]
    code += [cell for path in (ROOT / "notebooks").glob("*.ipynb") for cell in code_cells(path.stem)]
    named = re.findall(r"^\s*(?:from|import) (\w+)", "\n".join(code), re.MULTILINE)
    names = set(named) & set(homes) - {PROJECT["name"]}
    used = {canonicalize_name(BROUGHT[name]) for name in names & set(BROUGHT)}
    for name in names - set(BROUGHT):
        assert homes[name] & declared, f"{name} is in no extra"
        used |= homes[name]
    assert declared - used <= COMMANDS_AND_DATA


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """A Python that sees the wheel and what the library alone needs, from a folder that is not the repository."""
    folder = tmp_path_factory.mktemp("core")
    source = folder / "source"
    shutil.copytree(LIB, source / "lib" / PROJECT["name"], ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    venv.create(folder / "venv", symlinks=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", site, source], check=True)
    for name in with_needed({canonicalize_name(requirement.name) for requirement in wanted()}):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__", "bin"}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))

    def run(code):
        clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        command = [folder / "venv" / "bin" / "python", "-c", code]
        return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)

    return run


def with_needed(names):
    """Distributions and all that they need without any extra, directly or not."""
    asked = [requirement for name in names for requirement in map(Requirement, distribution(name).requires or ())]
    needed = {one.name for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})}
    more = names | {canonicalize_name(name) for name in needed}
    return names if more == names else with_needed(more)


def test_the_library_alone_runs_the_lines_of_the_readme(core):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import timm, torch, tokmerge\n.*?)```", text, re.DOTALL)
    code = code.replace("pretrained=True", "img_size=64").replace("merged(images)", "merged(torch.rand(1, 3, 64, 64))")
    code += "import sys\nprint('site-packages' in tokmerge.__file__, record.tokens.shape, len(record.payload_bytes))\n"
    code += "print(all(getattr(tokmerge, name) for name in tokmerge.__all__ if name != 'llava'))\n"
    code += "from tokmerge import wire\nprint({'pandas', 'transformers'} & set(sys.modules))"
    done = core(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True torch.Size([1, 13]) 1", "True", "set()"]


@pytest.mark.parametrize(
    ("module", "extra"),
    [("models.llava", "llava"), ("data", "data"), ("search.bayesian", "search"), ("channel.phy", "channel"),
     ("privacy.leakage", "privacy"), ("plots.style", "all")],
)  # fmt: skip
def test_a_missing_extra_is_named(core, module, extra):
    done = core(f"import tokmerge.{module}")
    *_, last = done.stderr.splitlines()
    assert re.fullmatch(rf"ModuleNotFoundError: \w+ is not installed: pip install 'tokmerge\[{extra}\]'", last), last
    assert "another exception" not in done.stderr


def test_the_wheel_brings_the_models_and_tables_that_ship(core):
    code = "from tokmerge.io import paths; print(sorted(one.name for one in paths.ASSETS.glob('*/*')))"
    assert core(code).stdout.strip() == str(sorted(path.name for path in (LIB / "assets").glob("*/*")))
