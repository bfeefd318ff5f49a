"""Wheels with and without the compiled extension, their metadata, and the search for the CUDA toolkit."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import rootfree_kernels
from tests.tools import check_dist

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("pip", "setuptools")),  # importing them here would clash with PyTorch
    reason="building a wheel needs pip and setuptools",
)

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    *("pyproject.toml", "setup.py", "README.md", "LICENSE"),
    *("build_support", "csrc", "rootfree_kernels", "triton_kernels"),
)
BUILD_PRODUCTS = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "_build*.json")
WHEEL_CONTAINS = (
    *("__init__.py", "py.typed", "_build.json", "triton_kernels/__init__.py"),
    # build_wheel adds a-device.json to its copy of the tree
    *("ops/dispatch_tables/README.md", "ops/dispatch_tables/a-device.json"),
)
CHANGED = ("PYTHONPATH", "ROOTFREE_BUILD", "ROOTFREE_LOCAL_VERSION")  # variables that commands do not inherit


def compiler_works() -> bool:
    include = f"-I{sysconfig.get_path('include')}"
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "-x", "c++", "-fsyntax-only", include, "-"]
    try:
        return subprocess.run(command, input=b"#include <Python.h>\n", capture_output=True).returncode == 0
    except OSError:
        return False


needs_compiler = pytest.mark.skipif(not compiler_works(), reason="no working C++ compiler, or no Python.h")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command in a folder and return its output. If the command fails, raise with the output."""
    inherited = {name: value for name, value in os.environ.items() if name not in CHANGED}
    environment = {**inherited, **environment}
    result = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def copy_tree(tree: Path) -> Path:
    """Copy the source tree without build products."""
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=BUILD_PRODUCTS)
        else:
            shutil.copy2(ROOT / name, tree / name)
    return tree


def build_wheel(folder: Path, **environment: str) -> Path:
    """Build a wheel from a copy of the source tree without build products."""
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


def test_wheel_contains_only_the_package(wheel: Path) -> None:
    top_level = {name.split("/")[0] for name in names(wheel)}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"rootfree_kernels"}


@pytest.mark.parametrize("name", WHEEL_CONTAINS)
def test_wheel_contains(wheel: Path, name: str) -> None:
    assert f"rootfree_kernels/{name}" in names(wheel)


def test_every_module_of_the_tree_is_in_the_wheel(wheel: Path) -> None:
    package = {path.relative_to(ROOT) for path in ROOT.glob("rootfree_kernels/**/*.py")}
    triton = {"rootfree_kernels" / path.relative_to(ROOT) for path in ROOT.glob("triton_kernels/**/*.py")}
    assert {path.as_posix() for path in package | triton} <= set(names(wheel))


def test_build_record_agrees_with_the_wheel(wheel: Path) -> None:
    record = build_record(wheel)
    assert record["extension"] == has_extension(wheel)
    assert record["extension"] == (record["left_out"]["cpp"] is None)


@needs_compiler
def test_extension_is_built_if_there_is_a_compiler(wheel: Path) -> None:
    assert has_extension(wheel), build_record(wheel)


@pytest.mark.skipif(os.name == "nt", reason="/bin/false stands in for a broken compiler")
def test_wheel_records_that_the_compiler_is_broken(wheel_without_compiler: Path) -> None:
    record = build_record(wheel_without_compiler)
    assert not record["extension"] and not has_extension(wheel_without_compiler)
    assert "/bin/false" in record["left_out"]["cpp"]
    assert "rootfree_kernels/__init__.py" in names(wheel_without_compiler)


@pytest.mark.skipif(os.name == "nt", reason="/bin/false stands in for a broken compiler")
def test_wheel_without_the_extension_is_for_every_platform(wheel_without_compiler: Path) -> None:
    assert check_dist.wheel_problems(wheel_without_compiler) == []
    assert not any(".data/" in name for name in names(wheel_without_compiler))


@needs_compiler
def test_wheel_with_the_extension_is_for_this_python_and_platform(wheel: Path) -> None:
    (tag,) = check_dist.tags(wheel)
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"cp{version}-cp{version}t?-(?!any).+", tag)


def test_metadata_has_the_version_and_a_description_without_relative_links(wheel: Path) -> None:
    metadata = check_dist.wheel_metadata(wheel)
    assert str(metadata.version) == rootfree_kernels.__version__
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description and check_dist.relative_links(metadata.description) == []
    assert check_dist.relative_links((ROOT / "README.md").read_text(encoding="utf-8"))  # the check finds links


def test_version_of_a_build_can_name_the_torch_that_it_needs() -> None:
    program = "from build_support.metadata import version; print(version())"
    output = run(sys.executable, "-c", program, cwd=ROOT, ROOTFREE_LOCAL_VERSION="torch2.13")
    assert output.splitlines()[-1] == f"{rootfree_kernels.__version__}+torch2.13"


def test_triton_kernels_is_imported_from_inside_the_package(installed: Path, tmp_path: Path) -> None:
    program = "import rootfree_kernels.triton_kernels as kernels; print(kernels.__file__)"
    output = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(output.splitlines()[-1]).is_relative_to(installed)


def test_no_top_level_triton_kernels_after_install(installed: Path, tmp_path: Path) -> None:
    """Neither this wheel nor the installation under test has a top-level triton_kernels."""
    program = "import rootfree_kernels, importlib.util as u; print(u.find_spec('triton_kernels'))"
    output = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert output.splitlines()[-1] == "None"


@needs_compiler
def test_extension_knows_how_it_was_built(installed: Path, tmp_path: Path) -> None:
    program = "import json; from rootfree_kernels import _C; print(json.dumps(_C.build_info()))"
    output = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    info = json.loads(output.splitlines()[-1])
    assert set(info) == {"compiler", "cxx_standard", "torch", "cuda", "build_type"}
    torch_built_against = json.loads((installed / "rootfree_kernels/_build.json").read_text())["torch"]
    assert torch_built_against.startswith(info["torch"])


# ---- a build in the tree -------------------------------------------------------------------------------------------


def record_seen(tree: Path) -> dict:
    """Return the build record that the package of a source tree reads."""
    program = "import json; from rootfree_kernels.native import build_record; print(json.dumps(build_record()))"
    return json.loads(run(sys.executable, "-c", program, cwd=tree.parent, PYTHONPATH=str(tree)).splitlines()[-1])


def test_each_python_has_its_own_build_record_in_a_source_tree(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    package = tree / "rootfree_kernels"
    others = {"_build.json": "of an earlier version", "_build.cpython-39-x86_64-linux-gnu.json": "of another Python"}
    for name, why in others.items():
        (package / name).write_text(json.dumps({"extension": False, "left_out": {"cpp": why, "cuda": why}}))
    assert record_seen(tree)["left_out"]["cpp"] == "of an earlier version"  # the only one for this Python

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
    """Create a fake CUDA toolkit: a folder with a header, and an nvcc that prints its location."""
    home = tmp_path / "cuda"
    script(home / "bin/nvcc", f'echo "#\\$ _HERE_={home}/bin" >&2')
    (home / "include").mkdir()
    (home / "include/cuda_runtime_api.h").touch()
    return home


@pytest.mark.skipif(os.name == "nt", reason="uses shell scripts instead of nvcc")
def test_find_toolkit_asks_an_nvcc_that_is_a_script(toolkit: Path, tmp_path: Path) -> None:
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
