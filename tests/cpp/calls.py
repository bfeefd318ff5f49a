"""Calls of the C++ kernels: sizes at which they change what they do, and their backend."""

from __future__ import annotations

from functools import partial

from tests.calls import kron, rf_rmsprop, scaled_rmsprop

PIECE, CHUNK = 512, 1 << 14
"""Elements that a kernel works on at a time; elements that a thread takes at a time, or a share of a block has."""

SHAPES = [
    *[(), (0,), (1,), (3, 0, 2), (13,), (PIECE - 1,), (PIECE,), (PIECE + 1,), (1031,)],
    *[(CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (17, 130), (2, 3, 4), (6, 5, 3, 7), (2, CHUNK + 3)],
]
LAYOUTS = ("whole", "offset by 1", "offset by 3", "channels last", "transposed", "every other")

cpp_call = partial(rf_rmsprop.Call, backend="cpp", alike=False)
scaled_call = partial(scaled_rmsprop.ScaledCall, backend="cpp", alike=False)
cpp_batch = partial(kron.Batch, backend="cpp")
