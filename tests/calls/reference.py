"""Reference implementation of the optimizers in NumPy float64, for one matrix at a time.

W weight, G gradient: p x d. C (p x p), K (d x d): factors of S^-1 = (C C^T) kron (K K^T). m_C, m_K: their
momentum. B ``batch_size``: number of terms that the loss averages. gamma: 1 for a moving average, 0 for a sum.
"""

from dataclasses import dataclass, fields, replace

import numpy as np


class _Float64State:
    """Store a float64 copy of every field."""

    def __post_init__(self):
        for field in fields(self):
            setattr(self, field.name, np.array(getattr(self, field.name), dtype=np.float64))


@dataclass
class DiagonalState(_Float64State):
    """s (``square``) and the momentum ``buffer``. Both have the weight's shape."""

    square: np.ndarray
    buffer: np.ndarray

    @classmethod
    def initial(cls, shape):
        """s = 1 (never 0), buffer = 0."""
        return cls(np.ones(shape), np.zeros(shape))


@dataclass
class KronState(_Float64State):
    """C, m_C: p x p.  K, m_K: d x d.  buffer: p x d."""

    C: np.ndarray
    K: np.ndarray
    m_C: np.ndarray
    m_K: np.ndarray
    buffer: np.ndarray

    @classmethod
    def initial(cls, p, d):
        """C = I, K = I, and zeros."""
        return cls(np.eye(p), np.eye(d), np.zeros((p, p)), np.zeros((d, d)), np.zeros((p, d)))


def _descend(weight, direction, buffer, *, lr, momentum, weight_decay, decoupled=False):
    """buf <- momentum buf + U + kappa W;  W <- W - lr buf.  Returns (W, buf). If decoupled:
    W <- (1 - lr kappa) W;  buf <- momentum buf + U;  W <- W - lr buf.
    """
    if decoupled:
        weight = weight * (1 - lr * weight_decay)
        buffer = momentum * buffer + direction
    else:
        buffer = momentum * buffer + direction + weight_decay * weight
    return weight - lr * buffer, buffer


def diagonal_step(weight, grad, state, *, batch_size, beta2, gamma, damping, maximize=False, **descent):
    """RF-RMSProp, RF-AdaGrad: s <- (1 - beta2 gamma) s + beta2 B g^2;  U = g / (s + lambda);  buf and W by
    ``_descend``, which gets ``descent``. weight, grad: equal shapes. Returns (new weight, new DiagonalState).
    """
    weight, grad = np.asarray(weight, np.float64), (-1 if maximize else 1) * np.asarray(grad, np.float64)
    square = (1 - beta2 * gamma) * state.square + beta2 * batch_size * grad**2
    weight, buffer = _descend(weight, grad / (square + damping), state.buffer, **descent)
    return weight, DiagonalState(square, buffer)


def kron_curvature(C, K, grad, *, batch_size, damping, gamma):
    """Delta_C (p x p) and Delta_K (d x d) of the natural-gradient step, from A = C^T G K:
    Delta_C = 1/2 [ (B/d) A A^T + (lambda/d) ||K||_F^2 C^T C - gamma I ]
    Delta_K = 1/2 [ (B/p) A^T A + (lambda/p) ||C||_F^2 K^T K - gamma I ]
    """
    p, d = grad.shape
    A = C.T @ grad @ K
    delta_C = (batch_size * A @ A.T + damping * np.sum(K**2) * C.T @ C) / d - gamma * np.eye(p)
    delta_K = (batch_size * A.T @ A + damping * np.sum(C**2) * K.T @ K) / p - gamma * np.eye(d)
    return delta_C / 2, delta_K / 2


def project_diagonal(S):
    """Pi(S) of diagonal factors: diag(S)."""
    return np.diag(np.diag(S))


def project_lower_triangular(S):
    """Pi(S) of lower-triangular factors: the diagonal plus twice the strict lower triangle."""
    return np.diag(np.diag(S)) + 2 * np.tril(S, -1)


def clipped_beta2(m, beta2, clip):
    """beta2 / max(1, norm of m). The norm is Frobenius or the largest absolute row sum. None does not clip."""
    if clip is None:
        return beta2
    norms = {"frobenius": np.sqrt(np.sum(m**2)), "row_sum": np.abs(m).sum(axis=1).max()}
    return beta2 / max(1.0, norms[clip])


