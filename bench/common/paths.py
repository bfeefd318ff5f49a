"""Folders of this repository, and a link that a checkout needs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


def link_kernels(tree: Path) -> None:
    """Let rootfree_kernels.triton_kernels be found in a tree that is not installed."""
    link = tree / "rootfree_kernels" / "triton_kernels"
    if not link.is_symlink():
        link.symlink_to(Path("..") / "triton_kernels")
