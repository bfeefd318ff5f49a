"""Import the Triton backend of a source tree, where its folder is beside the package and not inside it.

An installation maps the folder triton_kernels into the package. In a checkout that is only on the path, this does it.
The checkout's own folder comes before one that an editable installation of another checkout would find.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

NAME = "rootfree_kernels.triton_kernels"
_package = Path(__file__).resolve().parent
_folder = _package.parent / "triton_kernels"

if not (_package / "triton_kernels").is_dir() and (_folder / "operators.py").is_file():
    spec = spec_from_file_location(NAME, _folder / "__init__.py", submodule_search_locations=[str(_folder)])
    assert spec is not None and spec.loader is not None
    sys.modules[NAME] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])
    sys.modules["rootfree_kernels"].triton_kernels = sys.modules[NAME]  # type: ignore[attr-defined]
