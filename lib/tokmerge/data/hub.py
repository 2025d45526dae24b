"""Data sets of the Hugging Face hub, or local folders of parquet files with the same columns."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from tokmerge.data.image_sets import DataError

Row = dict[str, Any]


def open_hub(
    name: str, split: str, columns: list[str], check: Callable[[Row], None], remedy: str, config: str | None = None,
    keep: bool = False,
) -> tuple[Row, list[Row], Callable[[int], Iterator[Row]]]:  # fmt: skip
    """The features, all rows of some columns, and a stream of whole rows, whose images are still encoded.

    A set whose files a script of its own makes, which is not run, comes from the copy that the hub keeps in parquet.

    Args:
        name: of the set, or a local folder.
        split: its part; ``validation[:1000]`` for the first rows only, of which alone anything is fetched.
        columns: those that are read at once.
        check: raises if the features (by column) are not those needed.
        remedy: what the message of an error ends with.
        config: of sets that have several.
        keep: fetch the set once, into the hub's cache, instead of streaming it whenever it is read.

    Raises:
        DataError: no access, no such data, or a wrong schema.
    """
    import datasets

    found = re.fullmatch(r"([\w.-]+)(?:\[:(\d+)\])?", split)
    if found is None:
        raise DataError(f"split {split!r} of data set {name}: use a name such as validation, or validation[:1000]")
    given: dict[str, Any] = {"name": config, "split": found[1], "streaming": not keep}

    def rows_of(**only: Any) -> Any:
        rows = datasets.load_dataset(name, **given, **only)
        return rows.take(int(found[2])) if found[2] else rows

    try:
        try:
            rows = rows_of()
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            given["revision"] = "refs/convert/parquet"
            rows = rows_of()
        features = dict(rows.features or {})
        check(features)
        # Named to the parquet reader, so that the images (6.7 GB in ImageNet's validation split) stay where they are.
        light = list(rows.select_columns(columns) if keep else rows_of(columns=columns))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"data set {name}, split {split!r}: {type(error).__name__}: {error}\n{remedy}") from error
    # Not decoded here, because the library would also turn photos by their EXIF orientation, unlike an image folder.
    encoded = rows.cast_column("image", datasets.Image(decode=False))
    return features, light, lambda start: iter(encoded.skip(start))
