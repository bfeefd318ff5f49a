"""Optimizers are saved and loaded in process groups: broadcasts from rank 0, ZeRO and FSDP1."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer

from rootfree_kernels import RFRMSProp
from tests.calls.optimizers import CASES, OPTIONS, Case, Model, snapshot, train
from tests.calls.tensors import assert_same_bits
from tests.optim.checkpoints import FIRST, SECOND, uninterrupted
from tests.optim.test_distributed_checkpoint import assert_goes_on, fresh, pytestmark, trained  # noqa: F401

FROM_RANK_0 = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Create a process group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


BROADCAST = [case for case in CASES if case.options.get("rounding") != "compensated"]
"""Cases without residuals: neither Gloo nor NCCL broadcasts int16."""


@pytest.mark.parametrize("case", BROADCAST, ids=lambda case: case.name)
def test_a_state_dict_of_rank_0_is_broadcast(case: Case, alone: None) -> None:
    saved = list(get_state_dict(*trained(case), options=FROM_RANK_0))
    model, optimizer = fresh(case)
    set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=FROM_RANK_0)
    assert_goes_on(case, model, optimizer)


def load_from_rank_0(rank: int, folder: str) -> None:
    """Train on rank 0, send the state dicts to rank 1, train there and save the results."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for case in BROADCAST:
        model, optimizer = trained(case) if rank == 0 else fresh(case)
        saved = get_state_dict(model, optimizer, options=FROM_RANK_0) if rank == 0 else ({}, {})
        model, optimizer = fresh(case)
        set_model_state_dict(model, saved[0], options=FROM_RANK_0)
        set_optimizer_state_dict(model, optimizer, saved[1], options=FROM_RANK_0)
        train(model, optimizer, SECOND)
        torch.save(snapshot(optimizer), f"{folder}/{case.name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_another_process_resumes_from_the_state_dict_of_rank_0(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(load_from_rank_0, args=(str(tmp_path),), nprocs=2)
    for case, rank in itertools.product(BROADCAST, range(2)):
        assert_same_bits(torch.load(tmp_path / f"{case.name}-{rank}.pt"), uninterrupted(case))


def test_a_run_with_zero_redundancy_resumes(case: Case, alone: None) -> None:
    def start(seed: int) -> tuple[Model, ZeroRedundancyOptimizer]:
        model = Model(case.dtype, seed=seed)
        options = {**OPTIONS, **case.options}
        return model, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=case.optimizer, **options)

    model, optimizer = start(-1)
    train(model, optimizer, FIRST)
    optimizer.consolidate_state_dict()
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    model, optimizer = start(-2)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert_goes_on(case, model, optimizer.optim)


@pytest.mark.parametrize("as_they_are", [False, True], ids=["flat parameters", "original parameters"])
def test_a_run_with_fsdp1_resumes(as_they_are: bool, alone: None) -> None:
    """With `RFRMSProp`, whose step does not depend on shapes."""

    def start() -> tuple[nn.Module, RFRMSProp]:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        model = FullyShardedDataParallel(layers, use_orig_params=as_they_are, device_id=torch.device("cpu"))
        return model, RFRMSProp(model.parameters(), **OPTIONS)

    def run(model: nn.Module, optimizer: RFRMSProp, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(torch.full((2, 5), float(step))).square().sum().backward()
            optimizer.step()

    model, optimizer = start()
    run(model, optimizer, FIRST)
    saved = copy.deepcopy(FullyShardedDataParallel.optim_state_dict(model, optimizer))
    weights = copy.deepcopy(model.state_dict())
    run(model, optimizer, SECOND)
    again, loaded = start()
    again.load_state_dict(weights)
    loaded.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(again, loaded, saved))
    run(again, loaded, SECOND)
    assert_same_bits(snapshot(loaded), snapshot(optimizer))
