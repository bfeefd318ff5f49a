"""Wheels, with a C++ compiler and without one, and no top-level triton_kernels."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("pip", "setuptools")),  # imported here, they would clash
    reason="building a wheel needs pip and setuptools",
)

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "rootfree_kernels", "triton_kernels"]
BUILD_PRODUCTS = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "_build*.json")
WHEEL_HOLDS = (
    *("__init__.py", "py.typed", "_build.json", "triton_kernels/__init__.py"),
    *(
        "ops/dispatch_tables/README.md",
        "ops/dispatch_tables/a-device.json",
    ),  # the latter is put into the copy of the tree
)
CHANGED = ("PYTHONPATH", "ROOTFREE_BUILD")  # environment variables that would change what is tested


def compiler_works() -> bool:
    include = f"-I{sysconfig.get_path('include')}"
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "-x", "c++", "-fsyntax-only", include, "-"]
    try:
        return subprocess.run(command, input=b"#include <Python.h>\n", capture_output=True).returncode == 0
    except OSError:
        return False


needs_compiler = pytest.mark.skipif(not compiler_works(), reason="no working C++ compiler, or no Python.h")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command away from the repository and return its output; show all of it if it fails."""
    inherited = {name: value for name, value in os.environ.items() if name not in CHANGED}
    environment = {**inherited, **environment}
    result = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def copy_tree(tree: Path) -> Path:
    """Copy the tree without what was built in it."""
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=BUILD_PRODUCTS)
        else:
            shutil.copy2(ROOT / name, tree / name)
    return tree


def build_wheel(folder: Path, **environment: str) -> Path:
    """Build a wheel from a copy of the tree, so that nothing built earlier slips in."""
    tree, wheels = copy_tree(folder / "tree"), folder / "wheels"
    (tree / "rootfree_kernels/ops/dispatch_tables/a-device.json").write_text("{}")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", wheels, tree, cwd=folder, **environment)
    (wheel,) = wheels.glob("*.whl")
    return wheel


def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def build_record(wheel: Path) -> dict:
    return json.loads(zipfile.ZipFile(wheel).read("rootfree_kernels/_build.json"))


def has_extension(wheel: Path) -> bool:
    return any(name.startswith("rootfree_kernels/_C.") for name in names(wheel))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("no_compiler"), CC="/bin/false", CXX="/bin/false")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def test_wheel_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    top_level = {name.split("/")[0] for name in names(wheel)}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"rootfree_kernels"}


@pytest.mark.parametrize("name", WHEEL_HOLDS)
def test_wheel_holds(wheel: Path, name: str) -> None:
    assert f"rootfree_kernels/{name}" in names(wheel)


def test_every_module_of_the_tree_is_in_the_wheel(wheel: Path) -> None:
    package = {path.relative_to(ROOT) for path in ROOT.glob("rootfree_kernels/**/*.py")}
    triton_room = {"rootfree_kernels" / path.relative_to(ROOT) for path in ROOT.glob("triton_kernels/**/*.py")}
    assert {path.as_posix() for path in package | triton_room} <= set(names(wheel))


def test_build_record_agrees_with_the_wheel(wheel: Path) -> None:
    record = build_record(wheel)
    assert record["extension"] == has_extension(wheel)
    assert record["extension"] == (record["left_out"]["cpp"] is None)


@needs_compiler
def test_extension_is_built_where_there_is_a_compiler(wheel: Path) -> None:
    assert has_extension(wheel), build_record(wheel)


@pytest.mark.skipif(os.name == "nt", reason="/bin/false stands in for a broken compiler")
def test_broken_compiler_leaves_a_wheel_that_says_why(wheel_without_compiler: Path) -> None:
    record = build_record(wheel_without_compiler)
    assert not record["extension"] and not has_extension(wheel_without_compiler)
    assert "/bin/false" in record["left_out"]["cpp"]
    assert "rootfree_kernels/__init__.py" in names(wheel_without_compiler)


def test_triton_kernels_is_imported_from_inside_the_package_only(installed: Path, tmp_path: Path) -> None:
    program = "import rootfree_kernels.triton_kernels as kernels; print(kernels.__file__)"
    output = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(output.splitlines()[-1]).is_relative_to(installed)


def test_no_top_level_triton_kernels_after_install(installed: Path, tmp_path: Path) -> None:
    """This wheel does not install it, nor does the installation, editable or not, that runs these tests."""
    program = "import rootfree_kernels, importlib.util as u; print(u.find_spec('triton_kernels'))"
    output = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert output.splitlines()[-1] == "None"