def kron_update(state, grad, *, batch_size, beta2, riemannian_momentum, damping, gamma, clip, project=None):
    """Update the factors of IF-Shampoo, both from their old values:
    m_C <- alpha2 m_C + (1 - alpha2) Pi(Delta_C);  C <- C - clipped(beta2) C m_C;  m_K and K likewise.
    grad: p x d. ``project`` is Pi, the same for both sides; None keeps dense factors. Returns a KronState.
    """
    grad = np.asarray(grad, dtype=np.float64)
    deltas = kron_curvature(state.C, state.K, grad, batch_size=batch_size, damping=damping, gamma=gamma)
    delta_C, delta_K = deltas if project is None else map(project, deltas)
    m_C = riemannian_momentum * state.m_C + (1 - riemannian_momentum) * delta_C
    m_K = riemannian_momentum * state.m_K + (1 - riemannian_momentum) * delta_K
    C = state.C - clipped_beta2(m_C, beta2, clip) * state.C @ m_C
    K = state.K - clipped_beta2(m_K, beta2, clip) * state.K @ m_K
    return replace(state, C=C, K=K, m_C=m_C, m_K=m_K)


def kron_precondition(state, grad):
    """U = C C^T G K K^T, p x d."""
    return state.C @ state.C.T @ grad @ state.K @ state.K.T


def kron_step(weight, grad, state, *, update, maximize=False, lr, momentum, weight_decay, decoupled=False, **factor):
    """Step one p x d block with IF-Shampoo: the factors if ``update``, then U, buf and W.
    ``factor`` holds the keywords of ``kron_update``. Returns (new weight, new KronState).
    """
    weight, grad = np.asarray(weight, np.float64), (-1 if maximize else 1) * np.asarray(grad, np.float64)
    if update:
        state = kron_update(state, grad, **factor)
    descent = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "decoupled": decoupled}
    weight, buffer = _descend(weight, kron_precondition(state, grad), state.buffer, **descent)
    return weight, replace(state, buffer=buffer)


