"""The compile gate of the CUDA kernels: every .cu of csrc/cuda, compiled for three GPUs.

    python -m bench.gate.cuda [--only PATTERN] [--targets sm_80,sm_90] [--all]

It needs nvcc but no GPU; without nvcc it says so and passes. Table and bounds are those of `bench.gate.report`.
Moreover no memory access may be generic, which is slower than one to global memory, and kernels that only read must
read 128 bits at a time. The exit status is 1 if something does not pass. build/compile_cuda keeps the numbers of the
same sources and the same compiler.
"""

from __future__ import annotations

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
from bench.gate.report import Row, conclude, gate_parser

CSRC, CACHE = ROOT / "csrc", ROOT / "build" / "compile_cuda"
ARCHITECTURES = {"sm_80": "80", "sm_90": "90a", "sm_100": "100"}
FLAGS = ["-O3", "-fmad=false", "--std=c++17", "-Xptxas", "-v", "-cubin"]  # the first two as in setup.py
MAX_PROCESSES = 2

KINDS = {"rf_rmsprop_kernel": "elementwise", "momentum_kernel": "elementwise", "norms_kernel": "irregular"}
"""The kind of each kernel, which decides its bounds. A kernel that is not listed is an error."""

READS_WIDE = ("norms_kernel",)
"""Kernels that store next to nothing, but read 128 bits at a time."""

GENERIC = re.compile(r"(LD|ST|ATOM)\b")
"""Accesses to any kind of memory. Those to global memory are LDG, STG and ATOMG."""

DTYPES = ("fp32", "bf16", "fp16")


class Job(NamedTuple):
    source: Path
    target: str


# ---- compiling -------------------------------------------------------------------------------------------------------


def find_nvcc() -> str | None:
    """Return the path of nvcc, from PATH or CUDA_HOME."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def key_of(job: Job, version: str) -> str:
    """Return a hash of everything that the numbers of a job depend on."""
    headers = (*sorted(CSRC.glob("*.h")), *sorted(CSRC.glob("cuda/*.h")))
    readers = (Path(__file__), Path(machine_code.__file__))
    content = [path.read_bytes() for path in (*headers, job.source, *readers)]
    parts = [job.source.name.encode(), job.target.encode(), version.encode(), *content]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:24]


def compiled(job: Job, nvcc: str) -> tuple[str, bytes]:
    """Compile a job, and return what ptxas prints about every kernel, and the cubin."""
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
    """Compile a file and return the table's numbers of every kernel, by its mangled name."""
    log, cubin = compiled(job, nvcc)
    usage = dict(parse_ptxas(log))
    instructions = dict(parse_functions(run_tool("cuobjdump", "-sass", data=cubin)))
    for name, names in instructions.items():
        generic = sum(number for each, number in names.items() if GENERIC.match(each))
        usage[name] |= {**count(names, job.target), "generic": generic, "tmem": 0}
    return usage


def parse_ptxas(log: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield registers, stack and shared memory of every kernel in the output of `ptxas -v`."""
    for part in log.split("Compiling entry function '")[1:]:
        registers, stack = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes stack frame", part)
        shared = re.search(r"(\d+) bytes smem", part)
        numbers = {"registers": registers, "stack": stack, "shared": shared}
        yield part.partition("'")[0], {column: int(match[1]) if match else 0 for column, match in numbers.items()}


def parse_functions(text: str) -> Iterator[tuple[str, Counter[str]]]:
    """Yield the instructions, by name, of every function in the output of `cuobjdump -sass`."""
    for part in text.split("Function : ")[1:]:
        yield part.split(maxsplit=1)[0], Counter(name for _, name in parse_sass(part))


def measured(job: Job, nvcc: str, version: str) -> dict[str, dict[str, int]]:
    """Return the result of `measure`, from the cache if it is there."""
    path = CACHE / f"{key_of(job, version)}.json"
    if not path.exists():
        numbers = measure(job, nvcc)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(numbers))
    return json.loads(path.read_text())


# ---- rows of the table -----------------------------------------------------------------------------------------------


def readable(names: Sequence[str], nvcc: str) -> dict[str, str]:
    """Return short names such as "norms_kernel<fp32, true>" of mangled ones, or these if no tool demangles."""
    tool = shutil.which("cu++filt", path=str(Path(nvcc).parent)) or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, map(shorten, text.splitlines()), strict=True))


def shorten(demangled: str) -> str:
    """Return the name and the template's arguments alone, with dtypes by their names."""
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
    """Return what is wrong beyond the table's bounds, "" if nothing."""
    if row.kernel not in KINDS:
        return "is not listed in KINDS of bench/gate/cuda.py"
    if row.measured["generic"]:
        return f"{row.measured['generic']} generic accesses to memory"
    if row.kernel in READS_WIDE and not row.measured["loads128"]:
        return "no load of 128 bits"
    return ""


def compile_all(jobs: Sequence[Job], nvcc: str) -> list[Row]:
    """Return the rows of all kernels of all jobs."""
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


# ---- command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table and return the exit status."""
    parser = gate_parser((__doc__ or "").partition("\n")[0], ARCHITECTURES)
    args, _ = parser.parse_known_args(arguments)  # `make kernels` hands both gates the same arguments
    targets = [target for target in args.targets.split(",") if target in ARCHITECTURES]
    nvcc = find_nvcc()
    if nvcc is None:
        print("CUDA kernels: not compiled, there is no nvcc on the PATH or in CUDA_HOME")
        return 0
    start = time.perf_counter()
    jobs = [Job(source, target) for source in sorted((CSRC / "cuda").glob("*.cu")) for target in targets]
    rows = [row for row in compile_all(jobs, nvcc) if re.search(args.only, row.configuration)]
    seconds = round(time.perf_counter() - start, 1)
    number = len({row.configuration for row in rows})
    return conclude(f"{number} CUDA kernels × {len(targets)} targets", seconds, rows, args.all)


if __name__ == "__main__":
    sys.exit(main())
