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
        ("merging.threshold.at_0.5pp.top1_drop", 0.0048, -0.0002, 0.0099),
        ("merging.fixed_r.at_0.5pp.macs_ratio", 0.53, 0.55, 0.5501),
        ("merging.threshold.at_0.5pp.value", 0.92, 0.94, 0.95),
        ("search.best_bytes_at_0.5pp", 0.04, 0.09, 0.0901),
        ("search.hv64_fraction.sobol", 0.91, 0.93, 0.94),
        ("imagenet.peer.pitome.bytes_at_0.5pp", 0.1, 0.12, 0.13),
        ("vqav2.scenes.unmerged", 0.8, 0.805, 0.7),
        ("channel.gain_db_at_equal_uses", 3.0, 3.5, 2.4),
        ("channel.policy_regret_pp", -0.1, 0.4, 0.5),
        ("privacy.ssim.merged", 0.3, 0.32, 0.35),
        ("stage.something_new", 1.0, 1.02, 1.03),
    ],
)
def test_a_number_may_move_up_to_its_tolerance(key, before, near, far):
    assert not beyond(key, before, near)
    assert beyond(key, before, far)


def test_counts_and_names_must_be_equal():
    assert beyond("inputs.n_images", 10000, 9999)
    assert beyond("vqav2.n_questions", 100, 101)
    assert beyond("inputs.dataset", "Fashion-MNIST", "ImageNet-1k")


def test_clocks_are_reported_only():
    for key in ("search.minutes_64", "merging.speedup_over_macs_reduction.b1", "merging.off_overhead.b32",
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
    without = [key for key in numbers if verify.rule_of(key).pattern == "*"]
    assert all(key.endswith(".value") for key in without), without


def test_real_keys_meet_the_rule_that_is_meant():
    numbers = json.loads((paths.root() / verify.NUMBERS).read_text())
    meant = {
        "search.hv64_fraction.sobol": "a ratio",
        "vqav2.unmerged": "an accuracy, half a point",
        "vqav2.scenes.unmerged": "an accuracy, half a point",
        "privacy.ssim.unmerged": "of a table that ships",
        "privacy.ssim.worst.unmerged_0_db.low": "a similarity",
        "privacy.matched.unmerged": "of a table that ships",
        "privacy.top1.unmerged_0_db": "an accuracy, half a point",
        "privacy.attack_task_accuracy.merged_10_db": "an accuracy of few images",
        "privacy.bytes.unmerged": "bytes of a table that ships",
        "imagenet.sent.class_token_ours.bytes_at_0.5pp": "a count",
        "imagenet.sent.tokens_ours.bytes_at_0.5pp": "bytes of what a search found",
        "imagenet.peer.ToMe.bytes_at_0.5pp": "a ratio",
        "imagenet.best_macs_at_0.5pp": "what a search found",
        "imagenet.ours.front.macs_at_0.5pp": "what a search found",
        "channel.gain_db_at_equal_uses": "decibels",
        "channel.policy_regret_half_pp": "points of accuracy",
    }
    assert set(meant) <= set(numbers)
    assert {key: verify.rule_of(key).why for key in meant} == meant
    assert verify.rule_of("imagenet.best_macs_at_0.5pp").tolerance == (
        verify.rule_of("imagenet.ours.front.macs_at_0.5pp").tolerance
    )
    # Hundreds are counts or bytes, and no ratio's tolerance fits them.
    large = [key for key, value in numbers.items() if not isinstance(value, str) and abs(value) > 100]
    assert not [key for key in large if 0 < verify.rule_of(key).tolerance < 1]
    # 90_figures writes evaluations only where a rival matches the search.
    used = {verify.rule_of(key).pattern for key in numbers}
    assert {rule.pattern for rule in verify.rules()} - used == {"*evaluations_to_match*"}


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
    assert "run notebooks/90_figures.ipynb first" in missing.stderr


def test_an_unknown_revision_or_no_repository_is_one_clear_message(clone, tmp_path_factory):
    _, _, run = clone
    unknown = run("--against", "nowhere")
    assert unknown.returncode == 1
    assert "of nowhere cannot be read" in unknown.stderr
    assert "Traceback" not in unknown.stderr
    with pytest.raises(ValueError, match="git clone is needed"):
        verify.committed(tmp_path_factory.mktemp("plain"))
