"""From a trained model to the one that a user loads: packed, saved, loaded again, evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fliqs_hf.allocation import Allocation
from fliqs_hf.hf import FLIQSConfig, fold_batchnorm, quantize
from fliqs_hf.nn import format_switch
from fliqs_hf.pipeline.job import Job
from fliqs_hf.pipeline.statistics import settle_batchnorm
from fliqs_hf.runs.folder import RunFolder

#: (the packed model, in memory; the layers that were packed, with their trained weights, by name)
WhenPacked = Callable[[Any, Mapping[str, nn.Module]], None]


def deliver(
    job: Job,
    run: RunFolder,
    trained: Any,
    allocation: Allocation,
    folder: str | None,
    name: str,
    when_packed: WhenPacked | None = None,
) -> Any:
    """Evaluate a trained model as `packed_in` gives it. Args: as there."""
    return job.evaluate(packed_in(job, run, trained, allocation, folder, name, when_packed), name)


def packed_in(
    job: Job,
    run: RunFolder,
    trained: Any,
    allocation: Allocation,
    folder: str | None,
    name: str,
    when_packed: WhenPacked | None = None,
) -> Any:
    """Pack a trained model, and load it as a user would.

    Args:
        trained: searchable, and not needed any more: on the main process it is what becomes the packed one.
        folder: of the records, where it goes; None where it is the run's own model.
        when_packed: what else the main process does with the packed model, which it leaves as it is.
    """
    if job.accelerator.is_main_process:
        config = FLIQSConfig(allocation=allocation, activation_granularity=job.quantizers.activation_granularity)
        format_switch(trained).set_allocation(allocation)
        settle_batchnorm(job, trained, name)
        layers = {layer: trained.get_submodule(layer) for layer in allocation}
        packed = quantize(trained, config)
        if when_packed is not None:
            when_packed(packed, layers)
        if job.args.fold_batchnorm:
            fold_batchnorm(packed, {"pixel_values": job.eval_data[0][0][None].to(job.accelerator.device)})
        with run.files.model() if folder is None else run.replacing(folder) as draft:
            packed.save_pretrained(draft)
            job.processor.save_pretrained(draft)
        if folder is None:
            run.write("allocation.json", allocation.to_dict())
    job.accelerator.wait_for_everyone()
    place = run.path if folder is None else run.records / folder
    return job.task.auto_class().from_pretrained(place).to(job.accelerator.device)
