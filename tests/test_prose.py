import runpy
from types import SimpleNamespace

import pytest
from tokmerge import verify
from tokmerge.io import paths, store

ROOT = paths.root()
prose = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "prose.py")))
NUMBERS = {"a.top1": 0.9172, "a.drop": -0.0042, "a.n": 10000, "a.gain_pp": -1.25, "a.method": "ToMe", "a.macs": 0.3127}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("1 %<!-- a.top1 -->", "92 %<!-- a.top1 -->"),
        ("1.0 %<!-- a.top1 -->", "91.7 %<!-- a.top1 -->"),
        ("0.00 points<!-- a.drop -->", "−0.42 points<!-- a.drop -->"),
        ("+0.0 points<!-- a.gain_pp -->", "−1.2 points<!-- a.gain_pp -->"),
        ("+0.0<!-- a.macs -->", "+0.3<!-- a.macs -->"),
        ("1 test images<!-- a.n -->", "1 test images<!-- a.n -->"),
        ("1<!-- a.n --> test images", "10,000<!-- a.n --> test images"),
        ("needs **ToMe**<!-- a.method -->", "needs **ToMe**<!-- a.method -->"),
    ],
)
def test_numbers_are_written_as_they_stand(text, filled):
    assert prose.fill(text, NUMBERS) == prose.fill(filled, NUMBERS) == filled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.3<!-- a.gone -->", "a.gone is not in numbers.json"),
        ("ToFu<!-- a.method -->", "a.method is 'ToMe', and the text says 'ToFu'"),
        ("<!-- numbers -->half, or 0.52 of it, 5 %<!-- /numbers -->", "without a key: 0.52, 5 %"),
    ],
)
def test_prose_that_cannot_be_held_to_its_numbers_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        prose.fill(text, NUMBERS)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_every_number_in_prose_is_the_one_of_its_key(page):
    text, numbers = (ROOT / page).read_text(), store.load_json(ROOT / "figures" / "numbers.json")
    # Rebuilt on another machine numbers move by what machines differ in: prose may go on saying what was committed.
    differ = verify.compare(verify.committed(ROOT), numbers)
    moved = {one.key: one.before for one in differ if not one.beyond and one.before is not None}
    assert text in (prose.fill(text, numbers), prose.fill(text, numbers | moved))
    assert page != "README.md" or text.count("<!-- numbers -->") == 1
