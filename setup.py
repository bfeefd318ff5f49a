"""Build rootfree_kernels: the Python package always, the compiled extension if possible.

pyproject.toml has most of the metadata. This file does the rest: it installs the folder triton_kernels/ inside the
package, compiles rootfree_kernels._C against the PyTorch of this environment, and gives the README absolute links. If
the extension cannot be compiled, the build prints the reason, records it in _build.json beside the modules (because
pip hides what a build prints), and installs the package in pure Python.

ROOTFREE_BUILD=none compiles nothing, =cpu the C++ part only, =cuda both parts. A part that is named and cannot be built
is an error.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import textwrap
from functools import cache
from glob import glob
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT))  # for build_support: pip does not run this file as a script

from build_support.metadata import long_description, version  # noqa: E402
from build_support.toolkit import find_toolkit  # noqa: E402


def set_cuda_home():
    """Tell PyTorch where the CUDA toolkit is. Return the reason if there is none, or None."""
    if torch.version.cuda is None or os.name == "nt":
        return None
    folder, problem = find_toolkit()
    if folder:
        os.environ["CUDA_HOME"] = str(folder)
    return problem


toolkit_problem = None
try:
    import torch

    toolkit_problem = set_cuda_home()
    from torch.utils import cpp_extension
except Exception as error:  # a broken PyTorch can raise anything, and must not break this build
    torch = cpp_extension = None
    torch_problem = textwrap.shorten(f"{type(error).__name__}: {error}", 80, placeholder=" ...")

PACKAGE = "rootfree_kernels"
KERNELS = f"{PACKAGE}.triton_kernels"  # the folder triton_kernels/
TABLES = f"{PACKAGE}.ops.dispatch_tables"  # a folder of data
# Where the outcome of the build is recorded: in a wheel, and in a source tree, which several Pythons may build in.
WHEEL_RECORD = "_build.json"
TREE_RECORD = f"_build{sysconfig.get_config_var('EXT_SUFFIX').rpartition('.')[0]}.json"
CPU_SOURCES = ["csrc/bindings.cpp", "csrc/operators.cpp", *sorted(glob("csrc/cpu/*.cpp", root_dir=ROOT))]
VECTORIZED_SOURCES = sorted(glob("csrc/cpu/kernels/*.cpp", root_dir=ROOT))
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu", root_dir=ROOT) + glob("csrc/cuda/*.cpp", root_dir=ROOT))

# Value of ROOTFREE_BUILD -> the parts of the extension that must be built.
MODES = {"auto": (), "none": (), "cpu": ("cpp",), "cuda": ("cpp", "cuda")}
MODE = os.environ.get("ROOTFREE_BUILD") or "auto"
if MODE not in MODES:
    raise SystemExit(f"rootfree-kernels: ROOTFREE_BUILD={MODE} is unknown: choose one of {', '.join(MODES)}")

# Instruction set -> flags of GCC and Clang, the same as for PyTorch's own kernels. The vectorised sources are compiled
# once for each, and one is chosen at run time.
INSTRUCTION_SETS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
}
HAS_AVX = platform.machine().lower() in ("x86_64", "amd64") and os.name != "nt"

CXX_FLAGS = [] if os.name == "nt" else ["-O3", "-g0", "-fvisibility=hidden"]
# Without errno and floating-point exceptions, compilers vectorise more loops. Without fused multiply-adds, every
# instruction set gives bitwise the same results.
VECTORIZED_FLAGS = [] if os.name == "nt" else ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

NVCC_FLAGS = ["-O3", "-fmad=false"]  # no fused multiply-adds here either

# Program that loads the extension from a file.
LOAD = f"""
import sys, torch
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("{PACKAGE}._C", sys.argv[1])
spec.loader.exec_module(module_from_spec(spec))
"""

LEFT_OUT = {"cpp": None, "cuda": None}  # part -> reason why it is not built, or None


def leave_out(part, reason):
    """Record that a part of the extension is not built. Raise an error if ROOTFREE_BUILD names it."""
    if part in MODES[MODE]:
        raise SystemExit(f"rootfree-kernels: ROOTFREE_BUILD={MODE} is impossible here: {reason}")
    LEFT_OUT[part] = LEFT_OUT[part] or reason  # keep the first reason


def why_no_cpp():
    """Return the reason why nothing can be compiled, or None."""
    if MODE == "none":
        return "ROOTFREE_BUILD=none"
    if torch is None:
        return (
            f"PyTorch cannot be imported in the build environment ({torch_problem}); with PyTorch installed, "
            "`pip install --no-build-isolation --no-binary rootfree-kernels rootfree-kernels` builds the extension"
        )
    return None


def why_no_cuda():
    """Return the reason why the CUDA part is left out, or None. No GPU is needed to compile it."""
    if LEFT_OUT["cpp"]:
        return LEFT_OUT["cpp"]
    if MODE == "cpu":
        return "ROOTFREE_BUILD=cpu"
    if not CUDA_SOURCES:
        return "this version has no CUDA sources"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if toolkit_problem:
        return toolkit_problem
    if cpp_extension.CUDA_HOME is None:
        return "no CUDA toolkit: set CUDA_HOME or put nvcc on the PATH"
    return None


SIMPLEST = "#include <memory>\n#include <Python.h>\n"
CLANG = "#ifndef __clang__\n#error another compiler\n#endif\n"


@cache
def why_no_compiler(*flags, program=SIMPLEST):
    """Return in one line why the C++ compiler cannot compile `program` with these flags, or None."""
    if os.name == "nt":
        return None  # setuptools finds MSVC, or says why not
    compiler = os.environ.get("CXX") or "c++"
    includes = [f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")]
    command = [*shlex.split(compiler), *flags, "-x", "c++", "-fsyntax-only", *includes, "-"]
    english = {**os.environ, "LC_ALL": "C"}
    try:
        run = subprocess.run(command, input=program, capture_output=True, text=True, env=english)
    except OSError as error:
        return f"no C++ compiler: {error}"
    if run.returncode == 0:
        return None
    errors = [line for line in run.stderr.splitlines() if "error" in line]
    detail = errors[0] if errors else f"exit status {run.returncode}"
    return f"no working C++ compiler: `{compiler}`: {detail}"


def instruction_sets():
    """Return the names of the instruction sets that this compiler supports."""
    return [name for name, flags in INSTRUCTION_SETS.items() if not flags or (HAS_AVX and not why_no_compiler(*flags))]


def make_extension(with_cuda):
    """Return the extension rootfree_kernels._C, with or without the CUDA sources."""
    kind = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    if with_cuda:  # for all supported GPUs, also newer ones, instead of only those of this machine
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    macros = [(f"ROOTFREE_WITH_{name.upper()}", "1") for name in instruction_sets()[1:]]
    return kind(
        f"{PACKAGE}._C",
        CPU_SOURCES + (CUDA_SOURCES if with_cuda else []),
        include_dirs=pybind11_include(),
        define_macros=macros + ([("ROOTFREE_WITH_CUDA", "1")] if with_cuda else []),
        extra_compile_args={"cxx": CXX_FLAGS + openmp_flags(), "nvcc": NVCC_FLAGS},
        depends=sorted(glob("csrc/**/*.*", root_dir=ROOT, recursive=True)),
    )


def openmp_flags():
    """Return the flags that let loops run on the threads of PyTorch: on Linux with GCC. Otherwise they use one thread.

    The OpenMP library is not linked: PyTorch has already loaded GCC's, and a second one would keep a second set of
    spinning threads. Clang's code would need Clang's library.
    """
    is_gcc = platform.system() == "Linux" and not why_no_compiler("-fopenmp") and bool(why_no_compiler(program=CLANG))
    return ["-fopenmp"] if is_gcc and torch.backends.openmp.is_available() else []


def pybind11_include():
    """Return the folder of pybind11's headers. Without pybind11, the copy among PyTorch's headers is used."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


