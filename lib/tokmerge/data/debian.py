"""Files of Debian packages, had on any system: without Debian's tools, without root, without installing anything.

A package is a place in Debian's archive and a checksum: the same bytes everywhere, as long as the archive or its
snapshots keep them.
"""

import hashlib
import http.client
import io
import tarfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from tqdm.auto import tqdm

from tokmerge.data.image_sets import DataError

# Tried in turn; snapshots keep what the archive has removed.
ARCHIVES = ("https://deb.debian.org/debian", "https://snapshot.debian.org/archive/debian/20250520T000000Z")
_MEGABYTE = 1 << 20


def unpack(packages: Mapping[str, str], work: Path) -> Path:
    """Fetch packages and unpack them below ``work``: gives their root, below which there is usr/share.

    Args:
        packages: places below ``pool/main`` of the archive, such as "d/name/name_1.0_all.deb", and their sha256.
        work: a folder; what it needs is removed again, but for the root.

    Raises:
        DataError: a package cannot be had, or is not the one expected; the message says what every archive said.
    """
    root = work / "files"
    root.mkdir()
    for place, sha256 in packages.items():
        file, failures = work / place.rpartition("/")[2], []
        for archive in ARCHIVES:
            try:
                _fetch(f"{archive}/pool/main/{place}", file, sha256)
                break
            except (DataError, OSError, http.client.HTTPException) as error:
                failures.append(f"{archive}: {error}")
        else:
            raise DataError(f"{file.name} could not be fetched ({'; '.join(failures)})")
        with tarfile.open(fileobj=io.BytesIO(_data(file)), mode="r:*") as archive_file:
            archive_file.extractall(root, [member for member in archive_file if member.isfile()])
        file.unlink()
    return root


def _fetch(url: str, file: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=60) as answer, file.open("wb") as target:
        size = int(answer.headers.get("Content-Length") or 0) or None
        with tqdm(desc=file.name, total=size, unit="B", unit_scale=True, mininterval=2) as bar:
            while part := answer.read(_MEGABYTE):
                digest.update(part)
                bar.update(target.write(part))
    if digest.hexdigest() != sha256:
        raise DataError("what came is not the package expected (sha256 differs)")


def _data(file: Path) -> bytes:
    """The archive of files that a package holds: a member of an ar archive, which has headers of 60 bytes."""
    with file.open("rb") as stream:
        stream.seek(8)
        while True:
            header = stream.read(60)
            size = int(header[48:58])
            if header.startswith(b"data.tar"):
                return stream.read(size)
            stream.seek(size + size % 2, io.SEEK_CUR)
