"""The compile gate: every Triton kernel, in every configuration that dispatch can choose, compiled for four GPUs.

    python -m bench.gate.triton [--only PATTERN] [--targets sm_90,gfx942] [--all] [--output gate-{triton}.json]

It needs no GPU and loads no driver: what the compilers made is read from the machine code. The table shows each number
with the bound that it must meet. The exit status is 1 where a bound is broken, a kernel does not compile, or one named
*_kernel has no configuration. What was compiled before comes from Triton's cache, whose key covers source, options and
versions. The last line names the version of Triton. A folder with another version on PYTHONPATH comes before the
installed one: `make kernels` runs the gate with the pinned version and with the oldest one that is supported. In the
name of the output file, "{triton}" stands for the version.

Columns: registers, a thread; stack and shared, bytes a thread and a block; tmem, columns of sm_100's tensor memory; and
numbers of instructions. spills: accesses to local memory (AMD: spilled registers); mma: the tensor-core instruction of
this generation; old mma: of an earlier one; async: asynchronous copies to shared memory; loads128, stores128: accesses
to global memory of 128 bits or more.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.gate.machine_code import TARGETS, code_of, count, disassemble, parse_amdgcn, parse_resource_usage, run_tool

if TYPE_CHECKING:
    from rootfree_kernels.triton_kernels.configuration import Configuration

# Triton and the kernels are imported within functions: main() takes TRITON_INTERPRET out of the environment first, and
# the tests, which import this module under the interpreter, keep it.

KERNELS = "rootfree_kernels.triton_kernels"
COLUMNS = ("registers", "stack", "spills", "shared", "tmem", "mma", "old mma", "async", "loads128", "stores128")
MAX_ERROR_LINES = 20


# ---- bounds --------------------------------------------------------------------------------------------------


def bounds(kind: str, target: str) -> dict[str, tuple[str, int]]:
    """What a kernel of `kind` must meet: by column, "≤" or "≥" and a number."""
    nvidia = TARGETS[target].backend == "cuda"
    limits = {"stack": ("≤", 0), "spills": ("≤", 0), "shared": ("≤", TARGETS[target].max_shared)}
    if target == "sm_100":
        limits["tmem"] = ("≤", 512)
    if kind == "matrix":
        limits["mma"] = ("≥", 1)
        if target in ("sm_90", "sm_100"):
            limits["old mma"] = ("≤", 0)
        if nvidia:  # Triton copies through registers for gfx942
            limits["async"] = ("≥", 1)
    if kind == "elementwise":
        limits["loads128"] = ("≥", 1)
        if nvidia:  # the block that gives a thread 128 bits of BF16 in a warp of 32 gives it 64 bits in one of 64
            limits["stores128"] = ("≥", 1)
    return limits


def broken(value: int, sign: str, bound: int) -> bool:
    return value > bound if sign == "≤" else value < bound


@dataclass
class Row:
    """One configuration on one target: what was measured, by column, or why nothing was."""

    kernel: str
    kind: str
    configuration: str
    target: str
    seconds: float = 0.0
    """Of the compilation; next to none where Triton's cache had it."""
    measured: dict[str, int] = field(default_factory=dict)
    error: str = ""

    @property
    def violations(self) -> list[str]:
        """The columns whose bound is broken; "error" where nothing was measured."""
        if self.error:
            return ["error"]
        limits = bounds(self.kind, self.target)
        return [column for column, limit in limits.items() if broken(self.measured[column], *limit)]


# ---- compiling ---------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    configuration: Configuration
    target: str

    def row(self) -> Row:
        kernel, kind = self.configuration.kernel.__name__, self.configuration.kind
        return Row(kernel, kind, describe(self.configuration), self.target)


def describe(configuration: Configuration) -> str:
    """A configuration in one line; equal types that follow each other are written once, as in "*bf16 ×7"."""
    kernel, arguments, constants, num_warps, num_stages, *_ = configuration
    runs = [(type_, len(list(run))) for type_, run in itertools.groupby(arguments)]
    types = [type_ if number == 1 else f"{type_} ×{number}" for type_, number in runs]
    names = kernel.arg_names[len(arguments) :]
    values = [f"{name}={value}" for name, value in zip(names, constants, strict=True)]
    return f"{kernel.__name__}({', '.join([*types, *values])}), num_warps={num_warps}, num_stages={num_stages}"


def triton_compile(configuration: Configuration, target: str) -> Any:
    """What Triton compiles at a launch of this configuration."""
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
    """The row of a job; and, for NVIDIA, the machine code, whose instructions are still to be counted."""
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
    """The row of every job, compiled on all cores."""
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


