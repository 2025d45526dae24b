"""Every example of CONTRIBUTING.md runs, is short, and does what the text around it says."""

import re
import runpy

import pytest
import timm
import tokmerge
import torch
from PIL import Image
from tokmerge.data import image_sets
from tokmerge.data.registry import load_images
from tokmerge.io import paths, store
from tokmerge.merging.matching import Policy
from tokmerge.models import zoo

TEXT = (paths.root() / "CONTRIBUTING.md").read_text()
EXAMPLES = dict(re.findall(r"^## Add an? ([\w ]+)\n.*?```python\n(.*?)```", TEXT, re.MULTILINE | re.DOTALL))


@pytest.fixture
def run(tmp_path):
    """Run an example as a file of its own; its names."""

    def run(name):
        (tmp_path / "example.py").write_text(EXAMPLES[name])
        return runpy.run_path(str(tmp_path / "example.py"), run_name="example")

    return run


def test_the_map_names_every_folder_once():
    named = re.findall(r"^\| \d \| `(\w+)` \|", TEXT, re.MULTILINE)
    library = paths.root() / "lib" / "tokmerge"
    folders = {path.parent.name for path in library.glob("*/__init__.py")}
    assert sorted(named) == sorted(folders | {path.stem for path in library.glob("*.py")} - {"__init__"})


def test_the_walks_lead_past_what_is_there():
    walks = re.search(r"## Three walks\n(.*?)\n## ", TEXT, re.DOTALL).group(1).strip().split("\n\n")
    assert len(walks) == 3
    for walk in walks:
        assert 4 <= len(walk.split("→")) <= 7, walk
        for name in re.findall(r"`([\w/]+\.(?:py|ipynb|yaml))`", walk):
            assert any((paths.root() / folder / name).is_file() for folder in (".", "lib/tokmerge")), name
        code = "".join(path.read_text() for path in (paths.root() / "lib").rglob("*.py"))
        for name in re.findall(r"`(?:[A-Z]\w+\.)?([a-z_]+|[A-Z]\w+)`", walk):
            assert re.search(rf"(def|class) {name}\b", code), name


def test_there_are_four_short_examples():
    assert list(EXAMPLES) == ["policy", "backbone", "data set", "channel"]
    for name, code in EXAMPLES.items():
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= 20, f"{name}: {len(lines)} lines"
        assert max(map(len, code.splitlines())) <= 125


def test_policy(run, model, images):
    policy = run("policy")["BestHalf"]
    assert isinstance(policy(0.5), Policy)
    _, record = tokmerge.patch(model, policy(-1.0))(images)
    # The first block is left alone; half of set A merges in the others.
    assert record.tokens.tolist() == [[65, 65, 49, 37, 28]] * len(images)
    none, _ = tokmerge.patch(model, policy(1.0))(images)
    assert torch.allclose(none, model(images), atol=1e-5)


def test_backbone(run, tmp_path):
    run("backbone")
    made = timm.create_model("my_vit")
    store.save_tensors(made.state_dict(), tmp_path / "my_vit.safetensors")
    model = zoo.load_model("my_vit", checkpoint=tmp_path / "my_vit.safetensors")
    assert torch.equal(model.head.weight, made.head.weight)
    assert zoo.transform(model)(Image.new("RGB", (50, 40))).shape == (3, 32, 32)


def test_data_set(run):
    stripes = run("data set")["stripes"]("test")
    assert [example.id for example in stripes.examples(18)] == ["test-18", "test-19"]
    level, upright = (next(stripes.examples(start)).image for start in (0, 1))
    assert level.getpixel((0, 9)) == level.getpixel((20, 9))
    assert upright.getpixel((9, 0)) == upright.getpixel((9, 20))
    assert len(image_sets.subset(stripes, [1, 2])) == 2


def test_channel(run):
    erasures = run("channel")["erasures"]
    model = zoo.load_model("fashion-vit")
    images = image_sets.tensors(load_images("sample"), zoo.transform(model)).images[:4]
    merged = tokmerge.patch(model, tokmerge.Threshold(0.9), split_layer=6)
    with torch.inference_mode():
        clean, sent = merged(images)
        same, _ = merged(images, through=erasures(0.0, torch.Generator().manual_seed(0)))
        _, lossy = merged(images, through=erasures(0.5, torch.Generator().manual_seed(0)))
    assert torch.equal(clean, same), "no loss is no channel"
    assert torch.equal(lossy.payload_bytes, sent.payload_bytes), "the record counts what was sent"
    assert (lossy.tokens[:, -1] < sent.tokens[:, -1]).all()
