"""One name, one meaning: no two modules of the library define the same public name."""

import ast
from collections import defaultdict

from imports import MODULES

# A program's entry point; what attaches policies to a model and detaches them, one for each kind of model.
ALLOWED = {"main", "patch", "unpatch"}


def public_names(file):
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_no_public_name_has_two_homes():
    homes = defaultdict(list)
    for module, file in MODULES.items():
        for name in public_names(file) - ALLOWED:
            homes[name].append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}
