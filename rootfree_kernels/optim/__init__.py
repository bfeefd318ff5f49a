"""The optimizers, one file each, and what they share (`base`, `options`, `factor_batch`, `schedules`)."""

from rootfree_kernels.optim.if_shampoo import IFShampoo
from rootfree_kernels.optim.rf_rmsprop import RFAdaGrad, RFRMSProp
from rootfree_kernels.optim.schedules import GrowingInterval

__all__ = ["GrowingInterval", "IFShampoo", "RFAdaGrad", "RFRMSProp"]