# ---- the table ---------------------------------------------------------------------------------------------------


def worst(rows: Sequence[Row]) -> Row:
    """A row with the worst number of every bounded column, and of registers, among rows of one kind and target."""
    limits = {"registers": ("≤", 0), **bounds(rows[0].kind, rows[0].target)}
    measured = [row.measured for row in rows if not row.error]
    numbers = {column: [each[column] for each in measured] for column in limits if measured}
    worst_of = {"≤": max, "≥": min}
    return replace(rows[0], measured={column: worst_of[limits[column][0]](numbers[column]) for column in numbers})


def cells(row: Row) -> list[str]:
    """A line of the table: the target, and every number with its bound; a cross where it is broken."""
    limits = bounds(row.kind, row.target)
    line = [f"  {row.target}"]
    for column in COLUMNS:
        text = f"{row.measured[column]:,}" if column in row.measured else ""
        if text and column in limits:
            sign, bound = limits[column]
            text = f"{'✗ ' if broken(row.measured[column], sign, bound) else ''}{text} {sign}{bound:,}"
        line.append(text)
    return line


def table(rows: Sequence[Row], every: bool) -> list[str | list[str]]:
    """Headings and lines: of each kernel the worst of its configurations; then those that break a bound, or all."""
    lines: list[str | list[str]] = [["", *COLUMNS]]
    for (kernel, kind), group in grouped(rows, lambda row: (row.kernel, row.kind)):
        configurations = grouped(group, lambda row: row.configuration)
        lines.append(f"{kernel} ({kind}), worst of {len(configurations)}")
        lines += [cells(worst(same)) for _, same in grouped(group, lambda row: row.target)]
        for configuration, same in configurations:
            shown = [row for row in same if every or row.violations]
            if shown:
                lines.append(f"  {'✗ ' if any(row.violations for row in same) else ''}{configuration}")
            for row in shown:
                lines.append(textwrap.indent(f"{row.target}  ✗ {row.error}", "  ") if row.error else cells(row))
    return lines


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def print_table(lines: Sequence[str | list[str]]) -> None:
    """Print lines with their cells in columns, and headings as they are."""
    widths = [max(map(len, column)) for column in zip(*[x for x in lines if isinstance(x, list)], strict=True)]
    for line in lines:
        if isinstance(line, list):
            line = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        print(line)


# ---- command line ------------------------------------------------------------------------------------------------


def import_modules(names: Sequence[str]) -> list[ModuleType]:
    """Return the modules of these names, or all modules of the Triton backend."""
    if not names:
        package = importlib.import_module(KERNELS)
        names = [f"{KERNELS}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(name) for name in names]


def forgotten(modules: Iterable[ModuleType], listed: Iterable[Configuration]) -> list[str]:
    """Kernels, by their names, of which no configuration is listed."""
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    return sorted(kernels - {each.kernel.__name__ for each in listed})


def save(rows: Sequence[Row], seconds: float, path: Path) -> None:
    """Write all rows, and where they come from, to a JSON file."""
    import triton

    from bench.common.record import provenance

    numbers = [{**asdict(row), "bounds": bounds(row.kind, row.target), "violations": row.violations} for row in rows]
    record = {**provenance("python -m bench.gate.triton"), "triton": triton.__version__, "seconds": seconds}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**record, "rows": numbers}, indent=1) + "\n")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="configurations in whose line this occurs")
    parser.add_argument("--targets", default=",".join(TARGETS), help="some of %(default)s")
    parser.add_argument("--module", action="append", default=[], help="what has configurations(); default: all kernels")
    parser.add_argument("--all", action="store_true", help="show every configuration")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write all rows to this file as well")
    args = parser.parse_args(arguments)
    args.targets = args.targets.split(",")
    if unknown := sorted(set(args.targets) - set(TARGETS)):
        parser.error(f"unknown target {', '.join(unknown)}: choose from {', '.join(TARGETS)}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table and return the exit status."""
    args = parse_arguments(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
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
    print_table(table(rows, args.all))
    if args.output:
        save(rows, seconds, Path(str(args.output).replace("{triton}", triton.__version__)))
    failed = sum(bool(row.violations) for row in rows)
    verdict = f"✗ {failed} of {len(rows)} do not pass" if failed else "all pass"
    compiled = f"{len(chosen)} configurations × {len(args.targets)} targets"
    print(f"{compiled} by Triton {triton.__version__} in {seconds} s: {verdict}")
    missing = forgotten(modules, listed)
    if missing:
        print(f"✗ no configuration is listed of {', '.join(missing)}")
    return int(failed > 0 or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
