import ast

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from tokmerge import origins, paths

CELLS = [
    new_markdown_cell("# 90 · Figures"),
    new_code_cell('first = load(need(f"{a}/a.json", made_by="10_a"))\ntitle = first["title"]'),
    new_markdown_cell("## Both\nWhat *both* show."),
    new_code_cell('second = load(need("b", made_by="20_b"))'),
    new_code_cell(
        "for name, part in second.groups():\n    draw(part)\nax.set_title(title)\nplots.save(fig, target / 'both')"
    ),
    new_markdown_cell("## One of each"),
    new_code_cell(
        'third = load(need("c", made_by="30_c"))\n'
        "for name in third.kinds:\n    plots.save(draw(third, name), target / f'each_{name}')"
    ),
    new_code_cell("for name in second:\n    plots.save(draw(second), target / name)"),
    new_code_cell("first = 1\nplots.save(draw(first), target / 'nothing')"),
]


def test_a_figure_knows_its_caption_and_the_notebooks_behind_it(tmp_path):
    nbformat.write(new_notebook(cells=CELLS), tmp_path / "90_figures.ipynb")
    drawn = ["each_x", "each_y", "both", "nothing", "stray"]
    figures = {figure.name: figure for figure in origins.find_figures(tmp_path, drawn)}
    assert list(figures) == ["both", "each_x", "each_y", "nothing", "stray"], "in the order of the code"
    assert figures["both"].tables_of == ("10_a", "20_b")
    assert figures["both"].caption.strip() == "<p>What <em>both</em> show.</p>"
    assert figures["each_y"].tables_of == ("30_c",)
    assert "One of each" in figures["each_y"].caption
    assert figures["nothing"].tables_of == (), "the variable was assigned something else"
    assert figures["stray"].tables_of == ("20_b",), "only a run knows its name"


def test_a_figure_that_no_code_names_comes_last(tmp_path):
    nbformat.write(new_notebook(cells=CELLS[:5]), tmp_path / "90_figures.ipynb")
    both, stray = origins.find_figures(tmp_path, ["a_stray", "both"])
    assert (both.name, stray.name) == ("both", "a_stray")
    assert (stray.caption, stray.drawn_by, stray.tables_of) == ("", "90_figures", ())


def test_every_committed_figure_is_found_with_its_caption():
    root = paths.root()
    drawn = {path.stem for path in (root / "figures").glob("*.png")}
    figures = {figure.name: figure for figure in origins.find_figures(root / "notebooks", drawn)}
    assert set(figures) == drawn
    for figure in figures.values():
        assert figure.tables_of, f"{figure.name}: no tables behind it"
        assert figure.caption, f"{figure.name}: no caption"
    assert figures["search_hypervolume"].tables_of == ("31_search_study",)
    assert figures["merge_maps"].tables_of == ("20_merging",)


def test_loop_variables():
    assert origins.loop_variables(ast.parse("for a, (b, c) in x:\n    [d for d in e]")) == {"a", "b", "c", "d"}
