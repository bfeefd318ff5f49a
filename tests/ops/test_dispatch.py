"""Dispatch tables: their choices, the default without a table, and errors for invalid files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rootfree_kernels import IFShampoo, RFRMSProp, __main__, native
from rootfree_kernels.native import CUDA as CUDA_BACKEND
from rootfree_kernels.ops import dispatch
from rootfree_kernels.ops.backends import BACKENDS
from rootfree_kernels.ops.dispatch import DispatchTableError, for_diagonal, for_matrices, parse, size_class
from tests.calls.dispatch_files import GPU, Use, entry, table, user_of_tables
from tests.calls.optimizers import OPTIONS

CUDA = torch.device("cuda", 0)
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
MATRICES = (FP32, None, (BF16, None))
"""Dtype, `fused` and (factor dtype, product dtype) of a typical batch."""


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Use:
    return user_of_tables(tmp_path, monkeypatch)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine with an H100, Triton and the whole extension. The package includes no table."""
    monkeypatch.setattr(dispatch, "TABLES", tmp_path)
    left_out = {"cpp": None, "cuda": None}
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("ROOTFREE_BACKEND", raising=False)
    monkeypatch.delenv("ROOTFREE_DISPATCH", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(native, "build_record", lambda: {"extension": False, "left_out": left_out})
    for backend in BACKENDS:
        monkeypatch.setitem(vars(backend), "import_problem", None)


def diagonal(numbers: int, tensors: int, dtype: torch.dtype = FP32, fused: bool | None = None) -> str:
    """Return the backend of a list with this number of elements on the GPU."""
    with FakeTensorMode():
        sizes = [numbers - tensors + 1, *[1] * (tensors - 1)]
        return for_diagonal([torch.empty(size, device=CUDA) for size in sizes], dtype, fused).name


def matrices(side: int, blocks: int, kind: Any = MATRICES) -> str:
    return for_matrices(CUDA, *kind, (8, side), blocks).name


# ---- the rule ------------------------------------------------------------------------------------------------------


def test_a_class_ends_with_a_power_of_two() -> None:
    assert [size_class(size) for size in (1, 2, 3, 4, 5, 512, 513, 1024, 1025)] == [0, 1, 2, 2, 3, 9, 10, 10, 11]


RULE = [  # entries of a table (side, blocks, choice); a shape; the expected choice
    ([(1024, 64, "eager")], (1000, 48), "eager"),
    ([(1024, 64, "eager")], (1025, 33), "eager"),  # class (2048, 64)
    ([(1024, 64, "eager")], (2048, 128), "eager"),
    ([(1024, 64, "eager")], (2049, 64), None),
    ([(1024, 64, "eager")], (1024, 16), None),
    ([(1024, 64, "eager"), (1024, 32, "triton")], (1024, 32), "triton"),
    ([(1024, 64, "eager"), (1024, 32, None)], (768, 20), None),  # null: measured without a winner
    ([(1024, 64, "eager"), (256, 64, "triton")], (512, 64), None),  # both are equally near
    ([(1024, 64, "eager"), (256, 64, "eager")], (512, 64), "eager"),
    ([(1024, 64, "eager"), (256, 32, "triton")], (512, 64), "eager"),
    ([], (512, 64), None),
]


@pytest.mark.parametrize(("entries", "shape", "expected"), RULE)
def test_a_shape_uses_the_nearest_class_within_a_factor_of_two(entries, shape, expected) -> None:
    listed = [entry(choice, side=side, blocks=blocks) for side, blocks, choice in entries]
    found = parse(table(matrices=listed), "t").choice("matrices", dict(zip(("side", "blocks"), shape, strict=True)))
    assert found == expected


# ---- choices -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
def test_a_table_chooses_by_shape(use: Use) -> None:
    use(
        diagonal=[entry("cuda", numbers=1 << 20, tensors=1024), entry("triton", numbers=1 << 28, tensors=16)],
        matrices=[entry("eager", side=256, blocks=64), entry("triton", side=4096, blocks=2)],
        symmetric=[entry("bmm", side=4096, blocks=2), entry("bmm", side=256, blocks=64)],
    )
    assert [diagonal(10**6, 1000), diagonal(1 << 28, 16), diagonal(10**6, 10)] == ["cuda", "triton", "triton"]
    assert [matrices(250, 50), matrices(4096, 2), matrices(4096, 16)] == ["eager", "triton_bmm", "triton"]


@pytest.mark.usefixtures("gpu")
def test_without_a_table_the_order_of_preference_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "off"):
        monkeypatch.setenv("ROOTFREE_DISPATCH", value) if value is not None else None
        assert diagonal(10**6, 1000) == matrices(4096, 2) == "triton"
        assert diagonal(10**6, 1000, FP64) == matrices(4096, 2, (FP32, None, (FP64, None))) == "eager"
        assert matrices(4096, 2, (FP32, None, (FP32, None))) == "eager_with_triton_momentum"


