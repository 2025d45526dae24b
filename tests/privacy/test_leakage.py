import numpy as np
import pandas as pd
import pytest
import torch
from tokmerge.privacy import leakage


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(40, 1, 7, 7, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=28, mode="bilinear")


@pytest.fixture
def noisy(images):
    return (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


def reference_ssim(x, y, sigma=1.5, reach=5):
    """SSIM of two (H, W) images by plain loops (Wang et al. 2004): 11x11 Gaussian window, edges mirrored."""
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    window = np.outer(weights, weights) / weights.sum() ** 2
    padded, values = [np.pad(z, reach, mode="reflect") for z in (x, y)], []
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            a, b = (z[i : i + 2 * reach + 1, j : j + 2 * reach + 1] for z in padded)
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * a * a).sum() - ma**2, (window * b * b).sum() - mb**2
            cov = (window * a * b).sum() - ma * mb
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


def test_similarity_agrees_with_plain_loops(images, noisy):
    table = leakage.similarity(images[:4], noisy[:4], batch_size=3)
    x, y = images[:4, 0].double().numpy(), noisy[:4, 0].double().numpy()
    psnr = [10 * np.log10(1 / np.mean((a - b) ** 2)) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(table.psnr, psnr, rtol=1e-4)
    np.testing.assert_allclose(table.ssim, [reference_ssim(a, b) for a, b in zip(x, y, strict=True)], atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_similarity_is_perfect_for_a_copy_and_falls_with_noise(images, noisy, channels):
    images, noisy = (part.expand(-1, channels, -1, -1).contiguous() for part in (images, noisy))
    same, worse = leakage.similarity(images, images), leakage.similarity(images, noisy)
    assert (same.psnr == 100).all()
    for metric in ("ssim", "fsim", "haarpsi"):
        np.testing.assert_allclose(same[metric], 1, atol=1e-3)
        assert (worse[metric] < same[metric] - 0.01).all()
    with pytest.raises(ValueError, match="images are"):
        leakage.similarity(images, images[1:])


def test_feature_distance_is_one_minus_cosine(images, noisy):
    found = leakage.feature_distance(lambda part: part.flatten(1), images, noisy, batch_size=16)
    a, b = images.flatten(1).numpy(), noisy.flatten(1).numpy()
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(found, 1 - cosine, atol=1e-5)


def test_originals_are_looked_for_within_a_group(images, noisy):
    groups = torch.tensor([0] * 25 + [1] * 15)
    found = leakage.reidentify(images, noisy, groups)
    assert found.identified[:25].tolist() == [1.0] * 25
    assert found.chance[:25].tolist() == [1 / 25] * 25
    assert found[25:].isna().all().all()  # too few rivals
    # The same picture for everybody finds one original.
    same = leakage.reidentify(images, images[:1].expand_as(images), groups)
    assert same.identified[:25].sum() == 1


def test_the_worst_are_the_most_similar_twentieth():
    n = 200
    table = pd.DataFrame({"hit": np.arange(n) % 2, "ssim": np.linspace(0, 1, n)})
    found = leakage.summarise_leakage(table, draws=200).set_index(["images", "metric"])
    assert found.value["worst", "ssim"] == pytest.approx(table.ssim[-10:].mean())
    assert found.value["worst", "hit"] == table.hit[-10:].mean()
    assert found.value["all", "ssim"] == pytest.approx(0.5)
    assert found.low["worst", "ssim"] < found.value["worst", "ssim"] <= found.high["worst", "ssim"] + 0.02


def test_intervals_are_those_of_the_mean_and_changes_are_paired():
    rng = np.random.default_rng(0)
    base = pd.DataFrame({"ssim": rng.normal(0.5, 0.2, 800)})
    shifted = base - 0.1 + rng.normal(0, 0.01, base.shape)
    row = leakage.summarise_leakage(shifted, base).query("images == 'all'").iloc[0]
    half = 1.96 * shifted.ssim.std() / 800**0.5
    assert (row.value - row.low, row.high - row.value) == pytest.approx((half, half), rel=0.15)
    assert row.change == pytest.approx(-0.1, abs=0.002)
    assert row.change_high - row.change_low < 0.1 * (row.high - row.low)
    assert "change" not in leakage.summarise_leakage(base)


def test_missing_values_do_not_count():
    table = pd.DataFrame({"ssim": [0.0, 1.0, 1.0, 1.0], "identified": [1.0, np.nan, 0.0, np.nan], "none": [np.nan] * 4})
    found = leakage.summarise_leakage(table, draws=20).query("images == 'all'").set_index("metric")
    assert found.value["identified"] == 0.5
    assert np.isnan(found.value["none"])


def test_retraining_intervals_hold_one_more_training_in_19_of_20_cases():
    rng = np.random.default_rng(0)
    draws = rng.normal(0, [[1.0]] * 2000, (2000, 8))
    inside = 0
    for a, b in zip(draws[:, :4], draws[:, 4:] + 5, strict=True):
        low, high = leakage.retraining_intervals({"a": a[:3], "b": b[:3]})["b"]
        inside += low <= b[3] <= high
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)
    with pytest.raises(ValueError, match="b: 1 training"):
        leakage.retraining_intervals({"a": [1, 2], "b": [1]})
