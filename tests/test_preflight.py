import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from tokmerge import preflight
from tokmerge.io import paths

PROFILES = """
profiles: {embedded: &embedded {studies: lib}, paper: &paper {studies: results/paper}}
by_hand: {embedded: *embedded, paper: *paper}
"""
PIPELINE = """
stages:
  inputs:
    foreach: ${profiles}
    do: {cmd: run, deps: [notebooks/10_inputs.ipynb, 'params/${key}/10_inputs.yaml'], outs: ['results/${key}/inputs']}
  study:
    foreach: ${by_hand}
    do: &study
      cmd: run
      deps: [notebooks/45_study.ipynb, 'params/${key}/45_study.yaml', 'results/${key}/inputs']
      outs: ['${item.studies}/study': {cache: false, persist: true}]
      frozen: true
  vqa:
    foreach: ${profiles}
    do:
      cmd: run
      deps: [notebooks/50_vqa.ipynb, 'params/${key}/50_vqa.yaml', '${item.studies}/study']
      outs: ['results/${key}/vqa']
"""
REFUSED = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.fixture
def root(tmp_path):
    """A repository with an embedded and a paper profile; the second has a frozen stage, whose tables are not there."""
    files = {
        "10_inputs": {"dataset": "imagenet-1k", "model_name": "deit_small_patch16_224", "data_path": None, "seed": 0},
        "45_study": {"model_name": "no_such_model"},
        "50_vqa": {"llava": "llava-hf/llava-1.5-7b-hf", "datasets": ["vqav2-hub"], "out_dir": "results/paper/vqa"},
    }
    for profile in ("embedded", "paper"):
        (tmp_path / "params" / profile).mkdir(parents=True)
        for name, params in files.items():
            (tmp_path / "params" / profile / f"{name}.yaml").write_text(yaml.safe_dump(params))
    for folder in (".git", "lib", "notebooks"):
        (tmp_path / folder).mkdir()
    for name, content in (("params/profiles.yaml", PROFILES), ("dvc.yaml", PIPELINE), ("lib/study", "shipped")):
        (tmp_path / name).write_text(content)
    return tmp_path


def change(root, name, **values):
    file = root / "params" / "paper" / f"{name}.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | values))


@pytest.fixture
def machine(monkeypatch):
    """A machine where nothing is missing; a test takes something away."""
    here = SimpleNamespace(gpus=[80e9], free=500e9, token="hf_x", refuse={}, asked=[])

    def auth_check(self, name, repo_type=None):
        here.asked.append((repo_type, name))
        if name in here.refuse:
            raise here.refuse[name]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(here.gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(here.gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: SimpleNamespace(total_memory=here.gpus[n]))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=here.free))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: here.token)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", auth_check)
    return here


def missing(root, profile="paper", stage=None, study=True):
    """What is missing, with the frozen stage's tables made unless a test is about them."""
    if study:
        (root / "results" / "paper" / "study").mkdir(parents=True, exist_ok=True)
    return list(preflight.missing(root, profile, stage))


def test_stages_are_those_of_the_profile_with_its_values(root):
    assert preflight.stages(root, "embedded")["study"] == {
        "cmd": "run", "frozen": True, "outs": [{"lib/study": {"cache": False, "persist": True}}],
        "deps": ["notebooks/45_study.ipynb", "params/embedded/45_study.yaml", "results/embedded/inputs"],
    }  # fmt: skip
    assert preflight.outputs(preflight.stages(root, "paper")["vqa"]) == ["results/paper/vqa"]


def test_nothing_missing_and_everything_asked_for(root, machine):
    assert missing(root, "embedded") == []
    assert machine.asked == []
    assert missing(root) == []
    assert set(machine.asked) == {
        ("dataset", "ILSVRC/imagenet-1k"),
        ("dataset", "lmms-lab/VQAv2"),
        ("model", "timm/deit_small_patch16_224.fb_in1k"),
        ("model", "llava-hf/llava-1.5-7b-hf"),
    }


