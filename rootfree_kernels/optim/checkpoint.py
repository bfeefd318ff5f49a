"""State dicts: checked before anything changes, exact in dtype, free of callables."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from rootfree_kernels.optim.layout import Entry, Group, layout_options
from rootfree_kernels.optim.options import RULES


class CheckpointedOptimizer(Optimizer):
    """An optimizer whose `_layout` says what each parameter's state is; see `RootFreeOptimizer`."""

    def _layout(self, param: Tensor, group: Group) -> dict[str, Entry]:
        """The state of a parameter under the options of `group`, all but `step`."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Drop what is derived from groups and state and kept between steps."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; callables among the options are saved as their names only, so that
        `torch.load(weights_only=True)` reads it. On loading, the optimizer keeps its own callables."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            for name, value in group.items():
                if callable(value):
                    group[name] = f"callable: {getattr(value, '__qualname__', type(value).__qualname__)}"
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the same class and of parameters of the same shapes; dtypes stay as they were saved.

        Raises:
            ValueError: it belongs to another optimizer or to other shapes; nothing was changed.
        """
        final: dict[str, Any] = {}
        own_groups = [dict(group) for group in self.param_groups]

        def check(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            """Runs last of the hooks before the load, and so sees what will be loaded."""
            self._check_state_dict(state_dict)
            final.update(state_dict)

        def restore(optimizer: Optimizer) -> None:
            """Runs first of the hooks after the load."""
            self._restore_tensors(final)
            self._restore_callables(own_groups)

        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
            self._forget()

    def _saved_states(self, state_dict: Mapping[str, Any]) -> Iterable[tuple[Tensor, Group, dict[str, Any]]]:
        """(parameter, its saved group, its saved state) for every parameter with a saved state."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, index in zip(group["params"], saved["params"], strict=True):
                if state_dict["state"].get(index):
                    yield param, saved, state_dict["state"][index]

    def _check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        name = type(self).__name__
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(f"state_dict has no 'state' and 'param_groups': load one of a {name}, not of a model.")
        sizes = [len(group["params"]) for group in self.param_groups]
        if sizes != [len(group["params"]) for group in state_dict["param_groups"]]:
            raise ValueError(f"state_dict has other groups than this {name}: build the groups in the same way.")
        for group in state_dict["param_groups"]:
            if foreign := sorted(RULES.keys() & (group.keys() ^ self.defaults.keys())):
                raise ValueError(f"state_dict lacks or adds the options {foreign}: load one of a {name}.")
        for param, group, state in self._saved_states(state_dict):
            layout = self._layout(param, group)
            if set(state) != {"step", *layout}:
                kept = sorted({"step", *layout})
                raise ValueError(f"state_dict has {sorted(state)} for {kept}: load one of a {name} with these options.")
            for key, entry in layout.items():
                shape = tuple(state[key].shape)
                if shape != entry.shape:
                    raise ValueError(
                        f"state_dict has {key} {shape} for {entry.shape}: load one of the same model, whose state "
                        f"belongs to its options ({layout_options(group)})."
                    )

    def _restore_tensors(self, state_dict: Mapping[str, Any]) -> None:
        """Undo the casts of `Optimizer.load_state_dict`, which gives all state the parameter's dtype."""
        for param, group, saved in self._saved_states(state_dict):
            state, layout = self.state[param], self._layout(param, group)
            for name, entry in layout.items():
                state[name] = saved[name].detach().to(param.device, entry.dtype, copy=True)
            device = param.device if group["capturable"] else "cpu"
            state["step"] = torch.as_tensor(saved["step"]).detach().to(device, torch.float32, copy=True)

    def _restore_callables(self, own_groups: list[Group]) -> None:
        """Give the groups back the callables that a state dict has only the names of."""
        for group, own in zip(self.param_groups, own_groups, strict=True):
            for name, value in group.items():
                if isinstance(value, str) and value.startswith("callable: "):
                    group[name] = own[name]
                    if not callable(own[name]):
                        warnings.warn(f"{name} was saved as a {value}; {own[name]!r} is kept.", stacklevel=4)
