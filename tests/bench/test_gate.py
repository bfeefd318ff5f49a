"""`make kernels`, the compile gate, on small kernels: what passes, what does not, and how machine code is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from bench.common.paths import ROOT
from bench.gate import triton as triton_gate
from bench.gate.machine_code import TARGETS, count, parse_amdgcn, parse_resource_usage, parse_sass
from bench.gate.report import Row, worst
from bench.gate.triton import Job
from rootfree_kernels.triton_kernels.common import dot
from rootfree_kernels.triton_kernels.configuration import Configuration

# ---- kernels: the gate imports this file in a process of its own -------------------------------------------------


@triton.jit
def scale_wide(x_ptr, y_ptr, size_16, factor, BLOCK: tl.constexpr):
    """y = factor·x of a size that Triton can see to be a multiple of 16."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size_16 * 16
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask) * factor, mask=mask)


@triton.jit
def scale_narrow(x_ptr, y_ptr, size, factor, BLOCK: tl.constexpr):
    """y = factor·x of any size."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask) * factor, mask=mask)


@triton.jit
def normalise(x_ptr, y_ptr, size_16, factor, BLOCK: tl.constexpr):
    """y = factor·x / Σx: every number is kept until the sum is known."""
    offsets = tl.arange(0, BLOCK)
    mask = offsets < size_16 * 16
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    tl.store(y_ptr + offsets, x * (factor / tl.sum(x)), mask=mask)


@triton.jit
def product(a_ptr, b_ptr, c_ptr, num_tiles, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """C = AB of row-major A [M, num_tiles·K] and B [num_tiles·K, N]."""
    rows, cols, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for k in range(num_tiles):
        a = tl.load(a_ptr + rows * (num_tiles * K) + k * K + inner[None, :])
        b = tl.load(b_ptr + (k * K + inner[:, None]) * N + cols)
        total = tl.dot(a, b, total)
    tl.store(c_ptr + rows * N + cols, total)


@triton.jit
def our_product(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    """C = AB of row-major A, B and C [SIZE, SIZE], by the product that all matrix kernels use."""
    offsets = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets), tl.zeros((SIZE, SIZE), tl.float32))
    tl.store(c_ptr + offsets, total)


SCALE = ("*fp32", "*fp32", "i32", "fp32")
PRODUCT = ("*bf16", "*bf16", "*fp32", "i32")

PASSING = {
    "vector": Configuration(scale_wide, SCALE, (1024,), 4, 1, "elementwise"),
    "unaligned": Configuration(scale_narrow, SCALE, (1024,), 4, 1, "irregular"),
    "matrix": Configuration(product, PRODUCT, (128, 128, 32), 4, 3, "matrix"),
}
FAILING = {
    "scalar accesses": Configuration(scale_narrow, SCALE, (512,), 4, 1, "elementwise"),
    "spills": Configuration(normalise, SCALE, (32768,), 4, 1, "elementwise"),
    "too much shared memory": Configuration(product, PRODUCT, (128, 128, 128), 8, 4, "matrix"),
    "old tensor-core instruction": Configuration(product, PRODUCT, (32, 32, 32), 4, 3, "matrix"),
    "no tensor cores": Configuration(scale_wide, SCALE, (512,), 4, 1, "matrix"),
    "does not compile": Configuration(scale_wide, SCALE, (1000,), 4, 1, "elementwise"),  # 1000 is no power of two
}
IN_FP32 = Configuration(our_product, ("*fp32", "*fp32", "*fp32"), (32,), 4, 1, "matrix")


def configurations() -> Iterator[Configuration]:
    yield from PASSING.values()
    yield from FAILING.values()
    yield IN_FP32


# ---- the gate on them --------------------------------------------------------------------------------------------


Result = tuple[int, str, list[dict[str, Any]]]


def run_gate(folder: Path, *arguments: str) -> Result:
    """Return exit status, printed table and rows of the gate on this file's kernels.

    The environment asks for the interpreter, which the gate must not use.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    changed = {
        "TRITON_INTERPRET": "1",
        "TRITON_CACHE_DIR": str(folder),
        "PYTHONPATH": path,
        "PYTHONIOENCODING": "utf-8",
    }
    file, output = folder / f"rows-{triton.__version__}.json", folder / "rows-{triton}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.gate.triton", "--module", __name__, "--output", str(output), *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **changed}, **streams)
    assert "Traceback" not in result.stdout, result.stdout
    return result.returncode, result.stdout, json.loads(file.read_text())["rows"] if file.exists() else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate")


@pytest.fixture(scope="module")
def gate(folder: Path) -> Result:
    return run_gate(folder)


def violations(rows: list[dict[str, Any]], configuration: Configuration) -> dict[str, list[str]]:
    """Return the broken bounds of a configuration, by target."""
    line = triton_gate.describe(configuration)
    return {row["target"]: row["violations"] for row in rows if row["configuration"] == line}


@pytest.mark.parametrize("name", PASSING)
def test_passes(gate: Result, name: str) -> None:
    assert violations(gate[2], PASSING[name]) == {target: [] for target in TARGETS}


def everywhere(columns: list[str], **but: list[str]) -> dict[str, list[str]]:
    return {target: but.get(target, columns) for target in TARGETS}


