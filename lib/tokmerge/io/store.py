"""Saved things: parquet tables, JSON scalars, safetensors weights. Never pickle, never half a file.

Everything is written to a temporary name beside its target and then renamed, so a reader sees
either the old file or the whole new one.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

_STARTED = time.monotonic()
RECORDED_PACKAGES = ("torch", "torchvision", "timm", "transformers", "ax-platform", "numpy", "pandas")


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it there if the block succeeds, else remove it.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "new" / "a.txt"
    >>> with writing(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text(), [p.name for p in target.parent.iterdir()]
    ('whole', ['a.txt'])
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors makes its files private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_table(table: "pd.DataFrame", path: str | Path) -> None:
    """Write a tidy table as zstd-compressed parquet."""
    with writing(path) as temporary:
        table.to_parquet(temporary, compression="zstd", index=False)


def load_table(path: str | Path) -> "pd.DataFrame":
    """Read a table written by `save_table`; ValueError that names the file if it is damaged."""
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no parquet table ({error}): delete it and run its notebook again") from error


def save_json(content: Mapping[str, Any], path: str | Path) -> None:
    """Write one JSON object, keys in the order given."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def load_json(path: str | Path) -> dict[str, Any]:
    """Read one JSON object; ValueError that names the file if it is none."""
    try:
        content = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete it and run its notebook again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def provenance(params: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was made with: parameters, package versions, machine, seconds so far. Goes into a stage's JSON."""
    versions = {}
    for package in RECORDED_PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "params": dict(params),
        "versions": versions,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "seconds": round(time.monotonic() - _STARTED, 1),
    }


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors as safetensors."""
    with writing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read tensors written by `save_tensors`."""
    return load_file(path)


def sha256(path: str | Path) -> str:
    """Hex sha256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
