import dataclasses
import io
import re
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from conftest import hub_folder
from PIL import Image
from tokmerge.data import fashion_mnist, image_sets, imagenet
from tokmerge.data.image_sets import DataError, ImageSet
from tokmerge.data.registry import load_images
from torchvision.transforms.functional import to_tensor


@pytest.fixture
def folder(tmp_path):
    """ImageNet's val layout with three classes."""
    rng = np.random.default_rng(2)
    for synset, n in (("n02084071", 3), ("n01440764", 2), ("n03445777", 1)):
        (tmp_path / synset).mkdir()
        for i in range(n):
            photo = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
            photo.convert("L" if i == 1 else "RGB").save(tmp_path / synset / f"ILSVRC2012_val_{i:08d}.JPEG")
    return tmp_path


def test_image_folder(folder, monkeypatch):
    images = load_images("imagefolder", "val", path=folder)
    assert images.classes == ("n01440764", "n02084071", "n03445777")
    examples = list(images.examples())
    assert [e.label for e in examples] == images.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert examples[0].id == "n01440764/ILSVRC2012_val_00000000.JPEG"
    assert {e.image.mode for e in examples} == {"RGB"}
    assert [e.id for e in images.examples(4)] == images.ids[4:]
    monkeypatch.chdir(folder)
    assert imagenet.image_folder(".").name == imagenet.image_folder(f"{folder}/").name == f"ImageFolder {folder.name}"


def test_image_folder_errors_are_named(folder):
    def refused(path, message):
        with pytest.raises(DataError, match=message):
            list(imagenet.image_folder(path).examples())

    refused(folder / "nowhere", "nowhere is not a folder")
    refused(folder / "n01440764", "one folder of images per class")
    (folder / "n09999999").mkdir()
    refused(folder, "n09999999")
    (folder / "n09999999" / "bad.JPEG").write_bytes(b"not a picture")
    refused(folder, r"bad\.JPEG cannot be read")


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        # (SyntaxError) the pixel chunk claims to end early, in the middle of its data.
        ("PNG", lambda content, at: content[: at - 4] + (300).to_bytes(4, "big") + content[at:]),
        # (DecompressionBombError) it claims to be 10^5 pixels wide and high.
        ("BMP", lambda content, at: content[:18] + (10**5).to_bytes(4, "little") * 2 + content[26:]),
        ("JPEG", lambda content, at: content[:-900]),
    ],
)
def test_damaged_images_are_named_whatever_the_decoder_raises(kind, damage):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(file, kind)
    content = file.getvalue()
    with pytest.raises(DataError, match="image photo cannot be read"):
        image_sets.open_rgb(io.BytesIO(damage(content, content.find(b"IDAT"))), "photo")


def test_pictures_of_any_folder_come_turned_and_without_labels(tmp_path):
    rng, turned = np.random.default_rng(3), Image.Exif()
    turned[0x0112] = 6
    pixels = rng.integers(0, 256, (8, 12, 3), np.uint8)
    (tmp_path / "inner" / "deep").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "inner" / "b.png", exif=turned)
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "inner" / "deep" / "a.JPG")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "z.webp", lossless=True)
    (tmp_path / "notes.txt").write_text("no picture")
    images = load_images("folder", "own", path=tmp_path)
    assert images.ids == ["inner/b.png", "inner/deep/a.JPG", "z.webp"]
    assert images.name == f"pictures in {tmp_path.name}"
    found = list(images.examples())
    assert {example.label for example in found} == set(images.labels.tolist()) == {-1}
    assert {example.image.mode for example in found} == {"RGB"}
    assert np.array_equal(np.asarray(found[0].image), np.rot90(pixels, -1))