BROKEN = {
    "scalar accesses": everywhere(["loads128", "stores128"], gfx942=["loads128"]),
    "spills": everywhere(["stack", "spills"], gfx942=[]),  # which has twice the registers
    "too much shared memory": everywhere(["shared"]),
    "old tensor-core instruction": everywhere(["mma", "old mma"], sm_80=[], gfx942=[]),  # there is one alone
    "no tensor cores": everywhere(["mma", "async"], gfx942=["mma"]),
    "does not compile": everywhere(["error"]),
}


@pytest.mark.parametrize("name", FAILING)
def test_fails(gate: Result, name: str) -> None:
    status, printed, rows = gate
    assert violations(rows, FAILING[name]) == BROKEN[name]
    assert status == 1
    assert f"✗ {triton_gate.describe(FAILING[name])}" in printed


@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if target.backend == "cuda"])
def test_fp32_operands_are_not_rounded_to_tf32(gate: Result, target: str) -> None:
    """NVIDIA's tensor cores take FP32 only as TF32, which has 10 bits of mantissa, so none may be used."""
    assert "mma" in violations(gate[2], IN_FP32)[target]


def test_exit_status_is_0_where_all_pass(folder: Path) -> None:
    status, printed, rows = run_gate(folder, "--only", "scale_wide.*BLOCK=1024", "--targets", "sm_90,gfx942", "--all")
    assert status == 0 and len(rows) == 2
    assert "✗" not in printed and "2 ≥1" in printed
    assert f" by Triton {triton.__version__} in " in printed.splitlines()[-1] and printed.endswith("s: all pass\n")


def test_nothing_to_compile_does_not_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert triton_gate.main(["--module", "json"]) == 1
    assert "nothing to compile" in capsys.readouterr().out


def test_a_kernel_without_configurations_is_named() -> None:
    module = ModuleType("module")
    module.listed_kernel, module.forgotten_kernel, module.helper = scale_wide, product, scale_narrow
    listed = [PASSING["vector"]._replace(kernel=SimpleNamespace(__name__="listed_kernel"))]
    assert triton_gate.forgotten([module], listed) == ["forgotten_kernel"]


def test_a_crash_of_the_compiler_is_reported_for_the_right_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_one(job: Job) -> tuple[Row, bytes]:
        if job.target == "sm_90":
            os._exit(1)
        return job.row(), b""

    monkeypatch.setattr(triton_gate, "compile_one", compile_one)  # workers are forked, and see it
    rows = triton_gate.compile_all([Job(PASSING["vector"], target) for target in TARGETS])
    assert {row.target: row.error for row in rows} == {**dict.fromkeys(TARGETS, ""), "sm_90": "the compiler crashed"}


# ---- machine code --------------------------------------------------------------------------------------------------

SASS = """\
	.headerflags	@"EF_CUDA_64BIT_ADDRESS EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR18][R10.64], P1 ;
        /*0030*/               @P2 STG.E.U16 desc[UR4][R2.64], R5 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0050*/                   STL.128 [R1+0x10], R4 ;
        /*0060*/             @!UP1 UTMALDG.3D [UR8], [UR4] ;
        /*0070*/                   LDL.LU R4, [R1+0x10] ;
"""

AMDGCN = """\
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
	.loc	1 35 67
	global_load_dwordx4 v[0:3], v[4:5], off
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	global_store_dwordx2 v[0:1], v[2:3], off
.LBB0_1:
	s_endpgm
	.amdgpu_metadata
    .private_segment_fixed_size: 24
    .sgpr_count:     106
    .sgpr_spill_count: 16
    .vgpr_count:     111
    .vgpr_spill_count: 3
"""


def test_sass() -> None:
    instructions = list(parse_sass(SASS))
    assert instructions[:2] == [(0, "LDC"), (16, "LDG.E.128")]
    numbers = count(Counter(name for _, name in instructions), "sm_90")
    assert numbers == {"spills": 2, "async": 2, "loads128": 2, "stores128": 0, "mma": 1, "old mma": 0}


@pytest.mark.parametrize("target, own", [("sm_80", 3), ("sm_90", 2), ("sm_100", 1)])
def test_each_generation_has_its_own_tensor_core_instruction(target: str, own: int) -> None:
    names = {"HMMA.16816.F32.BF16": 3, "HGMMA.64x128x16.F32.BF16": 2, "UTCHMMA": 1, "UTCBAR": 5}
    numbers = count(Counter(names), target)
    assert (numbers["mma"], numbers.get("old mma")) == (own, None if target == "sm_80" else 3)


def test_amdgcn() -> None:
    usage, instructions = parse_amdgcn(AMDGCN)
    assert usage == {"registers": 111, "stack": 24, "spills": 3}
    assert count(instructions, "gfx942") == {"mma": 1, "loads128": 2, "stores128": 0}


def test_resource_usage() -> None:
    text = " Function mm:\n  REG:255 STACK:104 SHARED:1024 LOCAL:0 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    assert parse_resource_usage(text) == {"registers": 255, "stack": 104}


def test_worst_takes_the_greatest_of_upper_and_the_least_of_lower_bounds() -> None:
    numbers = {"registers": 40, "stack": 0, "spills": 0, "shared": 0, "loads128": 2}
    rows = [
        Row("kernel", "elementwise", "first", "gfx942", measured=numbers),
        Row("kernel", "elementwise", "second", "gfx942", measured={**numbers, "stack": 8, "loads128": 4}),
        Row("kernel", "elementwise", "third", "gfx942", error="the compiler crashed"),
    ]
    assert worst(rows).measured == {**numbers, "stack": 8}
