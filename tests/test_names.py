"""One name, one meaning: no two modules of the library define the same public name."""

import ast
from collections import defaultdict
from pathlib import Path

import tokmerge

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
    homes, root = defaultdict(list), Path(tokmerge.__file__).parent
    for file in sorted(root.rglob("*.py")):
        for name in public_names(file) - ALLOWED:
            homes[name].append(str(file.relative_to(root)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