@pytest.mark.usefixtures("gpu")
def test_the_package_s_table_of_the_device_is_used_unless_it_is_off(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "nvidia-h100-80gb-hbm3.json"
    path.write_text(json.dumps(table(matrices=[entry("eager", side=1024, blocks=64)])))
    assert matrices(1024, 64) == "eager"
    monkeypatch.setenv("ROOTFREE_DISPATCH", "off")
    assert matrices(1024, 64) == "triton"
    monkeypatch.delenv("ROOTFREE_DISPATCH")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert matrices(1024, 64) == "triton"


@pytest.mark.usefixtures("gpu")
def test_explicit_choices_override_the_table(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    use(
        diagonal=[entry("cuda", numbers=64, tensors=1)],
        matrices=[entry("eager", side=64, blocks=1)],
        symmetric=[entry("bmm", side=64, blocks=1)],
    )
    assert diagonal(64, 1, fused=False) == matrices(64, 1, (FP32, False, (BF16, None))) == "eager"
    assert diagonal(64, 1, fused=True) == "cuda"  # cuda is a kernel too
    assert matrices(64, 1, (FP32, True, (BF16, None))) == "triton_bmm"
    monkeypatch.setenv("ROOTFREE_BACKEND", "triton")
    assert diagonal(64, 1) == matrices(64, 1) == "triton"
    use("not a table")
    monkeypatch.setenv("ROOTFREE_BACKEND", "eager")
    assert diagonal(64, 1) == "eager"  # the table is not read


@pytest.mark.usefixtures("gpu")
def test_a_choice_that_cannot_run_is_ignored(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    use(diagonal=[entry("cuda", numbers=64, tensors=1)], matrices=[entry("cpp", side=64, blocks=1)])
    assert matrices(64, 1) == "triton"  # C++ does not run on a GPU
    assert diagonal(64, 1, FP64) == "eager"
    left_out = {"extension": True, "left_out": {"cpp": None, "cuda": "no CUDA toolkit"}}
    with monkeypatch.context() as patch:
        patch.setattr(native, "build_record", lambda: left_out)
        assert diagonal(64, 1) == "triton"
    monkeypatch.setitem(vars(CUDA_BACKEND), "import_problem", "undefined symbol")
    assert diagonal(64, 1) == "triton"  # the extension is imported only when it is chosen


@pytest.mark.usefixtures("gpu")
def test_a_table_of_another_device_is_ignored(use: Use) -> None:
    path = use(table("NVIDIA A100", matrices=[entry("eager", side=64, blocks=1)]))
    assert matrices(64, 1) == "triton"
    assert dispatch.describe(CUDA) == f"none: {path} belongs to NVIDIA A100"


def test_every_included_table_is_valid_and_named_after_its_device() -> None:
    for path in dispatch.TABLES.glob("*.json"):
        found = dispatch.read(path)
        assert path.stem == dispatch.slug(found.device) and found.date


# ---- invalid files -------------------------------------------------------------------------------------------------

WRONG = [
    ("{", "Expecting property name"),
    ([], "it is a list, not an object"),
    ({"operations": {}}, "device is None: write the device's name"),
    ({"device": GPU}, "operations is None: write an object with a list for each"),
    (table(products=[]), "operation 'products' is unknown: write diagonal, matrices, symmetric"),
    (table(matrices={}), "matrices is {}: write a list of entries"),
    (table(matrices=[1]), "matrices[0]: it is 1: write an object"),
    (table(matrices=[entry("eager", side=64)]), "matrices[0]: blocks is None: write a power of two"),
    (table(matrices=[entry("eager", side=63, blocks=1)]), "matrices[0]: side is 63: write a power of two"),
    (table(matrices=[entry("eager", side=True, blocks=1)]), "matrices[0]: side is True: write a power of two"),
    (table(symmetric=[{"side": 64, "blocks": 1}]), "symmetric[0]: choice is missing: write triton, bmm or null"),
    (
        table(diagonal=[entry(None, numbers=1, tensors=1), entry("cublas", numbers=1, tensors=1)]),
        "diagonal[1]: choice 'cublas' is unknown: write triton, cuda, cpp, eager or null",
    ),
]


@pytest.mark.parametrize(("value", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_an_error_names_file_entry_and_remedy_before_anything_changes(use: Use, value: Any, message: str) -> None:
    path = use(value)
    param = nn.Parameter(torch.ones(3, 3))
    optimizer = IFShampoo([param], **OPTIONS)
    param.grad = torch.ones(3, 3)
    with pytest.raises(DispatchTableError) as caught:
        optimizer.step()
    text = str(caught.value)
    assert str(path) in text and message in text and text.endswith("or ignore it: ROOTFREE_DISPATCH=off.")
    assert not optimizer.state and torch.equal(param, torch.ones(3, 3))


def test_a_missing_file_is_an_error_unless_tables_are_off(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    use("").unlink()
    param = nn.Parameter(torch.ones(3))
    optimizer = RFRMSProp([param], **OPTIONS)
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match="No such file"):
        optimizer.step()
    monkeypatch.setenv("ROOTFREE_DISPATCH", "off")
    optimizer.step()


# ---- the report ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
def test_the_report_says_which_table_is_in_use_for_each_device(use: Use, capsys, monkeypatch) -> None:
    def tables() -> list[str]:
        __main__.main()
        return [line.strip() for line in capsys.readouterr().out.splitlines() if "dispatch table:" in line]

    assert tables() == ["dispatch table: none: order of preference"] * 2
    entries = [entry("cuda", numbers=64, tensors=1), entry(None, numbers=4096, tensors=1)]
    path = use(diagonal=entries, symmetric=[entry(None, side=64, blocks=1)])
    described = f"dispatch table: {path}, measured 2026-12-01, 2026-12-02; choices: diagonal 1, symmetric 0"
    assert tables() == [f"dispatch table: none: {path} belongs to {GPU}", described]
    use("{")
    assert all(line.startswith(f"dispatch table: BROKEN: dispatch table {path}: Expecting") for line in tables())
    for value, reason in (("off", "ROOTFREE_DISPATCH=off"), ("", "order of preference")):
        monkeypatch.setenv("ROOTFREE_DISPATCH", value)
        assert tables() == [f"dispatch table: none: {reason}"] * 2
    monkeypatch.setenv("ROOTFREE_BACKEND", "eager")
    assert tables() == ["dispatch table: none: the backend is fixed, eager"] * 2
