"""What docs/gather.py collects for the site, and what 91_claims leaves for it. `make test-browser` looks at pages."""

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import yaml
from nbformat.v4 import new_output
from tokmerge import claims
from tokmerge.io import paths

ROOT = paths.root()
WIDGET = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "a progress bar"}


@pytest.fixture
def root(tmp_path):
    """A copy of what a site is made of, with three executed notebooks (whole, stopped half-way, and an older one), and
    one that ships executed."""
    for name in ("notebooks", "figures", "params", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in (tmp_path / "docs" / "executed").glob("*.ipynb"):
        if path.stem != "35_images_study":
            path.unlink()
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path / name)
    stages = {
        name: {"foreach": "${profiles}", "do": {"deps": [f"notebooks/{stem}.ipynb"], "frozen": name.endswith("study")}}
        for name, stem in (("search", "30_search"), ("search_study", "36_search_study"), ("figures", "91_claims"))
    }
    stages["merging"] = {"foreach": "${profiles}", "do": {"deps": ["notebooks/20_merging.ipynb"]}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    folder = tmp_path / "executed" / "embedded"
    folder.mkdir(parents=True)
    for stem, done, more in (("10_inputs", 99, ""), ("20_merging", 2, ""), ("30_search", 99, "\nprint('more')")):
        book = nbformat.read(tmp_path / "notebooks" / f"{stem}.ipynb", as_version=4)
        for number, cell in enumerate(cell for cell in book.cells if cell.cell_type == "code"):
            cell.source += more
            if number < done:
                cell.execution_count = number + 1
                cell.outputs = [new_output("display_data", data=WIDGET), new_output("stream", text=f"cell {number}")]
        nbformat.write(book, folder / f"{stem}.ipynb")
    return tmp_path


def gather(root, profile):
    command = [sys.executable, ROOT / "docs" / "gather.py", profile, "site"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_all_is_collected_where_links_look_for_it_and_what_is_missing_says_so(root):
    (root / "site").mkdir()
    (root / "site" / "stray.md").write_text("old")
    done = gather(root, "embedded")
    assert done.returncode == 0, done.stderr
    site = root / "site"
    assert not (site / "stray.md").exists()
    for text in [path for folder in (site, site / "docs", site / "figures") for path in folder.glob("*.md")]:
        for link in re.findall(r"\]\((?!https)([^)#]+)", text.read_text()):
            assert (text.parent / link).exists(), f"{text.name} links to {link}"
    told = {path.stem: path.read_text() for path in (site / "notebooks").glob("*.ipynb")}
    assert set(told) == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert "Executed from an earlier version of it: `make repro` brings it up to date." in told["30_search"]
    assert "Not executed here: `make studies STUDY=search_study` (hours) does that." in told["36_search_study"]
    assert "Not executed here: `make lab` (run all cells) does that." in told["00_tour"]
    assert "Its execution ended before the last cell: `make repro` goes on." in told["20_merging"]
    assert "{warning}" not in told["10_inputs"]
    assert "{warning}" not in told["35_images_study"], "the copy that ships"
    assert '"execution_count": 1,' in told["35_images_study"]
    assert "cell 0" in told["10_inputs"]
    assert "a progress bar" not in told["10_inputs"]
    page, numbers = (site / "figures" / "numbers.md").read_text(), (ROOT / "figures" / "numbers.json").read_text()
    assert all(f"| `{key}` | {value} |" in page for key, value in json.loads(numbers).items())


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_executed_copy_that_ships_is_whole_and_of_this_version(path):
    copy = ROOT / "docs" / "executed" / path.name
    assert copy.stat().st_size < 2_000_000
    assert str(ROOT) not in copy.read_text()
    ran = [cell for cell in nbformat.read(copy, as_version=4).cells if cell.id != "note"]
    own = [cell.source for cell in ran if "injected-parameters" not in cell.metadata.get("tags", [])]
    assert own == [cell.source for cell in nbformat.read(path, as_version=4).cells], "run it, then `make executed`"
    code = [cell for cell in ran if cell.cell_type == "code" and cell.source]
    assert all(cell.execution_count for cell in code)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)


def test_without_figures_one_line_names_the_command(root):
    done = gather(root, "paper")
    assert done.returncode == 1
    said = "site: results/paper/figures has no claims.md: `make repro PROFILE=paper` writes it\n"
    assert done.stderr == said


def test_every_committed_figure_has_a_caption_and_the_notebooks_behind_it():
    text = (ROOT / "figures" / "README.md").read_text()
    shown = re.findall(r"\[!\[(.+)\]\((\w+)\.png\)\]\((\w+)\.svg\)\n\n(.+?) \*Tables of (.+)\.\*", text)
    drawn = {path.stem for path in (ROOT / "figures").glob("*.svg")}
    assert {png for _, png, _, _, _ in shown} == {svg for _, _, svg, _, _ in shown} == drawn
    assert all(alt == caption for alt, _, _, caption, _ in shown)
    for *_, makers in shown:
        links = re.findall(r"\[(\w+)\]\(\.\./notebooks/(\w+)\.ipynb\)", makers)
        assert links
        assert all(name == stem and (ROOT / "notebooks" / f"{stem}.ipynb").is_file() for name, stem in links)


def test_the_page_of_claims_has_a_row_for_each():
    _, claimed = claims.load_claims("params/claims.yaml")
    page = (ROOT / "figures" / "claims.md").read_text()
    assert all((ROOT / "notebooks" / f"{claim.notebook}.ipynb").is_file() for claim in claimed)
    said = re.findall(rf"\| \*\*({'|'.join(claims.VERDICTS)})\*\* \|$", page, re.MULTILINE)
    numbers = json.loads((ROOT / "figures" / "numbers.json").read_text())
    assert said == [numbers[f"claims.{claim.name}.verdict"] for claim in claimed]
