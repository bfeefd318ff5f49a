"""Prints what decides whether a bundle fits this machine: versions, Triton's key, and one product.

python -m bench.gpu_run.probe
"""

from __future__ import annotations

import hashlib
import sys

import torch
import triton
from triton.runtime.cache import triton_key


def main() -> None:
    """Print one line."""
    key = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    norm = (x @ x).float().norm().item()
    python = sys.version.partition(" ")[0]
    print(f"python {python}, torch {torch.__version__}, triton {triton.__version__} with key {key}, norm {norm:.0f}")


if __name__ == "__main__":
    main()
