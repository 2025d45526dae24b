"""`python docs/trim.py`: the executed notebooks that ship in docs/executed, where a git host shows them.

Those of the embedded profile, whose studies are read; trainings, which take hours there, of the smoke profile, with a
note. Outputs are trimmed: no progress bars, no warnings, long texts cut, figures in few colours. An older copy stays
where none was executed.
"""

import base64
import io
import sys
from pathlib import Path
from typing import Any

import nbformat
from gather import WIDGET
from PIL import Image
from tokmerge.io import paths

PROFILES = {
    "embedded": "",
    "smoke": "Executed with its smallest values, which show how it works and nothing else: the shipped weights are of "
    "the embedded profile, and took hours.",
}
LONGEST, COLOURS = 4000, 192  # characters of a text; of a figure


def trimmed(source: Path, executed: Path, note: str) -> Any:
    """A notebook with its outputs, without what only machines read. Its texts may be newer than the run.

    Raises:
        ValueError: the run did not come to its end, or its code was another.
    """
    book = nbformat.read(source, as_version=4)
    ran = [cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"]
    given = [cell for cell in ran if "injected-parameters" in cell.metadata.get("tags", [])]
    own = [cell for cell in ran if cell not in given]
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    if [cell.source for cell in own] != [cell.source for cell in code] or not all(cell.execution_count for cell in own):
        raise ValueError(f"{executed} is not {source} as it is now, or did not come to its end: run it again")
    for cell, done in zip(code, own, strict=True):
        cell.execution_count = done.execution_count
        cell.outputs = [output for output in map(_output, done.outputs) if output]
    for cell in given:
        cell.id = "given"
        book.cells.insert(book.cells.index(code[0]) + 1, cell)
    for cell in book.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
    if note:
        book.cells.insert(1, nbformat.v4.new_markdown_cell(f"*{note}*", id="note"))
    return book


def _output(output: Any) -> Any:
    if output.output_type == "stream":
        return _cut(output, "text") if output.name == "stdout" else None
    data = output.get("data", {})
    if WIDGET in data:
        return None
    if "image/png" in data:
        data["image/png"] = _few_colours(data["image/png"])
    for kind in ("text/plain", "text/markdown"):
        if kind in data:
            _cut(data, kind)
    output.metadata = {}
    return output


def _cut(holder: Any, key: str) -> Any:
    if len(holder[key]) > LONGEST:
        holder[key] = f"{holder[key][: LONGEST // 2]}\n[...]\n{holder[key][-LONGEST // 2 :]}"
    return holder


def _few_colours(png: str) -> str:
    with Image.open(io.BytesIO(base64.b64decode(png))) as image, io.BytesIO() as small:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
        return min(base64.b64encode(small.getvalue()).decode(), png, key=len)


def main(root: Path) -> None:
    """Trim what was executed since the copies that ship.

    Raises:
        ValueError: of a notebook there is neither an executed copy nor one that ships.
    """
    target = root / "docs" / "executed"
    target.mkdir(exist_ok=True)
    for source in sorted((root / "notebooks").glob("*.ipynb")):
        ran = [profile for profile in PROFILES if (root / "executed" / profile / source.name).is_file()]
        if ran:
            book = trimmed(source, root / "executed" / ran[0] / source.name, PROFILES[ran[0]])
            (target / source.name).write_text(nbformat.writes(book).replace(str(root), "."))
        elif not (target / source.name).is_file():
            raise ValueError(f"{source.name} was executed in none of the profiles {', '.join(PROFILES)}")


if __name__ == "__main__":
    try:
        main(paths.root())
    except ValueError as error:
        sys.exit(f"trim: {error}")
