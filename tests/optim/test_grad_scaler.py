"""All optimizers with GradScaler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.calls.optimizers import Case, Model, snapshot
from tests.calls.tensors import assert_same_bits, same_bits
from tests.optim.runs import BEFORE, results, trained

SCALE = 2.0**12  # a power of two, so scaling and unscaling are exact


def scaled_step(model: Model, optimizer: torch.optim.Optimizer, scaler: Any, step: int) -> None:
    optimizer.zero_grad()
    scaler.scale(model(step)).backward()
    scaler.step(optimizer)
    scaler.update()


def test_grad_scaler_keeps_the_result(case: Case) -> None:
    model, optimizer = case.start()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in BEFORE:
        scaled_step(model, optimizer, scaler, step)
    assert_same_bits(snapshot(optimizer), results(case))


def test_grad_scaler_with_unscale_and_clipping_keeps_the_result(case: Case) -> None:
    model, optimizer = case.start()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    plain_model, plain = case.start()
    for step in BEFORE:
        optimizer.zero_grad()
        scaler.scale(model(step)).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

        plain.zero_grad()
        plain_model(step).backward()
        assert nn.utils.clip_grad_norm_(plain_model.parameters(), 1.0) == norm > 1
        plain.step()
    assert_same_bits(snapshot(optimizer), snapshot(plain))


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale-step"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("steps_before", [3, 4], ids=["update-step", "other-step"])
def test_an_overflow_under_grad_scaler_is_counted_and_changes_nothing_else(
    case: Case, unscale: bool, bad: float, steps_before: int
) -> None:
    """Every parameter is skipped, not only the one whose gradient overflowed."""
    model, optimizer = trained(case, range(steps_before))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    before = snapshot(optimizer)
    optimizer.zero_grad()
    scaler.scale(model(steps_before)).backward()
    model.bias.grad[0] = bad
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()

    after = snapshot(optimizer)
    for name in before:
        if "skipped" in name or "step" in name:
            assert torch.equal(after[name], before[name] + 1), name
        else:
            assert same_bits(after[name], before[name]), name
    assert scaler.get_scale() == SCALE / 2

    scaled_step(model, optimizer, scaler, steps_before)
    finite = snapshot(optimizer)
    assert all(value.isfinite().all() for value in finite.values())
    assert not any(same_bits(finite[name], before[name]) for name in before if "momentum_buffer" in name)
    assert all(torch.equal(finite[name], after[name]) for name in after if "skipped" in name)


def test_only_a_scaler_is_told_that_the_step_unscales(case: Case) -> None:
    """Lightning asks too, in runs without a scaler, and would then refuse to clip gradients."""
    _, optimizer = case.start()

    class Own(torch.amp.GradScaler):
        def asks(self) -> bool:
            return bool(optimizer._step_supports_amp_scaling)

    assert Own("cpu").asks()
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true"])
def test_lightning_clips_gradients(case: Case, precision: str) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return case.make(self.parameters())

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", precision=precision, gradient_clip_val=1.0, enable_checkpointing=False, **quiet
    )
    module = Module()
    before = [param.detach().clone() for param in module.parameters()]
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 6)), batch_size=8)
    trainer.fit(module, batches)
    assert all(not torch.equal(x.float(), y) for x, y in zip(module.parameters(), before, strict=True))
