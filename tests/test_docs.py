"""docs/: the files that pages name exist, and docs/a-step.md follows the way that a step takes through them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tools import file_changes

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
A_STEP = (ROOT / "docs" / "a-step.md").read_text(encoding="utf-8")


def exists(name: str) -> bool:
    """Return whether a file or a folder of that name is in the tree; names may leave out the package."""
    return any((ROOT / place / name).exists() for place in ("", "rootfree_kernels", "rootfree_kernels/optim"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`([\w/.-]+(?:\.py|\.cpp|\.cu|/))`", page.read_text(encoding="utf-8"))
    assert named
    siblings = {"products.py", "clipped_momentum.py", "common.py", "rounding.py"}  # of eager/kron_factor.py
    missing = [name for name in named if not exists(name) and name not in siblings]
    assert not missing


def test_a_step_enters_every_file_from_one_that_the_page_named_before() -> None:
    changes = file_changes.changes("eager")
    named = list(dict.fromkeys(re.findall(r"\*\*`([\w/.]+\.py)`\*\*", A_STEP)))
    assert len(named) >= 6
    for number, file in enumerate(named[1:], start=1):
        assert any((before, file) in changes for before in named[:number]), file


def test_a_step_is_one_page() -> None:
    assert len(A_STEP.splitlines()) <= 110