def test_all_that_is_missing_comes_in_one_go(root, machine):
    machine.gpus, machine.free, machine.token = [], 3e9, None
    machine.refuse = {
        "ILSVRC/imagenet-1k": GatedRepoError("no", response=REFUSED),
        "llava-hf/llava-1.5-7b-hf": RepositoryNotFoundError("no", response=REFUSED),
        "lmms-lab/VQAv2": httpx.ConnectError("no"),
    }
    change(root, "10_inputs", mask_path="nowhere/mask.png", judge_name="resnet_of_nobody")
    found = missing(root)
    expected = [
        "disk: 3 GB free",
        "GPU: none that torch can use; one with 22 GB or more is needed",
        "local: nowhere/mask.png (mask_path in params/paper/10_inputs.yaml) does not exist",
        "model: 'resnet_of_nobody' in params/paper/10_inputs.yaml is neither",
        "token: no Hugging Face token",
        "dataset: ILSVRC/imagenet-1k (params/paper/10_inputs.yaml) is not open to this token: accept its terms at "
        "https://huggingface.co/datasets/ILSVRC/imagenet-1k",
        "dataset: lmms-lab/VQAv2 (params/paper/50_vqa.yaml) cannot be reached: ConnectError",
        "model: llava-hf/llava-1.5-7b-hf (params/paper/50_vqa.yaml) was not found",
    ]
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected


def test_the_largest_gpu_counts_and_a_language_model_needs_more(root, machine):
    machine.gpus = [6e9, 12e9]
    assert missing(root) == ["GPU: the largest has 12 GB, 22 GB are needed"]
    change(root, "50_vqa", llava=None)
    assert missing(root) == []


def test_local_copies_need_no_access(root, machine, tmp_path):
    images, model, weights = tmp_path / "val", tmp_path / "llava", tmp_path / "weights.safetensors"
    images.mkdir()
    model.mkdir()
    weights.write_text("")
    change(root, "10_inputs", dataset="imagefolder", data_path=str(images), checkpoint=str(weights))
    change(root, "50_vqa", llava=str(model), datasets=["vqav2"], data_path=str(images))
    machine.token = None
    assert missing(root) == []
    assert machine.asked == []
    model.rmdir()
    assert missing(root) == [f"local: {model} (llava in params/paper/50_vqa.yaml) does not exist"]
    change(root, "50_vqa", data_path=None, llava=None)
    assert missing(root) == ["local: data_path of vqav2 (params/paper/50_vqa.yaml) does not exist"]


def test_a_frozen_stage_that_others_wait_for_is_asked_for(root, machine):
    (line,) = missing(root, study=False)
    assert line == (
        "input: results/paper/study, for vqa, is not there yet: "
        "`.venv/bin/dvc repro inputs@paper && make studies PROFILE=paper STUDY=study`"
    )
    (root / "lib" / "study").unlink()
    assert missing(root, "embedded") == ["input: lib/study, for vqa, is not there yet: `git checkout -- lib/study`"]


def test_a_stage_by_itself_needs_its_inputs(root, machine):
    assert missing(root, "embedded", "study") == [
        "input: results/embedded/inputs, for study, is not there yet: `.venv/bin/dvc repro inputs@embedded`"
    ]
    (root / "results" / "embedded" / "inputs").mkdir(parents=True)
    assert missing(root, "embedded", "study") == []
    with pytest.raises(ValueError, match=r"^no stage 'stduy' in the embedded profile: use inputs, study, vqa$"):
        missing(root, "embedded", "stduy")


def test_an_unknown_profile_and_a_folder_that_lacks_a_file_are_named(root, machine):
    with pytest.raises(ValueError, match=r"^no profile 'papre' in params/profiles.yaml: use embedded, paper$"):
        missing(root, "papre")
    (root / "params" / "embedded" / "50_vqa.yaml").unlink()
    assert missing(root, "embedded") == [
        "params: params/embedded lacks 50_vqa.yaml: a comment is enough where nothing differs"
    ]


