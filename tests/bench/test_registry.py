"""What `bench.compare` compares: the weights of real models, every optimizer with its period, and other people's packages,
which may be missing or broken."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections import Counter
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter

from bench.common import peers
from bench.common.memory import tensors_of
from bench.common.optimizers import ENTRIES, WHOLE
from bench.common.peers import PEERS, MissingPeer, find, why_missing
from bench.common.workloads import WORKLOADS, Workload
from bench.compare.contest import distinct_blocks, shapes_for
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
"""As counted by those who published the models, not by our formulas."""


@pytest.mark.parametrize("name", HIDDEN_WEIGHTS)
def test_a_workload_has_all_hidden_weights_of_its_model_and_no_others(name):
    assert WORKLOADS[name].num_weights == HIDDEN_WEIGHTS[name]


def test_the_matrices_of_gpt2_are_four_in_each_of_twelve_layers():
    assert HIDDEN_WEIGHTS["GPT-2 124M"] == 84_934_656
    layer = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
    assert Counter(WORKLOADS["GPT-2 124M"].shapes) == dict.fromkeys(layer, 12)


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
@pytest.mark.parametrize("max_dim", [100, 1024, WHOLE])
def test_blocks_hold_every_weight_once_and_no_side_is_longer_than_asked(workload, max_dim):
    blocks = workload.blocks(max_dim)
    assert sum(map(prod, blocks)) == workload.num_weights
    assert max(map(max, blocks)) <= min(workload.longest_side, max_dim)


def test_a_weight_falls_into_the_blocks_that_a_ruler_gives():
    workload = Workload("odd", ((5, 7),))
    assert Counter(workload.blocks(3)) == {(3, 3): 1, (3, 2): 2, (2, 3): 1, (2, 2): 2}  # 5 is 3 + 2, 7 is 3 + 2 + 2
    assert workload.blocks(WHOLE) == ((5, 7),)


# ---- optimizers ----------------------------------------------------------------------------------------------------

CUT = 8
"""The longest side of a block in these tests."""


def stepped_here(name):
    """An entry, unless it cannot take part here."""
    entry = ENTRIES[name]
    if "cpu" not in entry.devices:
        pytest.skip(f"{name} needs a GPU")
    if entry.peer == "dion":
        pytest.skip(f"{name} compiles for a minute on a CPU")
    if entry.peer and (problem := why_missing(entry.peer)):
        pytest.skip(f"{PEERS[entry.peer].title} is {problem}")
    return entry


def weights_of(entry, *shapes):
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).mul_(0.1).to(entry.weights)) for shape in shapes]
    for param in params:
        param.grad = torch.empty_like(param)
    return params, generator


def step(optimizer, params, generator):
    for param in params:
        param.grad.copy_(torch.randn(param.shape, generator=generator))
    optimizer.step()


@pytest.mark.parametrize("name", ENTRIES)
def test_every_optimizer_that_is_at_hand_changes_its_weights_and_keeps_them_finite(name):
    entry = stepped_here(name)
    params, generator = weights_of(entry, *shapes_for(entry, Workload("two", ((6, 10), (10, 4))), CUT))
    before = [param.detach().clone() for param in params]
    optimizer = entry.make(params, 2, CUT)
    for _ in range(5):
        step(optimizer, params, generator)
    assert all(param.isfinite().all() for param in params)
    assert not any(torch.equal(*pair) for pair in zip(params, before, strict=True))


def state_of(optimizer):
    """Every tensor of its state as bytes, by the way to it."""
    tensors = tensors_of([dict(optimizer.state), vars(optimizer)])
    return [(tuple(x.shape), x.detach().reshape(-1).view(torch.uint8).numpy().tobytes()) for x in tensors]


PERIODIC = [name for name, entry in ENTRIES.items() if entry.has_period]


@pytest.mark.parametrize("name", PERIODIC)
def test_factors_change_in_every_third_step_and_in_no_other_where_t_is_3(name):
    """Of Distributed Shampoo these are the inverse roots (it updates its factors at every step), of SOAP the bases."""
    entry = stepped_here(name)
    params, generator = weights_of(entry, (6, 10))
    optimizer = entry.make(params, 3, WHOLE)
    for _ in range(3):
        step(optimizer, params, generator)
    changed: dict[int, set[int]] = {}
    for number in range(3, 9):
        before = state_of(optimizer)
        step(optimizer, params, generator)
        after = state_of(optimizer)
        for index, pair in enumerate(zip(before, after, strict=True)):
            if pair[0] != pair[1]:
                changed.setdefault(index, set()).add(number)
    sizes = [shape for shape, _ in state_of(optimizer)]
    always = set(range(3, 9))
    seldom = {index: steps for index, steps in changed.items() if steps != always}
    updates = {number for number in always if number % 3 == entry.update_at % 3}
    assert all(steps == updates for steps in seldom.values())
    packed = {6: 21, 10: 55}
    for side in (6, 10):
        square = {side * side, packed[side]}
        assert any(prod(sizes[index]) in square for index in seldom), f"no factor of {side} × {side} has changed"


@pytest.mark.parametrize("name", ENTRIES)
def test_who_does_not_cut_gets_the_blocks_and_all_get_the_same_number_of_weights(name):
    entry, workload = ENTRIES[name], Workload("long", ((24, 100), (64, 8)))
    shapes = shapes_for(entry, workload, 32)
    assert sum(map(prod, shapes)) == workload.num_weights
    assert shapes == workload.shapes if entry.cuts else max(map(max, shapes)) == 32


@pytest.mark.parametrize("name", [name for name in PERIODIC if ENTRIES[name].is_ours or name.startswith("Distributed")])
def test_who_can_cut_has_no_factor_that_is_longer_than_a_block(name):
    entry = stepped_here(name)
    params, generator = weights_of(entry, (24, 100))
    optimizer = entry.make(params, 1, 32)
    step(optimizer, params, generator)
    theirs = {x.untyped_storage().data_ptr() for param in params for x in (param, param.grad)}
    state = [x for x in tensors_of(dict(optimizer.state)) if x.untyped_storage().data_ptr() not in theirs]
    squares = [x.shape[-1] for x in state if x.ndim >= 2 and x.shape[-1] == x.shape[-2]]
    assert not [side for side in squares if side > 32]


def test_block_sizes_that_cut_a_workload_alike_are_measured_once():
    entry = ENTRIES["IFShampoo"]
    small, long = Workload("small", ((512, 512),)), Workload("long", ((1024, 4096),))
    assert distinct_blocks(entry, small, entry.blocks) == [WHOLE]
    assert distinct_blocks(entry, long, entry.blocks) == [1024, WHOLE]
    assert distinct_blocks(entry, long, (1024,)) == [1024]
    assert len(distinct_blocks(ENTRIES["AdamW, fused"], long, (1024, WHOLE))) == 1


def test_only_optimizers_of_this_package_are_called_ours():
    ours = {name for name, entry in ENTRIES.items() if entry.is_ours}
    assert ours == {name for name in ENTRIES if name.startswith(("IFShampoo", "RFRMSProp"))}


# ---- peers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def none_here(tmp_path):
    with without_peers(tmp_path):
        yield tmp_path


@pytest.mark.parametrize("module", PEERS)
def test_a_missing_peer_is_named_with_the_command_that_gets_it(none_here, module):
    with pytest.raises(MissingPeer, match="not installed") as raised:
        find(module)
    peer = PEERS[module]
    command = f"git clone https://github.com/{peer.repository} .peers/{peer.repository.split('/')[1]}"
    assert command in str(raised.value)
    assert ("; make peers" in str(raised.value)) == bool(peer.index)
    assert why_missing(module) == str(raised.value)


def fake_checkout(folder, text):
    """A checkout of SOAP, whose module has this text."""
    (folder / "SOAP").mkdir()
    (folder / "SOAP" / "soap.py").write_text(text)
    sys.modules.pop("soap", None)


def test_a_checkout_is_imported_and_leaves_the_path_as_it_was(none_here):
    fake_checkout(none_here, "SOAP = 'from the checkout'")
    path = [*sys.path]
    assert find("soap").SOAP == "from the checkout"
    assert sys.path == path and why_missing("soap") is None
    assert PEERS["soap"].version() == "a copy without its commits"


def test_a_checkout_that_raises_is_reported_with_its_error(none_here):
    fake_checkout(none_here, "raise RuntimeError('this Python is too old')")
    assert why_missing("soap") == "cannot be imported: RuntimeError: this Python is too old"


def test_a_checkout_that_needs_another_package_says_which(none_here):
    fake_checkout(none_here, "import a_package_that_nobody_has")
    problem = why_missing("soap")
    assert "it is here, and needs a_package_that_nobody_has" in problem and "git clone" in problem


def test_a_peer_that_was_copied_without_metadata_has_a_version_all_the_same(none_here, monkeypatch):
    monkeypatch.setattr(peers.importlib.metadata, "version", no_metadata)
    assert PEERS["dion"].version() == "of an unknown version"


def no_metadata(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_the_list_of_peers_has_a_line_for_each_that_is_not_here(none_here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.common.peers"])
    assert peers.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PEERS)
    for line, peer in zip(lines, PEERS.values(), strict=True):
        assert line.startswith(peer.title) and line.endswith(peer.how_to_install())


def test_install_gives_pip_pinned_requirements_and_changes_nothing_else(monkeypatch):
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
