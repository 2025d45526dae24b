"""What every notebook does first: read its parameters, and refuse the ones it does not know."""

import ast
from collections.abc import Mapping
from typing import Any

INJECTED = "# Parameters"


def parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a notebook with these ``globals()``, and their values in this run.

    A parameters cell holds nothing but assignments of literals. papermill adds its own copy below it, and only warns
    about a name the notebook does not have; here that is an error, before any work.

    Raises:
        ValueError: a parameter was given that the notebook does not have; the message lists those it has.

    >>> parameters({"In": ["", "seed = 0", "# Parameters\\nseed = 1"], "seed": 1})
    {'seed': 1}
    """
    declared: list[str] = []
    given: list[str] = []
    for cell in namespace["In"]:
        names = literal_names(cell)
        if names and cell.startswith(INJECTED):
            given = names
        elif names and not given:
            declared = names
    if not declared:
        # A runner that keeps no history (nbval) injects nothing either: the plain values so far are the parameters, but
        # for constants that were imported.
        plain = (str, int, float, list, tuple, dict, type(None))
        own = [name for name in namespace if not (name.startswith("_") or name.isupper() or name in ("In", "Out"))]
        return {name: namespace[name] for name in own if isinstance(namespace[name], plain)}
    unknown = [name for name in given if name not in declared]
    if unknown:
        raise ValueError(f"unknown parameter {', '.join(unknown)}: this notebook has {', '.join(declared)}")
    return {name: namespace[name] for name in declared}


def literal_names(cell: str) -> list[str]:
    """Names a cell assigns if it does nothing but assign literals to names, else none.

    >>> literal_names("a = 1\\nb = [2, 'x']"), literal_names("a = f(1)")
    (['a', 'b'], [])
    """
    try:
        statements = ast.parse(cell).body
        names = []
        for statement in statements:
            if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
                return []
            ast.literal_eval(statement.value)
            names.append(statement.targets[0].id)
    except (SyntaxError, ValueError):
        return []
    return names
