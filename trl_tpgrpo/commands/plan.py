"""`trl-tpgrpo plan`: what a run will cost, whether it fits into a GPU, and what to change if it does not."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from trl import DatasetMixtureConfig, get_peft_config

from ..testbed import TESTBED
from .architectures import architecture_folder
from .planner import (
    GIB,
    OPTIMIZERS,
    Counts,
    FakeModel,
    Memory,
    PlannedConfig,
    Spread,
    advise,
    count,
    estimate,
    optim_of,
)
from .train import TPGRPOModelConfig, TPGRPOScriptArguments, load_prompts, make_parser, split_options


MARGIN = 0.95
"""The share of a GPU's memory that a run may fill: cards have a little less than their name says, and allocators gaps."""


@dataclass
class PlanArguments:
    """
    Arguments of `trl-tpgrpo plan`, besides those of `trl-tpgrpo train`, which say what is planned.

    Args:
        gpu (`str`, *optional*):
            Memory of each GPU by its trade name, such as `24GB`, which means 24 GiB. `None`: nothing is said of fitting.
    """

    _argument_group_name = "Plan"

    gpu: str | None = field(
        default=None, metadata={"help": "Memory of each GPU, such as 24GB, to fit into. None: any."}
    )


def main(argv: list[str]) -> int:
    """Print what a run takes; nothing is trained, and no weights are loaded."""
    parser = make_parser("trl-tpgrpo plan", "What a run will cost, and whether it fits.", own_types=(PlanArguments,))
    launch_options, own_options = split_options(parser, argv)
    launch = launch_command_parser().parse_args([*launch_options, "script"])
    parser.dataclass_types[-1] = PlannedConfig
    parser.set_defaults(num_processes=_num_processes(launch))
    parsed = parser.parse_args_and_config(own_options, fail_with_unknown_args=False)
    own, script_args, model_args, dataset_args, args = parsed[:5]
    limit = None if own.gpu is None else gpu_size(own.gpu)
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: a Hub id, a folder, or 'testbed'.")
    counts = count(args, dataset_size(script_args, dataset_args))
    model = fake_model(args, model_args)
    memory = estimate(args, model)
    print("\n".join(_head(args, model_args, model)))  # noqa: T201
    print("\n".join(["", *_counts(args, counts), "", *_memory(memory)]))  # noqa: T201
    if limit is not None:
        print("\n".join(["", *_verdict(args, model, memory, limit)]))  # noqa: T201
    sharded = bool(launch.use_fsdp or launch.use_deepspeed or args.fsdp or args.deepspeed)
    print("\n".join(["", *(f"- {note}" for note in _notes(args, model, counts, sharded))]))  # noqa: T201
    return 0


def gpu_size(given: str) -> float:
    """Bytes of a GPU that is sold as `24GB`.

    Raises:
        ValueError: If it is not written so.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB|GiB)?", given.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ValueError(f"--gpu must be the memory of a GPU, such as 24GB, got {given!r}.")
    return float(match[1]) * GIB


def dataset_size(script_args: TPGRPOScriptArguments, dataset_args: DatasetMixtureConfig) -> int | None:
    """The number of training prompts, if they are on this machine."""
    name = script_args.dataset_name
    if dataset_args.datasets or name is None or not (name == "testbed" or Path(name).exists()):
        return None
    return len(load_prompts(script_args, dataset_args, evaluate=False)[0])


def fake_model(args: PlannedConfig, model_args: TPGRPOModelConfig) -> FakeModel:
    """The model of the options, as the trainer would load it."""
    name = TESTBED if model_args.model_name_or_path == "testbed" else model_args.model_name_or_path
    peft_config = get_peft_config(model_args)
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    given = (args.model_init_kwargs or {}).get("dtype", model_args.dtype)
    dtype = getattr(torch, str(given).removeprefix("torch.")) if given else half if peft_config else torch.float32
    return FakeModel(architecture_folder(name, model_args.model_revision), args, peft_config, dtype)


def _num_processes(launch: Any) -> int:
    """Of accelerate's options or the config file that they name; 1 if they do not say."""
    of_file = None if launch.config_file is None else load_config_from_file(launch.config_file).num_processes
    return launch.num_processes or of_file or 1


# -------------------------------------------------------------------------------------------------------- what is shown


def _head(args: PlannedConfig, model_args: TPGRPOModelConfig, model: FakeModel) -> list[str]:
    trained, base = sum(model.trained), model.weights.number
    what = (
        f"an adapter of {trained / 1e6:,.1f} M weights" if model.is_adapter else f"all {trained / 1e6:,.1f} M weights"
    )
    kind = args.quantization or str(model.dtype).removeprefix("torch.")
    return [
        f"{model_args.model_name_or_path}: transformer of {base / 1e6:,.1f} M numbers in {kind}, trained: {what}",
        f"{args.height} x {args.width} pixels, {args.num_inference_steps} steps, {model.num_text_tokens} text tokens, "
        f"{args.world_size} process{'es' if args.world_size > 1 else ''}",
    ]


