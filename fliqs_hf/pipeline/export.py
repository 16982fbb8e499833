"""A packed model for programs without this package: written, run there, and compared with itself before it is kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fliqs_hf.cost import example_image
from fliqs_hf.errors import ConfigError, ExportError
from fliqs_hf.files import disk_errors, replacing
from fliqs_hf.hf.export.agreement import Agreement, compare
from fliqs_hf.hf.export.forms import LayerForm, OnnxSettings
from fliqs_hf.hf.export.openvino_file import OpenVinoSettings
from fliqs_hf.hf.export.preprocessing import Normalization
from fliqs_hf.hf.export.targets import ExportTarget, Settings, find_target
from fliqs_hf.json_file import read_object
from fliqs_hf.nn import packed_layers
from fliqs_hf.pipeline.checkpoints import load_model, load_processor, read_config
from fliqs_hf.pipeline.outputs import check_apart, check_writable
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task, find_task
from fliqs_hf.version import __version__

To = Literal["onnx", "openvino", "torch", "aotinductor"]
#: What an export consists of; lists the files of its folder, so that another export may replace them.
RECORD = "export.json"
#: The most that is asked for by itself, and of images with a meaning alone: on noise every class is nearly as likely
#: as the next. Another order of sums rounds some codes the other way: DeiT-Tiny gives 3 % of ImageNet's images another
#: class for that in W8A8, and 44 % in W4A4 without calibration. So less is asked where the model itself is as unsure.
MIN_AGREEMENT = 95.0
_GENERATED = 64


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how it compares with the packed model.

    Attributes:
        files: names in `folder`, the model first.
        agreement: on `images`: "yours", or "generated" noise, which says whether the arithmetic is the same but not
            how often the answers differ.
        layers: what became of each; `changed` says what differs and why.
        packed_bytes: codes and scales of the packed layers in the checkpoint. file_bytes: of the exported model, all
            of it.
    """

    folder: str
    to: To
    files: tuple[str, ...]
    images: Literal["yours", "generated"]
    agreement: Agreement
    min_agreement: float | None
    layers: tuple[LayerForm, ...]
    packed_bytes: int
    file_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "agreement": {**asdict(self.agreement), "percent": self.agreement.percent}}


def export(
    run: str | Path,
    output: str | Path,
    *,
    to: To = "onnx",
    images: Iterable[Tensor] | None = None,
    min_agreement: float | None = None,
    settings: Settings | None = None,
    include_preprocessing: bool = False,
    overwrite: bool = False,
    task: str = IMAGE_CLASSIFICATION.name,
) -> ExportResult:
    """Write a packed model as a file that other programs run, if it answers there as it does here.

    Args:
        run: run folder, checkpoint folder or Hub id of a packed model.
        to: "onnx", "openvino", "torch" for a program of `torch.export`, or "aotinductor" for that, compiled.
        output: folder to write: the model, its config and image processor, and a record.
        images: batches of pixel values [images, channels, height, width] as the image processor makes them, to compare
            on; default: noise.
        min_agreement: percent of the images that must get the same class; default: on your images 95, or
            less where the packed model itself agrees less often with what it answers to pixels that are moved by a
            millionth; none on noise.
        settings: of a file of ONNX or OpenVINO.
        include_preprocessing: the file takes pixels from 0 to 255 of resized images and normalizes them itself.
        overwrite: replace an earlier export; nothing else is ever replaced.
        task: what the model does; the name of a registered one.
    Raises: ConfigError: a setting, or a model that cannot be exported. DependencyError: an extra is missing.
        ExportError: the agreement is below `min_agreement`; nothing is written. DiskError: `output` cannot be written.
    """
    target, kind = find_target(to), find_task(task)
    settings = _checked_settings(to, target, min_agreement, settings, include_preprocessing)
    target.check()
    folder = Path(output)
    check_output(folder, str(run), overwrite)
    source = _PackedModel.load(str(run), kind)
    target.check_layers(source.model, settings)
    normalization = Normalization.of(source.processor, source.image.shape[1]) if include_preprocessing else None
    with replacing(folder) as draft:
        draft.mkdir()
        with disk_errors(folder):
            layers = target.write(source.model, source.image, draft / target.file, settings, normalization)
            exported = target.load(draft / target.file, source.config)
        agreement = compare(
            source.model, exported, _noise(source.image) if images is None else images,
            None if normalization is None else normalization.pixels, kind,
            itself=images is not None and min_agreement is None,
        )  # fmt: skip
        min_agreement = _check_agreement(agreement, min_agreement, settings)
        source.config.save_pretrained(draft)
        source.processor.save_pretrained(draft)
        names = sorted(path.name for path in draft.iterdir())
        stem = Path(target.file).stem
        names.sort(key=lambda name: (name != target.file, not name.startswith(f"{stem}.")))
        result = ExportResult(
            str(folder), to, (*names, RECORD), "generated" if images is None else "yours", agreement, min_agreement,
            layers, _packed_bytes(source.model), exported.file_bytes,
        )  # fmt: skip
        _write_record(draft / RECORD, result, settings)
    return result


