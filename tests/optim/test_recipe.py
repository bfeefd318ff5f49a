"""The recipe: comparison with the reference, invariances, options, and the split of a model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rootfree_kernels import PAPER_RULE, RECIPE, BatchSizeCounter, IFShampoo
from tests.calls import recipe_reference as recipe
from tests.calls.optimizers import Model, snapshot, train
from tests.calls.tensors import assert_same_bits, fp64

FP32, FP64 = torch.float32, torch.float64
ROOT_FREE = {**RECIPE, "direction": "root_free", "damping": 1e-3}
RULES = pytest.mark.parametrize("rule", [dict(RECIPE), ROOT_FREE], ids=["whitened", "root_free"])


def language_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Embedding(11, 6), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6), nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
    )
    return model.to(FP64)


def losses(model: nn.Module, steps: range) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(11, (len(steps), 8, 2), generator=generator)
    return [nn.functional.cross_entropy(model(x[:, 0]), x[:, 1]) for x in inputs]


def trained(make: Callable[[nn.Module], Any], scale: float = 1.0, dtype: torch.dtype = FP64, steps: int = 6) -> Any:
    """Return the weights after some steps with the loss multiplied by `scale`."""
    model = language_model().to(dtype)
    optimizer = make(model)
    generator = torch.Generator().manual_seed(1)
    for x in torch.randint(11, (steps, 8, 2), generator=generator):
        optimizer.zero_grad()
        (scale * nn.functional.cross_entropy(model(x[:, 0]), x[:, 1])).backward()
        optimizer.step()
    return [fp64(param.detach()) for param in model.parameters()]


def assert_close(actual: list[np.ndarray], expected: list[np.ndarray], allowed: float) -> None:
    errors = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(actual, expected, strict=True)]
    assert max(errors) <= allowed, errors


# ---- steps -------------------------------------------------------------------------------------------------------


@RULES
@pytest.mark.parametrize("update_norm", ["muon", "rms"])
def test_steps_match_the_reference_in_blocks(rule: dict[str, Any], update_norm: str) -> None:
    """A 7 × 5 weight has blocks with at most 4 rows. Each has its own factors and its share of the update's norm."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(7, 5, dtype=FP64))
    options = {**rule, "update_norm": update_norm, "update_scale": 0.5, "weight_decay": 0.3, "factor_dtype": FP64}
    optimizer = IFShampoo([weight], lr=0.1, max_preconditioner_dim=4, fused=False, **options)
    cuts = [np.s_[rows, cols] for rows in (slice(0, 4), slice(4, 7)) for cols in (slice(0, 3), slice(3, 5))]
    expected = fp64(weight.detach().clone())
    states = [recipe.RecipeState.of(recipe.ref.KronState.initial(*expected[cut].shape)) for cut in cuts]
    chosen = ("direction", "relative_damping", "factor_init", "momentum_on", "nesterov")
    numbers = ("beta2", "riemannian_momentum", "damping", "clip")
    for _ in range(4):
        weight.grad = torch.randn(7, 5, dtype=FP64)
        optimizer.step()
        for index, cut in enumerate(cuts):
            size = expected[cut].size
            expected[cut], states[index] = recipe.recipe_step(
                expected[cut],
                fp64(weight.grad)[cut],
                states[index],
                norm=0.5 * (size / (5 if update_norm == "muon" else 1)) ** 0.5,
                **{name: rule[name] for name in (*chosen, *numbers)},
                **{"batch_size": 1.0, "gamma": 1.0, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.3},
            )
    assert_close([fp64(weight.detach())], [expected], 1e-12)


