import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from tokmerge import paths, preflight

REFUSED = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.fixture
def root(tmp_path):
    """A repository whose paper profile has two stages that run and a frozen one."""
    folder = tmp_path / "params" / "paper"
    folder.mkdir(parents=True)
    files = {
        "10_inputs": {"dataset": "imagenet-1k", "model_name": "deit_small_patch16_224", "data_path": None, "seed": 0},
        "50_vqa": {"llava": "llava-hf/llava-1.5-7b-hf", "datasets": ["vqav2-hub"], "out_dir": "results/paper/vqa"},
        "99_frozen": {"model_name": "no_such_model"},
    }
    for name, params in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(params))
    stages = {
        name: {"cmd": f"papermill notebooks/{name}.ipynb -f params/paper/{name}.yaml", "frozen": name == "99_frozen"}
        for name in files
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
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


def test_nothing_missing_and_everything_asked_for(root, machine):
    assert list(preflight.missing(root, "paper")) == []
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
    found = list(preflight.missing(root, "paper"))
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
    for line in expected:
        assert sum(one.startswith(line) for one in found) == 1, (line, found)
    assert len(found) == len(expected)


def test_the_largest_gpu_counts_and_a_language_model_needs_more(root, machine):
    machine.gpus = [6e9, 12e9]
    assert list(preflight.missing(root, "paper")) == ["GPU: the largest has 12 GB, 22 GB are needed"]
    change(root, "50_vqa", llava=None)
    assert list(preflight.missing(root, "paper")) == []


def test_local_copies_need_no_access(root, machine, tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "weights.safetensors").write_text("")
    (tmp_path / "llava").mkdir()
    change(
        root,
        "10_inputs",
        dataset="imagefolder",
        data_path=str(tmp_path / "val"),
        checkpoint=str(tmp_path / "weights.safetensors"),
    )
    change(root, "50_vqa", llava=str(tmp_path / "llava"), datasets=["vqav2"], data_path=str(tmp_path / "val"))
    machine.token = None
    assert list(preflight.missing(root, "paper")) == []
    assert machine.asked == []
    change(root, "50_vqa", data_path=None)
    assert list(preflight.missing(root, "paper")) == [
        "local: data_path of vqav2 (params/paper/50_vqa.yaml) does not exist"
    ]
    change(root, "50_vqa", data_path=str(tmp_path / "val"))
    (tmp_path / "llava").rmdir()
    assert [line.split(" does")[0] for line in preflight.missing(root, "paper")] == [
        f"local: {tmp_path / 'llava'} (llava in params/paper/50_vqa.yaml)"
    ]


def test_a_frozen_stage_that_others_wait_for_is_asked_for(root, machine):
    file = root / "params" / "paper" / "dvc.yaml"
    pipeline = yaml.safe_load(file.read_text())
    pipeline["stages"]["10_inputs"]["outs"] = ["results/paper/inputs"]
    pipeline["stages"]["99_frozen"] |= {"deps": ["results/paper/inputs"], "outs": ["results/paper/study"]}
    pipeline["stages"]["50_vqa"]["deps"] = ["results/paper/inputs", "results/paper/study"]
    file.write_text(yaml.safe_dump(pipeline))
    (line,) = preflight.missing(root, "paper")
    assert line == (
        "study: results/paper/study, which stage 50_vqa reads, is made by hand: "
        "`.venv/bin/dvc repro params/paper/dvc.yaml:10_inputs && make studies PROFILE=paper STUDY=99_frozen`"
    )
    (root / "results" / "paper" / "study").mkdir(parents=True)
    assert list(preflight.missing(root, "paper")) == []


def test_disk_counts_what_will_be_fetched(root, machine):
    machine.free = (10 + 7 + 7 + 14.2 + 0.5 - 1) * 1e9
    (line,) = preflight.missing(root, "paper")
    assert line.startswith("disk: 38 GB free")
    assert line.endswith("about 39 GB are needed")
    machine.free = 1e9
    assert len(list(preflight.missing(root, "embedded"))) == 1


def test_the_paper_profile_of_this_repository_names_what_it_loads(machine):
    wanted = preflight.needs(paths.root(), "paper")
    assert "ILSVRC/imagenet-1k" in wanted.data
    assert "timm/deit_small_patch16_224.fb_in1k" in wanted.models
    assert wanted.unknown == {}
    assert wanted.local == {}


@pytest.mark.parametrize("folder", ["notebooks", "."])
def test_a_notebook_that_outlived_its_run_is_named(root, folder):
    (root / "notebooks").mkdir()
    script = root / "papermill"
    script.write_text(
        textwrap.dedent("""
        import time
        print("up", flush=True)
        time.sleep(60)
    """)
    )
    command = [sys.executable, str(script), "notebooks/30_search.ipynb", "executed/30_search.ipynb"]
    assert list(preflight.leftovers(root)) == []
    process = subprocess.Popen(command, cwd=root / folder, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"up\n"
        (line,) = preflight.leftovers(root)
        assert line.startswith(f"running: process {process.pid} still runs notebooks/30_search.ipynb")
        assert f"kill {process.pid}" in line
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
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


def test_command_exits_with_all_lines(root, machine, monkeypatch, capsys):
    machine.gpus, machine.token = [], None
    monkeypatch.setattr(paths, "root", lambda: root)
    monkeypatch.setattr(sys, "argv", ["preflight", "paper"])
    with pytest.raises(SystemExit) as stopped:
        preflight.main()
    assert stopped.value.code.splitlines()[0] == "The paper profile cannot start:"
    assert len(stopped.value.code.splitlines()) == 4
