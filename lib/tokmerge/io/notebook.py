"""What every notebook does first: read its parameters, and refuse those it does not know; is a study to run at all?"""

import ast
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from tokmerge.io import paths, store

INJECTED = "# Parameters"
# Whose values a notebook takes that is stepped through in JupyterLab, which tells its kernels the notebook's path.
PROFILE, NOTEBOOK = "TOKMERGE_PROFILE", "JPY_SESSION_NAME"


def parameters(namespace: MutableMapping[str, Any]) -> dict[str, Any]:
    """The parameters of a notebook with these ``globals()``, and their values in this run.

    A parameters cell holds nothing but assignments of literals. papermill adds its own copy below it, and only warns
    about a name the notebook does not have; here that is an error, before any work. In JupyterLab, where nothing is
    added, the values of the profile that `PROFILE` in the environment names take the place of the cell's.

    Raises:
        ValueError: a parameter was given that the notebook does not have, or a value of another type than its own.

    >>> parameters({"In": ["", "seed = 0", "# Parameters\\nseed = 1"], "seed": 1})
    {'seed': 1}
    """
    declared: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for cell in namespace["In"]:
        values = literals(cell)
        if values and cell.startswith(INJECTED):
            given = values
        elif values and not given:
            declared = values
    if not declared:
        # A runner that keeps no history (nbval) injects nothing either: the plain values so far are the parameters, but
        # for constants that were imported.
        plain = (str, int, float, list, tuple, dict, type(None))
        own = [name for name in namespace if not (name.startswith("_") or name.isupper() or name in ("In", "Out"))]
        return {name: namespace[name] for name in own if isinstance(namespace[name], plain)}
    if not given and (profile := os.environ.get(PROFILE)) and NOTEBOOK in os.environ:
        import yaml

        file = paths.root() / "params" / profile / f"{Path(os.environ[NOTEBOOK]).stem}.yaml"
        if not file.is_file():
            raise ValueError(f"{PROFILE} is {profile}, but there is no {file.relative_to(paths.root())}")
        given = yaml.safe_load(file.read_text()) or {}
        print(f"with the values of {file.relative_to(paths.root())}: {', '.join(given) or 'none differs'}")
        namespace.update({name: value for name, value in given.items() if name in declared})
    unknown = [name for name in given if name not in declared]
    if unknown:
        raise ValueError(f"unknown parameter {', '.join(unknown)}: this notebook has {', '.join(declared)}")
    for name, value in given.items():
        kind = type(declared[name])
        # None is no type: it leaves open what else may be given; a whole number is a number.
        if None not in (value, declared[name]) and type(value) not in ((kind, int) if kind is float else (kind,)):
            raise ValueError(f"{name} is {value!r}, a {type(value).__name__}: this notebook takes a {kind.__name__}")
    return {name: namespace[name] for name in declared}


def finished(out_dir: str, params: Mapping[str, Any], table: str = "study.json") -> bool:
    """Whether a study is read, not run: it is stepped through in JupyterLab, and was made with the same values.

    Elsewhere, as in `make repro` and `make studies`, it is run. Folders may differ, and what does the work.

    Args:
        out_dir: the study's folder.
        params: of this run; names that the study's record lacks are passed over.
        table: that has to be there, where the record alone does not say so.
    """
    record = paths.resolve(out_dir) / "study.json"
    if NOTEBOOK not in os.environ or not record.with_name(table).is_file() or not record.is_file():
        return False
    made, workers = store.load_json(record)["params"], ("n_workers", "ray_address")
    other = [name for name, value in params.items() if made.get(name, value) != value and name not in workers]
    if other := [name for name in other if not name.endswith("_dir")]:
        print(f"{out_dir} was made with another {', '.join(other)}: the study is run")
    else:
        print(f"{out_dir} was made with these values, and is read; to run the study, give out_dir another folder")
    return not other


def literals(cell: str) -> dict[str, Any]:
    """What a cell assigns to which names if it does nothing but assign literals, else nothing.

    >>> literals("a = 1\\nb = [2, 'x']"), literals("a = f(1)")
    ({'a': 1, 'b': [2, 'x']}, {})
    """
    found = {}
    try:
        for statement in ast.parse(cell).body:
            if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
                return {}
            found[statement.targets[0].id] = ast.literal_eval(statement.value)
    except (SyntaxError, ValueError):
        return {}
    return found
