"""Count the instructions of compiled kernels, for the GPUs that the gates compile for.

Triton's package contains NVIDIA's disassembler. For AMD's GPUs Triton's own assembly text is read.
"""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Triton is imported within functions, since the tests import this module under the interpreter.


class Gpu(NamedTuple):
    """A GPU to compile for."""

    backend: str
    arch: int | str
    warp_size: int
    max_shared: int
    """Bytes of shared memory that a block can have; a launch that asks for more fails."""
    mma: str
    """Pattern of this generation's tensor-core instruction."""
    disassembler: str = ""
    """The name of the architecture for nvdisasm."""


TARGETS = {
    "sm_80": Gpu("cuda", 80, 32, 166_912, r"HMMA\b", "SM80"),
    "sm_90": Gpu("cuda", 90, 32, 232_448, r"HGMMA\b", "SM90a"),
    "sm_100": Gpu("cuda", 100, 32, 232_448, r"UTC[A-Z]MMA\b", "SM100a"),
    "gfx942": Gpu("hip", "gfx942", 64, 65_536, r"v_mfma_"),
}

INSTRUCTIONS = {
    "cuda": {
        "spills": r"(LDL|STL)\b",
        "async": r"(LDGSTS|UTMALDG|UBLKCP)\b",
        "loads128": r"LDG(STS)?\..*\b(128|256)\b",
        "stores128": r"STG\..*\b(128|256)\b",
    },
    "hip": {
        "loads128": r"(global|buffer)_load_dwordx[24]\b",  # 64 bits a thread of a wave of 64 are as much
        "stores128": r"(global|buffer)_store_dwordx4\b",
    },
}
"""The counted instructions of each backend, as patterns for the start of an instruction's name."""


def run_tool(name: str, *arguments: str, data: bytes) -> str:
    """Return what a program of Triton's package prints about a file with these bytes."""
    from triton import knobs

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = [getattr(knobs.nvidia, name).path, *arguments, file.name]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def parse_resource_usage(text: str) -> dict[str, int]:
    """Return registers a thread and bytes of stack from the output of `cuobjdump -res-usage` for one kernel."""
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) ", text)
    return {"registers": int(usage[0]), "stack": int(usage[1])}


def parse_sass(text: str) -> Iterator[tuple[int, str]]:
    """Yield address and name of every instruction of a disassembly, such as (16, "LDG.E.128")."""
    for match in re.finditer(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE):
        yield int(match[1], 16), match[2]


def parse_amdgcn(text: str) -> tuple[dict[str, int], Counter[str]]:
    """Return registers, scratch memory ("stack") and spills of AMD's assembly text, and its instructions by name.

    Only spilled vector registers are counted: scalar ones go to lanes of vector registers, or else show as scratch.
    """
    entries = {"registers": "vgpr_count", "stack": "private_segment_fixed_size", "spills": "vgpr_spill_count"}
    usage = {}
    for column, entry in entries.items():
        (number,) = re.findall(rf"^\s+\.{entry}:\s+(\d+)$", text, re.MULTILINE)
        usage[column] = int(number)
    return usage, Counter(re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE))


def code_of(cubin: bytes) -> bytes:
    """Return the machine code of a cubin, a 64-bit ELF file: its sections .text.*, one after the other."""
    (headers_at,) = struct.unpack_from("<Q", cubin, 40)
    size, number, names = struct.unpack_from("<HHH", cubin, 58)
    # Of a section's header: name (an offset into the section of names), type, flags, address, offset, length.
    headers = [struct.unpack_from("<IIQQQQ", cubin, headers_at + index * size) for index in range(number)]
    names_at = headers[names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", names_at + name)
    )


def disassemble(codes: Sequence[bytes], target: str) -> list[Counter[str]]:
    """Return the instructions of each of `codes`, which are machine code, by name.

    One process reads all, laid end to end: nvdisasm takes about as long to start as Triton takes to compile a kernel.
    """
    text = run_tool("nvdisasm", "--binary", TARGETS[target].disassembler, "-ndf", data=b"".join(codes))
    ends = list(itertools.accumulate(map(len, codes)))
    instructions: list[Counter[str]] = [Counter() for _ in codes]
    current = 0
    for address, name in parse_sass(text):
        while address >= ends[current]:
            current += 1
        instructions[current][name] += 1
    return instructions


def count(instructions: Counter[str], target: str) -> dict[str, int]:
    """Return the table's numbers of instructions."""
    patterns = {**INSTRUCTIONS[TARGETS[target].backend], "mma": TARGETS[target].mma}
    if target in ("sm_90", "sm_100"):
        patterns["old mma"] = TARGETS["sm_80"].mma
    return {
        column: sum(number for name, number in instructions.items() if re.match(pattern, name))
        for column, pattern in patterns.items()
    }
