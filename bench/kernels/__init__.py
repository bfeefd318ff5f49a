"""Every kernel on a GPU against the device's limits, eager PyTorch and other optimizers."""