@RULES
def test_vectors_of_a_group_take_the_scaled_diagonal_step(rule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    bias = nn.Parameter(torch.randn(6, dtype=FP64))
    optimizer = IFShampoo([bias], lr=0.1, fused=False, **{**rule, "factor_dtype": FP64})
    expected, state = fp64(bias.detach().clone()), recipe.ScaledState(np.zeros(6), np.zeros(6), 0.0)
    chosen = ("direction", "relative_damping", "factor_init", "momentum_on", "nesterov", "beta2", "damping")
    for _ in range(4):
        bias.grad = torch.randn(6, dtype=FP64)
        optimizer.step()
        options = {**{name: rule[name] for name in chosen}, "batch_size": 1.0, "gamma": 1.0, "lr": 0.1}
        grad = fp64(bias.grad)
        step = recipe.scaled_diagonal_step(
            expected, grad, state, norm=6**0.5, momentum=0.9, weight_decay=0.0, **options
        )
        expected, state = step
    assert_close([fp64(bias.detach())], [expected], 1e-12)


# ---- batch size and scale of the loss cancel ---------------------------------------------------------------------


@RULES
def test_batch_size_cancels(rule: dict[str, Any]) -> None:
    def make(batch_size: float | None) -> Callable[[nn.Module], Any]:
        options = {**rule, "factor_dtype": FP64, "batch_size": batch_size}
        return lambda model: IFShampoo.for_model(model, **options)

    expected = trained(make(None))
    for batch_size in (1.0, 16, 3000.0):
        assert_close(trained(make(batch_size)), expected, 1e-12)


@RULES
@pytest.mark.parametrize("fused", [False, None], ids=["eager", "best backend"])
def test_the_scale_of_the_loss_changes_nothing(rule: dict[str, Any], fused: bool | None) -> None:
    options = {**rule, "factor_dtype": FP32, "fused": fused}
    once = trained(lambda model: IFShampoo.for_model(model, **options), dtype=FP32)
    for scale in (1000.0, 1 / 1024):
        scaled = trained(lambda model: IFShampoo.for_model(model, **options), scale, FP32)
        assert_close(scaled, once, 1e-6)


def test_the_scale_of_the_loss_changes_nothing_in_fp64() -> None:
    make = lambda model: IFShampoo.for_model(model, factor_dtype=FP64)  # noqa: E731
    assert_close(trained(make, 1000.0), trained(make), 1e-12)


@pytest.mark.parametrize("missing", ["relative_damping", "factor_init", "update_norm"])
def test_batch_size_is_required_unless_it_cancels(missing: str) -> None:
    options = {**RECIPE, missing: PAPER_RULE[missing]}
    with pytest.raises(ValueError, match=r"batch_size=None: .* It cancels only with factor_init='gradient'"):
        IFShampoo([nn.Parameter(torch.zeros(2, 2))], **options)
    optimizer = IFShampoo([nn.Parameter(torch.zeros(2, 2))], batch_size=4, **options)
    optimizer.param_groups[0]["batch_size"] = None
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="batch_size=None"):
        optimizer.step()


def test_a_counter_of_the_batch_size_changes_nothing() -> None:
    def make(model: nn.Module) -> IFShampoo:
        optimizer = IFShampoo.for_model(model, factor_dtype=FP64)
        BatchSizeCounter(model, optimizer)
        return optimizer

    assert_close(trained(make), trained(lambda model: IFShampoo.for_model(model, factor_dtype=FP64)), 1e-12)


# ---- options -----------------------------------------------------------------------------------------------------


def test_the_paper_s_rule_is_the_default() -> None:
    parameters = inspect.signature(IFShampoo).parameters
    assert {name: parameters[name].default for name in PAPER_RULE} == dict(PAPER_RULE)
    assert RECIPE.keys() <= parameters.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nesterov": True}, "nesterov=True with momentum_on='update'"),
        ({"update_scale": 0.2}, "update_scale=0.2 with update_norm=None"),
        ({"update_scale": 0.0, "update_norm": "rms"}, "update_scale=0.0: pass a finite number above 0"),
        ({"direction": "whitened", "cache_products": True}, "cache_products=True with direction='whitened'"),
        ({"direction": "inverse"}, "direction='inverse': choose one of root_free, whitened"),
        ({"momentum_on": "weights"}, "momentum_on='weights': choose one of update, gradient"),
        ({"update_norm": "frobenius"}, "update_norm='frobenius': choose one of muon, rms, or None"),
        ({"factor_init": "zero"}, "factor_init='zero': choose one of identity, gradient"),
        ({"relative_damping": 1}, "relative_damping=1: pass True or False"),
    ],
)
def test_bad_options_of_the_recipe_are_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IFShampoo([nn.Parameter(torch.zeros(2, 2))], batch_size=1, **options)


@pytest.mark.parametrize("option", ["direction", "relative_damping", "factor_init", "momentum_on", "update_norm"])
def test_every_option_alone_makes_a_difference_and_trains(option: str) -> None:
    """T is 2, and only one group sets the option."""
    finals = []
    for rule in ({}, {option: RECIPE[option]}):
        model = Model()
        groups = [{"params": [model.weight, model.bias], **rule}, {"params": [model.twin]}]
        optimizer = IFShampoo(groups, lr=0.01, batch_size=4, damping=0.05, precondition_frequency=2)
        train(model, optimizer, range(3))
        finals.append(snapshot(optimizer))
    changed = {name for name in finals[0] if not torch.equal(finals[0][name], finals[1][name])}
    assert {"0 weight", "1 weight"} <= changed
    assert not any(name.startswith("2 ") for name in changed)
    assert all(value.isfinite().all() for value in finals[1].values())


