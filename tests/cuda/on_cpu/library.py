"""The kernels of csrc/cuda as functions on CPU tensors.

A C++ compiler compiles them with the headers in this folder. They are called through ctypes with flat lists of
arguments.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rootfree_kernels.arguments import DiagonalOptions, DiagonalState, Draws, Scaling
from rootfree_kernels.pointer_tables.clipped_momentum import cut, momentum_call
from rootfree_kernels.pointer_tables.rf_rmsprop import DiagonalCall, diagonal_call
from tests.calls.tensors import CLIPS, ROUNDINGS

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[2] / "csrc" / "cuda"
FLAGS = "-std=c++17 -O1 -fPIC -ffp-contract=off -Wno-unknown-pragmas"
# A GPU traps unaligned accesses, a CPU does not. With these flags an illegal instruction ends the program.
FLAGS += " -fsanitize=alignment -fsanitize-undefined-trap-on-error"
CHUNK = 2048
"""Number of elements that a program of the diagonal step processes."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compiler() -> list[str]:
    """Return the command of the C++ compiler."""
    return shlex.split(os.environ.get("CXX") or "c++")


def why_not() -> str:
    """Return why the kernels cannot be compiled for the CPU, or an empty string."""
    if sys.platform != "linux":
        return f"needs Linux, not {sys.platform}: the threads of kernels are simulated with glibc's ucontext.h"
    return "" if shutil.which(compiler()[0]) else f"no C++ compiler: {compiler()[0]} is not found"


def build(folder: Path) -> Path:
    """Compile the kernels into a shared library in `folder`."""
    sources = [*sorted(KERNELS.glob("*.cu")), HERE / "launchers.cpp"]
    objects = [str(folder / f"{source.name}.o") for source in sources]
    library = folder / "libkernels.so"

    def run(*arguments: str) -> None:
        subprocess.run([*compiler(), *arguments], check=True)

    def compile_one(source: Path, target: str) -> None:
        run("-x", "c++", *FLAGS.split(), f"-I{HERE}", "-c", str(source), "-o", target)

    with ThreadPoolExecutor(2) as workers:
        list(workers.map(compile_one, sources, objects))
    run("-shared", *objects, "-o", str(library))
    return library


class DiagonalArguments(ctypes.Structure):
    """The struct of this name in csrc/cuda/rf_rmsprop.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("rows", "grads", "owners", "counters", "seeds", "steps")),
        *((name, c_void_p) for name in ("lr", "grad_scale", "found_inf")),
        *((name, c_int64) for name in ("seed_stride", "step_stride", "step")),
        *((name, c_float) for name in ("lr_value", "sign", "decay", "growth", "momentum", "damping")),
        *((name, c_float) for name in ("weight_decay", "decoupled_decay")),
        *((name, c_int) for name in ("rounding", "weight_rounding")),
    )


class MomentumArguments(ctypes.Structure):
    """The struct of this name in csrc/cuda/clipped_momentum.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("sides", "owners", "sums", "found_inf", "clips")),
        *((name, c_float) for name in ("alpha", "one_minus_alpha")),
        *(("num_sides", c_int), ("num_blocks", c_int64)),
    )


class CudaOnCpu:
    """Call the launchers with tables and workspaces, as PyTorch's operators do. Tensors are contiguous."""

    def __init__(self, path: Path) -> None:
        self.library: Any = ctypes.CDLL(str(path))
        assert self.library.chunk() == CHUNK
        self.min_share, self.max_shares = 4096, 512
        assert self.library.sizeof_diagonal() == ctypes.sizeof(DiagonalArguments)
        assert self.library.sizeof_momentum() == ctypes.sizeof(MomentumArguments)

    def run_backwards(self, yes: bool) -> None:
        """Run blocks and threads in reverse order, or in the usual order."""
        self.library.run_backwards(yes)

    @property
    def num_launches(self) -> int:
        return self.library.num_launches()

    def _programs_of(self, row: tuple[int, ...]) -> int:
        return -(-row[-1] // CHUNK)

    def run(self, stem: str, *flat: Any) -> Any:
        """Run an operator with a flat list of arguments, as `tests.calls.operators.call` does."""
        return getattr(self, stem)(*flat)

    def rf_rmsprop(self, params: list[Tensor], *arguments: Any) -> DiagonalCall | None:
        """Run a step and return its call, or None if there are no parameters."""
        if not params:
            return None
        call = self.diagonal_call(params, *arguments)
        self.launch_diagonal(call)
        call.finish()
        return call

    def diagonal_call(self, *flat: Any) -> DiagonalCall:
        """Return the tables and scalars of a launch of the diagonal step, from a flat list of arguments."""
        params, state, (grads, lr), draws, scaling = flat[0], flat[1:6], flat[6:8], flat[8:10], flat[10:12]
        packed = DiagonalState(*state), grads, lr, Draws(*draws), Scaling(*scaling), DiagonalOptions(*flat[12:])
        return diagonal_call(self._programs_of, params, *packed)

    def launch_diagonal(self, call: DiagonalCall) -> None:
        """Run the kernel on the tables of a call."""
        where, bits = call.where, call.bits
        on_memory = (where.rows, call.grads, where.owners, where.counters, bits.seeds, bits.steps)
        scalars = (call.lr, call.grad_scale, call.found_inf)
        arguments = DiagonalArguments(
            *map(Tensor.data_ptr, (*on_memory, *scalars)),
            *(bits.stride, bits.step_stride, bits.step, call.lr_value, *call.scalars),
            *map(ROUNDINGS.index, call.modes),
        )
        dtypes = (c_int * 4)(*map(DTYPES.index, call.dtypes))
        assert self.library.rf_rmsprop(ctypes.byref(arguments), dtypes, c_int64(where.num_programs)) == 0

    def clipped_momentum(
        self, momenta: list[Tensor], deltas: list[Tensor], found_inf: Tensor | None, alpha: float, clip: str
    ) -> Tensor:
        """Update momenta and return clip factors [sides, L]. Deltas do not change."""

        def shares_of(numel: int, cols: int) -> tuple[int, int]:
            unit = 8 * cols if clip == "row_sum" else 2048
            return cut(numel, max(self.min_share, -(-numel // self.max_shares)), unit)

        call = momentum_call(shares_of, momenta, deltas, found_inf)
        for made in (call.sums, call.clips):
            made.fill_(torch.nan)
        arguments = MomentumArguments(
            *map(Tensor.data_ptr, (call.where.rows, call.where.owners, call.sums, call.found_inf, call.clips)),
            *(alpha, 1.0 - alpha, *call.clips.shape),
        )
        dtype, mode, programs = DTYPES.index(call.dtype), CLIPS.index(clip), c_int64(call.where.num_programs)
        assert self.library.clipped_momentum(ctypes.byref(arguments), dtype, mode, programs) == 0
        return call.finish()
