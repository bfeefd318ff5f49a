"""Configuration of Sphinx; `make docs` builds the pages into build/docs. docs/README.md says why these tools."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the tree's own package, whether or not it is installed

import rootfree_kernels  # noqa: E402

REPOSITORY = "https://github.com/rootfree-kernels/rootfree-kernels"
SITE = "https://rootfree-kernels.readthedocs.io"
BRANCH = f"v{rootfree_kernels.__version__}" if os.environ.get("READTHEDOCS_VERSION_TYPE") == "tag" else "main"
"""Where links into the repository lead: pages of a release link to its tag."""

project = "rootfree-kernels"
author = "the rootfree-kernels developers"
copyright = f"2026, {author}"
release = version = rootfree_kernels.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
exclude_patterns = ["README.md"]  # about these sources, for readers of the repository
smartquotes_action = "D"  # dashes only: quotes in prose are mostly those of Python strings
nitpicky = True
default_role = "literal"  # docstrings write code in single backticks

# ---- Markdown ------------------------------------------------------------------------------------------------------

myst_heading_anchors = 3
myst_links_external_new_tab = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

RELATIVE_LINK = re.compile(r"(?<!!)(\[[^\]]*\])\((\.\./[^)\s]+)\)")


def link_to_repository(app: Any, docname: str, source: list[str]) -> None:
    """Turn relative links that leave docs/, which work on GitHub, into links to the repository. Images stay."""
    folder = (ROOT / "docs" / docname).parent

    def absolute(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / match[2])).relative_to(ROOT)
        leaves = target.parts[0] != "docs"
        return f"{match[1]}({REPOSITORY}/blob/{BRANCH}/{target.as_posix()})" if leaves else match[0]

    source[0] = RELATIVE_LINK.sub(absolute, source[0])


def setup(app: Any) -> None:
    app.connect("source-read", link_to_repository)


# ---- API reference -------------------------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Names of other projects become links where their inventories can be fetched. The build must not need a network, so
# only Read the Docs fetches them, and an unresolved name of these projects is no error.
if os.environ.get("READTHEDOCS"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|typing|types)(\..*)?"),
    (r"py:.*", r"(Tensor|Module|Parameter|Optimizer|ParamsT|Any|Callable|Collection|Mapping|Iterable)"),
    (r"py:.*", r"(bool|int|float|str|dict|list|tuple|object|optional|None)"),
    (r"py:.*", r"(CountTerms|required|TracebackType|BaseException|ValueError|RuntimeError|TypeError)"),
]

# ---- HTML ----------------------------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"rootfree-kernels {release}"
html_baseurl = SITE
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}