def _counts(args: PlannedConfig, counts: Counts) -> list[str]:
    """The counts of a rollout, and those of the run if its length is known."""
    sampling, number = counts.sampling, counts.num_rollouts
    most = "at most" if args.sde_window_share is not None else ""
    most_trained = "at most" if args.beta == 0 or most else ""
    rows: list[tuple[str, Spread | None, str]] = [
        ("trajectories", _exactly(counts.trajectories), ""),
        ("evaluations in sampling", sampling.evaluations, most),
        ("model calls in sampling", sampling.calls, most),
        ("images decoded and scored", sampling.images, most),
        ("transitions trained on", _exactly(counts.transitions), most_trained),
        ("evaluations in training", _exactly(counts.train_evaluations), most_trained),
    ]
    lines = [f"{'':<28}{'a rollout':>24}{'the run' if number else '':>20}".rstrip()]
    for name, spread, bound in rows:
        of_run = "" if number is None or spread is None else f"{spread.mean * number:,.0f}"
        lines.append(f"{name:<28}{_shown(spread):>24}{of_run:>20}  {bound}".rstrip())
    of_run = "" if counts.num_updates is None else f"{counts.num_updates:,}"
    lines.append(f"{'updates':<28}{counts.updates:>24,g}{of_run:>20}".rstrip())
    return lines + ([f"{'rollouts':<28}{'':>24}{number:>20,}"] if number else [])


def _exactly(number: int) -> Spread:
    return Spread(number, number, number)


def _shown(spread: Spread | None) -> str:
    if spread is None:
        return "not known"
    same = spread.least == spread.most
    return f"{spread.most:,}" if same else f"{spread.mean:,.0f} ({spread.least:,}-{spread.most:,})"


def _memory(memory: Memory) -> list[str]:
    """Items by phase, in GiB."""
    phases = list(memory.items)
    names = list(dict.fromkeys(name for items in memory.items.values() for name in items))
    lines = [f"{'GiB on each device':<24}" + "".join(f"{phase:>10}" for phase in phases)]
    for name in names:
        values = [memory.items[phase].get(name, 0) / GIB for phase in phases]
        if any(values):
            lines.append(f"{name:<24}" + "".join(f"{value:>10.2f}" if value else f"{'-':>10}" for value in values))
    return lines + [f"{'total':<24}" + "".join(f"{memory.total(phase) / GIB:>10.2f}" for phase in phases)]


def _verdict(args: PlannedConfig, model: FakeModel, memory: Memory, limit: float) -> list[str]:
    """Whether it fits, and the settings that make it fit."""
    phase = max(memory.items, key=memory.total)
    peak, gpu = (
        f"The most is {memory.peak / GIB:.1f} GiB ({phase})",
        f"{limit / GIB:g} GiB of which {MARGIN:.0%} are used",
    )
    if memory.peak <= MARGIN * limit:
        return [f"{peak}: it fits into {gpu}."]
    found = advise(args, model, MARGIN * limit)
    if found is None:
        full = "" if model.is_adapter else " An adapter would take much less: use_peft: true."
        return [f"{peak}: it does not fit into {gpu}, and no change of settings is enough.{full}"]
    changes, fits = found
    shown = {name: value for name, value in changes.items() if name != "steps_per_generation"}
    lines = yaml.safe_dump(shown, sort_keys=False).splitlines()
    return [
        f"{peak}: it does not fit into {gpu}. With these settings it takes {fits.peak / GIB:.1f} GiB:",
        *(f"  {line}" for line in lines),
    ]


def _notes(args: PlannedConfig, model: FakeModel, counts: Counts, sharded: bool) -> Iterator[str]:
    """What the numbers do and do not say."""
    if model.policy.uses_negative_prompt:
        yield "Classifier-free guidance: each evaluation is two rows of the model's batch, or two passes."
    if args.beta == 0:
        yield "beta=0: transitions whose advantage is 0 are not run, so that training may take less."
    if counts.measuring is not None:
        of_probe, images = counts.measuring.evaluations.most, counts.measuring.images.most
        yield (
            f"sde_window_share: numbers are those of the whole range, of which the window is a part. Measuring it adds "
            f"{of_probe:,} evaluations and {images:,} images, once."
        )
    if counts.checking is not None:
        of_check, of_images = counts.checking.evaluations.mean, counts.checking.images.mean
        yield (
            f"completion_check_every: every {args.completion_check_every}. rollout takes {of_check:,.0f} evaluations and "
            f"{of_images:,.0f} images more."
        )
    if args.rollout_batch_size is None:
        yield (
            "per_device_rollout_batch_size=auto is measured on the device: calls are not known, and memory is that of "
            f"batches of {args.per_device_train_batch_size}."
        )
    if counts.num_updates is None:
        yield "The length of the run is not known: set max_steps, or name a dataset that is on this machine."
    if args.eval_strategy != "no":
        yield "Evaluations of the model between updates (eval_strategy) are not counted."
    if optim_of(args) not in OPTIMIZERS:
        yield f"optim={optim_of(args)}: not known here, taken for 8 bytes of states a weight."
    if sharded:
        yield "FSDP and DeepSpeed are not modelled: memory is that of a run without them."
    yield (
        "Activations are those of PyTorch's own kernels without compilation, measured on fake tensors; workspaces of "
        "kernels and reward models are not in the sum. CUDA's own GiB is an assumption."
    )
