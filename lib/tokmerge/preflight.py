"""`python -m tokmerge.preflight [PROFILE [STAGE]]`: is all there that a run needs? Lists what is missing in one go.

What a profile needs is read from dvc.yaml and its params files: data sets, models, local files. GPU memory and disk are
estimates. It also looks for what a killed run left behind: dvc's locks end with it, but a notebook that was under way
goes on by itself, and a second one beside it would write to the same folders.
"""

import argparse
import json
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tokmerge.io import paths

# Gigabytes that a data set or model takes on disk; anything else counts as OTHER.
STAGE_GIGABYTES = {
    "ILSVRC/imagenet-1k": 7.0, "lmms-lab/VQAv2": 7.0, "llava-hf/llava-1.5-7b-hf": 14.2,
    "llava-hf/llava-interleave-qwen-0.5b-hf": 1.8,
}  # fmt: skip
OTHER = 0.5
# And its results: of profiles that need no GPU, most of which need no hub either, and of any other.
RESULTS, LARGE_RESULTS = {"smoke": 0.5, "embedded": 2.0, "photos": 2.0, "laptop": 1.0}, 10.0
OFFLINE = ("smoke", "embedded", "photos")
# Gigabytes of GPU memory: for a vision transformer of a batch of 64, and for a 7B language model in half precision.
VISION_MEMORY, LANGUAGE_MEMORY = 8.0, 22.0
# Data sets that have to be on this machine, where data_path says.
LOCAL_DATA = ("imagefolder", "vqav2")
# Parameters that name a model.
MODEL_KEY = re.compile(r"^(model|models|llava|judge)$|_(name|names|model|models)$|_llava$")
# Of them those whose terms have to be accepted first.
GATED = ("ILSVRC/imagenet-1k",)
HUB_DATA = {"imagenet-1k": "ILSVRC/imagenet-1k", "imagenette": "frgfm/imagenette", "vqav2-hub": "lmms-lab/VQAv2"}


@dataclass
class Needs:
    """What a profile needs, each with the params file that says so."""

    data: dict[str, str] = field(default_factory=dict)  #: data sets on the hub
    models: dict[str, str] = field(default_factory=dict)  #: models on the hub
    local: dict[str, str] = field(default_factory=dict)  #: files and folders on this machine
    unknown: dict[str, str] = field(default_factory=dict)  #: model names that neither timm nor the hub can know


def stages(root: Path, profile: str) -> dict[str, dict[str, Any]]:
    """The stages of a profile as dvc.yaml declares them, by their names without ``@profile``.

    Raises:
        ValueError: there is no such profile; the message lists those there are.
    """
    tables = yaml.safe_load((root / "params" / "profiles.yaml").read_text())
    known = list(dict.fromkeys(name for items in tables.values() for name in items))
    if profile not in known:
        raise ValueError(f"no profile {profile!r} in params/profiles.yaml: use {', '.join(known)}")
    found = {}
    for name, group in yaml.safe_load((root / "dvc.yaml").read_text())["stages"].items():
        items = tables[group["foreach"].strip("${}")]
        if profile in items:
            text = json.dumps(group["do"]).replace("${key}", profile)
            for key, value in items[profile].items():
                text = text.replace(f"${{item.{key}}}", value)
            found[name] = json.loads(text)
    return found


def params_files(stage: dict[str, Any]) -> list[str]:
    """The params files of a stage's notebooks, below the repository."""
    deps = stage["deps"]
    return [dep for dep in deps if dep.startswith("params/") and f"notebooks/{Path(dep).stem}.ipynb" in deps]


def outputs(stage: dict[str, Any]) -> list[str]:
    """What a stage writes, below the repository."""
    return [next(iter(out)) if isinstance(out, dict) else out for out in stage["outs"]]


def needs(root: Path, running: Iterable[dict[str, Any]]) -> Needs:
    """What stages need, from their params files."""
    found = Needs()
    for file in [file for stage in running for file in params_files(stage)]:
        if (root / file).exists():
            _read(yaml.safe_load((root / file).read_text()) or {}, file, found)
    return found


def _read(params: dict[str, Any], file: str, found: Needs) -> None:
    given = [(key, one) for key, some in params.items() for one in (some if isinstance(some, list) else [some])]
    for key, value in given:
        if not isinstance(value, str):
            continue
        if key.endswith(("_path", "_file", "_folder")) or key == "checkpoint":
            found.local[value] = f"{key} in {file}"
        elif value in HUB_DATA and not params.get("data_path"):
            found.data[HUB_DATA[value]] = file
        elif value in LOCAL_DATA and not params.get("data_path"):
            found.local[f"data_path of {value}"] = file
        elif MODEL_KEY.search(key):
            if Path(value).is_absolute() or value.startswith("."):
                found.local[value] = f"{key} in {file}"
            elif not params.get("checkpoint"):
                _model(value, file, found)


def _model(name: str, file: str, found: Needs) -> None:
    import timm

    hub = name if "/" in name else None
    if timm.is_model(name):
        hub = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    if hub:
        found.models[hub] = file
    else:
        found.unknown[name] = file


