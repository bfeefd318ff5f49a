"""Make a source tree complete that is used without an installation.

There the folder triton_kernels is beside the package and not inside it. Its parent becomes a place where submodules of
`rootfree_kernels` are looked for.
"""

from importlib.util import find_spec
from pathlib import Path

import rootfree_kernels

if find_spec("rootfree_kernels.triton_kernels") is None:
    rootfree_kernels.__path__.append(str(Path(__file__).resolve().parent.parent))
