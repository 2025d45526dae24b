"""`python -m tokmerge.preflight [paper]`: is all there that a profile needs? Lists what is missing in one go.

What a profile needs is read from its params files: data sets, models, local files. GPU memory and disk are estimates.
Both profiles also look for what a killed run left behind: dvc's locks end with it, but a notebook that was under way
goes on by itself, and a second one beside it would write to the same folders.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tokmerge import paths

# Gigabytes that a data set or model takes on disk; anything else counts as OTHER.
SIZES = {"ILSVRC/imagenet-1k": 7.0, "lmms-lab/VQAv2": 7.0, "llava-hf/llava-1.5-7b-hf": 14.2}
OTHER = 0.5
RESULTS = {"embedded": 2.0, "paper": 10.0}
# Gigabytes of GPU memory: for a vision transformer of a batch of 64, and for a 7B language model in half precision.
VISION_MEMORY, LANGUAGE_MEMORY = 8.0, 22.0
# Data sets that have to be on this machine, where data_path says.
LOCAL_DATA = ("imagefolder", "vqav2")
# Parameters that name a model.
MODEL_KEY = re.compile(r"^(model|models|llava|judge)$|_(name|names|model|models)$|_llava$")
HUB_DATA = {"imagenet-1k": "ILSVRC/imagenet-1k", "vqav2-hub": "lmms-lab/VQAv2"}


@dataclass
class Needs:
    """What a profile needs, each with the params file that says so.

    Attributes:
        data: data sets on the hub.
        models: models on the hub.
        local: files and folders on this machine.
        unknown: model names that neither timm nor the hub can know.
    """

    data: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    local: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def gigabytes(self) -> float:
        """Disk for all data sets and models."""
        return sum(SIZES.get(name, OTHER) for name in (*self.data, *self.models))

    @property
    def gpu_gigabytes(self) -> float:
        """GPU memory for the largest model."""
        return LANGUAGE_MEMORY if any("llava" in name.lower() for name in self.models) else VISION_MEMORY


def needs(root: Path, profile: str) -> Needs:
    """What the stages of a profile need, from their params files; frozen stages do not run and need nothing."""
    found = Needs()
    for stage in yaml.safe_load((root / "params" / profile / "dvc.yaml").read_text())["stages"].values():
        if not stage.get("frozen"):
            for file in re.findall(r"-f (\S+\.yaml)", stage["cmd"]):
                _read(yaml.safe_load((root / file).read_text()) or {}, file, found)
    return found


def _read(params: dict[str, Any], file: str, found: Needs) -> None:
    given = [
        (key, one)
        for key, value in params.items()
        for one in (value if isinstance(value, list) else [value])
        if isinstance(one, str)
    ]
    for key, value in given:
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

    if timm.is_model(name):
        config = timm.get_pretrained_cfg(name)
        if config is not None and config.hf_hub_id:
            found.models[config.hf_hub_id] = file
        else:
            found.unknown[name] = file
    elif "/" in name:
        found.models[name] = file
    else:
        found.unknown[name] = file


def missing(root: Path, profile: str) -> Iterator[str]:
    """A line for everything that is not as it must be; none if a run can start.

    Args:
        root: the repository.
        profile: "embedded" or "paper".
    """
    yield from leftovers(root)
    wanted = Needs() if profile == "embedded" else needs(root, profile)
    yield from _disk(root, RESULTS[profile] + wanted.gigabytes)
    if profile == "embedded":
        return
    yield from _gpu(wanted.gpu_gigabytes)
    for path, where in wanted.local.items():
        if not paths.resolve(path).exists():
            yield f"local: {path} ({where}) does not exist"
    yield from _studies(root, profile)
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


def _studies(root: Path, profile: str) -> Iterator[str]:
    """Tables of frozen stages that stages which run will ask for: better now than hours later."""
    pipeline = f"params/{profile}/dvc.yaml"
    stages = yaml.safe_load((root / pipeline).read_text())["stages"]
    maker = {(next(iter(out)) if isinstance(out, dict) else out): name
             for name, stage in stages.items() for out in stage.get("outs", [])}  # fmt: skip
    for name, stage in stages.items():
        for dep in [] if stage.get("frozen") else stage.get("deps", []):
            study = maker.get(dep)
            if study and stages[study].get("frozen") and not (root / dep).exists():
                first = [f"{pipeline}:{maker[one]}" for one in stages[study]["deps"] if one in maker]
                command = f".venv/bin/dvc repro {' '.join(first)} && " if first else ""
                command += f"make studies PROFILE={profile} STUDY={study}"
                yield f"study: {dep}, which stage {name} reads, is made by hand: `{command}`"


def _disk(root: Path, gigabytes: float) -> Iterator[str]:
    free = shutil.disk_usage(root).free / 1e9
    if free < gigabytes:
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

    if (wanted.data or wanted.models) and huggingface_hub.get_token() is None:
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
    parser.add_argument("profile", nargs="?", default="embedded", choices=("embedded", "paper"))
    profile = parser.parse_args().profile
    found = list(missing(paths.root(), profile))
    if found:
        lines = [f"The {profile} profile cannot start:", *(f"  - {line}" for line in found)]
        sys.exit("\n".join(lines) + ("\ndocs/paper_profile.md says how to get each." if profile == "paper" else ""))


if __name__ == "__main__":
    main()
