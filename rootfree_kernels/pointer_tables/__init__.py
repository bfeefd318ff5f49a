"""Tables of addresses: how kernels on lists of tensors are told where the tensors are.

`tables` keeps the tables on the device, `memory_order` copies tensors whose layout a kernel does not read, and
`rf_rmsprop` and `clipped_momentum` turn an operator's arguments into those of its kernels.
"""
