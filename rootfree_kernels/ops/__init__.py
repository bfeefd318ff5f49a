"""The five operators and the choice of the backend that runs them.

    operators   the functions that the optimizers call, and their schemas in `torch.ops.rootfree`
    backends    the list of backends and the choice among them
    dispatch    measured tables that change that choice

To add an operator, give it a stem. Write `<stem>` in `operators` and in `rootfree_kernels.backend.Operators`, and a
file `<stem>.py` in every backend that has it, with a test file each.
"""

from rootfree_kernels.ops.operators import clipped_momentum, kron_factor, kron_gather, kron_step, rf_rmsprop

__all__ = ["clipped_momentum", "kron_factor", "kron_gather", "kron_step", "rf_rmsprop"]
