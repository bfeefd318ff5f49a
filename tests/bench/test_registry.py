"""What `bench.compare` compares: real models' weights, every optimizer with its period, and other people's packages."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections import Counter
from itertools import product
from math import prod
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch.nn import Parameter

from bench.common import muon, peers
from bench.common.memory import tensors_of
from bench.common.optimizers import ENTRIES, WHOLE
from bench.common.paths import ROOT
from bench.common.peers import PEERS, MissingPeer, find, why_missing
from bench.common.workloads import WORKLOADS, Workload
from bench.compare.contest import Case
from rootfree_kernels import RECIPE
from tests.bench.fakes import without_peers

# ---- workloads -----------------------------------------------------------------------------------------------------

HIDDEN_WEIGHTS = {
    # published number of weights, less embeddings, vectors (biases and norms) and head
    "GPT-2 124M": 124_439_808 - (50_257 + 1024) * 768 - (12 * 13 + 2) * 768,
    "GPT-2 350M": 354_823_168 - (50_257 + 1024) * 1024 - (24 * 13 + 2) * 1024,
    # of ViT-B/16 the class token, 197 positions, the patches' bias, 13 vectors a layer, the last norm and the head
    "ViT-B/16": 86_567_656 - (1 + 197 + 1 + 12 * 13 + 2) * 768 - 769_000,
    # of ResNet-50 the head, and two numbers for each of the 26,560 channels of its batch norms
    "ResNet-50": 25_557_032 - (2048 * 1000 + 1000) - 2 * 26_560,
    # of Llama 7B a 32nd of what is left without the embedding, the head and 65 norms
    "Llama-7B layer": (6_738_415_616 - 2 * 32_000 * 4096 - 65 * 4096) // 32,
}
"""The counts that were published with the models."""


def test_a_workload_has_exactly_the_hidden_weights_of_its_model():
    assert {name: WORKLOADS[name].num_weights for name in HIDDEN_WEIGHTS} == HIDDEN_WEIGHTS
    layer = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
    assert Counter(WORKLOADS["GPT-2 124M"].shapes) == dict.fromkeys(layer, 12)


def test_blocks_are_cut_evenly_hold_every_weight_once_and_are_no_longer_than_allowed():
    for workload, max_dim in product(WORKLOADS.values(), (100, 1024, WHOLE)):
        blocks = workload.blocks(max_dim)
        assert sum(map(prod, blocks)) == workload.num_weights
        assert max(map(max, blocks)) <= min(workload.longest_side, max_dim)
    workload = Workload("odd", ((5, 7),))
    assert Counter(workload.blocks(3)) == {(3, 3): 1, (3, 2): 2, (2, 3): 1, (2, 2): 2}  # 5 is 3 + 2, 7 is 3 + 2 + 2
    assert workload.blocks(WHOLE) == ((5, 7),)


# ---- optimizers ----------------------------------------------------------------------------------------------------

CUT = 8
"""The longest side of a block in these tests."""


class Stepper:
    """An entry at work on weights of some shapes; skipped if it cannot take part here."""

    def __init__(self, name, *shapes, period, block):
        self.entry = entry = ENTRIES[name]
        if "cpu" not in entry.devices:
            pytest.skip(f"{name} needs a GPU")
        if entry.peer == "dion":
            pytest.skip(f"{name} compiles for a minute on a CPU")
        if entry.peer and (problem := why_missing(entry.peer)):
            pytest.skip(f"{PEERS[entry.peer].title} is {problem}")
        self.generator = torch.Generator().manual_seed(0)
        shapes = Case(entry, Workload("weights", shapes), block).shapes
        self.params = [Parameter(self.random(shape).mul_(0.1).to(entry.weights)) for shape in shapes]
        for param in self.params:
            param.grad = torch.empty_like(param)
        self.optimizer = entry.make(self.params, period, block)

    def random(self, shape):
        return torch.randn(shape, generator=self.generator)

    def step(self):
        for param in self.params:
            param.grad.copy_(self.random(param.shape))
        self.optimizer.step()


@pytest.mark.parametrize("name", ENTRIES)
def test_every_optimizer_changes_its_weights_and_keeps_them_finite(name):
    stepper = Stepper(name, (6, 10), (10, 4), period=2, block=CUT)
    before = [param.detach().clone() for param in stepper.params]
    for _ in range(5):
        stepper.step()
    assert all(param.isfinite().all() for param in stepper.params)
    assert not any(torch.equal(*pair) for pair in zip(stepper.params, before, strict=True))


def state_of(optimizer):
    """Return shape and bytes of every tensor of its state."""
    tensors = tensors_of([dict(optimizer.state), vars(optimizer)])
    return [(tuple(x.shape), x.detach().reshape(-1).view(torch.uint8).numpy().tobytes()) for x in tensors]


PERIODIC = [name for name, entry in ENTRIES.items() if entry.has_period]


@pytest.mark.parametrize("name", PERIODIC)
def test_factors_change_only_in_every_third_step_if_t_is_3(name):
    """These are the inverse roots of Distributed Shampoo, whose factors change at every step, and the bases of SOAP."""
    stepper = Stepper(name, (6, 10), period=3, block=WHOLE)
    changed: dict[int, set[int]] = {}
    for number in range(9):
        before = state_of(stepper.optimizer) if number >= 3 else []
        stepper.step()
        for index, pair in enumerate(zip(before, state_of(stepper.optimizer), strict=number >= 3)):
            if pair[0] != pair[1]:
                changed.setdefault(index, set()).add(number)
    seldom = {index: steps for index, steps in changed.items() if len(steps) < 6}
    updates = {number for number in range(3, 9) if number % 3 == stepper.entry.update_at % 3}
    assert all(steps == updates for steps in seldom.values())
    sizes = [shape for shape, _ in state_of(stepper.optimizer)]
    for side, packed in ((6, 21), (10, 55)):
        factors = [index for index in seldom if prod(sizes[index]) in (side * side, packed)]
        assert factors, f"no factor of {side} × {side} has changed"


@pytest.mark.parametrize("name", [name for name in PERIODIC if ENTRIES[name].is_ours])
def test_no_factor_of_ours_is_longer_than_a_block(name):
    stepper = Stepper(name, (24, 100), period=1, block=32)
    stepper.step()
    theirs = {x.untyped_storage().data_ptr() for param in stepper.params for x in (param, param.grad)}
    tensors = tensors_of(dict(stepper.optimizer.state))
    state = [x for x in tensors if x.untyped_storage().data_ptr() not in theirs]
    squares = [x.shape[-1] for x in state if x.ndim >= 2 and x.shape[-1] == x.shape[-2]]
    assert not [side for side in squares if side > 32]


def test_the_recipe_has_its_options_and_blocks_and_period():
    stepper = Stepper("IFShampoo, recipe", (6, 10), period=3, block=CUT)
    (group,) = stepper.optimizer.param_groups
    assert {name: group[name] for name in RECIPE} == dict(RECIPE)
    assert (group["lr"], group["precondition_frequency"], group["max_preconditioner_dim"]) == (0.045, 3, CUT)


@pytest.mark.parametrize("slow", [False, True])
def test_muon_of_torch_iterates_in_fp32_only_on_a_cpu_that_multiplies_bf16_slowly(monkeypatch, slow):
    calls = []
    monkeypatch.setattr(muon, "use_fp32_muon", lambda: calls.append("FP32"))
    monkeypatch.setattr(muon, "cpu_matmul_dtype", lambda dtype, device: torch.float32 if slow else dtype)
    ENTRIES["Muon of torch"].make([Parameter(torch.ones(2, 2))], 1, WHOLE)
    assert calls == ["FP32"] * slow


def test_muon_iterates_in_bf16_on_a_gpu():
    assert not muon.muon_is_fp32(torch.device("cuda"))


# ---- peers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def none_here(tmp_path):
    with without_peers(tmp_path):
        yield tmp_path


def test_a_missing_peer_is_listed_with_the_command_that_installs_it(none_here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.common.peers"])
    assert peers.main() == 0
    for line, peer in zip(capsys.readouterr().out.splitlines(), PEERS.values(), strict=True):
        command = f"git clone https://github.com/{peer.repository} .peers/{peer.repository.split('/')[1]}"
        problem = f"not installed: {command}{'; make peers' if peer.index else ''}"
        assert line == f"{peer.title:30} {problem}"
        with pytest.raises(MissingPeer, match=problem):
            find(peer.module)


def fake_checkout(folder, text):
    """Make a checkout of SOAP whose module has this text."""
    (folder / "SOAP").mkdir()
    (folder / "SOAP" / "soap.py").write_text(text)
    sys.modules.pop("soap", None)


def test_a_checkout_is_imported_and_versions_are_of_it_or_unknown(none_here):
    fake_checkout(none_here, "SOAP = 'from the checkout'")
    path = [*sys.path]
    assert find("soap").SOAP == "from the checkout"
    assert sys.path == path and why_missing("soap") is None
    assert PEERS["soap"].version() == "a copy without its commits"
    with patch.object(peers.importlib.metadata, "version", side_effect=importlib.metadata.PackageNotFoundError):
        assert PEERS["dion"].version() == "of an unknown version"


CLONE = "git clone https://github.com/nikhilvyas"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("raise RuntimeError('it is too old')", "cannot be imported: RuntimeError: it is too old"),
        ("import nobody_has_this", f"not installed (it is here, and needs nobody_has_this): {CLONE}/SOAP .peers/SOAP"),
    ],
)
def test_a_checkout_that_cannot_be_imported_is_reported_with_the_reason(none_here, text, problem):
    fake_checkout(none_here, text)
    assert why_missing("soap") == problem


def test_install_gives_pip_only_pinned_requirements(monkeypatch):
    calls = []
    monkeypatch.setattr(peers.subprocess, "run", lambda command: calls.append(command) or SimpleNamespace(returncode=3))
    assert peers.install() == 3
    (command,) = calls
    assert command[:3] == [sys.executable, "-m", "pip"] and "install" in command and "--no-deps" in command
    constraints = Path(command[command.index("-c") + 1]).read_text().splitlines()
    pinned = {line.partition("==")[0] for line in constraints if "==" in line}
    wanted = command[command.index("-c") + 2 :]
    assert {"sirfshampoo==0.0.1", "pytorch-optimizer==4.1.0"} <= set(wanted)
    assert len(wanted) == len(set(wanted)) and "torch" not in wanted
    assert all("==" in requirement or requirement in pinned for requirement in wanted)


def test_the_package_itself_never_imports_a_peer():
    modules = [*PEERS, "bench", "singd", "einops"]
    code = f"import sys, rootfree_kernels, rootfree_kernels.optim; print([m for m in {modules} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_bench_common_imports_no_other_package_of_bench():
    imports = re.compile(r"^\s*(?:from|import) (bench\.(?!common\b)\S*|bench import .*)", re.MULTILINE)
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "bench" / "common").glob("*.py")}
    assert len(texts) > 10 and {name: found for name, text in texts.items() if (found := imports.findall(text))} == {}
