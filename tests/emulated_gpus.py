"""Makes accelerate take processes on the CPU for processes with a GPU each.

On the CPU accelerate leaves FSDP and DeepSpeed out without a word and runs DDP. With this, torch's own `fully_shard`
and DeepSpeed's own engine run, between processes that talk by gloo. What depends on the device is not shown: NCCL,
streams, memory.
"""

import os

import torch
import transformers.training_args
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def install() -> None:
    """Call before any `TPGRPOConfig` is made, in a process that `accelerate launch` has started."""
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # or DDP would be given the numbers of GPUs
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = _set_device
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.comm.torch  # not everywhere

        deepspeed.comm.torch.build_shm_op = lambda: None  # a faster way to talk, which takes a minute to compile


def _set_device(state: PartialState) -> None:
    state.device = torch.device("cpu")