def test_whitened_factors_stay_symmetric_and_positive_definite() -> None:
    model = Model()
    optimizer = IFShampoo(model.parameters(), lr=0.01, **{**RECIPE, "factor_dtype": FP32})
    train(model, optimizer, range(50))
    for param in (model.weight, model.twin, model.conv):
        for name in ("factor_c", "factor_k"):
            factor = optimizer.state[param][name]
            assert torch.equal(factor, factor.mT)
            assert torch.linalg.eigvalsh(factor).min() > 0


def test_a_parameter_without_a_gradient_at_first_starts_later() -> None:
    """An example is a matrix of an adapter whose other matrix is 0."""
    late, early = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    optimizer = IFShampoo([late, early], lr=0.1, **RECIPE)
    for step in range(4):
        early.grad = torch.randn(4, 3)
        late.grad = torch.zeros(4, 3) if step < 2 else torch.randn(4, 3)
        optimizer.step()
        curvature = optimizer.state[late]["curvature"]
        assert (float(curvature) > 0) == (step >= 2)
        assert torch.equal(late, torch.ones(4, 3)) == (step < 2)
    assert late.isfinite().all()


def test_zero_gradients_do_not_overflow() -> None:
    weight = nn.Parameter(torch.zeros(6, 5))
    optimizer = IFShampoo([weight], lr=0.01, **{**RECIPE, "factor_dtype": FP32})
    for step in range(600):
        grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        grad[2], grad[:, 3] = 0.0, 0.0
        weight.grad = grad if step < 300 else torch.zeros_like(grad)
        optimizer.step()
    state = optimizer.state[weight]
    assert int(state["skipped"].sum()) == 0
    assert all(value.isfinite().all() for value in state.values())
    assert weight.isfinite().all()


@pytest.mark.parametrize("option", ["direction", "momentum_on"])
def test_the_rule_is_not_changed_after_the_first_step(option: str) -> None:
    model = Model()
    optimizer = IFShampoo(model.parameters(), lr=0.01, batch_size=4)
    train(model, optimizer, range(2))
    before = snapshot(optimizer)
    optimizer.param_groups[0][option] = RECIPE[option]
    with pytest.raises(ValueError, match=f"'{option}': '{RECIPE[option]}'.* in a group whose state was made with"):
        train(model, optimizer, range(2, 3))
    assert_same_bits(snapshot(optimizer), before)
    saved = optimizer.state_dict()
    optimizer.param_groups[0][option] = PAPER_RULE[option]
    train(model, optimizer, range(2, 3))
    saved["param_groups"][0][option] = PAPER_RULE[option]
    optimizer.load_state_dict(saved)


@RULES
def test_factors_start_at_the_first_update_even_after_step_0(rule: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.ones(4, 3, dtype=FP64))
    options = {**rule, "factor_dtype": FP64, "precondition_frequency": lambda step: step == 2}
    optimizer = IFShampoo([weight], lr=0.1, **options)
    curvatures = []
    for step in range(4):
        weight.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step), dtype=FP64)
        optimizer.step()
        curvatures.append(float(optimizer.state[weight]["curvature"]))
    assert curvatures[:2] == [0.0, 0.0] and curvatures[2] == curvatures[3] > 0
    assert weight.isfinite().all()


@RULES
@pytest.mark.parametrize("fused", [False, None], ids=["eager", "best backend"])
@pytest.mark.parametrize("frequency", [1, 2])
def test_only_parameters_of_a_batch_with_a_gradient_step(
    rule: dict[str, Any], fused: bool | None, frequency: int
) -> None:
    """Each steps as it would alone. Updates of the 8 × 8 weights and of blocks of the 8 × 16 weight differ in norm."""
    options = {**rule, "factor_dtype": FP32, "fused": fused, "precondition_frequency": frequency}
    options |= {"max_preconditioner_dim": 8, "weight_decay": 0.1}
    finals = []
    for foreach in (None, False):
        params = [nn.Parameter(torch.ones(8, columns)) for columns in (8, 16, 8, 8)]
        optimizer = IFShampoo(params, lr=0.1, foreach=foreach, **options)
        generator = torch.Generator().manual_seed(0)
        for step in range(5):
            for index, param in enumerate(params):
                grad = torch.randn(param.shape, generator=generator)
                param.grad = grad if index != step % 4 else None
            optimizer.step()
        finals.append(snapshot(optimizer))
    for name, value in finals[1].items():
        if "skipped" not in name and "curvature" not in name:
            torch.testing.assert_close(finals[0][name], value, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("fused", [False, None], ids=["eager", "best backend"])
def test_a_vector_whose_curvature_overflows_is_skipped(fused: bool | None) -> None:
    bias = nn.Parameter(torch.ones(10_000))
    optimizer = IFShampoo([bias], lr=0.1, **RECIPE, batch_size=3000.0, fused=fused)
    for step in range(3):
        bias.grad = torch.full((10_000,), 0.1)
        if step == 1:
            bias.grad[7] = 1e19
            before = snapshot(optimizer)
        optimizer.step()
        if step == 1:
            after = snapshot(optimizer)
            assert torch.equal(after["0 weight"], before["0 weight"])
            assert torch.equal(after["0 square"], before["0 square"])
    assert int(optimizer.state[bias]["skipped"]) == 1
    assert optimizer.state[bias]["square"].isfinite().all()


# ---- checkpoints from versions without these options -------------------------------------------------------------


def without_the_new_options(saved: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k not in PAPER_RULE} for group in saved["param_groups"]]
    return {**saved, "param_groups": groups}


