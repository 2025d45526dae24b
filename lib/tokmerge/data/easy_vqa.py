"""easy-VQA: questions about one drawn shape, as its wheel ships them."""

from importlib.util import find_spec
from pathlib import Path

from tokmerge.data.image_sets import DataError
from tokmerge.data.questions import Question, QuestionSet, open_from, read_json, with_images


def load_easy_vqa(split: str, path: str | Path | None = None) -> QuestionSet:
    """easy-VQA (Victor Zhou, 2019): 64x64 drawings of one shape; 38,575 + 9,673 questions, 13 answers.

    Args:
        split: "train" (4,000 images) or "test" (1,000).
        path: folder that holds train/ and test/; by default the data inside the installed package easy-vqa.

    Raises:
        DataError: the package is not installed, a file is missing, truncated or of another form.
    """
    if split not in ("train", "test"):
        raise DataError(f"easy-VQA has no split {split!r}: use 'train' or 'test'")
    if path is None:
        spec = find_spec("easy_vqa")
        if spec is None or spec.origin is None:
            raise DataError("easy-VQA is not installed: pip install easy-vqa")
        path = Path(spec.origin).parent / "data"
    folder = Path(path) / split
    rows = read_json(folder / "questions.json")
    try:
        table = [(str(text), str(answer), str(int(image))) for text, answer, image in rows]
    except (TypeError, ValueError) as error:
        raise DataError(f"{folder / 'questions.json'} is not a list of [question, answer, image]: {error}") from error
    kinds = {"yes": "yes/no", "no": "yes/no", "circle": "shape", "rectangle": "shape", "triangle": "shape"}
    questions = []
    for index, (text, answer, image) in enumerate(table):
        kind = kinds.get(answer, "color")
        questions.append(Question(index, image, text, (answer,), "yes/no" if kind == "yes/no" else "other", kind))
    names = {question.image_id: f"{question.image_id}.png" for question in questions}
    return with_images("easy-VQA", split, questions, open_from(folder / "images", names))
