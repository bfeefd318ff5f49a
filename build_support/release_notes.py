"""`python -m build_support.release_notes 0.2.0`: print the section of CHANGELOG.md about a version."""

import re
import sys

from build_support.metadata import ROOT, with_absolute_links

COMPILED_WHEELS = """
The wheels named `+torch2.13` contain the compiled extension, and work with that version of PyTorch only. `pip install
rootfree-kernels` installs the wheel in pure Python; see
[Installation](https://rootfree-kernels.readthedocs.io/en/stable/install.html).
"""


def section(changelog, version):
    """Return the text below the heading of a version."""
    heading = rf"^## \[{re.escape(version)}\].*?\n"
    found = re.search(rf"{heading}(.*?)(?=^## \[|^\[[^\]]+\]: |\Z)", changelog, re.DOTALL | re.MULTILINE)
    if not found:
        raise SystemExit(f"CHANGELOG.md has no section about {version}")
    return found[1].strip()


if __name__ == "__main__":
    (version,) = sys.argv[1:]
    text = section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    print(with_absolute_links(text, f"v{version}") + "\n" + COMPILED_WHEELS)
