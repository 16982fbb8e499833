"""Statistics of batch norms for one model as it stands, measured instead of remembered."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fliqs_hf.errors import DataError
from fliqs_hf.nn.evaluation import evaluation


def tracking_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms that normalize with running statistics in evaluation."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of all batch norms by those of `batches`, in place; nothing else is changed.

    A running average is of many models: of weights that have moved on, of every format that a search has tried. And
    how many it averages is up to the architecture: Transformers' MobileNets and EfficientNets have momentum 0.99 and
    more, TensorFlow's way of saying 0.01, with which it is the last batch alone. What a quantized layer puts out has a
    mean and variance of its own formats, so these have to be in force: the statistics are right for them only.

    Mean and variance are those over all images together: the variance is the mean one within batches plus that of
    their means. Norms see what norms before them make of the batch, as in training; dropout is off.

    Args:
        batches: images as `model` takes them, [batch, ...], without augmentation, as inference sees none.
    Raises: DataError: no images, or a batch of one where a norm sees one value of each. The model is as it was then.
    Source: precise batch norm, Wu and Johnson 2021 (arXiv 2105.07576), section 3.
    """
    norms = tracking_norms(model)
    if not norms:
        return
    sums = {name: torch.zeros(2, norm.num_features, dtype=torch.float64) for name, norm in norms.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    before = {name: [buffer.clone() for buffer in norm.buffers()] for name, norm in norms.items()}
    count = 0
    try:
        with evaluation(model):
            for norm in norms.values():
                norm.train()
                norm.momentum = 1.0  # the running statistics are then the batch's
                norm.reset_running_stats()
            for images in batches:
                _run(model, images)
                count += len(images)
                for name, norm in norms.items():
                    mean, var = norm.running_mean.double().cpu(), norm.running_var.double().cpu()  # type: ignore[union-attr]
                    sums[name] += len(images) * torch.stack([mean, var + mean * mean])
        if not count:
            raise DataError("there are no images to estimate the statistics of batch norms from")
        for name, norm in norms.items():
            if norm.num_batches_tracked == 0:  # the pass does not reach it: what it remembers is all that is known
                for buffer, old in zip(norm.buffers(), before[name], strict=True):
                    buffer.copy_(old)
                continue
            mean, square = sums[name] / count
            norm.running_mean.copy_(mean)  # type: ignore[union-attr]
            norm.running_var.copy_(square - mean * mean)  # type: ignore[union-attr]
    except BaseException:  # an interruption, too, must not leave half of the statistics
        for name, norm in norms.items():
            for buffer, old in zip(norm.buffers(), before[name], strict=True):
                buffer.copy_(old)
        raise
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]


def _run(model: nn.Module, images: Tensor) -> None:
    try:
        model(images)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise DataError(
            f"a batch norm cannot be measured on a batch of {len(images)}, of which it sees one value per channel: "
            "take batches of two images or more"
        ) from error
