"""How Sphinx builds the site, see `make site`; gather.py collects what is shown."""

import re
from pathlib import Path
from textwrap import indent

from docutils import nodes

project = html_title = "Adaptive token merging"
html_theme, html_static_path, html_css_files = "sphinx_book_theme", ["style.css"], ["style.css"]
html_context = {"default_mode": "auto"}
html_theme_options = {"use_download_button": False, "use_fullscreen_button": False, "collapse_navbar": True}
html_use_index = html_domain_indices = html_show_copyright = False
html_copy_source = html_show_search_summary = False  # a page opened as a file may fetch nothing
exclude_patterns = ["README.md"]  # index.md holds it

extensions = ["myst_nb", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
nb_execution_mode, nb_merge_streams, nb_output_stderr = "off", True, "remove"
nb_render_markdown_format = "myst"  # so that links in what a notebook shows lead to pages
nb_ipywidgets_js = {}  # comes from elsewhere
myst_heading_anchors, default_role = 3, "code"
viewcode_follow_imported_members = False  # what the root exports is described where it is defined
library = {"path": Path(__file__).parents[1] / "lib" / "tokmerge", "destination": "api"}
apidoc_modules = [{**library, "automodule_options": {"members", "show-inheritance"}}]
apidoc_separate_modules = apidoc_module_first = napoleon_use_ivar = True
suppress_warnings = ["ref.python"]  # "edge_macs, macs: ..." among a class's attributes is no reference


def describe(app, doctree):
    """Give the figures of notebooks an alternative text."""
    for image in doctree.findall(nodes.image):
        image.setdefault("alt", f"Figure of {next(doctree.findall(nodes.title)).astext()}")


def mark_up(app, what, name, obj, options, lines):
    """Leave tables and drawings of docstrings as they are typed; a bar is no markup elsewhere."""
    paragraphs = re.split(r"\n\n", "\n".join(lines))
    for i, text in enumerate(paragraphs):
        if text.startswith("|") or (what == "module" and text.startswith("    ")):
            paragraphs[i] = "::\n\n" + indent(text, "    ")
        elif ">>>" not in text:
            paragraphs[i] = text.replace("|", r"\|")
    lines[:] = "\n\n".join(paragraphs).split("\n")


def setup(app):
    """Called by Sphinx."""
    app.connect("doctree-read", describe)
    # Fields of a NamedTuple are told of where the class is.
    app.connect("autodoc-skip-member", lambda *given: type(given[3]).__name__ == "_tuplegetter" or None)
    app.connect("autodoc-process-docstring", mark_up, priority=400)  # before Google's style is read
