"""What `make kernels` compiles: every kernel in every configuration that dispatch can choose."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple


class Configuration(NamedTuple):
    """One compilation of one kernel."""

    kernel: Any
    arguments: tuple[str, ...]
    """Triton's types of the arguments before the constants: "i32", "fp32", "*bf16" (a pointer, 16-byte aligned)."""

    constants: tuple[Any, ...]
    """Values of the `tl.constexpr` parameters, which stand last, in order."""

    num_warps: int
    num_stages: int
    kind: Literal["matrix", "elementwise", "irregular"]
    """Matrix kernels must use the tensor cores and asynchronous copies; element-wise ones must access 128 bits at a
    time; irregular ones, the second path for tensors that are not aligned, only must not spill."""

    max_registers: int | None = None
    """The most registers of a thread on Hopper: with 128, two programs of 8 warps share a multiprocessor, and one's
    epilogue hides behind the other's products. Elsewhere the compiler decides."""
