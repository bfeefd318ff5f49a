"""Prints what decides whether a bundle fits this machine: versions, Triton's key, and one product.

python -m bench.gpu_run.probe
"""

from __future__ import annotations

import sys

import torch
import triton

from bench.gpu_run.bundle import compiler_key


def main() -> None:
    """Print one line."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    norm = (x @ x).float().norm().item()
    python = sys.version.partition(" ")[0]
    versions = f"python {python}, torch {torch.__version__}, triton {triton.__version__} with key {compiler_key()}"
    print(f"{versions}; norm of a product {norm:.0f}")


if __name__ == "__main__":
    main()
