"""The six operators and the choice of the backend that runs them.

    operators   the functions that the optimizers call, and their schemas in `torch.ops.rootfree`
    backends    the list of backends and the choice among them
    dispatch    measured tables that change that choice

CONTRIBUTING.md says how to add an operator.
"""

from rootfree_kernels.ops.operators import (
    clipped_momentum,
    kron_factor,
    kron_gather,
    kron_step,
    rf_rmsprop,
    scaled_rmsprop,
)

__all__ = ["clipped_momentum", "kron_factor", "kron_gather", "kron_step", "rf_rmsprop", "scaled_rmsprop"]
