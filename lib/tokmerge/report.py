"""`python -m tokmerge.report`: a static site from executed notebooks, figures and pages, under results/report.

Everything is found, nothing is listed: notebooks, figures, dvc stages, docs. What was not executed is shown as it is in
the repository, and says which `make` command executes it.
"""

import argparse
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import markdown2html_mistune
from pygments.formatters import HtmlFormatter

from tokmerge import claims, origins, paths, verify

DOCS = ("docs/*.md", "CONTRIBUTING.md", "CHANGELOG.md")
NO_ALT = "No description has been provided for this image"


@dataclass(frozen=True)
class Page:
    """One page of the site.

    Attributes:
        path: below the site's folder, such as notebooks/00_tour.html.
        title: heading and link text.
        html: what stands below the navigation.
        group: heading in the navigation.
        about: one line of HTML for the overview: a notebook's question.
        note: HTML, what keeps it from being complete; "" for nothing.
    """

    path: str
    title: str
    html: str
    group: str
    about: str = ""
    note: str = ""

    @property
    def up(self) -> str:
        """From the page to the site's folder."""
        return "../" * self.path.count("/")


def build(root: Path, profile: str = "embedded", out: Path | None = None) -> Path:
    """Build the site; an old one is replaced once the new one is whole.

    Args:
        root: the repository.
        profile: whose executed notebooks and figures are shown.
        out: where the site goes; results/report by default.

    Returns:
        Its first page.

    Raises:
        FileNotFoundError: there are no figures yet.
    """
    params = yaml.safe_load((root / "params" / profile / "90_figures.yaml").read_text())
    drawn = root / params["out_dir"]
    if not (drawn / "numbers.json").is_file():
        command = "make repro" + ("" if profile == "embedded" else f" PROFILE={profile}")
        raise FileNotFoundError(f"{params['out_dir']} has no numbers.json: `{command}` writes it")
    numbers = json.loads((drawn / "numbers.json").read_text())
    out = out or root / "results" / "report"
    site = out.with_name(f".{out.name}.new")
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(drawn, site / "figures")
    templates = Environment(
        loader=FileSystemLoader(paths.ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    notebooks = [notebook_page(path, profile) for path in sorted((root / "notebooks").glob("*.ipynb"))]
    docs = [markdown_page(path) for pattern in DOCS for path in sorted(root.glob(pattern))]
    figures = origins.find_figures(root / "notebooks", {path.stem for path in drawn.glob("*.png")})
    stems = [Path(page.path).stem for page in notebooks]
    facts = {"numbers": numbers, "profile": profile, "notebooks": notebooks, "stems": stems, "figures": figures}
    intro = markdown2html_mistune((root / "README.md").read_text().split("\n\n")[1])
    index = templates.get_template("report_index.html").render(intro=intro, verdicts=claims.judge(numbers), **facts)
    table = templates.get_template("report_numbers.html").render(rule_of=verify.rule_of, **facts)
    pages = [
        Page("index.html", "Overview", index, ""),
        Page("numbers.html", "All numbers", table, ""),
        *notebooks,
        *docs,
    ]
    for position, page in enumerate(pages):
        around = {"before": pages[position - 1] if position else None, "after": (*pages, None)[position + 1]}
        html = templates.get_template("report_page.html").render(page=page, pages=pages, **around)
        (site / page.path).parent.mkdir(parents=True, exist_ok=True)
        (site / page.path).write_text(html)
    (site / "report.css").write_text((paths.ASSETS / "report.css").read_text() + code_colours())
    shutil.rmtree(out, ignore_errors=True)
    site.rename(out)
    return out / "index.html"


def notebook_page(path: Path, profile: str) -> Page:
    """The page of one notebook: executed if it was, else as it is in the repository."""
    root, source = path.parent.parent, nbformat.read(path, as_version=4)
    executed = root / "executed" / profile / path.name
    command = make_command(root, path.stem, profile)
    shown, note = source, f"Not executed here: {command} does that."
    if executed.is_file():
        shown = nbformat.read(executed, as_version=4)
        code = [cell for cell in shown.cells if cell.cell_type == "code"]
        note = ""
        if any(cell.execution_count is None for cell in code if cell.source):
            note = f"Its execution ended before the last cell: {command} goes on."
        elif code_of(shown) != code_of(source):
            note = f"Executed from an earlier version of it: {command} brings it up to date."
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    html, _ = exporter.from_notebook_node(without_progress(shown))
    title = source.cells[0].source.splitlines()[0].lstrip("# ")
    question = re.search(r"\*\*(.+?\?)\*\*", source.cells[0].source, re.DOTALL)
    about = question.group(1).replace("\n", " ") if question else ""
    html = html.replace(NO_ALT, f"Figure of {title}")
    return Page(f"notebooks/{path.stem}.html", title, html, "Notebooks", inline(about), inline(note))


def inline(text: str) -> str:
    """One line of markdown as HTML, without a paragraph around it.

    >>> inline("run `make`")
    'run <code>make</code>'
    """
    return markdown2html_mistune(text).strip().removeprefix("<p>").removesuffix("</p>")


def make_command(root: Path, stem: str, profile: str) -> str:
    """The command that executes a notebook: found in the pipeline, where frozen stages are those of `make studies`."""
    pipeline = root / ("dvc.yaml" if profile == "embedded" else f"params/{profile}/dvc.yaml")
    option = "" if profile == "embedded" else f" PROFILE={profile}"
    for name, stage in yaml.safe_load(pipeline.read_text())["stages"].items():
        if f"notebooks/{stem}.ipynb" in stage["cmd"]:
            if not stage.get("frozen"):
                return f"`make repro{option}`"
            shipped = "" if option else "; its tables ship with the repository"
            return f"`make studies{option} STUDY={name}` (hours{shipped})"
    return "`make lab` (run all cells)"


def code_of(notebook: Any) -> list[str]:
    """Sources of a notebook's code cells, without what papermill injected."""
    return [
        cell.source
        for cell in notebook.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]


def without_progress(notebook: Any) -> Any:
    """The notebook without progress bars and other widgets, which need a running kernel."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr"
                and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            ]
    return notebook


def markdown_page(path: Path) -> Page:
    """The page of a text of the repository; links to notebooks and other texts lead to their pages."""
    text = path.read_text()
    text = re.sub(r"\]\((?:\.\./)?notebooks/(\w+)\.ipynb\)", r"](../notebooks/\1.html)", text)
    text = re.sub(r"\]\((?:\.\./)?(?:docs/)?([A-Za-z_]+)\.md\)", r"](\1.html)", text)
    text = re.sub(r"\]\((?:\.\./)?figures/", "](../figures/", text)
    title = text.splitlines()[0].lstrip("# ")
    return Page(f"docs/{path.stem}.html", title, markdown2html_mistune(text), "Pages")


def code_colours() -> str:
    """CSS of highlighted code, light and dark."""
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark"))
    return f"\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def main() -> None:
    """Build the site and print where it is."""
    parser = argparse.ArgumentParser(prog="python -m tokmerge.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profile", nargs="?", default="embedded", choices=("embedded", "paper"))
    try:
        first = build(paths.root(), parser.parse_args().profile)
    except FileNotFoundError as error:
        sys.exit(f"report: {error}")
    print(f"report: open {first}")


if __name__ == "__main__":
    main()
