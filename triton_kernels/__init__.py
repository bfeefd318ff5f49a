"""The Triton room: the operators of :mod:`rootfree_kernels.eager` as fused kernels, under the same stems.

``rf_rmsprop``, ``kron_factor`` and ``clipped_momentum`` name here what they name in every other room; each
file reads from the formula to the kernel, its configuration, the launcher and the registration.

This folder is installed as ``rootfree_kernels.triton_kernels`` and always imported by that name. A top-level
``triton_kernels`` belongs to another project, and inference engines probe for it: a bare
``import triton_kernels`` works in the root of this repository by accident only, and makes a second copy of
every kernel.
"""
