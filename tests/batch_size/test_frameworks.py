"""Counting with what training programs put around a model and an optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.convert_frame import input_codes
from torch._dynamo.testing import CompileCounter
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from rootfree_kernels import BatchSizeCounter, RFRMSProp
from tests.batch_size.loops import backward, batch, mlp, rmsprop, sizes


def micro_batches(model: nn.Module, *of_sizes: int) -> None:
    for size in of_sizes:
        backward(model, size)


# ---- torch.compile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", ["the model", "the compiled model", "a model compiled in place"])
def test_a_compiled_model_is_counted_and_not_compiled_again(counted: str) -> None:
    torch._dynamo.reset()
    model, backend = mlp(), CompileCounter()
    optimizer = rmsprop(model)
    compiled: Any = model if counted == "a model compiled in place" else torch.compile(model, backend=backend)
    BatchSizeCounter(compiled if counted == "the compiled model" else model, optimizer)
    if counted == "a model compiled in place":
        model.compile(backend=backend)
    for _ in range(3):
        micro_batches(compiled, 4, 4)
        optimizer.step()
        optimizer.zero_grad()
        assert sizes(optimizer) == [8]
    assert (backend.frame_count, backend.op_count) == (1, 3)  # the layers, and nothing of the hooks


def test_a_compiled_training_step_counts() -> None:
    torch._dynamo.reset()
    model, backend = mlp(), CompileCounter()
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer)

    @torch.compile(backend=backend)
    def train(inputs: torch.Tensor) -> None:
        for half in inputs.chunk(2):
            model(half).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        train(batch(6))
        assert sizes(optimizer) == [6]
    seen = [code() for code in input_codes.seen]
    files = {Path(code.co_filename).name for code in seen if code is not None}
    assert "module.py" in files  # of the model's call: the list is not empty
    assert not files & {"batch_size.py", "backward_passes.py", "forward_calls.py"}


def test_a_compiled_step_counts() -> None:
    torch._dynamo.reset()
    model, backend = mlp(), CompileCounter()
    optimizer = RFRMSProp(model.parameters(), batch_size=999, capturable=True)
    BatchSizeCounter(model, optimizer)
    step = torch.compile(optimizer.step, backend=backend)
    for _ in range(4):
        micro_batches(model, 4, 2)
        step()
        optimizer.zero_grad()
        assert sizes(optimizer) == [6]
    assert backend.frame_count == 1


# ---- mixed precision ---------------------------------------------------------------------------------------------


def test_a_step_that_the_scaler_skips_does_not_add_to_the_next() -> None:
    model = mlp()
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    seen = []
    for index, size in enumerate((8, 6, 4)):
        optimizer.zero_grad()
        for _ in range(2):
            loss = model(batch(size)).square().mean() / 2
            scaler.scale(loss * float("inf") if index == 1 else loss).backward()
        if index == 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()
        seen += sizes(optimizer)
    assert seen == [16, 12, 8]


# ---- distributed -------------------------------------------------------------------------------------------------

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch was built without Gloo"
)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_gloo
@pytest.mark.parametrize("counted", ["the wrapper", "the model"])
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}], ids=str)
def test_distributed_data_parallel(one_rank: None, counted: str, options: dict[str, bool]) -> None:
    model = mlp()
    optimizer = rmsprop(model)
    parallel = DistributedDataParallel(model, **options)
    BatchSizeCounter(parallel if counted == "the wrapper" else model, optimizer, world_size=3)
    for size in (6, 4, 5):
        if not options.get("static_graph"):
            with parallel.no_sync():
                backward(parallel, size)
        backward(parallel, size)
        optimizer.step()
        optimizer.zero_grad()
        assert sizes(optimizer) == [size * (3 if options.get("static_graph") else 6)]


@needs_gloo
def test_a_call_of_the_module_inside_the_wrapper_that_is_counted_is_an_error(one_rank: None) -> None:
    model = mlp()
    optimizer = rmsprop(model)
    parallel = DistributedDataParallel(model)
    BatchSizeCounter(parallel, optimizer)
    backward(parallel, 6)
    backward(parallel.module, 4)
    with pytest.raises(RuntimeError, match="without going through a call of the model"):
        optimizer.step()


@needs_gloo
def test_a_zero_redundancy_optimizer(one_rank: None) -> None:
    model = mlp()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), RFRMSProp, lr=1e-3, batch_size=999)
    BatchSizeCounter(model, optimizer)
    for size in (6, 4):
        micro_batches(model, size, size)
        optimizer.step()
        optimizer.zero_grad()
        assert sizes(optimizer.optim) == [2 * size]


# ---- wrapped optimizers ------------------------------------------------------------------------------------------


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, as trainers make it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()


def test_the_optimizer_inside_wrappers_is_counted() -> None:
    model = mlp()
    optimizer = rmsprop(model)
    wrapped = Wrapper(Wrapper(optimizer))
    BatchSizeCounter(model, wrapped)
    backward(model, 7)
    wrapped.step()
    assert sizes(optimizer) == [7]


def test_a_wrapped_optimizer_of_another_kind_is_refused_before_anything_is_hooked() -> None:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer=Wrapper has groups without a batch_size"):
        BatchSizeCounter(model, Wrapper(sgd))
    assert not model._forward_hooks and not sgd._optimizer_step_pre_hooks


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = mlp()
    optimizer = rmsprop(model)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    BatchSizeCounter(prepared, wrapped)
    seen = []
    for index in range(5):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(batch(8)).square().mean())
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            wrapped.step()
            wrapped.zero_grad()
        seen += sizes(optimizer) if index % 2 else []
    assert seen == [16, 16]


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def on_train_start(self) -> None:
            BatchSizeCounter(self.layers, self.optimizers())

        def training_step(self, inputs: tuple[torch.Tensor], index: int) -> torch.Tensor:
            return self.layers(inputs[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return rmsprop(self.layers)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batch(24)), batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(max_epochs=1, accumulate_grad_batches=3, accelerator="cpu", **quiet)
    trainer.fit(Module(), loader)
    assert sizes(trainer.optimizers[0]) == [12]


def test_transformers_model_output() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    lengths = {"vocab_size": 8, "n_positions": 6, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**lengths, bos_token_id=0, eos_token_id=0))
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer)
    model.gradient_checkpointing_enable()
    for size in (3, 2):
        tokens = torch.zeros(size, 6, dtype=torch.long)
        model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert sizes(optimizer) == [5]
