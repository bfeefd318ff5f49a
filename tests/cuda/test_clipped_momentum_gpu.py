"""CUDA kernels of the clipped momentum on a GPU: comparison with the FP64 reference, and CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from tests.calls.clipped_momentum import assert_matches_reference, sides
from tests.calls.tensors import BF16, CLIPS, FP32, clones

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("offsets", [(0, 0), (0, 1), (1, 0)])
def test_momentum_and_clip_match_the_reference(on_gpu, clip, dtype, offsets):
    momenta, deltas = sides(5, [(300, 300), (67, 67), (1, 1), (1024, 1024)], dtype, 0.1, offsets, "cuda")
    old = clones(momenta)
    clips = on_gpu("clipped_momentum", momenta, clones(deltas), None, 0.3, clip)
    assert_matches_reference(momenta, deltas, old, clips, 0.3, clip)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_a_block_that_is_not_finite_keeps_all_momenta(on_gpu, clip, bad):
    momenta, deltas = sides(3, [(2, 2), (515, 515)], BF16, device="cuda")
    deltas[1][1, 514, 513] = bad
    before = clones(momenta)
    clips = on_gpu("clipped_momentum", momenta, deltas, None, 0.5, clip)
    for m, old, factors in zip(momenta, before, clips, strict=True):
        assert torch.equal(m[1], old[1]) and not torch.equal(m[0], old[0]) and not torch.equal(m[2], old[2])
        assert factors[1] == 0 and (factors[[0, 2]] > 0).all()


@pytest.mark.parametrize("clip", CLIPS)
def test_a_replayed_graph_gives_bitwise_the_same_result(on_gpu, clip):
    momenta, deltas = sides(4, [(130, 130), (768, 768)], BF16, device="cuda")
    start, expected = clones(momenta), clones(momenta)
    on_gpu("clipped_momentum", momenta, deltas, None, 0.5, clip)
    torch._foreach_copy_(momenta, start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clips = on_gpu("clipped_momentum", momenta, deltas, None, 0.5, clip)
    for _ in range(3):
        graph.replay()
        wanted = on_gpu("clipped_momentum", expected, deltas, None, 0.5, clip)
        assert torch.equal(clips, wanted) and all(map(torch.equal, momenta, expected))
