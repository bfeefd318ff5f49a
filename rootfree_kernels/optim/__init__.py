"""The optimizers, one file each, and what they share.

`base` has the step and the conventions, `options` the checks, `layout` and `checkpoint` the state, `factor_batch` the
batches of blocks, `schedules` when factors are updated.
"""

from rootfree_kernels.optim.if_shampoo import IFShampoo
from rootfree_kernels.optim.rf_rmsprop import RFAdaGrad, RFRMSProp
from rootfree_kernels.optim.schedules import GrowingInterval

__all__ = ["GrowingInterval", "IFShampoo", "RFAdaGrad", "RFRMSProp"]
