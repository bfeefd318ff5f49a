"""The stages of a run on a GPU: the commands of each, and its limit in seconds."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from bench.common.paths import ROOT
from bench.demo.settings import SETTINGS
from bench.gpu_run.machine import ignored

FAILED = "failed.txt"
"""The file with the names of failed tests, in the folder of a run, or in a bundle for stage `again`."""

Command = list[str]

TESTS = (
    *(f"triton/test_kron_{name}.py" for name in ("gather", "factor", "products", "step", "steps")),
    *("cuda/test_rf_rmsprop_gpu.py", "cuda/test_clipped_momentum_gpu.py", "optim/test_capture.py"),
    *("triton/test_rf_rmsprop.py", "triton/test_scaled_rmsprop.py", "triton/test_clipped_momentum.py"),
    *("triton/test_rf_rmsprop_arguments.py", "triton/test_memory.py", "optim/test_on_triton.py"),
    *("optim/test_launches.py", "optim/test_streams.py"),
    *("ops/test_dispatch_runs.py", "optim/test_no_reads.py", "test_ranges.py", "optim/test_packed_momentum.py"),
    *("ops/test_kernel_momentum.py", "bench/test_compare.py", "ops/test_opcheck.py"),
    *("ops/test_large_step_counts.py", "ops/test_left_out_updates.py", "ops/test_lazy_negation.py"),
)
"""Files of tests/ with tests for a GPU, the most informative first."""

HUGE = "more_than_2_31"
"""Part of the name of a test that needs tens of GB."""

CONTESTANTS = (
    *("IFShampoo", "IFShampoo, recipe", "IFShampoo, least memory", "RFRMSProp", "AdamW, fused", "SGD, fused"),
    *("Muon of torch", "Muon of Dion, Triton", "Distributed Shampoo, eigh, unpacked", "sirfshampoo"),
)
"""The optimizers of stage `peers`."""


class Limits(NamedTuple):
    """The limit and the folder of a stage."""

    seconds: int
    folder: Path
    """The folder for everything that the stage writes."""


class Stage(NamedTuple):
    """Commands that run one after the other, whether or not the one before failed."""

    name: str
    seconds: int
    """The limit for all commands together, unless the command line sets another one."""

    what: str
    commands: Callable[[Limits], Sequence[Command]]
    by_default: bool = True


def python(module: str, *arguments: object) -> Command:
    """Return the command that runs a module with this Python."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def pytest(*arguments: object, parallel: bool = False) -> Command:
    """Return the command that runs tests marked gpu.

    If pytest-xdist is installed, a CUDA error ends only one of several processes. If pytest-timeout is installed, a
    call that hangs is ended. Each process takes half a gigabyte of the GPU's memory for its context.
    """
    options = ["-p", "bench.gpu_run.pytest_plugin", "-m", "gpu", "-q", "--no-header", "--tb=short", "-rf"]
    options += ["-p", "no:cacheprovider"]
    if find_spec("pytest_timeout"):
        options += ["--timeout", "60", "--timeout-method", "thread"]
    if parallel and find_spec("xdist"):
        workers = max(1, min(8, (os.cpu_count() or 2) // 2))
        options += ["-n", str(workers), "--dist", "loadfile", "--max-worker-restart", "16"]
    return python("pytest", *options, *arguments)


# ---- the commands of the stages ------------------------------------------------------------------------------------


def machine(limits: Limits) -> list[Command]:
    smi = [["nvidia-smi"]] if shutil.which("nvidia-smi") else []
    return [*smi, python("rootfree_kernels"), python("bench.gpu_run.machine", "--probe")]


def tests(limits: Limits) -> list[Command]:
    return [pytest("-k", f"not {HUGE}", *_test_files(), parallel=True)]


def huge(limits: Limits) -> list[Command]:
    return [pytest("-k", HUGE, *_test_files())]


def again(limits: Limits) -> list[Command]:
    """Return the command that repeats the tests that failed in this folder, or else those that the bundle names."""
    lists = (limits.folder / FAILED, ROOT / ".gpu-bundle" / FAILED)
    found = next((path for path in lists if path.exists()), None)
    names = found.read_text(encoding="utf-8").splitlines() if found else []
    return [pytest(*dict.fromkeys(names), parallel=True)] if names else []


def memcheck(limits: Limits) -> list[Command]:
    chosen = "if_shampoo_steps_as_eager_pytorch and (fp32 or compensated)"
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--print-limit", "20"]
    files = ["tests/optim/test_on_triton.py", "tests/triton"]
    return [["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *sanitizer, *pytest(*files, "-k", chosen)]]


def kernels(limits: Limits, *options: str) -> list[Command]:
    given = [*options, "--seconds", max(10, limits.seconds - 20), "--only", "^(?!First step)", "--out", limits.folder]
    return [python("bench.kernels", *given)]


def quick(limits: Limits) -> list[Command]:
    return kernels(limits, "--quick")


def peers(limits: Limits) -> list[Command]:
    names = "|".join(CONTESTANTS)
    options = ["--device", "cuda", "--only", "GPT-2 124M", "--sections", "steps", "training"]
    options += ["--optimizers", f"^({names})$", "--seconds", max(10, limits.seconds - 30)]
    return [python("bench.compare", *options, "--out", limits.folder / "peers")]


def profile(limits: Limits) -> list[Command]:
    options = ["--device", "cuda", "--out", limits.folder / "profile"]
    return [
        python("bench.profile", "--steps", 5, *options),
        python("bench.profile", "--frequency", 10, "--steps", 10, *options),
    ]


def ncu(limits: Limits) -> list[Command]:
    """Return the commands for two batches' launches of the matrix kernels, in an update and the step after it."""
    report = limits.folder / "ncu"
    options = ["--clock-control", "none", "--profile-from-start", "off", "-k", "regex:kron_", "-c", "10"]
    step = python("bench.profile", "--nsys", "--steps", 1)
    return [
        ["ncu", *options, "--set", "full", "-o", str(report), "-f", *step],
        ["ncu", "--import", f"{report}.ncu-rep", "--page", "details"],
    ]


def language(limits: Limits) -> list[Command]:
    size = "30m"
    each = max(5, (limits.seconds - 35) // len(SETTINGS[size]))  # seconds of every method
    options = ["--device", "cuda", "--size", size, "--seconds", each, "--out", limits.folder / "language"]
    return [python("bench.demo", *options)]


def _test_files() -> list[str]:
    left_out = {*ignored()}
    paths = [Path("tests") / name for name in TESTS]
    return [str(path) for path in paths if (ROOT / path).exists() and path not in left_out]


STAGES = {
    stage.name: stage
    for stage in (
        Stage("machine", 30, "driver, versions, which backend serves what, one product", machine),
        Stage("tests", 150, "all tests that need a GPU, but those that need tens of GB", tests),
        Stage("quick", 140, "kernels at the main sizes: ceilings, cuBLAS, eager PyTorch, fused AdamW", quick),
        Stage("peers", 160, "GPT-2 124M, steps and training, beside AdamW, Muon and other people's Shampoo", peers),
        Stage("profile", 45, "where the time of a step goes, by phase", profile),
        Stage("ncu", 60, "Nsight Compute on the matrix kernels", ncu),
        Stage("language", 135, "a language model trained by several methods, loss against time", language),
        Stage("kernels", 300, "kernels at all sizes", kernels, by_default=False),
        Stage("again", 120, "tests that failed before", again, by_default=False),
        Stage("huge", 120, "tests that need tens of GB", huge, by_default=False),
        Stage("memcheck", 180, "tests of the matrix kernels under compute-sanitizer", memcheck, by_default=False),
    )
}
"""By name, the most wanted first; those that run by default take 12 minutes together."""
