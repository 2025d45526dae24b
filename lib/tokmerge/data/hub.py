"""Data sets of the Hugging Face hub, or local folders of parquet files with the same columns, streamed."""

from collections.abc import Callable, Iterator
from typing import Any

from tokmerge.data.image_sets import DataError

Row = dict[str, Any]


def open_hub(
    name: str, split: str, columns: list[str], check: Callable[[Row], None], remedy: str, config: str | None = None
) -> tuple[Row, list[Row], Callable[[int], Iterator[Row]]]:
    """The features, all rows of some columns, and a stream of whole rows, whose images are still encoded.

    ``check`` raises if the features (by column) are not those needed; ``config`` is of sets that have several. A set
    whose files a script of its own makes, which is not run, comes from the copy that the hub keeps of it in parquet.

    Raises:
        DataError: no access, no such data (the message ends with the remedy), or a wrong schema.
    """
    import datasets

    given: dict[str, Any] = {"name": config, "split": split, "streaming": True}
    try:
        try:
            rows = datasets.load_dataset(name, **given)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            given["revision"] = "refs/convert/parquet"
            rows = datasets.load_dataset(name, **given)
        features = dict(rows.features or {})
        check(features)
        # Named to the parquet reader, so that the images (6.7 GB in ImageNet's validation split) stay where they are.
        light = list(datasets.load_dataset(name, **given, columns=columns))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"data set {name}, split {split!r}: {type(error).__name__}: {error}\n{remedy}") from error
    # Not decoded here, because the library would also turn photos by their EXIF orientation, unlike an image folder.
    encoded = rows.cast_column("image", datasets.Image(decode=False))
    return features, light, lambda start: iter(encoded.skip(start))
