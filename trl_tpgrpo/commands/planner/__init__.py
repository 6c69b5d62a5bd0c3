"""What a run will take, from its settings and the config files of its model alone: no weights, no GPU.

Counts come from the rollout itself, run on latents of one number. Activations come from the model in its true size, run on
fake tensors, which know their shapes and hold nothing. The rest is arithmetic on the numbers of weights.
"""

from .counts import Counts, PlannedConfig, Sampling, Spread, changed, count, rows_of, sampling_of
from .fake import FakeModel, LiveBytes, Weights
from .memory import CONTEXT, GIB, OPTIMIZERS, Memory, advise, estimate, optim_of, optimizer_size, savings


__all__ = [
    "CONTEXT", "GIB", "OPTIMIZERS", "Counts", "FakeModel", "LiveBytes", "Memory", "PlannedConfig", "Sampling", "Spread",
    "Weights", "advise", "changed", "count", "estimate", "optim_of", "optimizer_size", "rows_of", "sampling_of", "savings",
]  # fmt: skip