def test_an_archive_without_git_is_told_how_dvc_runs_without(root, machine):
    (root / ".git").rmdir()
    (line,) = missing(root, "embedded")
    assert line.startswith(f"git: {root} is no clone but an unpacked archive: `.venv/bin/dvc config --local core.no")
    (root / ".dvc").mkdir()
    (root / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
    assert missing(root, "embedded") == []


def test_disk_counts_what_will_be_fetched(root, machine):
    machine.free = (10 + 7 + 7 + 14.2 + 0.5 - 1) * 1e9
    assert missing(root) == [f"disk: 38 GB free where {root} lies, about 39 GB are needed"]
    machine.free = 1e9
    assert missing(root, "embedded") == [f"disk: 1 GB free where {root} lies, about 2 GB are needed"]


def test_the_paper_profile_of_this_repository_names_what_it_loads(machine):
    wanted = preflight.needs(paths.root(), preflight.stages(paths.root(), "paper").values())
    assert "ILSVRC/imagenet-1k" in wanted.data
    assert "timm/deit_small_patch16_224.fb_in1k" in wanted.models
    assert wanted.unknown == wanted.local == {}


def not_running(*what):
    """What this repository lacks, but for notebooks that run beside the tests."""
    return [line for line in preflight.missing(paths.root(), *what) if not line.startswith("running")]


def test_the_laptop_profile_needs_a_network_but_neither_gpu_nor_account(machine):
    machine.gpus, machine.token = [], None
    assert not_running("laptop") == []
    assert machine.asked == [
        ("dataset", "frgfm/imagenette"),
        ("dataset", "lmms-lab/VQAv2"),
        ("model", "timm/deit_small_patch16_224.fb_in1k"),
        ("model", "llava-hf/llava-interleave-qwen-0.5b-hf"),
        ("model", "timm/resnet18.a1_in1k"),
    ]
    machine.free = 1e9
    machine.refuse = {"frgfm/imagenette": httpx.ConnectError("no")}
    disk, data = not_running("laptop")
    assert disk.startswith("disk:")
    said = "dataset: frgfm/imagenette (params/laptop/10_inputs.yaml) cannot be reached: ConnectError (network, proxy?)"
    assert data.startswith(said)


def test_photographs_need_no_hub(machine):
    machine.gpus, machine.token = [], None
    assert not_running("photos", "inputs") == []
    assert machine.asked == []


@pytest.mark.parametrize("folder", ["notebooks", "."])
def test_a_notebook_that_outlived_its_run_is_named(root, folder):
    script = root / "papermill"
    script.write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, str(script), "notebooks/30_search.ipynb", "executed/30_search.ipynb"]
    assert list(preflight.leftovers(root)) == []
    with subprocess.Popen(command, cwd=root / folder, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"up\n"
            (line,) = preflight.leftovers(root)
        finally:
            process.kill()
    assert line.startswith(f"running: process {process.pid} still runs notebooks/30_search.ipynb")
    assert f"kill {process.pid}" in line
    assert list(preflight.leftovers(root)) == []


def test_a_killed_run_leaves_no_lock_that_stops_the_next(tmp_path):
    dvc = [sys.executable, "-m", "dvc"]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    subprocess.run([*dvc, "init", "--no-scm", "-q"], cwd=tmp_path, check=True, env=environment)
    command = "echo $$ > pid; test -e again || exec sleep 60; echo done > out"
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"slow": {"cmd": command, "outs": ["out"]}}}))
    run = subprocess.Popen([*dvc, "repro", "-q"], cwd=tmp_path, env=environment)
    pid = tmp_path / "pid"
    deadline = time.monotonic() + 60
    while not (pid.is_file() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.kill()
    run.wait()
    os.kill(int(pid.read_text()), signal.SIGKILL)
    (tmp_path / "again").touch()
    subprocess.run([*dvc, "repro", "-q"], cwd=tmp_path, check=True, env=environment, timeout=60)
    assert (tmp_path / "out").read_text() == "done\n"


@pytest.mark.parametrize("folder", [".", "params/paper"])
def test_command_exits_with_all_lines_wherever_it_is_started(root, machine, monkeypatch, capsys, folder):
    machine.gpus, machine.token = [], None
    monkeypatch.chdir(root / folder)
    monkeypatch.setattr(sys, "argv", ["preflight", "paper"])
    with pytest.raises(SystemExit) as stopped:
        preflight.main()
    assert [line.split(":")[0] for line in stopped.value.code.splitlines()] == [
        "The paper profile cannot start", "  - input", "  - GPU", "  - token",
        "docs/paper_profile.md says how to get each.",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["preflight", "papre"])
    with pytest.raises(SystemExit, match=r"^preflight: no profile 'papre'"):
        preflight.main()
