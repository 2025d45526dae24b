import hashlib

import numpy as np
import pytest
from PIL import Image
from tokmerge.data import photos
from tokmerge.data.image_sets import SPLITS, DataError

N = 20


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Packages in small: 20 cut-outs that are discs of noise, a drawing, and backgrounds of one colour each."""
    rng = np.random.default_rng(0)
    stamps = tmp_path / "root" / photos.STAMPS
    for number in range(N):
        pixels = rng.integers(0, 256, (90, 100, 4), np.uint8)
        y, x = np.mgrid[:90, :100]
        pixels[..., 3] = 255 * ((y - 45) ** 2 + (x - 50) ** 2 < 40**2)
        save(Image.fromarray(pixels), stamps / "animals" / f"{number}.png")
    save(Image.new("RGBA", (90, 90), (9, 9, 9, 255)), stamps / "animals" / "drawing.png")
    save(Image.fromarray(pixels), stamps / "symbols" / "photograph.png")
    save(Image.fromarray(pixels), stamps / "animals" / "cartoon" / "photograph.png")
    for number, name in enumerate(sorted(sum(photos.BACKGROUNDS.values(), ()))):
        nature, other = (tmp_path / "root" / part for part in photos.DESKTOPS)
        file = nature / f"{name}.jpg" if number % 2 else other / name / "contents" / "images" / "9x9.png"
        save(Image.new("RGB", (900, 600), (10 * number, 255 - 10 * number, 128)), file)
    monkeypatch.setattr(photos, "ORIGINALS_SHA256", "")
    with pytest.raises(DataError, match="sha256 differs"):
        photos.load_photos("test", tmp_path / "root", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == [], "nothing half-made stays"
    monkeypatch.setattr(hashlib, "sha256", Known)
    monkeypatch.setattr(photos, "ORIGINALS_SHA256", "known")
    return tmp_path / "root"


class Known:
    """Any digest is the one that is wanted."""

    def __init__(self, content=b""):
        self.content = content

    def update(self, more):
        pass

    def hexdigest(self):
        return "known"

    def digest(self):
        return self.content[::-1]


def save(image, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def test_pictures_have_exact_masks_and_come_again(root, tmp_path):
    found = photos.load_photos("test", root, tmp_path / "data")
    assert (found.name, len(found), len(found.classes)) == ("photos", photos.PICTURES["test"], 4)
    for position in range(12):
        example, again = found.at(position), photos.load_photos("test", None, tmp_path / "data").at(position)
        assert example.image.tobytes() == again.image.tobytes()
        assert np.array_equal(example.mask, again.mask)
        assert (example.image.size, example.mask.shape) == ((224, 224), (224, 224))
        assert example.id == found.ids[position] == again.id
        # Backgrounds are plain here: what differs from the commonest colour is an object, but for its soft edge.
        pixels = np.asarray(example.image).astype(int)
        colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        differs = (abs(pixels - colours[counts.argmax()]) > 8).any(2)
        assert (differs == example.mask).mean() > 0.97
        # Discs of 60 to 140 pixels across, one to four of them.
        assert example.mask.sum() < (1 + example.label) * 3.15 * 57**2
    assert set(found.labels[:200].tolist()) == {0, 1, 2, 3}


def test_splits_share_no_cut_out_and_no_background(root, tmp_path):
    names = [f"animals/{number}.png" for number in range(N)]
    shares = [photos._share(split, names) for split in SPLITS]
    assert sorted(number for share in shares for number in share) == list(range(N))
    assert [len(share) for share in shares] == [4, 4, 5, 7]
    used = [set(photos.BACKGROUNDS[split]) for split in SPLITS]
    assert sum(map(len, used)) == len(set.union(*used))
    for split in SPLITS:
        ids = photos.load_photos(split, root, tmp_path / "data").ids
        assert {identifier.partition(" on ")[2] for identifier in ids[:100]} == set(photos.BACKGROUNDS[split])


def test_what_cannot_be_had_is_named(root, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no split 'val': use one of train, search, select, test"):
        photos.load_photos("val", root, tmp_path / "data")
    with pytest.raises(DataError, match="does not hold the background"):
        photos.load_photos("test", tmp_path / "empty", tmp_path / "other")
    monkeypatch.setattr(photos.debian, "ARCHIVES", ((tmp_path / "nowhere").as_uri(),))
    with pytest.raises(DataError, match=r"could not be fetched.*nowhere.*\nGive a path below .* packages tuxpaint"):
        photos.load_photos("test", None, tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []
