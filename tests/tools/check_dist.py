"""`python -m tests.tools.check_dist dist`: check distribution files before their upload to a package index."""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata
from packaging.utils import parse_wheel_filename

SDIST_CONTAINS = (
    *("CITATION.cff", "LICENSE", "README.md", "constraints.txt", "pyproject.toml", "setup.py"),
    *("build_support/metadata.py", "csrc/operators.cpp", "csrc/cpu/kernels/kernel_table.cpp"),
    *("rootfree_kernels/py.typed", "triton_kernels/__init__.py"),
)


def wheel_metadata(wheel: Path) -> Metadata:
    """Return the metadata of a wheel.

    Raises:
        ExceptionGroup: a field is invalid.
    """
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Metadata.from_email(archive.read(name), validate=True)


def tags(wheel: Path) -> set[str]:
    """Return the tags in the name of a wheel, such as py3-none-any."""
    return {str(tag) for tag in parse_wheel_filename(wheel.name)[3]}


def relative_links(markdown: str) -> list[str]:
    """Return the targets of relative links and images, which do not work on a package index."""
    without_code = re.sub(r"^```.*?^```|(`+).+?\1", "", markdown, flags=re.DOTALL | re.MULTILINE)
    patterns = r"""\]\(([^)\s]+)|^\[[^\]]+\]:\s*(\S+)|(?:src|href)=["']([^"']+)"""
    targets = map("".join, re.findall(patterns, without_code, re.MULTILINE))
    return [target for target in targets if not target.startswith(("https://", "http://", "mailto:"))]


def wheel_problems(wheel: Path) -> list[str]:
    """Return the problems of a pure Python wheel."""
    problems = []
    if tags(wheel) != {"py3-none-any"}:
        problems.append("it is not for every platform")
    with zipfile.ZipFile(wheel) as archive:
        problems += [f"it contains {name}" for name in archive.namelist() if name.endswith((".so", ".pyd"))]
    links = relative_links(wheel_metadata(wheel).description or "")
    return problems + [f"its description has a relative link to {link}" for link in links]


def sdist_problems(sdist: Path) -> list[str]:
    """Return the problems of a source distribution."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    return [f"it lacks {name}" for name in SDIST_CONTAINS if name not in names]


def main(folder: Path) -> int:
    """Print the problems of all files in a folder. Return the exit status."""
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    problems = [f"{wheel}: {problem}" for wheel in wheels for problem in wheel_problems(wheel)]
    problems += [f"{sdist}: {problem}" for sdist in sdists for problem in sdist_problems(sdist)]
    if len(wheels) != 1 or len(sdists) != 1:
        problems.append(f"{folder}: {len(wheels)} wheels and {len(sdists)} source distributions instead of one each")
    print("\n".join(problems or [f"{path}: passed" for path in (*sdists, *wheels)]))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