FRAMES = [Image.new("L", (8, 8), tone) for tone in (0, 255)]


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("deep.png", Image.new("I;16", (8, 8)).save, "it has more than 8 bits a channel"),
        ("moving.gif", partial(FRAMES[0].save, save_all=True, append_images=FRAMES[1:]), "it has 2 frames"),
        ("bad.jpg", lambda file: file.write_text("no picture"), "cannot identify"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named_before_long_work(tmp_path, name, write, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    write(tmp_path / name)
    with pytest.raises(DataError, match=re.escape(f"{name} cannot be read: {message}")):
        imagenet.picture_folder(tmp_path)


def test_a_folder_without_pictures_is_named(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        imagenet.picture_folder(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(DataError, match="holds no picture"):
        imagenet.picture_folder(tmp_path)


def hub_photos(folder, photos):
    """A local data set of encoded photos in two parquet files, features declared in its card as on the hub."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["class 0", "class 1"]))
    for shard, part in enumerate((photos[:2], photos[2:])):
        rows = {"image": [{"bytes": p, "path": None} for p in part], "label": [shard] * len(part)}
        path = folder / "data" / f"validation-0000{shard}-of-00002.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        "      class_label:\n        names:\n          '0': class 0\n          '1': class 1\n---\n"
    )
    return folder


def test_hub_and_folder_give_the_same_pixels_and_a_damaged_image_is_named(tmp_path):
    turned, photos = Image.Exif(), []
    turned[0x0112] = 6  # orientation: a quarter turn, which timm's and torchvision's readers ignore
    for i, options in enumerate(({"exif": turned}, {}, {})):
        file = tmp_path / "folder" / ("class 0" if i < 2 else "class 1") / f"{i}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20), "red").save(file, **options)
        photos.append(file.read_bytes())
    folder = imagenet.image_folder(tmp_path / "folder")
    hub = imagenet.imagenet_hub("validation", str(hub_photos(tmp_path / "hub", [*photos, b"not a picture"])))
    assert hub.labels.tolist() == [*folder.labels.tolist(), 1] == [0, 0, 1, 1]
    stream = hub.examples()
    for a, b in zip(folder.examples(), stream, strict=False):
        assert (a.image.size, a.image.tobytes(), a.label) == (b.image.size, b.image.tobytes(), b.label)
    with pytest.raises(DataError, match="validation-00000003 cannot be read"):
        next(stream)


def test_hub_labels_come_without_images_and_the_stream_resumes(tmp_path, monkeypatch):
    photos = hub_folder(tmp_path / "imagenet", {"validation": 7}, size=(30, 50), classes=4)["validation"]
    columns, real = [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: columns.append(k.get("columns")) or real(*a, **k))
    images = load_images("imagenet-1k", "validation", path=tmp_path / "imagenet")
    assert columns == [None, ["label"]]
    assert images.classes == ("class 0", "class 1", "class 2", "class 3")
    examples = list(images.examples())
    assert [e.label for e in examples] == images.labels.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert [e.id for e in examples] == list(images.ids)
    assert [e.image.tobytes() for e in examples] == [photo.convert("RGB").tobytes() for photo in photos]
    later = list(images.examples(5))
    assert [(e.id, e.image.tobytes()) for e in later] == [(e.id, e.image.tobytes()) for e in examples[5:]]
    part = image_sets.subset(images, [6, 1, 2])
    assert [(e.id, e.label) for e in part.examples(1)] == [(images.ids[2], 2), (images.ids[6], 2)]


def test_imagenette_has_imagenets_labels_even_where_a_script_made_it(tmp_path, monkeypatch):
    names = ["parachute", *(name for name in imagenet.IMAGENETTE if name != "parachute")]
    hub_folder(tmp_path / "nette", {"validation": 12}, size=(20, 30), names=names)
    images = load_images("imagenette", "validation", path=tmp_path / "nette")
    expected = [imagenet.IMAGENETTE[name] for name in [*names, *names[:2]]]
    assert images.labels.tolist() == [example.label for example in images.examples()] == expected
    assert len(images.classes) == 1000
    assert (images.classes[701], images.classes[574]) == ("parachute", "golf ball")
    assert images.name == "Imagenette from nette"
    real, asked = datasets.load_dataset, []

    def refuses_scripts(path, name, revision=None, **given):
        asked.append((path, name, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found imagenette.py")
        return real(str(tmp_path / "nette"), **given)

    monkeypatch.setattr(datasets, "load_dataset", refuses_scripts)
    assert imagenet.imagenette_hub().labels.tolist() == expected
    assert asked[1:] == [("frgfm/imagenette", "320px", "refs/convert/parquet")]
    monkeypatch.undo()
    hub_folder(tmp_path / "other", {"validation": 4})
    with pytest.raises(DataError, match=r"has classes class 0, class 1, class 2, ...: not Imagenette's"):
        imagenet.imagenette_hub("validation", str(tmp_path / "other"))


def test_hub_errors_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"HF_TOKEN"):
        imagenet.imagenet_hub("validation", str(tmp_path / "nothing"))
    hub_folder(tmp_path / "imagenet", {"validation": 2})
    with pytest.raises(DataError, match=r"split 'train'"):
        imagenet.imagenet_hub("train", str(tmp_path / "imagenet"))
    datasets.Dataset.from_dict({"photo": [1]}).to_parquet(tmp_path / "other" / "train.parquet")
    with pytest.raises(DataError, match=r"columns image and label.*photo"):
        imagenet.imagenet_hub("train", str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("mnist", "test", "unknown data set 'mnist': use one of sample, fashion-mnist"),
        ("fashion-mnist", "val", "'val': use 'train' or 'test'"),
        ("imagefolder", "val", "imagefolder needs a path"),
    ],
)
def test_unknown_names_are_listed(source, split, message):
    with pytest.raises(DataError, match=message):
        load_images(source, split)


@pytest.mark.parametrize("n", [1, 10, 33, 99])
def test_search_split_is_stratified_and_disjoint(n):
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    search, rest = image_sets.search_split(labels, n, seed=4)
    assert sorted([*search, *rest]) == list(range(100))
    assert len(search) == n
    for label, share in enumerate((0.5, 0.3, 0.2)):
        assert abs((labels[search] == label).sum() - share * n) < 1
    assert (search == image_sets.search_split(torch.tensor(labels), n, seed=4)[0]).all()
    if n == 33:
        assert list(search) != list(image_sets.search_split(labels, n, seed=5)[0])
    for wrong in (0, 100, -1):
        with pytest.raises(ValueError, match=f"search split of {wrong} cannot be cut off 100"):
            image_sets.search_split(labels, wrong, seed=0)


def test_subset_takes_positions_as_numpy_does_and_keeps_the_order():
    images, opened = fashion_mnist.sample("test"), []
    recorded = dataclasses.replace(images, at=lambda position: opened.append(position) or images.at(position))
    part = image_sets.subset(image_sets.subset(recorded, [0, 2, 4, 5]), [1, 3])
    assert [e.id for e in part.examples()] == list(part.ids) == [images.ids[2], images.ids[5]]
    assert opened == [2, 5], "a part of a part opens only its own images"
    mask = np.zeros(len(images), bool)
    mask[[3, 40]] = True
    for positions in (mask, [3, 40], np.array([40, 3, 3]), [3 - len(images), 40], range(3, 41, 37)):
        part = image_sets.subset(images, positions)
        assert [e.id for e in part.examples()] == list(part.ids) == [images.ids[3], images.ids[40]]
        assert [e.label for e in part.examples(1)] == part.labels.tolist()[1:] == [images.labels[40]]
    assert list(part.examples(2)) == list(image_sets.subset(images, []).examples()) == []
    with pytest.raises(IndexError):
        image_sets.subset(images, [len(images)])
    assert list(image_sets.stretch(images, 2, 5, "test").ids) == images.ids[5:7]
    with pytest.raises(ValueError, match="2 images after the first 255 are asked for: the test split has 256"):
        image_sets.stretch(images, 2, 255, "test")


@pytest.mark.parametrize("start", [0, 3])
def test_batches_equal_stacking_by_hand(start):
    images = image_sets.subset(fashion_mnist.sample("test"), range(10))
    examples = list(images.examples())[start:]
    got = list(image_sets.batches(images, to_tensor, 4, start))
    assert [len(b.ids) for b in got] == ([4, 4, 2] if start == 0 else [4, 3])
    whole = torch.stack([to_tensor(e.image) for e in examples])
    assert torch.equal(torch.cat([b.images for b in got]), whole)
    assert torch.cat([b.labels for b in got]).tolist() == [e.label for e in examples]
    if start == 0:
        assert torch.equal(image_sets.tensors(images, to_tensor).images, whole)
        again = list(image_sets.split_batch(image_sets.tensors(images, to_tensor), 4))
        assert all(a.ids == b.ids and torch.equal(a.images, b.images) for a, b in zip(again, got, strict=True))


def test_impossible_starts_and_batch_sizes_are_refused():
    images = image_sets.subset(fashion_mnist.sample("test"), range(10))
    with pytest.raises(ValueError, match="cannot start at 11 of 10"):
        images.examples(11)
    with pytest.raises(ValueError, match="10 examples into batches of -4"):
        next(image_sets.batches(images, to_tensor, -4))
    with pytest.raises(ValueError, match="0 examples into batches of 0"):
        image_sets.tensors(image_sets.subset(images, []), to_tensor)


@pytest.mark.parametrize("fill", [None, -0.5])
def test_images_are_shifted_and_mirrored_only(fill):
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 4] = 1
    places = set()
    for _ in range(60):
        moved = image_sets.flip_and_shift(image, 1, fill)
        assert moved.shape == image.shape
        assert moved.clamp(min=0).sum() == 1
        assert set(moved.unique().tolist()) <= {0.0, 1.0, fill}
        places.add(divmod(int(moved.argmax()), 9))
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}


def test_labels_that_are_not_public_are_refused():
    with pytest.raises(DataError, match=r"example b of toy, test, has label -1, .* use a split with public labels"):
        ImageSet("toy", "test", ("x",), ["a", "b"], np.array([0, -1]), at=None)
    assert repr(ImageSet("toy", "test", ("x",), ["a"], np.array([0]))) == "ImageSet(name='toy', split='test')"
