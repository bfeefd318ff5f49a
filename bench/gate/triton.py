"""The compile gate: every Triton kernel, in every configuration that dispatch can choose, compiled for four GPUs.

    python -m bench.gate.triton [--only PATTERN] [--targets sm_90,gfx942] [--all] [--output gate-{triton}.json]

It needs no GPU and loads no driver: it reads the machine code. The table shows each number with its bound (see
`bench.gate.report` for the columns). The exit status is 1 if a bound is broken, a kernel does not compile, or a kernel
named *_kernel has no configuration. Triton's cache has what was compiled before; its key covers source, options and
versions. The last line names the version of Triton. A folder with another version on PYTHONPATH comes before the
installed one: `make kernels` runs the gate with the pinned version and with the oldest supported one. In the name of
the output file, "{triton}" stands for the version.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import multiprocessing
import os
import pkgutil
import re
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # the modules below import Triton, which must not be the interpreter

from bench.gate.machine_code import TARGETS, code_of, count, disassemble, parse_amdgcn, parse_resource_usage, run_tool
from bench.gate.report import Row, bounds, conclude, gate_parser

if TYPE_CHECKING:
    from rootfree_kernels.triton_kernels.configuration import Configuration

# Triton and the kernels are imported within functions, since the tests import this module under the interpreter.

KERNELS = "rootfree_kernels.triton_kernels"
MAX_ERROR_LINES = 20


# ---- compiling -------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    configuration: Configuration
    target: str

    def row(self) -> Row:
        kernel, kind = self.configuration.kernel.__name__, self.configuration.kind
        return Row(kernel, kind, describe(self.configuration), self.target)


def describe(configuration: Configuration) -> str:
    """Return a configuration in one line. Equal types in a row are written once, as in "*bf16 ×7"."""
    kernel, arguments, constants, num_warps, num_stages, *_ = configuration
    runs = [(type_, len(list(run))) for type_, run in itertools.groupby(arguments)]
    types = [type_ if number == 1 else f"{type_} ×{number}" for type_, number in runs]
    names = kernel.arg_names[len(arguments) :]
    values = [f"{name}={value}" for name, value in zip(names, constants, strict=True)]
    return f"{kernel.__name__}({', '.join([*types, *values])}), num_warps={num_warps}, num_stages={num_stages}"


def triton_compile(configuration: Configuration, target: str) -> Any:
    """Compile what Triton compiles at a launch of this configuration."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments, constants, num_warps, num_stages, _, max_registers = configuration
    types = [*arguments, *["constexpr"] * len(constants)]
    pointers = [index for index, type_ in enumerate(arguments) if type_.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=dict(zip(kernel.arg_names, types, strict=True)),
        constexprs={(index,): value for index, value in enumerate(constants, start=len(arguments))},
        attrs={(index,): [["tt.divisibility", 16]] for index in pointers},
    )
    gpu = GPUTarget(*TARGETS[target][:3])
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if max_registers and target == "sm_90":
        options["maxnreg"] = max_registers
    return triton.compile(source, target=gpu, options=options)


def compile_one(job: Job) -> tuple[Row, bytes]:
    """Return the row of a job, and for NVIDIA the machine code, whose instructions are still to be counted."""
    row, start = job.row(), time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints all of the PTX that ptxas refuses
            compiled = triton_compile(*job)
    except Exception as error:  # of any kind: to report them is what the gate is for
        row.error = "\n".join(f"{type(error).__name__}: {error}".splitlines()[:MAX_ERROR_LINES])
        return row, b""
    row.seconds = round(time.perf_counter() - start, 3)
    row.measured["shared"] = compiled.metadata.shared
    if TARGETS[job.target].backend == "hip":
        usage, instructions = parse_amdgcn(compiled.asm["amdgcn"])
        row.measured |= usage | count(instructions, job.target)
        return row, b""
    cubin = compiled.asm["cubin"]
    row.measured |= parse_resource_usage(run_tool("cuobjdump", "-res-usage", data=cubin))
    if job.target == "sm_100":
        row.measured["tmem"] = compiled.metadata.tmem_size
    return row, code_of(cubin)


