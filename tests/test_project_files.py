"""Versions, make targets and Python versions agree between the files that name them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rootfree_kernels
from build_support.metadata import with_absolute_links
from build_support.release_notes import section

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
REPOSITORY = "https://github.com/rootfree-kernels/rootfree-kernels/blob/v1.0"
PICTURES = "https://raw.githubusercontent.com/rootfree-kernels/rootfree-kernels/v1.0"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def first(pattern: str, name: str) -> str:
    """Return the first group of the first match of a pattern in a file."""
    found = re.search(pattern, read(name), re.MULTILINE)
    assert found, f"{name} has no {pattern}"
    return found[1]


def pinned(package: str) -> str:
    return first(rf"^{package}==(\S+)$", "constraints.txt")


def classifier_versions() -> list[str]:
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', read("pyproject.toml"))


# ---- versions ------------------------------------------------------------------------------------------------------


def test_newest_release_of_the_changelog_is_the_version_of_the_package() -> None:
    assert first(r"^## \[(\d[^\]]*)\]", "CHANGELOG.md") == rootfree_kernels.__version__


def test_citation_names_the_newest_release() -> None:
    assert first(r"^version: (.+)$", "CITATION.cff") == rootfree_kernels.__version__
    assert first(r'^date-released: "(.+)"$', "CITATION.cff") == first(r"^## \[\d[^\]]*\] - (.+)$", "CHANGELOG.md")


def test_changelog_has_text_for_the_release_page() -> None:
    notes = section(read("CHANGELOG.md"), rootfree_kernels.__version__)
    assert "### Added" in notes and "\n## " not in notes


def test_pre_commit_runs_the_pinned_ruff() -> None:
    assert first(r"ruff-pre-commit\n    rev: v(\S+)", ".pre-commit-config.yaml") == pinned("ruff")


def test_compiled_wheels_are_named_after_the_pinned_torch() -> None:
    named = first(r'ROOTFREE_LOCAL_VERSION = "torch([\d.]+)"', "pyproject.toml")
    assert pinned("torch").startswith(f"{named}.")
    assert f"`+torch{named}`" in read("build_support/release_notes.py")


# ---- workflows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*(f".github/workflows/{path.name}" for path in WORKFLOWS), ".ci/run", ".pre-commit-config.yaml"]
)
def test_make_targets_exist(name: str) -> None:
    used = set(re.findall(r"^\s*(?:.*(?:run|entry): )?make ([\w-]+)", read(name), re.MULTILINE))
    phony = " ".join(re.findall(r"^\.PHONY: (.+)$", read("Makefile"), re.MULTILINE)).split()
    assert used and used <= set(phony)


def test_ci_runs_the_targets_of_the_local_check() -> None:
    """The set-up by `make install` is part of every target."""
    on_github = set(re.findall(r"- run: make ([\w-]+)", read(".github/workflows/ci.yml")))
    assert on_github | {"install"} == set(re.findall(r"^make ([\w-]+)", read(".ci/run"), re.MULTILINE))


def test_ci_runs_every_python_version_of_the_classifiers() -> None:
    tested = re.findall(r"[\d.]+", first(r"^ +python: \[(.+)\]$", ".github/workflows/ci.yml"))
    assert tested == classifier_versions()
    assert first(r'^requires-python = ">=(.+)"$', "pyproject.toml") == tested[0]


def test_compiled_wheels_are_built_for_every_python_version_of_the_classifiers() -> None:
    built = re.findall(r"cp3(\d+)-\*", first(r"^build = \[(.+)\]$", "pyproject.toml"))
    assert [f"3.{minor}" for minor in built] == classifier_versions()


def test_jobs_have_time_limits_and_no_write_permission_by_default() -> None:
    for path in WORKFLOWS:
        text = path.read_text(encoding="utf-8")
        assert text.count("timeout-minutes:") == text.count("runs-on:")
        assert "\npermissions:\n  contents: read\n" in text


# ---- links of the README on a package index ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("[a](docs/x.md)", f"[a]({REPOSITORY}/docs/x.md)"),
        ("[a](./docs/x.md#part)", f"[a]({REPOSITORY}/docs/x.md#part)"),
        ("[a](#part)", f"[a]({REPOSITORY}/README.md#part)"),
        ('[a](x.md "title")', f'[a]({REPOSITORY}/x.md "title")'),
        ("![a](b/c.png)", f"![a]({PICTURES}/b/c.png)"),
        ("[![a](c.svg)](x.md)", f"[![a]({PICTURES}/c.svg)]({REPOSITORY}/x.md)"),
        ("[`a`](x.md) `b`", f"[`a`]({REPOSITORY}/x.md) `b`"),
        ("[a]: x.md", f"[a]: {REPOSITORY}/x.md"),
        ('<img src="c.png" alt="">', f'<img src="{PICTURES}/c.png" alt="">'),
    ],
)
def test_relative_links_become_absolute(markdown: str, expected: str) -> None:
    assert with_absolute_links(markdown, "v1.0") == expected


@pytest.mark.parametrize(
    "markdown",
    ["[a](https://b.org/c.png)", "[a](mailto:a@b.org)", "`a[0](b)`", "``a`[0](b)``", "```python\na[0](b)\n```\n"],
)
def test_absolute_links_and_code_do_not_change(markdown: str) -> None:
    assert with_absolute_links(markdown, "v1.0") == markdown
