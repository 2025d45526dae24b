"""Files of Debian packages, had without root and without installing anything."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tokmerge.data.image_sets import DataError


def unpack(packages: Sequence[str], work: Path) -> Path:
    """Fetch packages from Debian's archive and unpack them below ``work``, an empty folder: gives their root.

    Raises:
        DataError: Debian's tools are missing, or fail; the message says what they said.
    """
    work = work.resolve()
    for part in ("state/lists/partial", "cache/archives/partial", "files"):
        (work / part).mkdir(parents=True)
    options = ["-o", f"Dir::State={work}/state", "-o", "Dir::State::status=/var/lib/dpkg/status"]
    options += ["-o", f"Dir::Cache={work}/cache", "-o", "Debug::NoLocking=1"]
    if os.geteuid() == 0:
        # apt would change to its own user, which may not write here.
        options += ["-o", "APT::Sandbox::User=root"]
    _run(["apt-get", *options, "update"], work)
    for package in packages:
        _run(["apt-get", *options, "download", package], work)
        archives = list(work.glob(f"{package}_*.deb"))
        if not archives:
            raise DataError(f"apt-get downloaded no {package}")
        _run(["dpkg-deb", "-x", str(archives[0]), "files"], work)
    return work / "files"


def _run(command: list[str], folder: Path) -> None:
    try:
        # apt checks signatures in the folder for temporary files, which not everyone may write to.
        own = {**os.environ, "TMPDIR": str(folder)}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=own)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise DataError(f"{command[0]} failed: " + " / ".join(done.stderr.strip().splitlines()[-3:]))
