"""Count the batch size B: the number of terms of the loss whose gradient an optimizer steps on."""

from rootfree_kernels.batch_size.counter import BatchSizeCounter as BatchSizeCounter
from rootfree_kernels.batch_size.forward_calls import leading_dim as leading_dim
