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
    unknown = [name for name in given if name not in declared]
    if unknown:
        raise ValueError(f"unknown parameter {', '.join(unknown)}: this notebook has {', '.join(declared)}")
    for name, value in given.items():
        kind = type(declared[name])
        # None is no type: it leaves open what else may be given; a whole number is a number.
        if None not in (value, declared[name]) and type(value) not in ((kind, int) if kind is float else (kind,)):
            raise ValueError(f"{name} is {value!r}, a {type(value).__name__}: this notebook takes a {kind.__name__}")
    return {name: namespace[name] for name in declared}


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
