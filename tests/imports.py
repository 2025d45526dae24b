"""What code of the project imports: read from its syntax, so that imports inside functions and by name count too."""

import ast
import re
from functools import cache

import nbformat
from tokmerge.io import paths

ROOT = paths.root()
LIB = ROOT / "lib" / "tokmerge"
# Every module by its dotted name below the package; a folder by its own; the package itself is left out.
FILES = {path.relative_to(LIB).with_suffix("").as_posix().replace("/", "."): path for path in LIB.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items() if name != "__init__"}


def module(name: str) -> str | None:
    """The module that a dotted name starts with: ``io.store.load_json`` is of ``io.store``."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def lazily(name: str) -> str:
    """The module that a name of the package itself comes from: ``patch`` is ``models.patching.patch``."""
    import tokmerge

    found = getattr(tokmerge, name)
    return getattr(found, "__module__", None) or found.__name__


def imports(source: str) -> set[str]:
    """Modules of the package that a piece of code names.

    Raises:
        ValueError: it looks a name up in the package that only shows when it runs.
    """
    tree = ast.parse(source)
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    named = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            named |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", dotted := ast.unparse(node)):
            named.add(dotted)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "import_module"):
            named |= looked_up(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            named |= set(re.findall(r"^tokmerge\.[\w.]+$", node.value))
    names = {name.removeprefix("tokmerge.") for name in named if name.startswith("tokmerge.")}
    return {found for name in names if (found := module(name) or module(lazily(name).removeprefix("tokmerge.")))}


def looked_up(call: ast.Call) -> set[str]:
    """What ``getattr(tokmerge, ...)`` or ``import_module(...)`` names."""
    of, *rest = call.args
    if ast.unparse(call.func) == "getattr" and ast.unparse(of) != "tokmerge":
        return set()
    name = rest[0] if rest else of
    if isinstance(name, ast.JoinedStr) and not ast.unparse(name.values[0]).startswith(("'tokmerge", "{")):
        return set()  # of another package
    if not isinstance(name, ast.Constant):
        raise ValueError(f"{ast.unparse(call)}: nobody can read what that imports")
    return {f"tokmerge.{name.value}" if rest else name.value}


@cache
def imported(name: str) -> frozenset[str]:
    """Modules that a module of the library imports itself; its own folder is none of them."""
    return frozenset(imports(MODULES[name].read_text())) - {name}


def closure(names: set[str]) -> set[str]:
    """All modules that importing these brings in, themselves included."""
    more = names.union(*map(imported, names))
    return names if more == names else closure(more)


def cells(name: str) -> list:
    """A notebook's."""
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells


def code_cells(name: str) -> list[str]:
    return [cell.source for cell in cells(name) if cell.cell_type == "code"]


def parameter_cell(name: str) -> str:
    """The one cell that is tagged so, which has to be the first with code."""
    (tagged,) = (cell.source for cell in cells(name) if "parameters" in cell.metadata.get("tags", []))
    assert tagged == code_cells(name)[0]
    return tagged


def place(name: str) -> str:
    """Where a module lives, as dvc.yaml names it: its folder, or its file beside the folders."""
    top = name.split(".")[0]
    return f"lib/tokmerge/{top}" if (LIB / top).is_dir() else f"lib/tokmerge/{top}.py"
