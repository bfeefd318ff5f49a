"""The configurations that `make kernels` compiles: every kernel in every form that a launcher can choose."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Kind = Literal["matrix", "elementwise", "irregular"]
"""What the machine code of a kernel is checked for.

Matrix kernels must use the tensor cores and asynchronous copies. Element-wise kernels must access 128 bits at a time.
Irregular kernels, which read element by element, must only not spill registers.
"""


class Configuration(NamedTuple):
    """One compilation of one kernel."""

    kernel: Any
    arguments: tuple[str, ...]
    """Triton's types of the arguments before the constants: "i32", "fp32", "*bf16" (a 16-byte aligned pointer)."""

    constants: tuple[Any, ...]
    """Values of the `tl.constexpr` parameters, which come last, in order."""

    num_warps: int
    num_stages: int
    kind: Kind
    max_registers: int | None = None
    """The most registers of a thread on Hopper. With 128, two programs of 8 warps share a multiprocessor, and one of
    them multiplies while the other one runs its epilogue. On other GPUs the compiler decides."""
