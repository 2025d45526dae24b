"""Long work in pieces: a piece is made once, and is a file from then on.

A run that was interrupted finds what it had made; a run with other settings finds nothing of it.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokmerge.io import store

if TYPE_CHECKING:
    import pandas as pd


def digest(about: Any) -> str:
    """Twelve hex digits that tell one set of plain values from another.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 2, "b": [2]})
    True
    """
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


class Cache:
    """The pieces of one work, each a file in a folder of the work's own, below one that works share.

    Args:
        folder: the shared one; as an attribute, the work's own.
        about: everything the pieces depend on, plain values; kept as ``about.json``. Another ``about`` is another work.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> Cache(folder, {"seed": 0}).json("sum", lambda: {"value": 3})
    {'value': 3}
    >>> Cache(folder, {"seed": 0}).json("sum", lambda: {"value": "not made again"})
    {'value': 3}
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any]) -> None:
        self.folder = Path(folder) / digest(about)
        if not (self.folder / "about.json").exists():
            store.save_json(about, self.folder / "about.json")

    def path(self, piece: str, suffix: str) -> Path:
        """The file of a piece, made or not."""
        return self.folder / (re.sub(r"[^\w.,%+-]", "_", piece) + suffix)

    def table(self, piece: str, make: Callable[[], "pd.DataFrame"]) -> "pd.DataFrame":
        """A table: read, or made and saved."""
        return self._piece(self.path(piece, ".parquet"), make, store.save_table, store.load_table)

    def tensors(self, piece: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors by name: read, or made and saved."""
        return self._piece(self.path(piece, ".safetensors"), make, store.save_tensors, store.load_tensors)

    def json(self, piece: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """One JSON object: read, or made and saved."""
        return self._piece(self.path(piece, ".json"), make, store.save_json, store.load_json)

    def remove(self) -> None:
        """Delete all pieces: once their result is saved elsewhere, nobody needs them."""
        shutil.rmtree(self.folder)
        if not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    @staticmethod
    def _piece(path: Path, make: Callable[[], Any], save: Callable[..., None], load: Callable[[Path], Any]) -> Any:
        if not path.exists():
            save(make(), path)
        return load(path)
