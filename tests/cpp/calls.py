"""Calls of the C++ kernels, and sizes around which they switch between code paths."""

from __future__ import annotations

from functools import partial

from tests.calls import kron, rf_rmsprop, scaled_rmsprop

PIECE, CHUNK = 512, 1 << 14
"""PIECE: number of elements that a kernel processes at once. CHUNK: elements per task of a thread, or per share of a
block."""

SHAPES = [
    *[(), (0,), (1,), (3, 0, 2), (13,), (PIECE - 1,), (PIECE,), (PIECE + 1,), (1031,)],
    *[(CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (17, 130), (2, 3, 4), (6, 5, 3, 7), (2, CHUNK + 3)],
]
LAYOUTS = ("whole", "offset by 1", "offset by 3", "channels last", "transposed", "every other")

cpp_call = partial(rf_rmsprop.Call, backend="cpp", alike=False)
scaled_call = partial(scaled_rmsprop.ScaledCall, backend="cpp", alike=False)
cpp_batch = partial(kron.Batch, backend="cpp")
