"""Hash tensors, and collect the results of a version of the package by case."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HEX_DIGITS = 24


def digest(x: Tensor) -> str:
    """Return a tensor's dtype, shape and strides, and a hash of the bytes of its elements in row-major order."""
    whole = x.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    data = whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b""
    kind = f"{str(x.dtype).removeprefix('torch.')}{[*x.shape]}/{[*x.stride()]}".replace(" ", "")
    return f"{kind} {hashlib.sha256(data).hexdigest()[:HEX_DIGITS]}"


def digests(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests of all tensors in named values. Tensors of a list or tuple get its name and an index."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            found[name] = digest(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            found.update(digests({f"{name} {i}": x for i, x in enumerate(value) if isinstance(x, Tensor)}))
    return found


def message_of(error: Exception) -> str:
    """Return the type and text of an error. Addresses are removed, because they differ between runs."""
    return f"{type(error).__name__}: {re.sub(r'0x[0-9a-f]{6,}', '0x', str(error))}"


@dataclass
class Results:
    """The results of a version on one backend, in the format of the output file."""

    cases: dict[str, dict[str, str]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    checkpoints: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def case(self, name: str) -> Iterator[dict[str, str]]:
        """Open a case and yield its dictionary of digests to fill. An error ends the case and is recorded in it."""
        if name in self.cases:
            raise KeyError(f"two cases are called {name!r}")
        entries: dict[str, str] = {}
        self.cases[name] = entries
        try:
            yield entries
        except Exception as error:  # the other version must raise too
            entries["raises"] = "yes"
            self.messages[name] = message_of(error)
