"""Build rootfree_kernels: the Python package always, the compiled extension where that is possible.

pyproject.toml holds the metadata. Here is what it cannot say: the folder triton_kernels/ is installed inside
the package, and rootfree_kernels._C is compiled against the PyTorch of this environment. Whatever keeps it
from being compiled is printed, is recorded beside the modules in _build.json (pip hides what a build prints),
and leaves a working install in pure Python.

ROOTFREE_BUILD=none compiles nothing; =cpu wants the C++ part alone, =cuda both parts, and what is wanted by
name and cannot be built is an error.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from functools import cache
from glob import glob
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.build import build


def is_toolkit(folder):
    """Whether a folder has what a build needs of a CUDA toolkit: the compiler and the headers."""
    return (folder / "bin/nvcc").is_file() and (folder / "include/cuda_runtime_api.h").is_file()


def toolkit_of(nvcc):
    """Return the toolkit that an nvcc says it runs in, or None. It may be a script that calls another one."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60).stderr
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^#\$ _HERE_=(.+)$", said, re.MULTILINE)
    return Path(found[1].strip()).parent if found else None


def find_toolkit(usual=Path("/usr/local/cuda")):
    """Return the CUDA toolkit to build with, and None; or None, and why there is none.

    The first guesses are PyTorch's own. It takes the folder above the nvcc on the PATH for a toolkit without looking
    for headers, which fails where that nvcc is a script; such an nvcc is asked.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    guesses = [Path(named)] if named else []
    guesses += [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1]] if nvcc else []
    if not any(map(is_toolkit, guesses)):
        guesses += [folder for folder in (nvcc and toolkit_of(nvcc), usual) if folder and folder.exists()]
    if found := next(filter(is_toolkit, guesses), None):
        return found, None
    if not guesses:
        return None, "no CUDA toolkit: set CUDA_HOME or put nvcc on the PATH"
    where = ", ".join(map(str, dict.fromkeys(guesses)))
    return None, f"no CUDA toolkit: not both bin/nvcc and include/cuda_runtime_api.h in {where}; set CUDA_HOME"


def set_cuda_home():
    """Tell PyTorch where the toolkit is, before it guesses; return why there is none, or None."""
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
except Exception as error:  # a broken install of torch raises anything, and must not break this one
    torch = cpp_extension = None
    torch_problem = textwrap.shorten(f"{type(error).__name__}: {error}", 80, placeholder=" ...")

ROOT = Path(__file__).resolve().parent
PACKAGE = "rootfree_kernels"
KERNELS = f"{PACKAGE}.triton_kernels"  # the folder triton_kernels/
TABLES = f"{PACKAGE}.ops.dispatch_tables"  # a folder of data
# What was left out of a wheel, which is of one Python, and of a tree, in which every Python has a build of its own.
WHEEL_RECORD = "_build.json"
TREE_RECORD = f"_build{sysconfig.get_config_var('EXT_SUFFIX').rpartition('.')[0]}.json"
CPU_SOURCES = ["csrc/bindings.cpp", "csrc/operators.cpp", *sorted(glob("csrc/cpu/*.cpp", root_dir=ROOT))]
VECTORIZED_SOURCES = sorted(glob("csrc/cpu/kernels/*.cpp", root_dir=ROOT))
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu", root_dir=ROOT) + glob("csrc/cuda/*.cpp", root_dir=ROOT))

# What ROOTFREE_BUILD may say -> the parts of the extension it insists on.
MODES = {"auto": (), "none": (), "cpu": ("cpp",), "cuda": ("cpp", "cuda")}
MODE = os.environ.get("ROOTFREE_BUILD") or "auto"
if MODE not in MODES:
    raise SystemExit(f"rootfree-kernels: ROOTFREE_BUILD={MODE} is unknown: choose one of {', '.join(MODES)}")

# Instruction sets that the vectorised sources are compiled for, one of which is chosen when run -> flags of GCC and
# Clang, those with which PyTorch compiles its own kernels.
INSTRUCTION_SETS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
}
HAS_AVX = platform.machine().lower() in ("x86_64", "amd64") and os.name != "nt"

CXX_FLAGS = [] if os.name == "nt" else ["-O3", "-g0", "-fvisibility=hidden"]
# Loops vectorise where nobody looks at errno and at floating-point exceptions; results are the same to the bit on every
# instruction set where none fuses products with sums.
VECTORIZED_FLAGS = [] if os.name == "nt" else ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

NVCC_FLAGS = ["-O3", "-fmad=false"]  # likewise: the same results on every GPU

# A program that loads the extension from a file.
LOAD = f"""
import sys, torch
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("{PACKAGE}._C", sys.argv[1])
spec.loader.exec_module(module_from_spec(spec))
"""

LEFT_OUT = {"cpp": None, "cuda": None}  # part -> why it is not built, None where it is


def leave_out(part, reason):
    """Go on without a part of the extension, unless ROOTFREE_BUILD insists on it."""
    if part in MODES[MODE]:
        raise SystemExit(f"rootfree-kernels: ROOTFREE_BUILD={MODE} is impossible here: {reason}")
    LEFT_OUT[part] = LEFT_OUT[part] or reason  # the first reason stands


def why_no_cpp():
    """Why the extension cannot be built at all, or None."""
    if MODE == "none":
        return "ROOTFREE_BUILD=none"
    if torch is None:
        return (
            f"PyTorch cannot be imported in the build environment ({torch_problem}); "
            "with torch installed, `pip install --no-build-isolation` builds the extension"
        )
    return None


def why_no_cuda():
    """Why the CUDA part is left out, or None. A visible GPU plays no part: builders may have none."""
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
    """Why the C++ compiler cannot compile a program, that of the simplest extension, with these flags, in one line, or
    None."""
    if os.name == "nt":
        return None  # setuptools searches for MSVC itself, and says what it found
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
    """Those that are compiled for here."""
    return [name for name, flags in INSTRUCTION_SETS.items() if not flags or (HAS_AVX and not why_no_compiler(*flags))]


def make_extension(with_cuda):
    """The extension rootfree_kernels._C, with the CUDA sources or without."""
    kind = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    if (
        with_cuda
    ):  # for any GPU that is served, later ones too, and not for those alone that the builder happens to have
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
    """So that loops run on PyTorch's threads, on Linux and by GCC; elsewhere they run on one. Nothing is linked: GCC's
    OpenMP, which PyTorch has loaded, is found when the extension is, whereas a second one would keep threads of its own
    spinning. Code of Clang's wants Clang's."""
    is_gcc = platform.system() == "Linux" and not why_no_compiler("-fopenmp") and bool(why_no_compiler(program=CLANG))
    return ["-fopenmp"] if is_gcc and torch.backends.openmp.is_available() else []


def pybind11_include():
    """The headers of pybind11; an environment without it takes the copy among PyTorch's headers."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