_jobs: list[Job] = []  # where forked workers find them: kernels cannot be pickled


def _work(index: int) -> tuple[Row, bytes]:
    return compile_one(_jobs[index])


def compile_all(jobs: Sequence[Job]) -> list[Row]:
    """Compile all jobs on all cores and return their rows."""
    _jobs[:] = jobs
    fork = multiprocessing.get_context("fork")
    results: dict[int, tuple[Row, bytes]] = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), fork) as workers:
        futures = {workers.submit(_work, index): index for index in range(len(jobs))}
        for future in as_completed(futures):
            with contextlib.suppress(BrokenProcessPool):
                results[futures[future]] = future.result()
    for index in sorted(set(futures.values()) - set(results)):  # a crash ended all workers: which job is to blame?
        with ProcessPoolExecutor(1, fork) as worker:
            try:
                results[index] = worker.submit(_work, index).result()
            except BrokenProcessPool:
                results[index] = replace(jobs[index].row(), error="the compiler crashed"), b""
    for target in {row.target for row, code in results.values() if code}:
        coded = [(row, code) for row, code in results.values() if code and row.target == target]
        for (row, _), instructions in zip(coded, disassemble([code for _, code in coded], target), strict=True):
            row.measured |= count(instructions, target)
    return [results[index][0] for index in range(len(jobs))]


# ---- command line ----------------------------------------------------------------------------------------------------


def import_modules(names: Sequence[str]) -> list[ModuleType]:
    """Return the modules of these names, or all modules of the Triton backend."""
    if not names:
        package = importlib.import_module(KERNELS)
        names = [f"{KERNELS}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(name) for name in names]


def forgotten(modules: Iterable[ModuleType], listed: Iterable[Configuration]) -> list[str]:
    """Return the names of kernels without a listed configuration."""
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    return sorted(kernels - {each.kernel.__name__ for each in listed})


def save(rows: Sequence[Row], seconds: float, path: Path) -> None:
    """Write all rows, and their origin, to a JSON file."""
    import triton

    from bench.common.record import provenance, write_json

    numbers = [{**asdict(row), "bounds": bounds(row.kind, row.target), "violations": row.violations} for row in rows]
    record = {**provenance("python -m bench.gate.triton"), "triton": triton.__version__, "seconds": seconds}
    write_json(path, {**record, "rows": numbers})


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = gate_parser((__doc__ or "").partition("\n")[0], TARGETS)
    parser.add_argument("--module", action="append", default=[], help="has configurations(); default: all kernels")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write all rows to this file as well")
    args = parser.parse_args(arguments)
    args.targets = args.targets.split(",")
    if unknown := sorted(set(args.targets) - set(TARGETS)):
        parser.error(f"unknown target {', '.join(unknown)}: choose from {', '.join(TARGETS)}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table and return the exit status."""
    args = parse_arguments(arguments)
    import triton

    start = time.perf_counter()
    modules = import_modules(args.module)
    listed = [each for module in modules if hasattr(module, "configurations") for each in module.configurations()]
    chosen = [each for each in listed if re.search(args.only, describe(each))]
    if not chosen:
        print("✗ nothing to compile: no configuration found")
        return 1
    rows = compile_all([Job(each, target) for each in chosen for target in args.targets])
    seconds = round(time.perf_counter() - start, 1)
    if args.output:
        save(rows, seconds, Path(str(args.output).replace("{triton}", triton.__version__)))
    compiled = f"{len(chosen)} configurations × {len(args.targets)} targets by Triton {triton.__version__}"
    status = conclude(compiled, seconds, rows, args.all)
    if missing := forgotten(modules, listed):
        print(f"✗ no configuration is listed of {', '.join(missing)}")
    return int(status or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
