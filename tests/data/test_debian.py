import pytest
from conftest import serve_package
from tokmerge.data import debian
from tokmerge.data.image_sets import DataError


def test_packages_are_unpacked_side_by_side(tmp_path, monkeypatch):
    both = {}
    for name in ("first", "second"):
        both |= serve_package(tmp_path / "archive", monkeypatch, f"x/{name}_1.0_all.deb", {f"usr/{name}.txt": b"1"})
    (tmp_path / "work").mkdir()
    root = debian.unpack(both, tmp_path / "work")
    assert sorted(file.name for file in (root / "usr").iterdir()) == ["first.txt", "second.txt"]
    assert list((tmp_path / "work").iterdir()) == [root], "what was fetched is gone"


def test_the_next_archive_is_asked_where_one_has_nothing_or_something_else(tmp_path, monkeypatch):
    place = "x/first_1.0_all.deb"
    known = serve_package(tmp_path / "right", monkeypatch, place, {"usr/first.txt": b"1"})
    serve_package(tmp_path / "changed", monkeypatch, place, {"usr/first.txt": b"2"})
    monkeypatch.setattr(debian, "ARCHIVES", tuple((tmp_path / name).as_uri() for name in ("none", "changed", "right")))
    (tmp_path / "work").mkdir()
    assert (debian.unpack(known, tmp_path / "work") / "usr" / "first.txt").read_bytes() == b"1"
    monkeypatch.setattr(debian, "ARCHIVES", debian.ARCHIVES[:2])
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"^first_1.0_all.deb could not be fetched \(.*none: .*; .*sha256 differs"):
        debian.unpack(known, tmp_path / "other")
