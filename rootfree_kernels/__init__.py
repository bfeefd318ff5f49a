"""Adaptive optimizers without the square root (Lin et al., ICML 2024): RF-RMSProp and IF-Shampoo for PyTorch."""

from rootfree_kernels.optim import GrowingInterval, IFShampoo, RFAdaGrad, RFRMSProp

__version__ = "0.1.0"

__all__ = ["GrowingInterval", "IFShampoo", "RFAdaGrad", "RFRMSProp", "__version__"]
