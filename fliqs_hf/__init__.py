"""Mixed-precision quantization search for Hugging Face vision transformers.

Importing this package registers the quantization method "fliqs" with Transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.formats import parse
from fliqs_hf.hf import FLIQSConfig, fold_batchnorm, quantize
from fliqs_hf.nn import make_searchable
from fliqs_hf.nn.kernels import kernels_of, set_kernels
from fliqs_hf.version import __version__

if TYPE_CHECKING:
    from fliqs_hf.cost import Target
    from fliqs_hf.hf.card import model_card
    from fliqs_hf.hf.hub import push
    from fliqs_hf.oneshot import SearchConfig
    from fliqs_hf.pipeline.estimating import estimate
    from fliqs_hf.pipeline.export import export
    from fliqs_hf.pipeline.export_config import export_config
    from fliqs_hf.pipeline.in_memory import search
    from fliqs_hf.pipeline.own_loop import Search, SearchResult
    from fliqs_hf.pipeline.post_training import allocate
    from fliqs_hf.ptq import calibrate
    from fliqs_hf.report.run_report import write_report
    from fliqs_hf.validation.validate import validate

#: Imported at their first use: they bring libraries (SciPy, Matplotlib, …) that loading a model does not need.
_LAZY = {
    "Search": "fliqs_hf.pipeline.own_loop",
    "SearchConfig": "fliqs_hf.oneshot",
    "SearchResult": "fliqs_hf.pipeline.own_loop",
    "Target": "fliqs_hf.cost",
    "allocate": "fliqs_hf.pipeline.post_training",
    "calibrate": "fliqs_hf.ptq",
    "estimate": "fliqs_hf.pipeline.estimating",
    "export": "fliqs_hf.pipeline.export",
    "export_config": "fliqs_hf.pipeline.export_config",
    "model_card": "fliqs_hf.hf.card",
    "push": "fliqs_hf.hf.hub",
    "search": "fliqs_hf.pipeline.in_memory",
    "validate": "fliqs_hf.validation.validate",
    "write_report": "fliqs_hf.report.run_report",
}

__all__ = [
    "Allocation",
    "FLIQSConfig",
    "LayerFormats",
    "Search",
    "SearchConfig",
    "SearchResult",
    "Target",
    "__version__",
    "allocate",
    "calibrate",
    "estimate",
    "export",
    "export_config",
    "fold_batchnorm",
    "kernels_of",
    "make_searchable",
    "model_card",
    "parse",
    "push",
    "quantize",
    "search",
    "set_kernels",
    "validate",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
