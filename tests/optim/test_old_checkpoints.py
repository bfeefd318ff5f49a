"""Checkpoints that earlier versions have written load, and training goes on as it did in these versions."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import rootfree_kernels
from rootfree_kernels import PAPER_RULE, RECIPE
from rootfree_kernels.optim.options import DTYPE_OPTIONS, dtype_of_text
from tests.calls.cpu import needs_cpp
from tests.calls.tensors import assert_same_bits
from tests.optim.checkpoints import flat, through_file
from tests.tools.write_checkpoint import AFTER, BEFORE, CASES, make_groups, make_params, take_steps

FOLDER = Path(__file__).resolve().parent.parent / "data/checkpoints"
VERSIONS = [path.stem for path in sorted(FOLDER.glob("*.pt"))]

TOLERANCES = {
    # Libraries for products and instruction sets round differently. Here the results are bitwise equal on the processor
    # that wrote the files.
    "fp32": {"rtol": 1e-5, "atol": 1e-6},
    # One such difference can also round a BF16 value to its other neighbour, 2⁻⁷ away.
    "bf16": {"rtol": 2**-7, "atol": 2**-9},
}


@functools.cache
def checkpoints(version: str) -> dict[str, Any]:
    return torch.load(FOLDER / f"{version}.pt", weights_only=True)


SAVED = [(version, name) for version in VERSIONS for name in checkpoints(version)]
each_checkpoint = pytest.mark.parametrize("version, name", SAVED)
each_backend = pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_cpp)])


def resumed(version: str, name: str, **options: Any) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Return parameters and an optimizer with default options into which a checkpoint was loaded."""
    kind, _, dtype = CASES[name]
    saved = copy.deepcopy(checkpoints(version)[name])
    params = make_params(dtype)
    for param, value in zip(params, saved["weights"], strict=True):
        param.data.copy_(value)
    optimizer = getattr(rootfree_kernels, kind)(
        [{"params": params[:3]}, {"params": params[3:]}], **{"batch_size": 1, **options}
    )
    optimizer.load_state_dict(saved["optimizer"])
    return params, optimizer


def tolerance(name: str) -> dict[str, float]:
    is_fp32 = name in ("RFRMSProp", "IFShampoo-fp32-blocks-T2")
    return TOLERANCES["fp32" if is_fp32 else "bf16"]


def assert_as_it_was(params: list[torch.nn.Parameter], version: str, name: str) -> None:
    torch.testing.assert_close(
        [p.detach() for p in params], checkpoints(version)[name]["weights_later"], **tolerance(name)
    )


def test_there_are_checkpoints_of_every_kind() -> None:
    assert VERSIONS == ["0.1.0", "0.2.0", "before-packed-momentum"]
    assert sorted(checkpoints("0.2.0")) == sorted(CASES)
    assert len(checkpoints("0.1.0")) == len(CASES) - 1
    assert len(checkpoints("before-packed-momentum")) == len(CASES) - 2


@each_checkpoint
def test_the_state_of_an_old_checkpoint_is_loaded_bitwise(version: str, name: str) -> None:
    """Only counts of steps have another dtype today."""
    expected = flat(checkpoints(version)[name]["optimizer"]["state"])
    expected.update({entry: value.to(torch.int64) for entry, value in expected.items() if entry.endswith(" step")})
    assert_same_bits(flat(resumed(version, name)[1].state_dict()["state"]), expected)


@each_checkpoint
def test_the_options_of_an_old_checkpoint_are_loaded(version: str, name: str) -> None:
    """Options of the recipe and of packed momentum are those that the old code had without knowing them."""
    others = {**RECIPE, "packed_momentum": True} if "IFShampoo" in name else {}
    optimizer = resumed(version, name, **others)[1]
    for group, saved in zip(
        optimizer.param_groups, checkpoints(version)[name]["optimizer"]["param_groups"], strict=True
    ):
        missing = {**PAPER_RULE, "packed_momentum": False} if "IFShampoo" in name else {}
        expected = {**missing, **saved, "params": group["params"]}
        assert group == expected


@each_checkpoint
@each_backend
def test_training_goes_on_as_it_did_in_the_old_version(
    version: str, name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOTFREE_BACKEND", backend)
    params, optimizer = resumed(version, name)
    take_steps(params, optimizer, range(BEFORE, BEFORE + AFTER))
    assert_as_it_was(params, version, name)


@each_checkpoint
def test_an_old_checkpoint_that_is_saved_again_loads_bitwise(version: str, name: str) -> None:
    params, optimizer = resumed(version, name)
    saved = through_file(optimizer.state_dict())
    again_params, again = resumed(version, name)
    take_steps(again_params, again, range(BEFORE))
    for param, source in zip(again_params, params, strict=True):
        param.data.copy_(source.data)
    again.load_state_dict(saved)
    assert again.state_dict()["param_groups"] == saved["param_groups"]
    take_steps(params, optimizer, range(BEFORE, BEFORE + AFTER))
    take_steps(again_params, again, range(BEFORE, BEFORE + AFTER))
    assert_same_bits(flat(again.state_dict()["state"]), flat(optimizer.state_dict()["state"]))
    assert all(torch.equal(x, y) for x, y in zip(params, again_params, strict=True))


@each_checkpoint
def test_a_new_run_with_the_same_options_has_the_options_of_the_old_one(version: str, name: str) -> None:
    """The cases build the same groups today. Every option that is new since then has to be in `_newer_options`."""
    kind, options, dtype = CASES[name]
    new = getattr(rootfree_kernels, kind)(make_groups(make_params(dtype), kind), **{**options, "batch_size": 4})
    old = resumed(version, name)[1]
    assert [group.keys() for group in old.param_groups] == [group.keys() for group in new.param_groups]
    for group in old.param_groups:
        assert all(
            group[option] is None or isinstance(group[option], torch.dtype)
            for option in DTYPE_OPTIONS
            if option in group
        )


@pytest.mark.parametrize("version", [path.stem for path in sorted(FOLDER.glob("*.pickle"))])
@each_backend
def test_a_pickled_optimizer_of_an_old_version_goes_on(
    version: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "IFShampoo-fp32-blocks-T2"
    monkeypatch.setenv("ROOTFREE_BACKEND", backend)
    params, optimizer = torch.load(FOLDER / f"{version}.pickle", weights_only=False)
    take_steps(params, optimizer, range(BEFORE, BEFORE + AFTER))
    assert_as_it_was(params, version, name)
    again = resumed("0.2.0", name)[1]
    again.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(3))})  # the defaults are complete as well


def test_names_of_dtypes_are_read_with_and_without_the_name_of_the_module() -> None:
    assert dtype_of_text("bfloat16") is dtype_of_text("torch.bfloat16") is torch.bfloat16
    assert dtype_of_text("Tensor") is None and dtype_of_text("bf16") is None
