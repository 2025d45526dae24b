import numpy as np
import pandas as pd
import pytest
import yaml
from tokmerge import contenders, paths, scale, store
from tokmerge.scale import Work


def table(**changes):
    """Measurements on lines that are known: 2 s + 10 ms per image, 1 s + 0.5 s per trial, 16 ms to decode."""
    rows = [("images", n, 2 + 0.01 * n, None) for n in (10, 20, 40)]
    rows += [("trials", n, 1 + 0.5 * n, None) for n in (5, 6, 9)]
    rows += [("tokens", n, 1e-4 * n**1.5, 1e6 * n) for n in (16, 64, 256)]
    rows += [("decode", 1, changes.get("decode", 0.016), None)]
    for busy, one, two in ((0.0, 3.0, 1.5), (0.5, 3.0, 4.0)):
        for n, seconds in ((1, one), (2, two)):
            rows += [("busy", n, busy, None), ("workers, start", n, 10 * n, None)]
            rows += [("workers, evaluations", n, seconds, None)]
    return pd.DataFrame(rows, columns=["axis", "x", "seconds", "macs"])


def test_lines_are_found_again():
    assert scale.line(table(), "images") == pytest.approx((2, 0.01))
    assert scale.line(table(), "trials") == pytest.approx((1, 0.5))


def test_growth_says_what_was_measured():
    text = scale.growth(table())
    parts = (
        "2.10 s at 10, 2.20 s at 20, 2.40 s at 40 images",
        "2.00 s + 10.00 ms per image",
        "tokens^1.50",
        "3 proposals",
        "1.00 s + 500 ms",
        "3.00 s with 1, 1.50 s with 2 (processors 0 % and 0 % busy before); "
        "3.00 s with 1, 4.00 s with 2 (processors 50 %",
        "2 workers against 1: 2.00, 0.75 times as fast; 10 to 20 s until they are up",
        "16.0 ms each",
    )
    for part in parts:
        assert part in text, text


def test_an_estimate_by_hand():
    by_arithmetic = Work("a", scale.LLAVA, passes=1000, ratio=0.5)
    expected = 1000 * 2 * 4.1e12 * 0.5 / 90e12 / 3600
    assert scale.estimate(table(), by_arithmetic, 1) == pytest.approx(expected)
    assert scale.estimate(table(), by_arithmetic, 8) == pytest.approx(expected / 8)
    by_decoding = Work("b", scale.DEIT, passes=1000)
    assert scale.estimate(table(), by_decoding, 1) == pytest.approx(1000 * 0.016 / 8 / 3600)
    assert scale.estimate(table(decode=1e-9), by_decoding, 1) == pytest.approx(1000 * 2 * 4.6e9 / 8e12 / 3600)


def test_the_optimiser_does_not_share():
    searched = Work("c", scale.LLAVA, passes=1000, trials=4)
    asks = sum(1 + 0.5 * n for n in (1, 2, 3, 4)) / 3600
    alone = scale.estimate(table(), Work("c", scale.LLAVA, passes=1000), 64)
    assert scale.estimate(table(), searched, 64) == pytest.approx(alone + asks)


def test_hours_add_up():
    rows = [line.split("|")[1:-1] for line in scale.hours(table()).splitlines()[2:]]
    assert len(rows) == len(scale.WORK) + 1
    for column in (3, 4, 5):
        values = [float(row[column].removesuffix("h ")) for row in rows]
        assert values[-1] == pytest.approx(sum(values[:-1]), abs=0.04)


def test_passes_are_those_of_the_params():
    folder = paths.root() / "params" / "paper"
    merging, search, imagenet, vqa = (
        yaml.safe_load((folder / f"{n}.yaml").read_text())
        for n in ("20_merging", "30_search", "40_imagenet", "50_vqav2")
    )
    work = {one.stage: one for one in scale.WORK}
    assert work["merging"].passes == (len(merging["thresholds"]) + len(merging["fixed_r"])) * 45_000
    evaluations = search["n_trials"] + search["n_uniform"] + search["n_fixed_r"]
    assert work["search"].trials == search["n_trials"]
    assert work["search"].passes == evaluations * search["n_images"] + 20 * search["n_front_images"]
    assert (imagenet["imagenet_study"], imagenet["n_test"]) == (None, None)
    points = 3 * len(imagenet["divergences"]) + len(imagenet["fixed_r"])
    assert work["imagenet"].passes == points * 45_000 + 30 * imagenet["n_baseline"]
    ours, others = len(vqa["shares"]), sum(map(len, contenders.grids(24, 32, 576, vqa["n_grid"]).values()))
    points = 1 + ours + others + len(vqa["precisions"]) * (1 + ours)
    codecs = 2 * len(vqa["qualities"]) * vqa["n_codec"] * 5.3  # questions per image
    assert vqa["n_test"] == [None]
    assert work["vqav2"].passes == points * 212_000 + codecs


def test_every_stage_of_the_paper_profile_that_runs_a_model_is_there():
    stages = yaml.safe_load((paths.root() / "params" / "paper" / "dvc.yaml").read_text())["stages"]
    running = [name for name, stage in stages.items() if not stage.get("frozen") and name != "figures"]
    assert [one.stage for one in scale.WORK] == running


def test_pages_hold_what_the_saved_measurements_say():
    measured = store.load_table(scale.TABLE)
    for name in ("scale", "paper_profile"):
        text = (paths.root() / "docs" / f"{name}.md").read_text()
        assert scale.fill(text, measured) == text, "run `python -m tokmerge.scale --keep`"
        assert text.count("| all |") == 1


def test_a_sample_evaluation_by_a_ray_worker_is_the_one_made_here():
    seconds = scale._seconds(lambda: None, rounds=2)
    assert seconds < 0.1
    objective = scale.sample_objective()
    measured = objective(scale.spaces.Configuration(scale.POLICY), n_images=16)
    assert 0 < measured["macs_ratio"] < 1
    assert np.isfinite(measured["kl"])
    assert scale._decoder()().shape == (3, 224, 224)
