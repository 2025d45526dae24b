"""Where things are: the repository's folders, and a clear word when an input is missing.

Notebooks run from their own folder (JupyterLab, nbval) or from anywhere (papermill), so every path
is resolved against the repository root, found by walking up from the working directory.
"""

import os
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"


def root(start: Path | None = None) -> Path:
    """The repository root: the nearest folder at or above ``start`` (here) that holds both dvc.yaml and notebooks.

    Raises:
        FileNotFoundError: no such folder.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "notebooks").is_dir():
            return folder
    raise FileNotFoundError(f"{here} is in no clone of the repository: change into one and run again")


def data() -> Path:
    """Where fetched files are kept: the repository's data, or in no clone of it a folder of the user's cache."""
    try:
        return root() / "data"
    except FileNotFoundError:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokmerge"


def resolve(path: str | Path) -> Path:
    """``path`` as it is when absolute, else below the repository root."""
    path = Path(path)
    return path if path.is_absolute() else root() / path


def need(path: str | Path, made_by: str) -> Path:
    """The resolved path of an input; where it is missing, FileNotFoundError names ``made_by``, the notebook to run."""
    found = resolve(path)
    if not found.exists():
        raise FileNotFoundError(f"missing input {path}: run notebooks/{made_by}.ipynb first (or `make repro`)")
    return found
