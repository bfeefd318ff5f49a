"""The version and the long description of the package, for setup.py."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "rootfree-kernels/rootfree-kernels"
PICTURES = (".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")

CODE = r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)|(?P<ticks>`+).+?(?P=ticks))"
BEFORE_TARGET = r"""\]\(\s*<?|^\[[^\]\n]+\]:\s*<?|\b(?:src|href|srcset)=["']"""  # inline link, definition, HTML
RELATIVE = r"""(?![a-z][a-z0-9+.-]*:|//)[^\s)>"']+"""
CODE_OR_LINK = re.compile(
    f"{CODE}|(?P<before>{BEFORE_TARGET})(?P<target>{RELATIVE})", re.DOTALL | re.IGNORECASE | re.MULTILINE
)


def public_version():
    """Return `__version__` of the package, without importing it."""
    text = (ROOT / "rootfree_kernels/__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def version():
    """Return the version of this build.

    ROOTFREE_LOCAL_VERSION=torch2.13 adds `+torch2.13`. Released wheels with the compiled extension have such a suffix,
    because they work with one version of PyTorch only.
    """
    suffix = os.environ.get("ROOTFREE_LOCAL_VERSION")
    return f"{public_version()}+{suffix}" if suffix else public_version()


def absolute(target, tag):
    """Return the address of a file of the repository at `tag`. A target like "#install" is a heading of the README."""
    path = f"README.md{target}" if target.startswith("#") else target.removeprefix("./")
    if path.lower().endswith(PICTURES):
        return f"https://raw.githubusercontent.com/{REPOSITORY}/{tag}/{path}"
    return f"https://github.com/{REPOSITORY}/blob/{tag}/{path}"


def with_absolute_links(markdown, tag):
    """Return `markdown` with absolute addresses in place of relative links and images. Code is left as it is."""

    def replace(found):
        return found[0] if found["code"] else found["before"] + absolute(found["target"], tag)

    return CODE_OR_LINK.sub(replace, markdown)


def long_description():
    """Return README.md for a package index, where relative links would lead nowhere."""
    return with_absolute_links((ROOT / "README.md").read_text(encoding="utf-8"), f"v{public_version()}")