def missing(root: Path, profile: str, stage: str | None = None) -> Iterator[str]:
    """A line for everything that is not as it must be; none if a run can start.

    Args:
        root: the repository.
        profile: of params/profiles.yaml.
        stage: the only one that is to run, frozen or not; all that are not frozen if none is named.

    Raises:
        ValueError: no such profile or stage.
    """
    declared = stages(root, profile)
    if stage is not None and stage not in declared:
        raise ValueError(f"no stage {stage!r} in the {profile} profile: use {', '.join(declared)}")
    yield from leftovers(root)
    yield from _repository(root)
    files = [Path(file) for one in declared.values() for file in params_files(one)]
    if absent := [file.name for file in files if not (root / file).exists()]:
        yield f"params: params/{profile} lacks {', '.join(absent)}: a comment is enough where nothing differs"
    running = [stage] if stage else [name for name, one in declared.items() if not one.get("frozen")]
    yield from _inputs(root, profile, declared, running)
    wanted = Needs() if profile in OFFLINE else needs(root, [declared[name] for name in running])
    fetched = sum(STAGE_GIGABYTES.get(name, OTHER) for name in (*wanted.data, *wanted.models))
    yield from _disk(root, RESULTS.get(profile, LARGE_RESULTS) + fetched)
    if profile in OFFLINE:
        return
    if profile not in RESULTS:
        language = any("llava" in name.lower() for name in wanted.models)
        yield from _gpu(LANGUAGE_MEMORY if language else VISION_MEMORY)
    for path, where in wanted.local.items():
        if not (root / path).exists():
            yield f"local: {path} ({where}) does not exist"
    for name, file in wanted.unknown.items():
        yield f"model: {name!r} in {file} is neither a timm model with weights nor a hub name"
    yield from _hub(wanted)


def leftovers(root: Path) -> Iterator[str]:
    """Notebooks of this repository that are still running."""
    for process in psutil.process_iter(["cmdline"]):
        try:
            command = process.info["cmdline"] or []
            runs = any(Path(part).name == "papermill" for part in command[:3])
            # It starts in the repository and goes on in the notebooks' folder.
            ours = runs and Path(process.cwd()) in (root.resolve(), root.resolve() / "notebooks")
        except (psutil.Error, OSError):
            continue
        if ours:
            notebook = next((part for part in command if part.endswith(".ipynb")), "a notebook")
            yield (
                f"running: process {process.pid} still runs {notebook}, perhaps of a run that was killed: "
                f"wait for its end, or `kill {process.pid}` (what it had done is kept)"
            )


def _repository(root: Path) -> Iterator[str]:
    """dvc starts in a git repository only, unless it is told otherwise."""
    config = "".join(file.read_text() for file in (root / ".dvc").glob("config*"))
    if "no_scm" not in config and not any((folder / ".git").exists() for folder in (root, *root.parents)):
        yield (
            f"git: {root} is no clone but an unpacked archive: `.venv/bin/dvc config --local core.no_scm true` "
            "lets dvc run without git"
        )


def _inputs(root: Path, profile: str, declared: dict[str, dict[str, Any]], running: Sequence[str]) -> Iterator[str]:
    """Tables that nothing in this run makes, of frozen stages or of any other: better now than hours later."""
    maker = {out: name for name, stage in declared.items() for out in outputs(stage)}
    readers = defaultdict(list)
    for name in running:
        for dep in declared[name]["deps"]:
            if dep in maker and maker[dep] not in running and not (root / dep).exists():
                readers[dep].append(name)
    for dep, names in readers.items():
        by = declared[maker[dep]]
        first = " ".join(f"{maker[one]}@{profile}" for one in by["deps"] if one in maker)
        if not by.get("frozen"):
            command = f".venv/bin/dvc repro {maker[dep]}@{profile}"
        elif dep.startswith("lib/"):
            command = f"git checkout -- {dep}"
        else:
            before = f".venv/bin/dvc repro {first} && " if first else ""
            command = f"{before}make studies PROFILE={profile} STUDY={maker[dep]}"
        yield f"input: {dep}, for {', '.join(names)}, is not there yet: `{command}`"


def _disk(root: Path, gigabytes: float) -> Iterator[str]:
    if (free := shutil.disk_usage(root).free / 1e9) < gigabytes:
        yield f"disk: {free:.0f} GB free where {root} lies, about {gigabytes:.0f} GB are needed"


def _gpu(gigabytes: float) -> Iterator[str]:
    import torch

    if not torch.cuda.is_available():
        yield f"GPU: none that torch can use; one with {gigabytes:.0f} GB or more is needed"
        return
    memory = max(torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count())) / 1e9
    if memory < gigabytes:
        yield f"GPU: the largest has {memory:.0f} GB, {gigabytes:.0f} GB are needed"


def _hub(wanted: Needs) -> Iterator[str]:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if set(GATED) & set(wanted.data) and huggingface_hub.get_token() is None:
        yield "token: no Hugging Face token: `.venv/bin/hf auth login`, or set HF_TOKEN"
    api = huggingface_hub.HfApi()
    for kind, names in (("dataset", wanted.data), ("model", wanted.models)):
        for name, file in names.items():
            page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
            try:
                api.auth_check(name, repo_type=kind)
            except GatedRepoError:
                yield f"{kind}: {name} ({file}) is not open to this token: accept its terms at {page}"
            except RepositoryNotFoundError:
                yield f"{kind}: {name} ({file}) was not found, or this token may not see it: {page}"
            except Exception as error:
                yield f"{kind}: {name} ({file}) cannot be reached: {type(error).__name__} (network, proxy?)"


def main() -> None:
    """Print what is missing; exit with 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m tokmerge.preflight", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profile", nargs="?", default="embedded")
    parser.add_argument("stage", nargs="?", help="the only one that is to run")
    given = parser.parse_args()
    try:
        found = list(missing(paths.root(), given.profile, given.stage))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"preflight: {error}")
    if found:
        page = "laptop" if given.profile == "laptop" else "paper"
        recipe = [] if given.profile in OFFLINE else [f"docs/{page}_profile.md says how to get each."]
        sys.exit("\n".join([f"The {given.profile} profile cannot start:", *(f"  - {line}" for line in found), *recipe]))


if __name__ == "__main__":
    main()