def test_a_checkpoint_without_the_options_of_the_recipe_continues_unchanged() -> None:
    (whole, first), (resumed, second) = ((m, IFShampoo(m.parameters(), batch_size=4)) for m in (Model(), Model()))
    train(whole, first, range(3))
    old = without_the_new_options(copy.deepcopy(first.state_dict()))
    untouched = copy.deepcopy(old)
    resumed.load_state_dict(whole.state_dict())
    second.load_state_dict(old)
    assert old["param_groups"] == untouched["param_groups"]
    train(whole, first, range(3, 6))
    train(resumed, second, range(3, 6))
    assert_same_bits(snapshot(second), snapshot(first))


def test_a_pickle_without_the_options_of_the_recipe_steps_unchanged() -> None:
    (whole, first), (other, second) = ((m, IFShampoo(m.parameters(), batch_size=4)) for m in (Model(), Model()))
    state = second.__getstate__()
    state["defaults"] = {k: v for k, v in state["defaults"].items() if k not in PAPER_RULE}
    state["param_groups"] = without_the_new_options(state)["param_groups"]
    second.__setstate__(state)
    for model, optimizer in ((whole, first), (other, second)):
        train(model, optimizer, range(3))
    assert_same_bits(snapshot(second), snapshot(first))


# ---- models ------------------------------------------------------------------------------------------------------


def test_a_model_is_split_and_every_parameter_steps() -> None:
    model = language_model()
    model[1].bias.requires_grad_(False)
    optimizer = IFShampoo.for_model(model, lr=0.1, weight_decay=0.5, factor_dtype=FP64)
    names = [set(group["param_names"]) for group in optimizer.param_groups]
    assert names == [{"1.weight", "3.weight"}, {"0.weight", "5.weight"}, {"3.bias", "4.weight", "4.bias"}]
    assert [group["structure"] for group in optimizer.param_groups] == ["dense", "elementwise", "elementwise"]
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    before = [param.clone() for param in model.parameters()]
    losses(model, range(1))[0].backward()
    optimizer.step()
    changed = [not torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True)]
    assert changed == [param.requires_grad for param in model.parameters()]


def test_options_of_for_model_replace_those_of_the_recipe_in_all_groups() -> None:
    optimizer = IFShampoo.for_model(language_model(), damping=0.1, direction="root_free", momentum=0.5)
    for group in optimizer.param_groups:
        assert (group["damping"], group["direction"], group["momentum"]) == (0.1, "root_free", 0.5)


def test_for_model_sets_options_of_the_other_parameters() -> None:
    options = {"beta2": 0.5, "update_norm": "rms", "update_scale": 0.2}
    optimizer = IFShampoo.for_model(language_model(), **options, rest={"update_scale": 0.1, "weight_decay": 0.0})
    matrices, *rest = optimizer.param_groups
    assert {name: matrices[name] for name in options} == options
    for group in rest:
        assert (group["beta2"], group["update_norm"], group["update_scale"]) == (0.02, "rms", 0.1)
        assert (group["structure"], group["weight_decay"]) == ("elementwise", 0.0)


def test_for_model_learns() -> None:
    model = language_model()
    optimizer = IFShampoo.for_model(model, lr=0.05)
    seen = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = losses(model, range(1))[0]
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.7 * seen[0]


@pytest.mark.parametrize("rule", [{}, RECIPE], ids=["paper", "recipe"])
def test_a_spike_in_the_gradients_moves_weights_far_only_by_the_papers_rule(rule: dict[str, Any]) -> None:
    param, generator = nn.Parameter(torch.zeros(32, 16)), torch.Generator().manual_seed(0)
    optimizer = IFShampoo([param], lr=1e-3, batch_size=16, **rule)
    moves = []
    for step in range(60):
        param.grad = torch.randn(32, 16, generator=generator) * (100.0 if step == 50 else 0.1)
        before = param.detach().clone()
        optimizer.step()
        moves.append(float((param.detach() - before).norm()))
    usual, spike = moves[49], max(moves[50:])
    assert spike < 1.01 * usual if rule else spike > 100 * usual
