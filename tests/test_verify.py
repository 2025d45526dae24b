import json
import shutil
import subprocess
import sys

import pytest
from tokmerge import verify
from tokmerge.io import paths
from tokmerge.verify import compare


def beyond(key, before, after):
    (difference,) = compare({key: before}, {key: after})
    return difference.beyond


@pytest.mark.parametrize(
    ("key", "before", "near", "far"),
    [
        ("inputs.top1", 0.9194, 0.9244, 0.9245),
        ("merging.speed_macs_ratio.deit_small.b1", 0.53, 0.55, 0.5501),
        ("search.hypervolume", 0.91, 0.93, 0.94),
        ("images.fashion_mnist.spearman.margin", -0.3, -0.25, -0.36),
        ("images.fashion_mnist.sent.webp.drop", 0.004, 0.009, 0.0099),
        ("channel.gain_db.unmerged", 3.0, 3.5, 2.4),
        ("channel.late_gain_pp", -0.1, 0.4, 0.5),
        ("stage.something_new", 1.0, 1.02, 1.03),
    ],
)
def test_a_number_may_move_up_to_its_tolerance(key, before, near, far):
    assert not beyond(key, before, near)
    assert beyond(key, before, far)


def test_counts_and_names_must_be_equal():
    assert beyond("inputs.n_images", 10000, 9999)
    assert beyond("questions.scenes.n_test", 100, 101)
    # Studies ship as tables.
    assert beyond("images.fashion_mnist.select.tome.macs", 0.45, 0.450001)
    assert beyond("privacy.last.merged.ssim", 0.3, 0.300001)
    assert beyond("inputs.dataset", "Fashion-MNIST", "ImageNet-1k")


def test_clocks_are_reported_only():
    for key in ("search.minutes_64", "merging.speedup_over_macs_reduction.b1", "engine.off_overhead.deit_small.b32",
                "search.optimiser_share", "repro.minutes"):  # fmt: skip
        assert not beyond(key, 1.0, 9.0), key
    assert not beyond("repro.machine", "x86_64, 2 CPUs", "aarch64, 8 CPUs")


def test_lost_keys_fail_new_ones_do_not():
    lost, new = compare({"a.top1": 0.5, "b.top1": 0.5}, {"b.top1": 0.5, "c.top1": 0.5})
    assert (lost.key, lost.after, lost.beyond) == ("a.top1", None, True)
    assert (new.key, new.before, new.beyond) == ("c.top1", None, False)
    assert "gone, was 0.5" in str(lost)
    assert "new, 0.5" in str(new)


def test_every_committed_number_has_a_rule_of_its_own_or_is_a_threshold():
    numbers = json.loads((paths.root() / verify.NUMBERS).read_text())
    assert not [key for key in numbers if verify.rule_of(key).pattern == "*"]


def test_real_keys_meet_the_rule_that_is_meant():
    numbers = json.loads((paths.root() / verify.NUMBERS).read_text())
    meant = {
        "search.hv64_fraction.sobol": "of a table that ships",
        "images.fashion_mnist.select.threshold.bytes.drop": "of a table that ships",
        "images.fashion_mnist.adaptivity.drop_pp": "of a table that ships",
        "images.fashion_mnist.sent.class_token_ours.bytes": "bytes, at a precision that just stays within",
        "questions.scenes.unmerged": "of a table that ships",
        "privacy.last.merged.identified": "of a table that ships",
        "channel.gain_db": "decibels",
        "channel.gain_db.learned_adaptive.low": "of a table that ships",
        "channel.policy_gain_pp.ci95": "points of accuracy",
        "channel.unmerged.at_5db": "an accuracy of few images",
        "claims.channel.value": "decibels or points",
        "inputs.top1": "an accuracy, half a point",
    }
    assert set(meant) <= set(numbers)
    assert {key: verify.rule_of(key).why for key in meant} == meant
    # Hundreds are counts or bytes, and no ratio's tolerance fits them.
    large = [key for key, value in numbers.items() if not isinstance(value, str) and abs(value) > 100]
    assert not [key for key in large if 0 < verify.rule_of(key).tolerance < 1]
    used = {verify.rule_of(key).pattern for key in numbers}
    assert {rule.pattern for rule in verify.rules()} - used == {"*"}


@pytest.fixture
def clone(tmp_path):
    """A repository of one commit that holds numbers; (folder, write new numbers, run verify)."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    shutil.copytree(paths.root() / "params", tmp_path / "params")

    def write(**numbers):
        (tmp_path / verify.NUMBERS).write_text(json.dumps(numbers))

    def run(*arguments):
        command = [sys.executable, "-m", "tokmerge.verify", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    write(top1=0.9, minutes=3.0, n_x=5)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "numbers"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path, write, run


def test_command_says_what_moved_and_fails_beyond_the_tolerance(clone):
    folder, write, run = clone
    same = run()
    assert (same.returncode, "3 equal" in same.stdout) == (0, True)
    write(top1=0.903, minutes=9.0, n_x=5)
    near = run()
    assert near.returncode == 0
    assert "top1: 0.9 -> 0.903 (within 0.005: an accuracy, half a point)" in near.stdout
    assert "minutes: 3 -> 9 (only reported" in near.stdout
    write(top1=0.8, minutes=3.0, n_x=5)
    far = run()
    assert far.returncode == 1
    assert "MOVED top1: 0.9 -> 0.8" in far.stdout
    assert "1 beyond it" in far.stdout
    (folder / verify.NUMBERS).unlink()
    missing = run()
    assert missing.returncode == 1
    assert "run notebooks/91_claims.ipynb first" in missing.stderr


def test_an_unknown_revision_or_no_repository_is_one_clear_message(clone, tmp_path_factory):
    _, _, run = clone
    unknown = run("--against", "nowhere")
    assert unknown.returncode == 1
    assert "of nowhere cannot be read" in unknown.stderr
    assert "Traceback" not in unknown.stderr
    with pytest.raises(ValueError, match="git clone is needed"):
        verify.committed(tmp_path_factory.mktemp("plain"))
