"""Say whether PyTorch sees a GPU. The module can be imported where PyTorch is not installed."""

from __future__ import annotations


def why_no_gpu() -> str | None:
    """Return why nothing can run on a GPU, or None if PyTorch sees one."""
    import torch

    if torch.cuda.is_available():
        return None
    toolkit = torch.version.cuda or torch.version.hip
    built = f"built for {'CUDA' if torch.version.cuda else 'ROCm'} {toolkit}" if toolkit else "built without CUDA"
    return f"torch {torch.__version__}, {built}, sees no GPU here"
