import pytest
from tokmerge.data import debian
from tokmerge.data.image_sets import DataError


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Debian's tools in small: apt-get that downloads what there is, dpkg-deb that unpacks it."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text("""#!/bin/bash
for last; do :; done
[ "$TMPDIR" -ef . ] || { echo "E: no folder of its own" >&2; exit 100; }
case " $* " in *" update "*) exit 0 ;; esac
[ "$last" = none ] && { echo "E: Unable to locate package none" >&2; exit 100; }
[ "$last" = silent ] && exit 0
echo "$last" > "${last}_1.0_all.deb"
""")
    (tools / "dpkg-deb").write_text("""#!/bin/sh
mkdir -p "$3/usr/share" && cp "$2" "$3/usr/share/$(cat "$2").txt"
""")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return tools


def test_packages_are_unpacked_side_by_side(archive, tmp_path):
    root = debian.unpack(["first", "second"], tmp_path / "work")
    assert sorted(file.name for file in (root / "usr" / "share").iterdir()) == ["first.txt", "second.txt"]


def test_what_the_tools_say_is_passed_on(archive, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="apt-get failed: E: Unable to locate package none"):
        debian.unpack(["none"], tmp_path / "work")
    with pytest.raises(DataError, match="apt-get downloaded no silent"):
        debian.unpack(["silent"], tmp_path / "other")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"^apt-get: "):
        debian.unpack(["first"], tmp_path / "third")
