import json
import re
import shutil
from html.parser import HTMLParser

import nbformat
import pytest
import yaml
from nbformat.v4 import new_output
from tokmerge import paths, report

ROOT = paths.root()
WIDGET = "application/vnd.jupyter.widget-view+json"


class Links(HTMLParser):
    """Collects what a page links to and shows."""

    def __init__(self, html):
        super().__init__()
        self.found, self.ids = [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        self.found += [given[name] for name in ("href", "src") if name in given]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A copy of what a report is made of, with two executed notebooks: one whole, one that stopped half-way."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("notebooks", "figures", "params", "docs"):
        shutil.copytree(ROOT / name, root / name)
    for name in ("dvc.yaml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, root / name)
    folder = root / "executed" / "embedded"
    folder.mkdir(parents=True)
    for stem, done in (("10_inputs", 99), ("20_merging", 2)):
        notebook = nbformat.read(root / "notebooks" / f"{stem}.ipynb", as_version=4)
        for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
            if number < done:
                cell.execution_count = number + 1
                cell.outputs = [
                    new_output("stream", name="stdout", text=f"printed by cell {number}"),
                    new_output("stream", name="stderr", text="a warning"),
                    new_output("display_data", data={WIDGET: {"model_id": "x"}, "text/plain": "a progress bar"}),
                ]
        nbformat.write(notebook, folder / f"{stem}.ipynb")
    return root


@pytest.fixture(scope="module")
def site(root):
    return report.build(root).parent


def text(site, page):
    return (site / page).read_text()


def test_every_link_and_image_leads_somewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 2 + len(list((ROOT / "notebooks").glob("*.ipynb")))
    for page in pages:
        html = page.read_text()
        for link in Links(html).found:
            if not link.startswith(("https://", "data:", "#")):
                target = (page.parent / link.split("#")[0]).resolve()
                assert target.is_file(), f"{page.relative_to(site)} links to {link}"
                assert site.resolve() in target.parents


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        html = page.read_text()
        assert not re.search(r"""<(script|link|img|iframe)[^>]*(src|href)=["']?https?:""", html), page.name
    assert "url(http" not in text(site, "report.css")


def test_overview_shows_every_claim_figure_and_notebook(site):
    html = text(site, "index.html")
    for figure in (ROOT / "figures").glob("*.png"):
        assert f'src="figures/{figure.name}"' in html
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f'href="notebooks/{notebook.stem}.html"' in html
    assert "30 % fewer FLOPs" in html
    assert "<strong>met</strong>" in html


def test_what_is_missing_names_the_command_that_makes_it(site):
    assert "Not executed here: <code>make repro</code> does that" in text(site, "notebooks/30_search.html")
    assert "<code>make studies STUDY=search_study</code>" in text(site, "notebooks/31_search_study.html")
    assert "<code>make lab</code>" in text(site, "notebooks/00_tour.html")
    stopped = text(site, "notebooks/20_merging.html")
    assert "Its execution ended before the last cell: <code>make repro</code> goes on" in stopped
    assert "printed by cell 1" in stopped
    assert 'class="note"' not in text(site, "notebooks/10_inputs.html")


def test_progress_bars_and_warnings_stay_out(site):
    html = text(site, "notebooks/10_inputs.html")
    assert "printed by cell 0" in html
    assert "a progress bar" not in html
    assert "a warning" not in html
    assert WIDGET not in html


def test_a_notebook_changed_since_its_execution_says_so(root, tmp_path):
    source = root / "notebooks" / "10_inputs.ipynb"
    notebook = nbformat.read(source, as_version=4)
    notebook.cells[-1].source += "\nprint('more')"
    before = source.read_text()
    nbformat.write(notebook, source)
    try:
        assert "Executed from an earlier version" in report.notebook_page(source, "embedded").note
    finally:
        source.write_text(before)


def test_numbers_page_holds_every_number(site):
    html = text(site, "numbers.html")
    for key in json.loads((ROOT / "figures" / "numbers.json").read_text()):
        assert f"<code>{key}</code>" in html


def test_an_old_site_is_replaced_whole(root, site, tmp_path):
    out = tmp_path / "report"
    out.mkdir()
    (out / "stray.html").write_text("old")
    report.build(root, out=out)
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (site, out)
    )
    assert first == second, "the same bytes at every run, and nothing of the old site"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_without_figures_it_names_the_command(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="make repro PROFILE=paper"):
        report.build(root, profile="paper")


def test_commands_follow_the_pipeline(root):
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        stem = re.search(r"notebooks/(\w+)\.ipynb", stage["cmd"]).group(1)
        expected = f"make studies STUDY={name}" if stage.get("frozen") else "make repro"
        assert expected in report.make_command(root, stem, "embedded")
    study = report.make_command(root, "31_search_study", "paper")
    assert study == "`make studies PROFILE=paper STUDY=search_study` (hours)"
    assert report.make_command(root, "30_search", "paper") == "`make repro PROFILE=paper`"


def test_links_between_texts_lead_to_their_pages(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(
        "# Title\n[n](../notebooks/30_search.ipynb) [d](paper_profile.md) ![f](../figures/x.png)\n\n|a|\n|-|\n|1|\n"
    )
    html = report.markdown_page(page)
    assert (html.title, html.path) == ("Title", "docs/a.html")
    for part in (
        'href="../notebooks/30_search.html"',
        'href="paper_profile.html"',
        'src="../figures/x.png"',
        "<table>",
    ):
        assert part in html.html
