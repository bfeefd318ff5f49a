"""Reference implementation of the recipe in NumPy float64, for one matrix or tensor at a time.

`tests.calls.reference` defines the symbols. q is the mean curvature of a block or a tensor. It is 0 until the first
nonzero gradient. With the options of the paper's rule, every function equals its counterpart in that module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.calls import reference as ref

PAPER = {
    "direction": "root_free",
    "relative_damping": False,
    "factor_init": "identity",
    "momentum_on": "update",
    "nesterov": False,
}


@dataclass
class RecipeState(ref.KronState):
    """`KronState` with q (``curvature``). ``buffer`` holds M if gradients are averaged."""

    curvature: np.ndarray

    @classmethod
    def of(cls, state: ref.KronState, curvature: float = 0.0) -> RecipeState:
        return cls(state.C, state.K, state.m_C, state.m_K, state.buffer, curvature)


@dataclass
class ScaledState(ref.DiagonalState):
    """`DiagonalState` with q (``curvature``)."""

    curvature: np.ndarray


def new_curvature(q: float, mean_square: float) -> float:
    """q <- 0.95 q + 0.05 B mean(G^2), or B mean(G^2) at the first nonzero gradient."""
    return mean_square if q == 0 else 0.95 * q + 0.05 * mean_square


def recipe_deltas(C: Any, K: Any, grad: Any, damping: float, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return the root-free Deltas of the paper, or for the whitened direction:
    Delta_C = 1/2 [ (B/d) A A^T + sqrt(lambda) (tr K / d) C - gamma I ]
    Delta_K = 1/2 [ (B/p) A^T A + sqrt(lambda) (tr C / p) K - gamma I ]
    """
    batch_size, gamma = options["batch_size"], options["gamma"]
    if options["direction"] == "root_free":
        return ref.kron_curvature(C, K, grad, batch_size=batch_size, damping=damping, gamma=gamma)
    p, d = grad.shape
    A = C.T @ grad @ K
    damping_C = np.sqrt(damping) * np.trace(K) / d * C
    damping_K = np.sqrt(damping) * np.trace(C) / p * K
    delta_C = batch_size / d * A @ A.T + damping_C - gamma * np.eye(p)
    delta_K = batch_size / p * A.T @ A + damping_K - gamma * np.eye(d)
    return delta_C / 2, delta_K / 2


def moved(factor: Any, m: Any, options: dict[str, Any]) -> Any:
    """C - b C m, or for the whitened direction C - (b/2) (C m + m C)."""
    b = ref.clipped_beta2(m, options["beta2"], options["clip"])
    if options["direction"] == "root_free":
        return factor - b * factor @ m
    return factor - b / 2 * (factor @ m + m @ factor)


def recipe_update(state: RecipeState, grad: Any, **options: Any) -> RecipeState:
    """Update the factors. ``options`` are the options of `reference.kron_update` and the first three of PAPER."""
    options = {**PAPER, **options}
    grad = np.asarray(grad, np.float64)
    follows = options["relative_damping"] or options["factor_init"] == "gradient"
    q = float(state.curvature)
    C, K = state.C, state.K
    if follows:
        mean_square = options["batch_size"] * np.mean(grad**2)
        if mean_square == 0:
            return state
        if q == 0 and options["factor_init"] == "gradient":
            start = (mean_square * (1 + options["damping"])) ** -0.25
            C, K = start * np.eye(len(C)), start * np.eye(len(K))
        q = new_curvature(q, mean_square)
    damping = options["damping"] * (q if options["relative_damping"] else 1)
    alpha2 = options["riemannian_momentum"]
    delta_C, delta_K = recipe_deltas(C, K, grad, damping, options)
    m_C, m_K = alpha2 * state.m_C + (1 - alpha2) * delta_C, alpha2 * state.m_K + (1 - alpha2) * delta_K
    return replace(state, C=moved(C, m_C, options), K=moved(K, m_K, options), m_C=m_C, m_K=m_K, curvature=q)


