import gzip
import hashlib
from functools import partial

import numpy as np
import pytest
from conftest import hub_folder, serve_package
from tokmerge.data import fashion_mnist
from tokmerge.data.image_sets import DataError


def idx(photos, monkeypatch):
    """The four idx files of {stem: (n, 28, 28)}, whose checksums stand in for the real ones."""
    files, side = {}, (28).to_bytes(4, "big")
    for stem, pixels in photos.items():
        count, labels = len(pixels).to_bytes(4, "big"), (np.arange(len(pixels)) % 10).astype(np.uint8)
        files[f"{stem}-images-idx3-ubyte"] = b"\0\0\x08\x03" + count + side * 2 + pixels.tobytes()
        files[f"{stem}-labels-idx1-ubyte"] = b"\0\0\x08\x01" + count + labels.tobytes()
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert list(checksums) == list(fashion_mnist.SHA256)
    monkeypatch.setattr(fashion_mnist, "SHA256", checksums)
    return files


@pytest.fixture
def idx_files(monkeypatch):
    """In small: 30 + 20 photos of 28x28."""
    rng = np.random.default_rng(0)
    photos = {stem: rng.integers(0, 256, (n, 28, 28), np.uint8) for stem, n in (("train", 30), ("t10k", 20))}
    return idx(photos, monkeypatch)


def write(folder, files, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        file = folder / (f"{name}.gz" if packed else name)
        file.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_reads_idx_files(tmp_path, idx_files, packed):
    images = fashion_mnist.load_fashion_mnist("test", write(tmp_path, idx_files, packed))
    content = idx_files["t10k-images-idx3-ubyte"][16:]
    assert (images.name, len(images), len(images.classes)) == ("Fashion-MNIST", 20, 10)
    for i, example in enumerate(images.examples()):
        assert example.id == images.ids[i] == f"test-{i:05d}"
        assert example.image.mode == "L"
        assert example.image.tobytes() == content[784 * i : 784 * (i + 1)]
        assert example.label == images.labels[i] == i % 10
    assert [e.id for e in images.examples(17)] == ["test-00017", "test-00018", "test-00019"]


def test_damaged_files_are_named(tmp_path, idx_files):
    name = "train-labels-idx1-ubyte"
    file = write(tmp_path, idx_files) / f"{name}.gz"
    changed = idx_files[name][:-1] + bytes([idx_files[name][-1] ^ 1])
    for content, message in (
        (file.read_bytes()[:-12], rf"{name}\.gz is truncated or damaged.*delete it"),
        (gzip.compress(changed), rf"{name}\.gz is not Fashion-MNIST's.*sha256"),
        (b"not gzip", rf"{name}\.gz is truncated or damaged"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            fashion_mnist.load_fashion_mnist("test", tmp_path)


def test_places_are_tried_in_order(tmp_path, idx_files, monkeypatch):
    calls, willing = [], set()

    def fetch(kind, folder):
        calls.append(kind)
        if kind not in willing:
            raise DataError(f"{kind} said no")
        write(folder, idx_files)

    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.setattr(fashion_mnist, "fetch_debian", partial(fetch, "debian"))
    monkeypatch.setattr(fashion_mnist, "fetch_hub", partial(fetch, "hub"))
    with pytest.raises(DataError) as caught:
        fashion_mnist.load_fashion_mnist("test", data_dir=tmp_path)
    for part in (str(tmp_path / "none"), "debian said no", "hub said no", "Give a path"):
        assert part in str(caught.value)
    willing.add("hub")
    assert len(fashion_mnist.load_fashion_mnist("test", data_dir=tmp_path)) == 20
    assert calls == ["debian", "hub"] * 2
    assert len(fashion_mnist.load_fashion_mnist("train", data_dir=tmp_path)) == 30
    assert len(calls) == 4, "the fetched copy is used again"
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", write(tmp_path / "debian", idx_files))
    (tmp_path / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    assert len(fashion_mnist.load_fashion_mnist("test", data_dir=tmp_path)) == 20, "the installed copy comes first"
    with pytest.raises(DataError, match="does not hold the four Fashion-MNIST idx files"):
        fashion_mnist.load_fashion_mnist("test", tmp_path / "a path that is given is the only place")


def debian(folder, monkeypatch, files, listed=True):
    """An archive that serves the files in a package; it is the one expected, or another."""
    inside = {f"{fashion_mnist.UNPACKED}/{name}.gz": gzip.compress(content) for name, content in files.items()}
    packages = serve_package(folder / "archive", monkeypatch, "d/fashion/fashion_1_all.deb", inside)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_PACKAGE", packages if listed else dict.fromkeys(packages, "0"))


def test_fetch_debian_unpacks_the_package_and_a_deleted_file_again(tmp_path, idx_files, monkeypatch):
    debian(tmp_path, monkeypatch, idx_files)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "none")
    fetched = tmp_path / "data" / "fashion-mnist"
    fashion_mnist.fetch_debian(fetched)
    assert sorted(path.name for path in fetched.iterdir()) == sorted(f"{name}.gz" for name in idx_files)
    assert list((tmp_path / "data").iterdir()) == [fetched]
    (fetched / "t10k-labels-idx1-ubyte.gz").unlink()
    assert len(fashion_mnist.load_fashion_mnist("test", data_dir=tmp_path / "data")) == 20


@pytest.mark.parametrize(("listed", "message"), [(False, "not the package expected"), (True, "not Fashion-MNIST's")])
def test_a_failed_fetch_leaves_nothing_behind(tmp_path, idx_files, monkeypatch, listed, message):
    debian(tmp_path, monkeypatch, {name: content[:-1] for name, content in idx_files.items()}, listed)
    with pytest.raises(DataError, match=message):
        fashion_mnist.fetch_debian(tmp_path / "data" / "fashion-mnist")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_among_the_reasons(tmp_path, idx_files, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "none")
    (tmp_path / "data").write_text("a file, not a folder")
    with pytest.raises(DataError, match="could not be fetched"):
        fashion_mnist.load_fashion_mnist("test", data_dir=tmp_path / "data")


def test_fetch_hub_rebuilds_the_idx_files(tmp_path, monkeypatch):
    photos = hub_folder(tmp_path / "hub", {"train": 12, "test": 6})
    idx({stem: np.stack(photos[split]) for split, stem in fashion_mnist.STEMS.items()}, monkeypatch)
    fashion_mnist.fetch_hub(tmp_path / "data" / "fashion-mnist", name=str(tmp_path / "hub"))
    assert len(fashion_mnist.load_fashion_mnist("train", tmp_path / "data" / "fashion-mnist")) == 12
    monkeypatch.setattr(fashion_mnist, "SHA256", dict.fromkeys(fashion_mnist.SHA256, "0"))
    with pytest.raises(DataError, match="sha256"):
        fashion_mnist.fetch_hub(tmp_path / "other" / "fashion-mnist", name=str(tmp_path / "hub"))
    assert list((tmp_path / "other").iterdir()) == []


def test_sample_halves_are_disjoint_photos():
    train, test = fashion_mnist.sample("train"), fashion_mnist.sample("test")
    assert len(train) == len(test) == 256
    assert not set(train.ids) & set(test.ids)
    assert {e.image.size for e in test.examples()} == {(28, 28)}
    assert np.bincount(np.concatenate([train.labels, test.labels])).min() >= 50