@needs_compiler
def test_extension_tells_how_it_was_built(installed: Path, tmp_path: Path) -> None:
    program = "import json; from rootfree_kernels import _C; print(json.dumps(_C.build_info()))"
    output = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    info = json.loads(output.splitlines()[-1])
    assert set(info) == {"compiler", "cxx_standard", "torch", "cuda", "build_type"}
    torch_built_against = json.loads((installed / "rootfree_kernels/_build.json").read_text())["torch"]
    assert torch_built_against.startswith(info["torch"])


# ---- a build in the tree -------------------------------------------------------------------------------------------


def record_seen(tree: Path) -> dict:
    """Return the record that the package in a tree finds."""
    program = "import json; from rootfree_kernels.native import build_record; print(json.dumps(build_record()))"
    return json.loads(run(sys.executable, "-c", program, cwd=tree.parent, PYTHONPATH=str(tree)).splitlines()[-1])


def test_every_python_that_builds_in_a_tree_has_a_record_of_its_own(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    package = tree / "rootfree_kernels"
    others = {"_build.json": "of an earlier version", "_build.cpython-39-x86_64-linux-gnu.json": "of another Python"}
    for name, why in others.items():
        (package / name).write_text(json.dumps({"extension": False, "left_out": {"cpp": why, "cuda": why}}))
    assert record_seen(tree)["left_out"]["cpp"] == "of an earlier version"  # where there is nothing newer

    program = "import setuptools.build_meta as backend; backend.build_editable('wheels')"
    run(sys.executable, "-c", program, cwd=tree, ROOTFREE_BUILD="none")
    assert record_seen(tree)["left_out"]["cpp"] == "ROOTFREE_BUILD=none"
    (name,) = {path.name for path in package.glob("_build*.json")} - set(others)
    assert name == f"_build{sysconfig.get_config_var('EXT_SUFFIX').rpartition('.')[0]}.json"
    for other, why in others.items():
        assert why in (package / other).read_text()


# ---- the CUDA toolkit ----------------------------------------------------------------------------------------------

FIND_TOOLKIT = """
import json, os, runpy, sys
from pathlib import Path
import setuptools, torch
setuptools.setup = lambda **options: None
torch.version.cuda = "13.0"
names = runpy.run_path(sys.argv[1])
homes = {"set": os.environ.get("CUDA_HOME")}
for case, environment in json.loads(sys.argv[2]).items():
    os.environ.pop("CUDA_HOME", None)
    os.environ.update(environment)
    homes[case] = [x and str(x) for x in names["find_toolkit"](usual=Path("/nowhere"))]
print(json.dumps(homes))
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A folder with an nvcc that says where it is, and with headers."""
    home = tmp_path / "cuda"
    script(home / "bin/nvcc", f'echo "#\\$ _HERE_={home}/bin" >&2')
    (home / "include").mkdir()
    (home / "include/cuda_runtime_api.h").touch()
    return home


@pytest.mark.skipif(os.name == "nt", reason="scripts stand in for nvcc")
def test_an_nvcc_that_is_a_script_is_asked_for_its_toolkit(toolkit: Path, tmp_path: Path) -> None:
    wrapper = script(tmp_path / "local/bin/nvcc", f'exec {toolkit}/bin/nvcc "$@"').parent
    silent = script(tmp_path / "broken/bin/nvcc", "exit 1").parent
    (tmp_path / "linked/bin").mkdir(parents=True)
    (tmp_path / "linked/bin/nvcc").symlink_to(toolkit / "bin/nvcc")
    system = "/usr/bin:/bin"
    cases = {
        "the toolkit's own": {"PATH": f"{toolkit}/bin:{system}"},
        "a link": {"PATH": f"{tmp_path}/linked/bin:{system}"},
        "CUDA_HOME without headers": {"PATH": f"{wrapper}:{system}", "CUDA_HOME": str(tmp_path / "local")},
        "broken": {"PATH": f"{silent}:{system}"},
        "none": {"PATH": str(tmp_path / "empty")},
    }
    command = (sys.executable, "-c", FIND_TOOLKIT, ROOT / "setup.py", json.dumps(cases))
    path = os.pathsep.join([str(wrapper), os.environ["PATH"]])
    environment = {"PATH": path, "CUDA_HOME": "", "CUDA_PATH": "", "ROOTFREE_BUILD": "none"}
    homes = json.loads(run(*command, cwd=tmp_path, **environment).splitlines()[-1])
    found = [str(toolkit), None]
    assert homes["set"] == str(toolkit)  # a wrapper on the PATH
    assert homes["the toolkit's own"] == homes["a link"] == homes["CUDA_HOME without headers"] == found
    assert homes["broken"][0] is None
    assert f"not both bin/nvcc and include/cuda_runtime_api.h in {tmp_path}/broken; set CUDA_HOME" in homes["broken"][1]
    assert homes["none"] == [None, "no CUDA toolkit: set CUDA_HOME or put nvcc on the PATH"]