def preconditioned(state: ref.KronState, grad: Any, direction: str) -> Any:
    """U = C C^T G K K^T, or for the whitened direction C G K."""
    return state.C @ grad @ state.K if direction == "whitened" else ref.kron_precondition(state, grad)


def scaled(update: Any, norm: float | None) -> Any:
    """U norm / |U|, or U if there is no norm."""
    size = np.sqrt(np.sum(update**2))
    return update if norm is None else update * (norm / size if size else 0.0)


def averaged(grad: Any, buffer: Any, momentum: float, nesterov: bool) -> tuple[Any, Any]:
    """M <- alpha1 M + (1 - alpha1) G. Returns (the gradient to precondition, M)."""
    buffer = momentum * buffer + (1 - momentum) * grad
    return ((1 - momentum) * grad + momentum * buffer if nesterov else buffer), buffer


def descended(weight: Any, grad: Any, buffer: Any, precondition: Any, norm: float | None, o: dict[str, Any]) -> Any:
    """Step the weights along precondition(gradient or its average). Returns (W, buffer)."""
    if o["momentum_on"] == "gradient":
        average, buffer = averaged(grad, buffer, o["momentum"], o["nesterov"])
        update = scaled(precondition(average), norm)
        return weight * (1 - o["lr"] * o["weight_decay"]) - o["lr"] * update, buffer
    descent = {name: o[name] for name in ("lr", "momentum", "weight_decay", "decoupled")}
    return ref._descend(weight, scaled(precondition(grad), norm), buffer, **descent)


def recipe_step(
    weight: Any, grad: Any, state: RecipeState, *, update: bool = True, norm: float | None = None, **options: Any
) -> tuple[Any, RecipeState]:
    """Step one p x d block. If ``update``, update its factors first. ``norm`` is the norm of the scaled U."""
    o = {**PAPER, "decoupled": False, "maximize": False, **options}
    weight, grad = np.asarray(weight, np.float64), (-1 if o["maximize"] else 1) * np.asarray(grad, np.float64)
    if update:
        names = ("batch_size", "beta2", "riemannian_momentum", "damping", "gamma", "clip", *list(PAPER)[:3])
        state = recipe_update(state, grad, **{name: o[name] for name in names})
    weight, buffer = descended(weight, grad, state.buffer, lambda x: preconditioned(state, x, o["direction"]), norm, o)
    return weight, replace(state, buffer=buffer)


def scaled_diagonal_step(
    weight: Any, grad: Any, state: ScaledState, *, norm: float | None = None, **options: Any
) -> tuple[Any, ScaledState]:
    """s <- (1 - beta2 gamma) s + beta2 B g^2;  U = g / (s + lambda), or g / (sqrt(s) + sqrt(lambda));  W as in
    ``descended``. For relative damping q <- (1 - beta2 gamma) q + beta2 B mean(g^2), and a zero gradient changes
    neither s nor q. 0/0 counts as 0.
    """
    o = {**PAPER, "decoupled": False, "maximize": False, **options}
    weight, grad = np.asarray(weight, np.float64), (-1 if o["maximize"] else 1) * np.asarray(grad, np.float64)
    q, square, decay = float(state.curvature), state.square, 1 - o["beta2"] * o["gamma"]
    if not o["relative_damping"] or np.any(grad):
        square = decay * square + o["beta2"] * o["batch_size"] * grad**2
        q = decay * q + o["beta2"] * o["batch_size"] * np.mean(grad**2)
    damping = o["damping"] * (q if o["relative_damping"] else 1)

    def precondition(x: Any) -> Any:
        divisor = np.sqrt(square) + np.sqrt(damping) if o["direction"] == "whitened" else square + damping
        return np.divide(x, divisor, out=np.zeros_like(x), where=divisor > 0)

    weight, buffer = descended(weight, grad, state.buffer, precondition, norm, o)
    return weight, ScaledState(square, buffer, q)
