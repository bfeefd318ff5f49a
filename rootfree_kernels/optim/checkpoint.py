"""State dicts: checked before anything changes, with exact dtypes, and without callables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer

from rootfree_kernels.optim.saved_groups import FORMAT_VERSION, SavedGroups, saved_groups
from rootfree_kernels.optim.state_spec import Group, layout_options, new_state, state_spec


def finished(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict of `Optimizer.state_dict` with plain values and the version of its format."""
    groups = saved_groups(state_dict["param_groups"])
    return {**state_dict, "param_groups": groups, "format_version": FORMAT_VERSION}


def add_untouched(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Add the state that parameters without a gradient so far will start from, if other parameters have state.

    `torch.distributed.checkpoint` loads a checkpoint only if it has the state of all trainable parameters, and so it
    has. An optimizer without any state has nothing to save. Nothing is added to the optimizer.
    """
    state, has_state = state_dict["state"], optimizer.state.get
    if not any(has_state(param) for group in optimizer.param_groups for param in group["params"]):
        return
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for param, index in zip(group["params"], saved["params"], strict=True):
            if param.requires_grad and not is_lazy(param) and not has_state(param):
                state[index] = new_state(param, group)


def _saved_states(
    groups: Sequence[Group], saved_groups: Sequence[Group], states: Mapping[Any, Any]
) -> Iterable[tuple[Tensor, Group, dict[str, Any]]]:
    """Yield (parameter, its saved group, its saved state) for every parameter with a saved state."""
    for group, saved in zip(groups, saved_groups, strict=True):
        for param, index in zip(group["params"], saved["params"], strict=True):
            if states.get(index):
                yield param, saved, states[index]


def check_groups(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError unless a state dict has as many groups and parameters as an optimizer."""
    name = type(optimizer).__name__
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"state_dict has no 'state' and 'param_groups': load one of a {name}, not of a model.")
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != [len(group["params"]) for group in state_dict["param_groups"]]:
        raise ValueError(f"state_dict has other groups than this {name}: build the groups in the same way.")


def _check_state(name: str, param: Tensor, group: Group, state: Mapping[str, Any]) -> None:
    """Raise ValueError if a saved state has other tensors than the parameter's state under the saved options."""
    spec = state_spec(param, group)
    if set(state) != {"step", *spec}:
        kept = sorted({"step", *spec})
        raise ValueError(f"state_dict has {sorted(state)} for {kept}: load one of a {name} with these options.")
    for key, value in state.items():
        if not isinstance(value, Tensor) and not (key == "step" and isinstance(value, int | float)):
            raise ValueError(f"state_dict has {value!r} as {key}: load one whose state is made of Tensors.")
    if isinstance(state["step"], Tensor) and state["step"].numel() != 1:
        raise ValueError(f"state_dict has step {tuple(state['step'].shape)} for (): load one of a {name}.")
    for key, entry in spec.items():
        shape = tuple(state[key].shape)
        if shape != entry.shape:
            raise ValueError(
                f"state_dict has {key} {shape} for {entry.shape}: load one of the same model, whose state belongs to "
                f"its options ({layout_options(group)})."
            )


class Load:
    """A state dict that was checked, and everything that is needed to put it in place.

    Making one may fail, and changes nothing. `finish` allocates nothing and does not fail.

    Raises:
        ValueError: the state dict belongs to another optimizer or to other shapes.
    """

    def __init__(self, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
        check_groups(optimizer, state_dict)
        self._saved = SavedGroups(optimizer, state_dict)
        groups, saved, states = optimizer.param_groups, self._saved.groups, state_dict["state"]
        for entry in _saved_states(groups, saved, states):
            _check_state(type(optimizer).__name__, *entry)
        self._states = {param: _restored(param, *entry) for param, *entry in _saved_states(groups, saved, states)}
        indices = {index for group in saved for index in group["params"]}
        others = {key: value for key, value in states.items() if key not in indices}
        self.remainder: dict[str, Any] = {**state_dict, "state": others, "param_groups": self._saved.to_load()}
        """The state dict without the state of parameters, which `Optimizer.load_state_dict` would cast."""

    def finish(self, optimizer: Optimizer) -> None:
        """Put in place what `Optimizer.load_state_dict` did not, which has loaded `remainder`."""
        optimizer.state.update(self._states)
        for group, kept in zip(optimizer.param_groups, self._saved.kept, strict=True):
            group.update(kept)


def _restored(param: Tensor, group: Group, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return copies of a parameter's saved state, with the dtypes and on the devices where they belong."""
    step = saved["step"]
    step = step if isinstance(step, Tensor) else torch.tensor(int(step), dtype=torch.int64, device="cpu")
    device = param.device if group["capturable"] else "cpu"
    state = {"step": step.detach().to(device, torch.int64, copy=True).reshape(())}
    for name, entry in state_spec(param, group).items():
        state[name] = saved[name].detach().to(param.device, entry.dtype, copy=True)
    return state
