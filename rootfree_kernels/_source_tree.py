"""Make a source tree complete that is used without an installation.

There the folder triton_kernels is beside the package and not inside it. Its parent becomes a place where submodules of
`rootfree_kernels` are looked for.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("rootfree_kernels.triton_kernels") is None:
    sys.modules["rootfree_kernels"].__path__.append(str(Path(__file__).resolve().parent.parent))
