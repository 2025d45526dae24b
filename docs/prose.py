"""Numbers in prose: what a comment names is what numbers.json says.

    python docs/prose.py            # write the numbers of README.md and docs/*.md anew
    python docs/prose.py --check    # fail if one differs

``0.31<!-- search.hypervolume -->`` is a number and its key. As many digits are shown as are written; before "%" and
"points" a fraction is shown in hundredths; a name is compared, never written. Between ``<!-- numbers -->`` and
``<!-- /numbers -->`` every number with a decimal point or a "%" needs its key.
"""

import re
import sys
from collections.abc import Mapping

from tokmerge.io import paths, store

KEY = r"<!-- (?P<key>\w+(?:\.[\w-]+)+) -->"
TAGGED = re.compile(r"(?P<number>[-+\u2212]?\d[\d,]*(?:\.\d+)?)(?P<unit>(?: (?:%|points?))?)" + KEY)
NAMED = re.compile(r"(?P<said>[^|.,;:(]*?)" + KEY)
BETWEEN = re.compile(r"<!-- numbers -->(.*?)<!-- /numbers -->", re.DOTALL)
PLAIN = re.compile(r"(?<![\w.-])[-+\u2212]?\d+\.\d+(?![\w.]*\w*[-/])(?: (?:%|points?|dB))?(?!<!--)|\b\d+ %(?!<!--)")


def shown(value: float, as_written: str, hundredths: bool) -> str:
    """A value with the digits and the sign of what is written.

    >>> shown(0.31271, "0.5", False), shown(-0.0042, "+1.23", True), shown(10000, "9,999", False)
    ('0.3', '\u22120.42', '10,000')
    """
    value = 100 * value if hundredths else value
    digits = len(as_written.partition(".")[2])
    text = f"{abs(value):,.{digits}f}"
    sign = "\u2212" if value < 0 and float(text.replace(",", "")) else "+" if as_written[0] in "+\u2212" else ""
    return sign + text


def fill(text: str, numbers: Mapping[str, float | str]) -> str:
    """The text with every number that has a key written anew.

    Raises:
        ValueError: a key that is not there, a name that differs, or a number that lacks its key.

    >>> fill("at 9.9 %<!-- a.top1 -->, ToMe<!-- a.method -->", {"a.top1": 0.917, "a.method": "ToMe"})
    'at 91.7 %<!-- a.top1 -->, ToMe<!-- a.method -->'
    """
    for match in NAMED.finditer(text):
        value = numbers.get(match["key"])
        if value is None:
            raise ValueError(f"{match['key']} is not in numbers.json")
        if isinstance(value, str) and not match["said"].strip(" *").endswith(value):
            raise ValueError(f"{match['key']} is {value!r}, and the text says {match['said'].strip()!r}")

    def anew(match: re.Match[str]) -> str:
        value, unit = numbers[match["key"]], match["unit"].strip()
        if isinstance(value, str):
            return match[0]
        hundredths = unit == "%" or (unit.startswith("point") and "_pp" not in match["key"])
        return f"{shown(value, match['number'], hundredths)}{match['unit']}<!-- {match['key']} -->"

    filled = TAGGED.sub(anew, text)
    for part in BETWEEN.findall(filled):
        if lacking := PLAIN.findall(TAGGED.sub("", part)):
            raise ValueError(f"without a key: {', '.join(lacking)}")
    return filled


def main() -> None:
    root = paths.root()
    numbers, wrong = store.load_json(root / "figures" / "numbers.json"), []
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = page.read_text()
        try:
            filled = fill(text, numbers)
        except ValueError as error:
            wrong.append(f"{page.name}: {error}")
            continue
        if filled != text and "--check" in sys.argv:
            before, after = text.splitlines(), filled.splitlines()
            wrong += [f"{page.name}: {new}" for old, new in zip(before, after, strict=True) if old != new]
        elif filled != text:
            page.write_text(filled)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
