import matplotlib.pyplot as plt
from tokmerge.plots.style import save_figure, shades, style


def test_saved_figures_are_the_same_bytes_at_every_run(tmp_path):
    style()
    for run in ("a", "b"):
        fig, ax = plt.subplots()
        ax.plot([0, 1], [0, 1], label="x")
        ax.legend()
        save_figure(fig, tmp_path / run)
    for suffix in (".svg", ".png"):
        first, second = ((tmp_path / f"{run}{suffix}").read_bytes() for run in ("a", "b"))
        assert first == second
        assert len(first) > 1000


def test_a_name_keeps_its_shade_and_the_palette_begins_again():
    colors = shades(["b", "a", "b", *range(20)])
    assert list(colors)[:3] == ["b", "a", 0]
    assert tuple(colors["b"]) != tuple(colors["a"])
    assert tuple(colors[18]) == tuple(colors["b"]), "the twenty-first"
