"""One split of a data set, by the name that a user gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fliqs_hf.errors import DataError
from fliqs_hf.training.data import is_digits, load_splits


def load_split(name: str, split: str | None) -> Any:
    """A `datasets.Dataset`.

    Args:
        name: Hub id, folder (parquet files, or images in one sub-folder per class), or "digits".
        split: default: "validation" or "test" where there is one, else the only one.
    Raises: DataError: it cannot be loaded, or has no such split; it names those that there are.
    """
    import datasets

    if is_digits(name):
        splits = dict(zip(("train", "test"), load_splits(name), strict=True))
    else:
        if not Path(name).exists() and Path(name).is_absolute():
            raise DataError(f"the folder {name!r} does not exist")
        try:
            splits = datasets.load_dataset(name)
        except (FileNotFoundError, ValueError, ConnectionError, OSError) as error:
            raise DataError(f"cannot load the data set {name!r}: {error}") from error
    if split is None:
        split = next((word for word in ("validation", "test") if word in splits), None)
        split = split or (next(iter(splits)) if len(splits) == 1 else None)
    if split not in splits:
        raise DataError(f"the data set {name!r} has no split {split!r}; choose one of {', '.join(splits)}")
    if len(splits[split]) == 0:
        raise DataError(f"the split {split!r} of {name!r} is empty")
    return splits[split]
