"""The optimizers.

    if_shampoo          IFShampoo
    recipe              the options of the paper's rule and of the recipe, and the groups of a model
    rf_rmsprop          RFRMSProp and RFAdaGrad
    schedules           GrowingInterval and GrowingGap: when factors are updated
    base                the step, and the conventions of torch.optim
    planner             checks before a step, and building of state and plans
    plan                what is kept from step to step: the batches of a step
    elementwise_batch   the diagonal step of a list of tensors
    block_step          the step of a batch of blocks
    block_batch         the storage of a batch of blocks: factors and their momenta
    context             what all batches of a step share: options, lr, gradient scaler
    options             the rules of options, parameters and gradients, with their error messages
    overlap             which tensors share memory
    shape_warnings      warnings about flattened and stacked matrices
    state_spec          what the state of a parameter looks like
    checkpoint          saving and loading of that state
    saved_groups        options in a state dict, of this version and of others
    saved_names         names of parameters in a state dict, in whatever order
    report              which batches an optimizer steps, and which backend steps each

`docs/a-step.md` follows one gradient through these files.
"""

from rootfree_kernels.optim.if_shampoo import IFShampoo
from rootfree_kernels.optim.recipe import PAPER_RULE, RECIPE
from rootfree_kernels.optim.rf_rmsprop import RFAdaGrad, RFRMSProp
from rootfree_kernels.optim.schedules import GrowingGap, GrowingInterval

__all__ = ["PAPER_RULE", "RECIPE", "GrowingGap", "GrowingInterval", "IFShampoo", "RFAdaGrad", "RFRMSProp"]
