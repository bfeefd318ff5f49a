"""The compile gate of the CUDA kernels: every .cu of csrc/cuda, compiled for three GPUs, and its machine code read.

    python -m bench.gate.cuda [--only PATTERN] [--targets sm_80,sm_90] [--all]

It needs nvcc, and no GPU; without nvcc it says so and passes. The table is that of `bench.gate.triton`, with the
bounds that are set there. Here moreover no access may be a generic one, which is slower than one that is known to be of
global memory, and kernels that only read must do so 128 bits at a time as well. The exit status is 1 where something
does not pass. What was measured before, of the same sources with the same compiler, comes from build/compile_cuda.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench.common.paths import ROOT
from bench.gate import machine_code
from bench.gate.machine_code import count, parse_sass, run_tool
from bench.gate.triton import Row, print_table, table

CSRC, CACHE = ROOT / "csrc", ROOT / "build" / "compile_cuda"
ARCHITECTURES = {"sm_80": "80", "sm_90": "90a", "sm_100": "100"}
FLAGS = ["-O3", "-fmad=false", "--std=c++17", "-Xptxas", "-v", "-cubin"]  # the first two as in setup.py
MAX_PROCESSES = 2

KINDS = {"rf_rmsprop_kernel": "elementwise", "momentum_kernel": "elementwise", "norms_kernel": "irregular"}
"""What bounds a kernel must meet; a kernel that is not listed is an error."""

READS_WIDE = ("norms_kernel",)
"""Kernels that store next to nothing, but read 128 bits at a time."""

GENERIC = re.compile(r"(LD|ST|ATOM)\b")
"""Accesses to memory of any kind; those to global memory are LDG, STG and ATOMG."""

DTYPES = ("fp32", "bf16", "fp16")


class Job(NamedTuple):
    source: Path
    target: str


# ---- compiling ---------------------------------------------------------------------------------------------------


def find_nvcc() -> str | None:
    """The compiler, on the PATH or in CUDA_HOME."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def key_of(job: Job, version: str) -> str:
    """A hash of everything that the measurement of a job depends on."""
    headers = (*sorted(CSRC.glob("*.h")), *sorted(CSRC.glob("cuda/*.h")))
    readers = (Path(__file__), Path(machine_code.__file__))
    content = [path.read_bytes() for path in (*headers, job.source, *readers)]
    parts = [job.source.name.encode(), job.target.encode(), version.encode(), *content]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:24]


def compiled(job: Job, nvcc: str) -> tuple[str, bytes]:
    """(what ptxas says about every kernel, the cubin)."""
    arch = ARCHITECTURES[job.target]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc, *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", str(job.source), "-o", str(cubin)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            lines = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()
            raise RuntimeError("\n".join(lines[:10]))
        return run.stderr, cubin.read_bytes()


def measure(job: Job, nvcc: str) -> dict[str, dict[str, int]]:
    """The table's numbers of every kernel of a file, by its mangled name."""
    log, cubin = compiled(job, nvcc)
    usage = dict(parse_ptxas(log))
    instructions = dict(parse_functions(run_tool("cuobjdump", "-sass", data=cubin)))
    for name, names in instructions.items():
        generic = sum(number for each, number in names.items() if GENERIC.match(each))
        usage[name] |= {**count(names, job.target), "generic": generic, "tmem": 0}
    return usage


