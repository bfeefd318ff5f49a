"""Make a source tree complete: there the folder triton_kernels is beside the package and not inside it.

Its parent becomes a place where submodules of `rootfree_kernels` are looked for, before any other installation is.
"""

import sys
from pathlib import Path

_package = Path(__file__).resolve().parent
if not (_package / "triton_kernels").is_dir() and (_package.parent / "triton_kernels" / "operators.py").is_file():
    sys.modules["rootfree_kernels"].__path__.append(str(_package.parent))
