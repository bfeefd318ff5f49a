"""Adaptive optimizers without the square root (Lin et al., ICML 2024): RF-RMSProp and IF-Shampoo for PyTorch."""

from rootfree_kernels import _source_tree as _source_tree  # first: others import what it provides
from rootfree_kernels.batch_size import BatchSizeCounter
from rootfree_kernels.optim import PAPER_RULE, RECIPE, GrowingGap, GrowingInterval, IFShampoo, RFAdaGrad, RFRMSProp
from rootfree_kernels.param_split import ParamSplit, split_params

__version__ = "0.2.0"

__all__ = [
    "PAPER_RULE",
    "RECIPE",
    "BatchSizeCounter",
    "GrowingGap",
    "GrowingInterval",
    "IFShampoo",
    "ParamSplit",
    "RFAdaGrad",
    "RFRMSProp",
    "__version__",
    "split_params",
]
