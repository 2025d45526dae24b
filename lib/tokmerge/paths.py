"""Where things are: the repository's folders, and a clear word when an input is missing.

Notebooks run from their own folder (JupyterLab, nbval) or from anywhere (papermill), so every path
is resolved against the repository root, found by walking up from the working directory.
"""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


def root(start: Path | None = None) -> Path:
    """The repository root: the nearest folder at or above ``start`` that holds dvc.yaml.

    Args:
        start: where to begin; the working directory by default.

    Raises:
        FileNotFoundError: no such folder; run from inside a clone.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no dvc.yaml at or above {here}: run from inside a clone of the repository")


def resolve(path: str | Path) -> Path:
    """``path`` as it is when absolute, else below the repository root."""
    path = Path(path)
    return path if path.is_absolute() else root() / path


def need(path: str | Path, made_by: str) -> Path:
    """The resolved path of an input that must exist.

    Args:
        path: file or folder, absolute or below the repository root.
        made_by: the notebook that writes it, named in the error.

    Raises:
        FileNotFoundError: it is missing; the message names the notebook to run first.
    """
    found = resolve(path)
    if not found.exists():
        raise FileNotFoundError(f"missing input {path}: run notebooks/{made_by}.ipynb first (or `dvc repro`)")
    return found
