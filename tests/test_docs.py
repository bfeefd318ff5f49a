"""README.md, CONTRIBUTING.md and docs/: named files and links exist, and docs/a-step.md follows a real step."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import rootfree_kernels
from tests.tools import file_changes
from tests.tools.pages import DOCS, PAGES, ROOT, anchors, blocks, links, name_of

A_STEP = (DOCS / "a-step.md").read_text(encoding="utf-8")
SITE = re.compile(r"https://rootfree-kernels\.readthedocs\.io(?:/en/[\w.]+)?(?:/([\w/-]+)\.html)?(?:#([\w-]+))?/?")


def exists(name: str) -> bool:
    """Return whether a file or a folder is in the tree. Names may be relative to the package or to some folders."""
    if name.startswith(("runs/", "build/", ".")):  # created by commands
        return True
    places = ("", "rootfree_kernels", "rootfree_kernels/optim", "rootfree_kernels/native", "csrc", "bench", "tests")
    return any((ROOT / place / name).exists() for place in places)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`([\w/.-]+(?:\.py|\.cpp|\.cu|/))`", page.read_text(encoding="utf-8"))
    siblings = {"products.py", "clipped_momentum.py", "common.py", "rounding.py"}  # files beside eager/kron_factor.py
    missing = [name for name in named if not exists(name) and name not in siblings]
    assert not missing


# ---- links ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_resolve(page: Path) -> None:
    assert not list(broken_links(page))


def broken_links(page: Path) -> Iterator[str]:
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if site := SITE.fullmatch(link):
            path, anchor = DOCS / f"{site[1] or 'index'}.md", site[2] or ""
        elif "://" in link:
            continue
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            yield link


# ---- API reference -------------------------------------------------------------------------------------------------


def test_every_public_name_has_a_page() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"^\.\. [\w:]+:: rootfree_kernels\.(\w+)", text, re.MULTILINE))
    assert documented == set(rootfree_kernels.__all__)


@pytest.mark.parametrize(
    ("page", "options"), [("recipe", rootfree_kernels.RECIPE), ("paper-rule", rootfree_kernels.PAPER_RULE)]
)
def test_pages_list_the_options(page: str, options: Mapping[str, Any]) -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", (DOCS / "api" / f"{page}.md").read_text(), re.MULTILINE)
    assert {name: ast.literal_eval(value) for name, value in rows} == dict(options)


def test_every_environment_variable_is_documented() -> None:
    page = (DOCS / "api" / "environment.md").read_text(encoding="utf-8")
    sources = [*ROOT.glob("rootfree_kernels/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), ROOT / "setup.py"]
    sources += [*ROOT.glob("triton_kernels/*.py"), *ROOT.glob("build_support/*.py")]
    read = r"(?:environ\.get\(|environ\[|getenv\()\"(ROOTFREE_\w+)\""
    variables = {name for file in sources for name in re.findall(read, file.read_text(encoding="utf-8"))}
    assert len(variables) >= 4
    assert {name for name in variables if f"`{name}`" not in page} == set()


# ---- messages ------------------------------------------------------------------------------------------------------


@cache
def strings_of_the_source() -> list[str]:
    """Return all strings of the package and of setup.py. In f-strings, "…" replaces inserted values."""
    files = [*ROOT.glob("rootfree_kernels/**/*.py"), *ROOT.glob("triton_kernels/*.py"), ROOT / "setup.py"]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return [text for node in nodes if (text := text_of(node))]


def text_of(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) if isinstance(value, ast.Constant) else "…" for value in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_messages_quoted_in_troubleshooting_are_in_the_source() -> None:
    quoted = [block.text.strip() for block in blocks(DOCS / "troubleshooting.md", "text")]
    assert len(quoted) >= 40
    assert not [message for message in quoted if not is_raised(message)]


def is_raised(message: str) -> bool:
    """Return whether each part of a message, separated by "…", is in a string of the source."""
    parts = [part.strip(" .:") for part in message.split("…")]
    return any(len(part) > 10 for part in parts) and all(part_is_raised(part) for part in parts)


def part_is_raised(part: str) -> bool:
    """Return whether a part of a message is in a string of the source. A prefix with an option's name is ignored."""
    part = re.sub(r"^\w*=$", "", part.removeprefix("lr=").removeprefix("batch_size="))
    return any(part in text for text in strings_of_the_source())


# ---- docs/a-step.md ------------------------------------------------------------------------------------------------


def test_a_step_enters_every_file_from_a_file_named_earlier_on_the_page() -> None:
    changes = file_changes.changes("eager")
    named = list(dict.fromkeys(re.findall(r"\*\*`([\w/.]+\.py)`\*\*", A_STEP)))
    assert len(named) >= 6
    for number, file in enumerate(named[1:], start=1):
        assert any((before, file) in changes for before in named[:number]), file


def test_a_step_is_one_page() -> None:
    assert len(A_STEP.splitlines()) <= 110
