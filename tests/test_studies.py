import os
import subprocess
import sys

import pytest
import yaml
from tokmerge import studies

ENVIRONMENT = {**os.environ, "DVC_NO_ANALYTICS": "1"}
STAGES = {
    "plain": {"cmd": "echo plain > plain", "outs": ["plain"]},
    "first": {"cmd": "cat seed > first && echo x >> ran", "deps": ["seed"], "outs": ["first"], "frozen": True},
    "second": {"cmd": "false && echo no > second", "outs": ["second"], "frozen": True},
}


@pytest.fixture(params=["embedded", "paper"])
def repository(request, tmp_path):
    """A DVC repository whose pipeline has two frozen stages, the second of which fails; (folder, profile, lock)."""
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True, env=ENVIRONMENT)
    folder = tmp_path if request.param == "embedded" else tmp_path / "params" / "paper"
    folder.mkdir(parents=True, exist_ok=True)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    where = {} if folder == tmp_path else {"wdir": "../.."}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {name: where | part for name, part in STAGES.items()}}))
    (tmp_path / "seed").write_text("1\n")
    return tmp_path, request.param, folder / "dvc.lock"


def test_a_frozen_stage_really_runs_and_is_recorded(repository):
    root, profile, lock = repository
    studies.run(root, profile, ["first"])
    assert (root / "first").read_text() == "1\n"
    before = yaml.safe_load(lock.read_text())["stages"]
    assert list(before) == ["first"], "nothing but the stage that was named"
    (root / "seed").write_text("2\n")
    studies.run(root, profile, ["first"])
    assert (root / "first").read_text() == "2\n"
    assert (root / "ran").read_text() == "x\nx\n"
    after = yaml.safe_load(lock.read_text())["stages"]
    for part in ("deps", "outs"):
        assert before["first"][part][0]["md5"] != after["first"][part][0]["md5"]
    assert not (root / "plain").exists()


def test_without_names_all_run_and_the_first_failure_ends_it(repository):
    root, profile, lock = repository
    with pytest.raises(subprocess.CalledProcessError, match="false"):
        studies.run(root, profile)
    assert list(yaml.safe_load(lock.read_text())["stages"]) == ["first"]


def test_an_unknown_name_is_one_line_that_names_the_frozen_stages(repository):
    root, profile, _ = repository
    command = [sys.executable, "-m", "tokmerge.studies", profile, "first", "plain"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("studies: no frozen stage plain in ")
    assert line.endswith(": use first, second")
    assert not (root / "first").exists(), "nothing has run"
