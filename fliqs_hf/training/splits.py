"""Data sets by the name that a user gives, their splits, and parts of these such as train[:500]."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fliqs_hf.errors import CheckpointError, DataError
from fliqs_hf.json_file import read_object
from fliqs_hf.limits import SEED
from fliqs_hf.optional import needed_for

logger = logging.getLogger(__name__)

DIGITS = "digits"
#: Share of the training images that is held out where there is no validation split.
TRAIN_VAL_SPLIT = 0.15
#: Column with the row that an image has in the data set, where a view shows rows in another order. A number, or a
#: text with the split, where several are joined.
ROW = "__row__"
#: (split, first row, row after the last)
Part = tuple[str, int, int]
LAYOUT = "a folder of images has one sub-folder per class, two at least: photos/cat/1.jpg, photos/dog/2.jpg"


def load_splits(
    dataset_name: str | None = None,
    *,
    dataset_config_name: str | None = None,
    train_dir: str | None = None,
    validation_dir: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    train_val_split: float = TRAIN_VAL_SPLIT,
    streaming: bool = False,
    seed: int = 0,
    cache_dir: str | None = None,
) -> tuple[Any, Any]:
    """Training and validation split as `datasets.Dataset`s, or `datasets.IterableDataset`s.

    Args:
        dataset_name: a Hub id, a local folder (parquet files or an image folder), or "digits": the 8 × 8 images that
            scikit-learn ships (1797, ten classes), which needs no network; "digits:1", … are other splits of them.
        train_dir, validation_dir: image folders, one sub-folder per class.
        train_split, validation_split: splits, or parts of them such as "train[:500]". Validation images are taken out
            of the training images. Default of the second: "validation" or "test" where there is one, else
            `train_val_split` of the training split.
        streaming: read the data set as it comes, instead of downloading it first.
        cache_dir: where downloads are kept.
    Raises: DataError: nothing to load, a split that does not exist or is empty; a name that means nothing with the
        others.
    """
    if dataset_name is not None:
        if validation_dir is not None:
            raise DataError(
                f"validation_dir={validation_dir!r} goes with train_dir, not with dataset_name={dataset_name!r}: "
                "leave one of them out"
            )
        splits = load_all(dataset_name, dataset_config_name, streaming, cache_dir)
    elif train_dir is not None:
        _check_no_config(train_dir, dataset_config_name)
        splits = _image_folders({"train": train_dir, "validation": validation_dir}, streaming, cache_dir)
    else:
        raise DataError("no data: give dataset_name (a Hub id, a folder or 'digits') or train_dir")
    other = validation_split or next((name for name in ("validation", "test") if name in splits), None)
    train = select(splits, train_split)
    if other is None:
        if streaming:
            raise DataError(f"a stream cannot be split: name a validation_split; the dataset has {', '.join(splits)}")
        return _held_out(train, train_split, train_val_split, seed)
    if train_val_split != TRAIN_VAL_SPLIT:
        raise DataError(
            f"train_val_split={train_val_split} is for data without a validation split, and {other!r} is one here: "
            "leave it out"
        )
    if not streaming:
        train = _without(splits, train_split, other)
    return train, select(splits, other)


def _held_out(train: Any, name: str, share: float, seed: int) -> tuple[Any, Any]:
    """The rest of the training images, and a share of them. Raises: DataError: there are too few."""
    if not 0 < share < 1:
        raise DataError(f"train_val_split={share} must be between 0 and 1")
    try:
        parts = numbered(train).train_test_split(share, seed=seed)
    except ValueError as error:
        raise DataError(
            f"the split {name!r} holds {len(train)} images, too few to hold out train_val_split={share} of them: add "
            "images, or give a validation split"
        ) from error
    return parts["train"], parts["test"]


def load_all(
    name: str, config_name: str | None = None, streaming: bool = False, cache_dir: str | None = None
) -> Mapping[str, Any]:
    """All splits of a data set, by name.

    Args:
        name: as `dataset_name` of `load_splits`.
    Raises: DataError: there is none; it says what there is instead.
    """
    import datasets

    if is_digits(name):
        _check_no_config(name, config_name)
        if (seed := int(name.partition(":")[2] or 0)) > SEED.high:
            raise DataError(f"the data set {name!r} does not exist: other splits of digits are 1 to {SEED.high:.0f}")
        digits = _digits(seed)
        return {key: split.to_iterable_dataset() for key, split in digits.items()} if streaming else digits
    folder = _checked_path(name)
    try:
        found: Mapping[str, Any] = datasets.load_dataset(name, config_name, streaming=streaming, cache_dir=cache_dir)
    except Exception as error:  # whatever the builder, the file system or the network raise
        raise _unloadable(name, folder, error) from error
    return found


def load_split(name: str, split: str | None, default: Sequence[str] = ()) -> tuple[Any, list[Part]]:
    """One split of a data set, and the rows that it consists of.

    Args:
        name: as for `load_all`. split: such as "train" or "train[:500]+test".
        default: names of splits, of which the first that there is, else the only one, is meant without `split`.
    Raises: DataError: it cannot be loaded, or has no such split; it names those that there are.
    """
    splits = load_all(name)
    if split is None:
        split = next((word for word in default if word in splits), None)
        split = split or (next(iter(splits)) if len(splits) == 1 else None)
        if split is None:
            raise DataError(f"the data set {name!r} has the splits {', '.join(splits)}: name one of them")
    return select(splits, split), parts_of(splits, split)


def parts_of(splits: Mapping[str, Any], spec: str) -> list[Part]:
    """The rows that a split, or a part such as "train[10%:20%]" or "train+test", stands for.

    Raises: DataError: there is no such split, or no image in it, or one twice.
    """
    import datasets

    known = ", ".join(splits)
    lengths = {name: len(split) for name, split in splits.items()}
    if spec in splits:
        parts = [(spec, 0, lengths[spec])]
    else:
        try:
            absolute = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
        except (ValueError, AssertionError) as error:
            raise DataError(
                f"the data set has no split {spec!r}; choose one of {known}, or a part of one, such as "
                f"{next(iter(splits))}[:500], {next(iter(splits))}[10%:20%] ({error})"
            ) from error
        parts = [(part.splitname, part.from_ or 0, lengths[part.splitname] if part.to is None else part.to)
                 for part in absolute]  # fmt: skip
    if sum(max(0, last - first) for _, first, last in parts) == 0:
        raise DataError(f"the split {spec!r} is empty: it holds no image; the data set has {lengths}")
    if any(common([part], parts[i + 1 :]) for i, part in enumerate(parts)):
        raise DataError(f"the split {spec!r} names images twice: leave one of its parts out")
    return parts


def select(splits: Mapping[str, Any], spec: str) -> Any:
    """The images of a split or part, see `parts_of`. Raises: as that does."""
    import datasets

    if isinstance(next(iter(splits.values())), datasets.IterableDataset):
        if spec not in splits:
            raise DataError(f"a stream has no split {spec!r}; streams have no parts; choose {', '.join(splits)}")
        return splits[spec]
    return _joined(splits, parts_of(splits, spec))


def common(some: Sequence[Part], others: Sequence[Part]) -> int:
    """How many rows are in both."""
    return sum(
        max(0, min(last, end) - max(first, start))
        for name, first, last in some
        for other, start, end in others
        if name == other
    )


def numbered(split: Any) -> Any:
    """`split` with the rows that its images have in the data set, which stay with them however they are chosen."""
    return split if ROW in split.column_names else split.add_column(ROW, np.arange(len(split)))


def sample(split: Any, count: int, seed: int = 0) -> Any:
    """`count` images at random, the same each time; all of them in that order where there are fewer."""
    return numbered(split).shuffle(seed=seed).select(range(min(count, len(split))))


def at_most(split: Any, limit: int | None) -> Any:
    """All images of a split, or `limit` random ones: a split may be sorted by class."""
    return split if limit is None or limit >= len(split) else sample(split, limit)


def columns_of(split: Any) -> list[str]:
    """Those of the user. Empty for a stream that does not name them."""
    return [name for name in (split.column_names or split.features or ()) if name != ROW]


def check_column(split: Any, column: str, what: str = "image", whose: str = "the dataset has") -> None:
    """Raises: DataError: there is no such column; it names those that there are."""
    columns = columns_of(split)
    if columns and column not in columns:
        hint = f"; {LAYOUT}" if what == "label" and columns == ["image"] else ""
        raise DataError(f"column {column!r} does not exist; {whose} {', '.join(columns)}{hint}")


def is_digits(name: str) -> bool:
    return re.fullmatch(rf"{DIGITS}(:\d+)?", name) is not None


def _check_no_config(name: str, config_name: str | None) -> None:
    if config_name is not None:
        raise DataError(f"{name!r} has no configurations: leave dataset_config_name={config_name!r} out")


def _joined(splits: Mapping[str, Any], parts: Sequence[Part]) -> Any:
    import datasets

    views = []
    for name, first, last in parts:
        view = splits[name]
        if (first, last) != (0, len(view)) or len(parts) > 1:
            rows: Any = np.arange(first, max(first, last))
            view = view.select(range(first, max(first, last)))
            view = view.add_column(ROW, [f"{row} of {name}" for row in rows] if len(parts) > 1 else rows)
        views.append(view)
    return views[0] if len(views) == 1 else datasets.concatenate_datasets(views, split=datasets.NamedSplit("several"))


def _without(splits: Mapping[str, Any], train: str, validation: str) -> Any:
    """The training images that are no validation images."""
    parts, held_out = parts_of(splits, train), parts_of(splits, validation)
    twice = common(parts, held_out)
    if not twice:
        return select(splits, train)
    if twice == sum(last - first for _, first, last in parts):
        logger.warning("the model is evaluated on its training images: %r holds all of %r", validation, train)
        return select(splits, train)
    logger.warning("the %d images of %r that are in %r are not trained with", twice, train, validation)
    rest = list(parts)
    for name, start, end in held_out:
        rest = [
            cut
            for part in rest
            for cut in (
                [(part[0], part[1], min(part[2], start)), (part[0], max(part[1], end), part[2])]
                if part[0] == name
                else [part]
            )
            if cut[1] < cut[2]
        ]
    return _joined(splits, rest)


def _image_folders(
    folders: Mapping[str, str | None], streaming: bool, cache_dir: str | None = None
) -> Mapping[str, Any]:
    import datasets

    given = {split: folder for split, folder in folders.items() if folder is not None}
    for split, folder in given.items():
        if not folder.strip() or not Path(folder).exists():
            raise DataError(f"the folder {split}_dir={folder!r} does not exist; {LAYOUT}")
        _checked_path(folder)
    try:
        files = {split: str(Path(glob.escape(folder)) / "**") for split, folder in given.items()}
        found: Mapping[str, Any] = datasets.load_dataset(
            "imagefolder", data_files=files, streaming=streaming, cache_dir=cache_dir
        )
    except Exception as error:  # whatever the builder and the file system raise
        bad = next((folder for folder in given.values() if not _has_images(folder)), None)
        raise _unloadable(bad or " and ".join(given.values()), None if bad is None else Path(bad), error) from error
    return found


def _has_images(folder: str) -> bool:
    from PIL import Image

    endings = Image.registered_extensions()
    return any(path.suffix.lower() in endings for path in Path(folder).rglob("*"))


def _checked_path(name: str) -> Path | None:
    """The folder, if `name` is one. Raises: DataError: it is a path to something else or to nothing."""
    path = Path(name)
    if not name.strip():
        raise DataError(f"the data set {name!r} is no name: give a Hub id, a folder of images, or 'digits'")
    if path.is_dir():
        if _is_model(path):
            raise DataError(f"cannot load the data set {name!r}: it is the folder of a model, not of images; {LAYOUT}")
        return path
    if path.exists():
        raise DataError(f"the data set {name!r} is a file: give the folder that the images are in; {LAYOUT}")
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name:
        raise DataError(f"cannot load the data set {name!r}: the folder does not exist")
    return None


def _is_model(folder: Path) -> bool:
    try:
        return "model_type" in read_object(folder / "config.json")
    except CheckpointError:
        return False


def _unloadable(name: str, folder: Path | None, error: Exception) -> DataError:
    said = " ".join(str(error).split()) or type(error).__name__
    if folder is None:
        return DataError(f"cannot load the data set {name!r}: no folder has this name, and from the Hub: {said}")
    if not any(path.is_file() for path in folder.rglob("*")):
        return DataError(f"cannot load the data set {name!r}: the folder is empty; {LAYOUT}")
    if isinstance(error, FileNotFoundError) or "no data" in said:  # `datasets` says it in terms of its own
        return DataError(f"cannot load the data set {name!r}: no file in it is an image or a table; {LAYOUT}")
    return DataError(f"cannot load the data set {name!r}: {said}; {LAYOUT}")


def _digits(seed: int) -> Mapping[str, Any]:
    import datasets
    from PIL import Image

    with needed_for("the data set 'digits'"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    parts = train_test_split(np.arange(len(pixels)), test_size=0.25, random_state=seed, stratify=digits.target)

    def split(name: str, indices: Any) -> Any:
        columns = {"image": [Image.fromarray(pixels[i]) for i in indices], "label": digits.target[indices].tolist()}
        return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(name))

    return {name: split(name, indices) for name, indices in zip(("train", "test"), parts, strict=True)}
