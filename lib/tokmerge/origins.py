"""Where figures come from: read off the notebook that draws them, so that no list has to be kept.

A figure notebook loads tables by ``paths.need(..., made_by="20_merging")`` and saves figures by
``plots.save(figure, target / "name")``. The names in between tell which tables a figure shows.
"""

import ast
import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import nbformat
from nbconvert.filters.markdown_mistune import markdown2html_mistune


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: file name without suffix.
        caption: HTML, from the notebook that draws it.
        drawn_by: that notebook.
        tables_of: notebooks whose tables it shows.
    """

    name: str
    caption: str
    drawn_by: str
    tables_of: tuple[str, ...]


def find_figures(folder: Path, drawn: Iterable[str]) -> list[Figure]:
    """The figures that were drawn, in the order of the code that draws them, with the notebooks behind them.

    Args:
        folder: of the notebooks; those numbered 90 and above draw.
        drawn: names of figures that are there. One that no notebook's code names comes last, without a caption.
    """
    saved: dict[str, Figure] = {}
    for path in sorted(folder.glob("9*.ipynb")):
        behind: dict[str, set[str]] = {}
        caption = ""
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                heading, _, text = cell.source.partition("\n")
                caption = text if heading.startswith("#") and text else cell.source.lstrip("# ")
                continue
            tree = ast.parse(cell.source)
            follow(tree, behind)
            used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in behind}
            makers = sorted(set().union(*(behind[one] for one in used), direct_makers(tree)))
            html = markdown2html_mistune(caption)
            for pattern in saved_names(tree):
                saved.setdefault(pattern, Figure(pattern, html, path.stem, tuple(makers)))
            for name in loop_variables(tree):
                behind.pop(name, None)
    saved["*"] = saved.pop("*", Figure("*", "", "90_figures", ()))
    order, figures = list(saved), []
    for name in sorted(drawn):
        # The pattern that says most about a name is the one that saved it.
        pattern = max((one for one in order if fnmatch.fnmatch(name, one)), key=len)
        figures.append((order.index(pattern), replace(saved[pattern], name=name)))
    return [figure for _, figure in sorted(figures, key=lambda pair: pair[0])]


def follow(tree: ast.AST, behind: dict[str, set[str]]) -> None:
    """Note which notebooks' tables are behind each variable that a piece of code assigns or loops over."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            value, targets = node.value, node.targets
        elif isinstance(node, ast.For | ast.comprehension):
            value, targets = node.iter, [node.target]
        else:
            continue
        sources = direct_makers(value)
        for inner in ast.walk(value):
            if isinstance(inner, ast.Name):
                sources |= behind.get(inner.id, set())
        for target in (name for one in targets for name in ast.walk(one) if isinstance(name, ast.Name)):
            behind.pop(target.id, None)
            if sources:
                behind[target.id] = sources


def loop_variables(tree: ast.AST) -> set[str]:
    """Names that a piece of code loops with."""
    targets = [node.target for node in ast.walk(tree) if isinstance(node, ast.For | ast.comprehension)]
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def direct_makers(tree: ast.AST) -> set[str]:
    """Notebooks named by ``made_by=`` in a piece of code."""
    keywords = (node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "made_by")
    return {str(node.value.value) for node in keywords if isinstance(node.value, ast.Constant)}


def saved_names(tree: ast.AST) -> Iterator[str]:
    """Names of the figures that a piece of code saves; ``*`` for the parts that only a run knows.

    >>> list(saved_names(ast.parse("plots.save(fig, target / 'front'); plots.save(fig, out / f'front_{kind}')")))
    ['front', 'front_*']
    """
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "plots.save"
            and isinstance(node.args[1], ast.BinOp)
        ):
            name = node.args[1].right
            parts = name.values if isinstance(name, ast.JoinedStr) else [name]
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts)
