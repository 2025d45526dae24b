import numpy as np
import pandas as pd
import pytest
import timm
import tokmerge
import torch
from PIL import Image
from tokmerge import cli
from tokmerge.data.image_sets import Batch, DataError
from tokmerge.data.imagenet import picture_folder
from tokmerge.evaluation.objective import Objective
from tokmerge.merging.policies import Threshold
from tokmerge.models import zoo
from tokmerge.models.configuration import Configuration
from tokmerge.search import own_pictures


@pytest.fixture
def pictures(tmp_path):
    """A folder of 16 pictures: noise on growing parts of plain canvases."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for number in range(16):
        pixels = np.full((28, 28), 10 * number, np.uint8)
        part = 2 + 24 * number // 15
        pixels[:part, :part] = rng.integers(0, 256, (part, part))
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


def test_a_search_on_a_folder_writes_a_policy_and_a_page_that_say_the_same(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    cli.main(["search", "--model", "fashion-vit", "--images", str(pictures), "--out", str(out), "--trials", "6"])
    said = capsys.readouterr().out
    assert sorted(file.name for file in out.iterdir()) == ["front.json", "report.md", "report.png"]
    page = (out / "report.md").read_text()
    assert page in said
    assert "6 trials on 8 pictures; what follows was measured on 8 others" in page
    assert "The score is agreement, unmerged 1.000" in page
    front, model = tokmerge.load_front(out / "front.json"), zoo.load_model("fashion-vit")
    assert front.dataset == "pictures in pictures"
    # What the file promises is what the model does on the pictures that were not searched on.
    images = picture_folder(pictures)
    others = np.random.default_rng(0).permutation(16)[8:]
    batch = torch.stack([zoo.transform(model)(images.at(place).image) for place in others])
    plain = tokmerge.patch(model, None)(batch)
    for point in front.points:
        logits, record = tokmerge.patch(model, point.policy)(batch)
        assert (record.macs / plain[1].macs).mean().item() == pytest.approx(point.macs_ratio)
        assert (record.payload_bytes / plain[1].payload_bytes).mean().item() == pytest.approx(point.bytes_ratio)
        agreement = (logits.argmax(1) == plain[0].argmax(1)).double().mean().item()
        assert point.score == pytest.approx(agreement)
    cheapest = min(point.macs_ratio for point in front.points if point.score >= 0.995)
    row = next(line for line in page.splitlines() if line.startswith("| 0.005 |"))
    assert row.startswith(f"| 0.005 | {cheapest:.3f} (loses ")


def test_points_that_others_beat_on_other_pictures_are_left_out(model, images):
    objective = Objective(model, Batch([str(i) for i in range(5)], images, torch.full((5,), -1)))
    points = [Configuration(Threshold(tau)) for tau in (0.95, 0.8, 0.6)]
    trials = pd.DataFrame([{"trial": i, **one.row(), **objective(one)} for i, one in enumerate(points)])
    # On the pictures searched on the second seemed to cost nothing; the third is out of bounds.
    trials.loc[1, ["kl", "macs_ratio", "bytes_ratio"]] = 0.0, 0.01, 0.01
    trials.loc[0, ["kl", "macs_ratio", "bytes_ratio"]] = 0.001, 0.005, 0.02
    trials.loc[2, "kl"] = 9.0
    found = own_pictures.front_points(trials, "kl", 1.0, objective)
    assert sorted(found.trial) == [0, 1]
    for row in found.to_dict("records"):
        assert row["macs_ratio"] == pytest.approx(objective(points[row["trial"]])["macs_ratio"])
    assert own_pictures.front_points(trials, "kl", -1.0, objective).trial.tolist() == [1], "all lose too much: the best"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet18", "--images", "."], "cannot merge tokens in a ResNet"),
        (["--model", "fashion-vit", "--images", "nowhere"], "nowhere is not a folder"),
        (["--model", "no_such_model", "--images", "."], "unknown model"),
    ],
)
def test_trouble_comes_before_long_work(arguments, message, tmp_path, monkeypatch):
    resnet = timm.models.ResNet(timm.models.resnet.BasicBlock, [1] * 4)
    monkeypatch.setattr(timm, "create_model", lambda name, **_: resnet)
    with pytest.raises(SystemExit, match=message):
        cli.main(["search", *arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_few_pictures_are_too_few(pictures, tmp_path):
    for file in sorted(pictures.iterdir())[7:]:
        file.unlink()
    with pytest.raises(DataError, match="7 pictures are too few, 8 are needed"):
        own_pictures.search_pictures("fashion-vit", zoo.load_model("fashion-vit"), picture_folder(pictures), tmp_path)