def parse_ptxas(log: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Registers, stack and shared memory of every kernel that `ptxas -v` speaks of."""
    for part in log.split("Compiling entry function '")[1:]:
        registers, stack = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes stack frame", part)
        shared = re.search(r"(\d+) bytes smem", part)
        numbers = {"registers": registers, "stack": stack, "shared": shared}
        yield part.partition("'")[0], {column: int(match[1]) if match else 0 for column, match in numbers.items()}


def parse_functions(text: str) -> Iterator[tuple[str, Counter[str]]]:
    """The instructions, by name, of every function that `cuobjdump -sass` prints."""
    for part in text.split("Function : ")[1:]:
        yield part.split(maxsplit=1)[0], Counter(name for _, name in parse_sass(part))


def measured(job: Job, nvcc: str, version: str) -> dict[str, dict[str, int]]:
    """`measure`, or what it said before."""
    path = CACHE / f"{key_of(job, version)}.json"
    if not path.exists():
        numbers = measure(job, nvcc)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(numbers))
    return json.loads(path.read_text())


# ---- rows of the table -------------------------------------------------------------------------------------------


def readable(names: Sequence[str], nvcc: str) -> dict[str, str]:
    """Short names, such as "norms_kernel<fp32, true>", of mangled ones; these themselves where nothing demangles."""
    tool = shutil.which("cu++filt", path=str(Path(nvcc).parent)) or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, map(shorten, text.splitlines()), strict=True))


def shorten(demangled: str) -> str:
    """The name and the template's arguments alone, dtypes by their names."""
    plain = re.sub(r"\([^()]*\bDtype\)(\d)", lambda match: DTYPES[int(match[1])], demangled)
    match = re.search(r"(\w+(?:<[^()]*>)?)\([^()]*\)$", plain)
    return match[1].replace("(bool)1", "true").replace("(bool)0", "false") if match else demangled


def rows_of(job: Job, numbers: dict[str, dict[str, int]], names: dict[str, str]) -> Iterator[Row]:
    for mangled, row in numbers.items():
        configuration = names[mangled]
        (kernel,) = re.findall(r"\w*?([a-z]\w*_kernel)\b", configuration) or [configuration]
        made = Row(kernel, KINDS.get(kernel, "irregular"), configuration, job.target, measured=row)
        made.error = problem(made)
        yield made


def problem(row: Row) -> str:
    """What is wrong that the table's bounds do not say."""
    if row.kernel not in KINDS:
        return "is not listed in KINDS of bench/gate/cuda.py"
    if row.measured["generic"]:
        return f"{row.measured['generic']} generic accesses to memory"
    if row.kernel in READS_WIDE and not row.measured["loads128"]:
        return "no load of 128 bits"
    return ""


def compile_all(jobs: Sequence[Job], nvcc: str) -> list[Row]:
    """The rows of all kernels of all jobs."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout

    def work(job: Job) -> dict[str, dict[str, int]] | str:
        try:
            return measured(job, nvcc, version)
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(MAX_PROCESSES) as workers:
        results = list(workers.map(work, jobs))
    names = readable(sorted({name for numbers in results if isinstance(numbers, dict) for name in numbers}), nvcc)
    rows = []
    for job, numbers in zip(jobs, results, strict=True):
        if isinstance(numbers, str):
            rows.append(Row(job.source.name, "irregular", job.source.name, job.target, error=numbers))
        else:
            rows += rows_of(job, numbers, names)
    return sorted(rows, key=lambda row: row.configuration)


# ---- command line ------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="kernels in whose name this occurs")
    parser.add_argument("--targets", default=",".join(ARCHITECTURES), help="some of %(default)s")
    parser.add_argument("--all", action="store_true", help="show every kernel")
    args, _ = parser.parse_known_args(arguments)  # `make kernels` hands both gates the same arguments
    args.targets = [target for target in args.targets.split(",") if target in ARCHITECTURES]
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table and return the exit status."""
    args = parse_arguments(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("CUDA kernels: not compiled, there is no nvcc on the PATH or in CUDA_HOME")
        return 0
    start = time.perf_counter()
    jobs = [Job(source, target) for source in sorted((CSRC / "cuda").glob("*.cu")) for target in args.targets]
    rows = [row for row in compile_all(jobs, nvcc) if re.search(args.only, row.configuration)]
    seconds = round(time.perf_counter() - start, 1)
    if rows:
        print_table(table(rows, args.all))
    failed = sum(bool(row.violations) for row in rows)
    verdict = f"✗ {failed} of {len(rows)} do not pass" if failed else "all pass"
    number = len({row.configuration for row in rows})
    print(f"{number} CUDA kernels × {len(args.targets)} targets in {seconds} s: {verdict}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