def tolerant_build_ext():
    """PyTorch's build_ext that survives a failing compile (Extension.optional does not survive ninja's)."""
    # pip runs a virtual environment's Python without its scripts on the PATH, where PyTorch looks for ninja.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])

    class BuildExt(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            if self.editable_mode:  # where setuptools would compile all of it in a new folder every time
                self.build_temp = str(
                    ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
                )

        def build_extension(self, ext):
            for name in instruction_sets():
                ext.extra_objects += self.compile_for(name, ext)
            super().build_extension(ext)

        def compile_for(self, instruction_set, ext):
            """The objects of the vectorised sources, compiled for an instruction set."""
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
                self.extensions = []  # so that no later step looks for the file

        def why_not_compiled(self):
            try:
                super().build_extensions()
            except Exception as error:
                what = textwrap.shorten(f"{type(error).__name__}: {error}", 80, placeholder=" ...")
                return f"the compile failed ({what}); `pip install -v` shows the compiler's words"
            return self.why_not_loaded()

        def why_not_loaded(self):
            """Why Python cannot load what was compiled, in one line, or None."""
            if "-fsanitize" in os.environ.get("CFLAGS", ""):
                return None  # it can, where the sanitizers' libraries come before all else
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
    """Print what was left out, and write it into a file beside the modules, of the wheel or the tree."""

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False  # set by setuptools for `pip install -e`

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        if LEFT_OUT["cpp"]:
            print(f"rootfree-kernels: compiled extension left out: {LEFT_OUT['cpp']}", flush=True)
            stale = self.folder() / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
            stale.unlink(missing_ok=True)  # an earlier build's would be packed, or imported, all the same
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

    def get_source_files(self):
        """What a source distribution holds beside the Python modules, extension or not."""
        return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file())

    def get_outputs(self):
        return [] if self.editable_mode else [str(self.file())]

    def get_output_mapping(self):
        return {}


class Build(build):
    # The record comes last, when the outcome is known.
    sub_commands = [*build.sub_commands, ("build_record", None)]  # noqa: RUF012, setuptools' own way


def describe_extension():
    """The extension modules and the commands that build them, empty where there is nothing to build."""
    for part, why in (("cpp", why_no_cpp), ("cuda", why_no_cuda)):
        if reason := why():
            leave_out(part, reason)
    if LEFT_OUT["cpp"]:
        return [], {}
    return [make_extension(with_cuda=LEFT_OUT["cuda"] is None)], {"build_ext": tolerant_build_ext()}


extensions, commands = describe_extension()
setup(
    # A top-level triton_kernels is another project's, and others probe for it: ours goes inside the package.
    packages=[
        *find_packages(include=[PACKAGE, f"{PACKAGE}.*"], exclude=[KERNELS]),  # a link to it may lie in the package
        *(KERNELS, TABLES),
    ],
    package_dir={KERNELS: "triton_kernels"},
    package_data={PACKAGE: ["py.typed"], TABLES: ["*"]},
    ext_modules=extensions,
    cmdclass={"build": Build, "build_record": BuildRecord, **commands},
)
