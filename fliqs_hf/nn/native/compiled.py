"""`quantize.cpp`, compiled for this machine at its first use where there is a compiler. Without it all works as well.

A wheel would have to be built for the least of all CPUs, or for each; a compiler takes about a second, once, and uses
what the CPU has. What is built stays in `fliqs_hf` of the user's cache folder, under a name that changes with the
source, the flags and the CPU. It is code, so it is loaded only from a folder and a file that belong to the user and
that nobody else can write to. Processes that build at the same time do not meet: each moves its own file into place.
FLIQS_COMPILE=0 switches it off.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fliqs_hf.errors import DiskError
from fliqs_hf.files import move_into
from fliqs_hf.formats import BlockFormat, Format
from fliqs_hf.quant.grid import MIN_SCALE, grid_params

logger = logging.getLogger(__name__)

#: "0" for operators who want nothing compiled.
ENVIRONMENT = "FLIQS_COMPILE"
_SOURCE = Path(__file__).with_name("quantize.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fopenmp")
_SECONDS = 120  # for a compiler that hangs


class _Grid(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("limit", "min_scale", "max_scale", "min_normal", "magic", "unit")),
        *((name, ctypes.c_int32) for name in ("integer", "saturate")),
    ]


@cache
def _grid(fmt: Format, shift: int, saturate: bool) -> _Grid:
    data = grid_params(fmt)
    numbers = (data.max_value, data.min_scale, data.max_scale, data.min_normal, data.magic, 2.0**shift)
    return _Grid(*map(float, numbers), int(fmt.is_integer), int(saturate))


class Scaling(NamedTuple):
    """What rows are scaled by: their absmax scale, that times `factor`, or `fixed`, both float32 [1]."""

    factor: Tensor | None = None
    fixed: Tensor | None = None

    @property
    def saturates(self) -> bool:
        return self.factor is not None or self.fixed is not None


class Library:
    """The compiled functions, on contiguous float32 tensors of the CPU."""

    def __init__(self, file: Path) -> None:
        self._c = ctypes.CDLL(str(file))  # releases the lock of the interpreter while a function runs
        pointer, size, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        grid = ctypes.POINTER(_Grid)
        self._c.fliqs_codes.argtypes = [pointer, size, size, grid, pointer, pointer, pointer, pointer, threads]
        self._c.fliqs_grid.argtypes = [pointer, size, size, grid, pointer, pointer, pointer, threads]
        self._c.fliqs_finish.argtypes = [pointer, size, size, pointer, size, pointer, threads]
        self._c.fliqs_one_sided.argtypes = [pointer, size, size, grid, pointer, pointer, threads]
        for function in (self._c.fliqs_one_sided, self._c.fliqs_codes, self._c.fliqs_grid, self._c.fliqs_finish):
            function.restype = None

    def codes(self, rows: Tensor, fmt: Format, shift: int, scaling: Scaling) -> tuple[Tensor, Tensor]:
        """Codes plus 128 of rows [rows, width], uint8, and their scales [rows, 1]; see `codes.input_codes`."""
        codes, scales = torch.empty(rows.shape, dtype=torch.uint8), torch.empty(rows.shape[0], 1)
        self._c.fliqs_codes(
            rows.data_ptr(), *rows.shape, _grid(fmt, shift, scaling.saturates), _pointer(scaling.factor),
            _pointer(scaling.fixed), codes.data_ptr(), scales.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return codes, scales

    def one_sided_codes(self, rows: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
        """`quant.block.one_sided_codes` of rows [rows, width] plus 128, uint8, and their scales [rows, 1]."""
        codes, scales = torch.empty(rows.shape, dtype=torch.uint8), torch.empty(rows.shape[0], 1)
        grid = _Grid(limit=fmt.max_value, min_scale=MIN_SCALE, max_scale=2.0**127)
        self._c.fliqs_one_sided(
            rows.data_ptr(), *rows.shape, grid, codes.data_ptr(), scales.data_ptr(), torch.get_num_threads()
        )
        return codes, scales

    def on_grid(self, rows: Tensor, fmt: Format, scaling: Scaling) -> Tensor:
        """Rows [rows, width], fake-quantized."""
        out = torch.empty_like(rows)
        self._c.fliqs_grid(
            rows.data_ptr(), *rows.shape, _grid(fmt, 0, scaling.saturates), _pointer(scaling.factor),
            _pointer(scaling.fixed), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def finish_(self, rows: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """rows [rows, width] × scales [n], each for rows / n rows in turn, + bias [width], in place."""
        repeat = rows.shape[0] // scales.numel()
        self._c.fliqs_finish(
            rows.data_ptr(), *rows.shape, scales.data_ptr(), repeat, _pointer(bias), torch.get_num_threads()
        )
        return rows


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def library() -> Library | None:
    """The library; None where it is switched off or cannot be had, which is said once, at debug level."""
    if os.environ.get(ENVIRONMENT) == "0":
        return None
    try:
        return _from_cache()
    except (OSError, DiskError, AttributeError, subprocess.SubprocessError) as error:
        logger.debug("inputs are quantized without compiled code: %s", error)
        return None


def _from_cache() -> Library:
    folder = _own_folder()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="fliqs_hf-") as made:  # a loaded file stays mapped when it is deleted
            return Library(_build(Path(made) / "quantize.so"))
    file = folder / f"quantize-{_key()}.so"
    if not (file.exists() and _is_own(file)):
        _build(file)
    return Library(file)


def _own_folder() -> Path | None:
    """The folder for what is built; None where it cannot be made, or where somebody else could write to it."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fliqs_hf"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    return folder if _is_own(folder) and os.access(folder, os.W_OK) else None


def _is_own(path: Path) -> bool:
    found = path.lstat()
    return not stat.S_ISLNK(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _key() -> str:
    """Of all that the machine code depends on: a home folder may be shared by machines with other CPUs."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    cpu = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    parts = (_SOURCE.read_text(encoding="utf-8"), *_FLAGS, platform.machine(), cpu)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _build(file: Path) -> Path:
    """Compile into `file`, all or nothing.

    Raises: OSError, DiskError: no compiler, or no room. SubprocessError: it fails or hangs.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler: none of {', '.join(names)}")
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="build-") as made:
        unlinked, done = f"{made}/quantize.o", Path(made) / "done"
        done.mkdir()
        linked = str(done / file.name)
        # In two steps: linked with -fopenmp it would bring an OpenMP runtime of its own.
        for command in ([*_FLAGS, "-c", str(_SOURCE), "-o", unlinked], ["-shared", unlinked, "-o", linked]):
            subprocess.run([compiler, *command], check=True, capture_output=True, timeout=_SECONDS)
        os.chmod(linked, 0o700)  # whatever the umask
        move_into(file.parent, done, file.name)
    return file
