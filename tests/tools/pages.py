"""Read the pages of the documentation: code blocks, commands and links.

python -m tests.tools.pages      # print all command lines of all pages
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
OTHER_PAGES = ("CONTRIBUTING.md", "SECURITY.md", "bench/results/README.md", ".github/pull_request_template.md")
PAGES = (ROOT / "README.md", *(ROOT / page for page in OTHER_PAGES), *sorted(DOCS.glob("**/*.md")))
"""All pages but CHANGELOG.md, which also names what is gone."""

FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:make|python3?|pip|nsys|ncu|git|\.ci/\w+)\b(?! *:)")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    output: str | None  # the next block, if only the word "prints" stands between them


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    listed = []
    for match, following in zip_longest(found, found[1:]):
        announced = following is not None and text[match.end() : following.start()].strip() == "prints"
        output = following[3] if following is not None and announced else None
        listed.append(Block(match[2], match[3], output))
    return [block for block in listed if language in (None, block.language)]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


# ---- commands ------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """Return the command lines of a page, from shell blocks, indented blocks and inline code."""
    found = [line for block in blocks(page) for line in _shell_lines(block)]
    rest = prose(page)
    indented = "\n".join(re.findall(r"^    (\S.*|    .*)$", rest, re.MULTILINE))
    found += _lines(indented)
    found += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    return [line for line in found if COMMAND.match(line)]


def _shell_lines(block: Block) -> Iterator[str]:
    if block.language == "bash":
        yield from _lines(block.text)
    elif block.language == "console":
        yield from (line.removeprefix("$ ") for line in _lines(block.text) if line.startswith("$ "))


def _lines(text: str) -> list[str]:
    """Return the lines without comments. Lines that end in a backslash are joined with the next line."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [re.sub(r"(^|\s+)# .*", "", line).strip() for line in joined.splitlines()]


# ---- links ---------------------------------------------------------------------------------------------------------


def links(page: Path) -> list[str]:
    """Return the targets of all links and images of a page."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and MyST generate for the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower().replace("\\", "")).strip().replace(" ", "-") for heading in headings
    }


if __name__ == "__main__":
    for page in PAGES:
        for command in commands(page):
            print(f"{name_of(page)}: {command}")