def tolerant_build_ext():
    """Return PyTorch's build_ext, changed to go on if a compile fails. (`Extension.optional` does not cover ninja.)"""
    # PyTorch looks for ninja on the PATH, but pip does not put the scripts of a virtual environment there.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])

    class BuildExt(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            if self.editable_mode:  # by default setuptools uses a new folder, and compiles everything, every time
                self.build_temp = str(
                    ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
                )

        def build_extension(self, ext):
            for name in instruction_sets():
                ext.extra_objects += self.compile_for(name, ext)
            super().build_extension(ext)

        def compile_for(self, instruction_set, ext):
            """Compile the vectorised sources for an instruction set. Return the object files."""
            return self.compiler.compile(
                VECTORIZED_SOURCES,
                output_dir=os.path.join(self.build_temp, instruction_set),
                macros=[("ROOTFREE_ISA", f"isa_{instruction_set}")],
                extra_postargs={"cxx": CXX_FLAGS + VECTORIZED_FLAGS + INSTRUCTION_SETS[instruction_set]},
                depends=ext.depends,
            )

        def build_extensions(self):
            problem = why_no_compiler()
            if problem is None:
                problem = self.why_not_compiled()
                if problem and LEFT_OUT["cuda"] is None:
                    problem = self.retry_without_cuda(problem)
            if problem:
                leave_out("cpp", problem)
                leave_out("cuda", problem)
                self.extensions = []  # nothing is there to be copied

        def why_not_compiled(self):
            try:
                super().build_extensions()
            except Exception as error:
                what = textwrap.shorten(f"{type(error).__name__}: {error}", 80, placeholder=" ...")
                return f"the compile failed ({what}); `pip install -v` shows the compiler's output"
            return self.why_not_loaded()

        def why_not_loaded(self):
            """Return in one line why Python cannot load the compiled extension, or None."""
            if "-fsanitize" in os.environ.get("CFLAGS", ""):
                return None  # it needs the sanitizers' libraries to be loaded first
            command = [sys.executable, "-c", LOAD, self.get_ext_fullpath(f"{PACKAGE}._C")]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode == 0:
                return None
            last = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
            return (
                f"the extension was compiled and cannot be loaded ({textwrap.shorten(last, 160, placeholder=' ...')})"
            )

        def retry_without_cuda(self, problem):
            leave_out("cuda", problem)
            for extension in self.extensions:
                vars(extension).update(vars(make_extension(with_cuda=False)))
            return self.why_not_compiled()

    return BuildExt


class BuildRecord(Command):
    """Print what was left out, and record it in a file beside the modules."""

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False  # set by setuptools for `pip install -e`

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        if LEFT_OUT["cpp"]:
            print(f"rootfree-kernels: compiled extension left out: {LEFT_OUT['cpp']}", flush=True)
            stale = self.folder() / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
            stale.unlink(missing_ok=True)  # the extension of an earlier build
        else:
            parts = f"built for {', '.join(instruction_sets())} instructions"
            cuda = f"CUDA part left out: {LEFT_OUT['cuda']}" if LEFT_OUT["cuda"] else "with CUDA"
            print(f"rootfree-kernels: compiled extension {parts}; {cuda}", flush=True)
        version = None if torch is None else str(torch.__version__)
        record = {"extension": LEFT_OUT["cpp"] is None, "left_out": LEFT_OUT, "torch": version}
        self.file().write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def file(self):
        return self.folder() / (TREE_RECORD if self.editable_mode else WHEEL_RECORD)

    def folder(self):
        folder = (ROOT if self.editable_mode else Path(self.build_lib)) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def get_outputs(self):
        return [] if self.editable_mode else [str(self.file())]

    def get_output_mapping(self):
        return {}


class Build(build):
    # The record comes last, because it needs the outcome.
    sub_commands = [*build.sub_commands, ("build_record", None)]  # noqa: RUF012, as setuptools does


class Wheel(bdist_wheel):
    """Build a wheel for any platform and Python (py3-none-any) if the extension could not be compiled."""

    def run_command(self, command):
        super().run_command(command)
        if command == "build" and LEFT_OUT["cpp"]:
            self.distribution.ext_modules = []
            self.root_is_pure = True


def describe_extension():
    """Return the extension modules and the commands that build them. Both are empty if nothing can be compiled."""
    for part, why in (("cpp", why_no_cpp), ("cuda", why_no_cuda)):
        if reason := why():
            leave_out(part, reason)
    if LEFT_OUT["cpp"]:
        return [], {}
    return [make_extension(with_cuda=LEFT_OUT["cuda"] is None)], {"build_ext": tolerant_build_ext()}


extensions, commands = describe_extension()
setup(
    version=version(),
    long_description=long_description(),
    long_description_content_type="text/markdown",
    # Other projects look for a top-level package triton_kernels, which is not this one. Ours goes inside the package.
    packages=[
        *find_packages(include=[PACKAGE, f"{PACKAGE}.*"], exclude=[KERNELS]),  # without the link that make lint creates
        *(KERNELS, TABLES),
    ],
    package_dir={KERNELS: "triton_kernels"},
    package_data={PACKAGE: ["py.typed"], TABLES: ["*"]},
    ext_modules=extensions,
    cmdclass={"build": Build, "build_record": BuildRecord, "bdist_wheel": Wheel, **commands},
)