def block_slices(size, max_dim):
    """Split range(size) into slices of at most ``max_dim``.

    The first rule that applies gives the lengths. The first two need max_dim >= 128 and size > max_dim.
    1. As few slices as possible, all of one length that is a multiple of 16.
    2. Slices of one length, and one slice for the remainder. The length is the largest multiple of 16 above max_dim / 2
       whose remainder is 0 or at least half the length.
    3. As few slices as possible, whose lengths differ by at most one. Longer slices come first.
    """
    count = -(-size // max_dim)
    lengths = [size // count + (i < size % count) for i in range(count)]
    if max_dim >= 128 and count > 1 and size % (16 * count) != 0:
        for length in (n for n in range(max_dim, 0, -1) if n % 16 == 0 and n > max_dim // 2):
            rest = size % length
            if rest == 0 or rest >= length / 2:
                lengths = [length] * (size // length) + [rest] * (rest > 0)
                break
    stops = np.cumsum(lengths).tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def _matrix_blocks(shape, max_dim):
    """Return {(i, j): (row slice, column slice)} of a weight viewed as shape[0] x (product of the other sizes)."""
    rows, columns = block_slices(shape[0], max_dim), block_slices(int(np.prod(shape[1:])), max_dim)
    return {(i, j): (row, column) for i, row in enumerate(rows) for j, column in enumerate(columns)}


def initial_blocked_states(shape, *, max_dim):
    """Return {(i, j): KronState.initial} for every block of a weight of ``shape``."""
    return {
        index: KronState.initial(row.stop - row.start, column.stop - column.start)
        for index, (row, column) in _matrix_blocks(shape, max_dim).items()
    }


def blocked_kron_step(weight, grad, states, *, max_dim, **step_arguments):
    """Apply ``kron_step`` to every block. weight, grad: two or more axes; states: {(i, j): KronState}.
    ``step_arguments`` are the other arguments of ``kron_step``. Returns (new weight, new states).
    """
    shape = np.shape(weight)
    weight, grad = np.array(weight, dtype=np.float64).reshape(shape[0], -1), np.reshape(grad, (shape[0], -1))
    new_states = {}
    for index, block in _matrix_blocks(shape, max_dim).items():
        weight[block], new_states[index] = kron_step(weight[block], grad[block], states[index], **step_arguments)
    return weight.reshape(shape), new_states


def growing_interval_updates(step, max_interval):
    """Return whether min(max(floor(log_4(step + 1)), 1), max_interval) divides ``step``. Steps count from 0."""
    floor_log4 = ((step + 1).bit_length() - 1) // 2  # exact; a rounded logarithm may miss a power of four
    return step % min(max(floor_log4, 1), max_interval) == 0


def root_free_shampoo_update(S_C, S_K, grad, *, batch_size, beta2, damping, gamma):
    """S_C <- (1 - beta2 gamma) S_C + (beta2/d) (B G S_K^-1 G^T + lambda tr(S_K^-1) I), and with the old S_C:
    S_K <- (1 - beta2 gamma) S_K + (beta2/p) (B G^T S_C^-1 G + lambda tr(S_C^-1) I).  Returns (S_C, S_K).
    """
    p, d = grad.shape
    S_C_inv, S_K_inv = np.linalg.inv(S_C), np.linalg.inv(S_K)
    curvature_C = (batch_size * grad @ S_K_inv @ grad.T + damping * np.trace(S_K_inv) * np.eye(p)) / d
    curvature_K = (batch_size * grad.T @ S_C_inv @ grad + damping * np.trace(S_C_inv) * np.eye(d)) / p
    return (1 - beta2 * gamma) * S_C + beta2 * curvature_C, (1 - beta2 * gamma) * S_K + beta2 * curvature_K


def full_matrix_update(S, g, *, batch_size, beta2, gamma):
    """S <- (1 - beta2 gamma) S + beta2 H,  H = B g g^T.  S: n x n, g: n."""
    return (1 - beta2 * gamma) * S + beta2 * batch_size * np.outer(g, g)


def inverse_free_full_update(S_inv, g, *, batch_size, beta2, gamma):
    """S^-1 <- (1 + beta2 gamma) S^-1 - beta2 P + (beta2^2 / 2) (P S P - 2 gamma P + gamma^2 S^-1),
    where P = S^-1 H S^-1, P S P = S^-1 H S^-1 H S^-1 and H = B g g^T. It needs no inverse.
    """
    H = batch_size * np.outer(g, g)
    P = S_inv @ H @ S_inv
    second_order = P @ H @ S_inv - 2 * gamma * P + gamma**2 * S_inv
    return (1 + beta2 * gamma) * S_inv - beta2 * P + beta2**2 / 2 * second_order


def factored_full_update(A, g, *, batch_size, beta2, gamma):
    """A <- A exp(-(beta2/2) (A^T H A - gamma I)),  H = B g g^T,  S^-1 = A A^T;  exp is computed by eigh."""
    projected = A.T @ g
    values, vectors = np.linalg.eigh(batch_size * np.outer(projected, projected) - gamma * np.eye(len(g)))
    return A @ (vectors * np.exp(-beta2 / 2 * values)) @ vectors.T


# BF16 rounding on bit patterns: a uint32 holds an fp32 value, a uint16 a BF16 value


def float32_bits(x):
    """Return the fp32 bit patterns of x as uint32."""
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)


def bfloat16_value(bits):
    """Return the values of BF16 bit patterns (uint16) as float32."""
    return (np.asarray(bits, dtype=np.uint32) << np.uint32(16)).view(np.float32)


def _truncate(bits, x):
    """Return the upper halves of ``bits`` as uint16, or the quiet NaN if x, the unrounded pattern, is a NaN."""
    is_nan = (x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint16(0x7FC0), (bits >> np.uint32(16)).astype(np.uint16))


def round_nearest(x):
    """fp32 bits (uint32) -> BF16 bits (uint16), to nearest, ties to even."""
    return _truncate(x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1)), x)


def round_stochastic(x, bits):
    """fp32 bits (uint32) + ``bits`` (uniform in [0, 65535]), truncated to BF16 bits (uint16)."""
    return _truncate(x + np.asarray(bits, dtype=np.uint32), x)


def compensated_split(x):
    """fp32 bits -> hi = (x + 0x8000) >> 16 (BF16 bits, uint16), lo = x - (hi << 16) (int16), modulo 2^32."""
    hi = (x + np.uint32(0x8000)) >> np.uint32(16)
    lo = (x - (hi << np.uint32(16))).astype(np.uint16).view(np.int16)
    return hi.astype(np.uint16), lo


def compensated_join(hi, lo):
    """(hi, lo) -> fp32 bits (uint32), the inverse of ``compensated_split``."""
    return (hi.astype(np.uint32) << np.uint32(16)) + lo.astype(np.int32).view(np.uint32)