def _checked_settings(
    to: str, target: ExportTarget, min_agreement: float | None, settings: Settings | None, include_preprocessing: bool
) -> Settings | None:
    """The settings that hold. Raises: ConfigError: a value that does not exist, or one that the target has not."""
    if min_agreement is not None and not 0 <= min_agreement <= 100:
        raise ConfigError(f"min_agreement={min_agreement!r}: give percent between 0 and 100")
    if include_preprocessing and not target.normalizes:
        raise ConfigError(f"to={to!r} has no include_preprocessing: leave it out")
    if target.settings is None or not isinstance(settings, (target.settings, type(None))):
        if settings is not None:
            raise ConfigError(f"to={to!r} has no {type(settings).__name__}: leave its settings out")
        return None
    return settings or target.settings()


def _write_record(file: Path, result: ExportResult, settings: Settings | None) -> None:
    head = {"format_version": 1, "fliqs_hf": __version__, "settings": None if settings is None else asdict(settings)}
    text = json.dumps({**head, **result.to_dict(), "folder": None}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _PackedModel:
    """What is exported; `image`: zeros of the size that its processor makes, [1, channels, height, width]."""

    model: Any
    config: Any
    processor: Any
    image: Tensor

    @classmethod
    def load(cls, run: str, task: Task) -> _PackedModel:
        config, quantization = read_config(run)
        if quantization is None:
            raise ConfigError(f"{run!r} is not quantized by fliqs_hf: run `fliqs-hf quantize` on it first")
        processor, model = load_processor(run), load_model(run)
        if not task.has_model(model):
            raise ConfigError(f"{type(model).__name__} is not {task.models}: name the task of the model (--task)")
        config.architectures = [type(model).__name__]
        return cls(model, config, processor, torch.zeros_like(example_image(model, _side(processor, model))))


def _check_agreement(agreement: Agreement, least: float | None, settings: Settings | None) -> float | None:
    """What is asked for, in percent: `least`, or what follows from the packed model.

    Raises: ExportError: the exported model agrees less often.
    """
    if agreement.least is not None:
        least = min(MIN_AGREEMENT, agreement.least)
    if least is None or agreement.percent >= least:
        return least
    hint = ""
    if isinstance(settings, OnnxSettings) and settings.input_scales == "per_tensor":
        hint = "; input_scales='as_packed' keeps its own input scales"
    elif isinstance(settings, OpenVinoSettings) and settings.inputs == "auto":
        hint = "; inputs='as_packed' rounds inputs as the packed model does"
    raise ExportError(
        f"the exported model gives {agreement.percent:.2f} % of {agreement.images:,} images the class that the packed "
        f"model gives them, less than min_agreement={least:.4g} (logits differ by {agreement.rms:.3g} of "
        f"{agreement.logits_rms:.3g}){_floor(agreement)}; nothing is written{hint}"
    )


def _floor(agreement: Agreement) -> str:
    if agreement.itself is None:
        return ""
    share = 100 * agreement.itself / agreement.images
    return f"; with pixels moved by a millionth, the packed model gives {share:.2f} % of them the class that it gave"


def check_output(folder: Path, run: str, overwrite: bool) -> None:
    """Whether an export may be written to `folder`.

    Raises: ConfigError: something is in the way. DiskError: it cannot be written.
    """
    if not str(folder).strip() or folder.name in ("", "..") or "\0" in str(folder):
        raise ConfigError(f"the output folder {str(folder)!r} has no usable name: give one, such as exported")
    check_apart(folder, {"RUN": run})
    check_writable(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} is no folder: choose another output folder")
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not there:
        return
    record = read_object(folder / RECORD) if (folder / RECORD).is_file() else {}
    listed = record.get("files")
    ours = set(listed) if isinstance(listed, list) and record.get("format_version") == 1 else set()
    if foreign := sorted(there - ours):
        raise ConfigError(
            f"{folder / foreign[0]} is in the way: no export of fliqs_hf wrote it, and nothing else is replaced. "
            "Move it away, or choose another output folder"
        )
    if not overwrite:
        raise ConfigError(f"{folder} holds an export already: pass overwrite to replace it, or choose another folder")


def _side(processor: Any, model: Any) -> tuple[int, int] | None:
    """Height and width of what the processor makes, where the model's config names none."""
    for config in (model.config, getattr(model.config, "vision_config", None)):
        if getattr(config, "image_size", None):
            return None
    for name in ("crop_size", "size"):
        size = getattr(processor, name, None)
        if size and {"height", "width"} <= set(size):
            return int(size["height"]), int(size["width"])
    return None


def _noise(image: Tensor) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(_GENERATED // 8):
        yield torch.randn(8, *image.shape[1:], generator=generator)


def _packed_bytes(model: Any) -> int:
    layers = packed_layers(model).values()
    parts = [part for x in layers for part in (x.weight_codes, x.weight_scale, x.weight_scale_codes)]
    return sum(part.numel() * part.element_size() for part in parts if part is not None)
