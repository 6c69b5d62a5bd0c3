"""Comparison of a checkpoint with the resumed run: settings, adapter, model, data, rewards."""

import json
import logging
from collections.abc import Callable
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from datasets import Image
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


logger = logging.getLogger(__name__)

SETTINGS = "settings.json"  # in a checkpoint: settings and parts of its run
SAMPLED = 4096  # sampled numbers per weight, and bytes per image, that identify a model or dataset
READ_AT_ONCE = 100  # rows with images, which a selection of a dataset copies
# Settings of execution, logging, storage and length of a run: they may change.
FREE = (
    "max_steps", "num_train_epochs", "disable_tqdm", "log_*", "logging_*", "eval_*", "*_eval", "*_eval_*", "save_*",
    "push_to_hub", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "prediction_loss_only",
    "include_*", "dataloader_*", "ddp_*", "do_*", "debug", "skip_memory_metrics", "torch_empty_cache_steps",
    "precompute_prompt_embeds", "offload_*", "vae_slicing", "guard_rails", "reward_failures", "completion_check_every",
    "num_completions_to_print", "use_cpu", "activation_checkpointing*", "gradient_checkpointing*",
    "per_device_rollout_batch_size", "derived",
)  # fmt: skip
# Settings of one machine or person: not reported.
PERSONAL = ("*_token", "*_dir", "hub_*", "trackio_*", "run_name", "project", "report_to", "local_rank", "resume_*")
# Values that an optimizer restores from its saved state.
NOT_APPLIED = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# Settings that must be equal, see `checkpoints.load_progress`: they define the batches of a rollout.
LAYOUT = ("per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps", "num_iterations",
          "num_generations", "num_inference_steps", "seed")  # fmt: skip
ADAPTER = ("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora",
           "use_dora", "layers_to_transform", "layers_pattern")  # fmt: skip


def describe_settings(args: Any, guidance: Any) -> dict[str, Any]:
    """Return a run's settings (except tokens), and the names of the given ones, from which others follow.

    `guidance`, a [`~trl_tpgrpo.policies.base.Guidance`], has the family's scales if none was given.
    """
    settings = {name: value for name, value in args.to_dict().items() if not _matches(name, PERSONAL)}
    settings |= {name: getattr(guidance, name) for name in ("guidance_scale", "true_cfg_scale")}
    return {"settings": settings, "given": sorted({*args.given, "bf16"} - {*LAYOUT, "generation_batch_size"})}


def describe_parts(model: nn.Module, policy: Any, rewards: list[str], train: Any) -> dict[str, Any]:
    """Return the parts of a run besides settings: adapter, models of `policy`, prompts of `train`, rewards."""
    adapter = model.peft_config["default"].to_dict() if isinstance(model, PeftModel) else {}
    models = {name: part for name, part in policy.pipeline.components.items() if isinstance(part, nn.Module)}
    prompts = json.dumps([] if train is None else list(train["prompt"]))
    prompts += image_digest(train, "image") if policy.takes_image and train is not None else ""
    return {
        "peft_config": {name: _plain(adapter.get(name)) for name in ADAPTER} if adapter else None,
        "model": {name: fingerprint(part) for name, part in models.items()},
        "train_dataset": f"{0 if train is None else len(train)} prompts, {sha256(prompts.encode()).hexdigest()[:8]}",
        "reward_funcs": rewards,
    }


def image_digest(dataset: Any, column: str) -> str:
    """Hash the lengths and ends of a dataset's encoded images; `""` for a column without `datasets.Image`."""
    if not isinstance(dataset.features.get(column), Image):
        return ""
    digest = sha256()
    for batch in dataset.select_columns(column).with_format("arrow").iter(READ_AT_ONCE):
        for image in batch[column]:
            encoded = _encoded(image) if image.is_valid else b""
            digest.update(f"{len(encoded)} ".encode())
            digest.update(encoded[-SAMPLED:])
    return digest.hexdigest()


def _encoded(image: Any) -> Any:
    """Return the bytes of Arrow's `bytes` or, without any, of the file at its `path`."""
    if (data := image["bytes"].as_buffer()) is not None:
        return data
    path = Path(image["path"].as_py())
    return path.read_bytes() if path.is_file() else str(path).encode()


def fingerprint(module: nn.Module) -> str:
    """Hash a sample of each weight (except an adapter's), to identify a model."""
    digest = sha256()
    for name, value in module.named_parameters():
        if "lora_" not in name:
            for inner in _plain_tensors(value.data):
                sample = inner.flatten()[:SAMPLED].contiguous().view(torch.uint8).cpu()
                digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain_tensors(value: Tensor) -> list[Tensor]:
    """Return the tensors of a quantised tensor."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    return [tensor for name in value.__tensor_flatten__()[0] for tensor in _plain_tensors(getattr(value, name))]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def check_settings(
    checkpoint: Path, now: dict[str, Any], accepted: list[str] | None, without_secrets: Callable[[Any], Any]
) -> dict[str, Any]:
    """Compare the descriptions of a checkpoint's run and this one, and warn about differences.

    Return the former values of settings that are not applied. Earlier versions may have saved a token in
    `model_init_kwargs`.

    Raises:
        ValueError: If a difference changes the meaning of the run and its name is not `accepted`.
    """
    path = checkpoint / SETTINGS
    if not path.exists():
        logger.warning("%s has no %s (of an earlier version?): settings are not compared.", checkpoint, SETTINGS)
        return {}
    before, now = without_secrets(json.loads(path.read_text())), json.loads(json.dumps(now, default=str))
    differing = _differences(before, now)
    if "peft_config" in differing:
        raise ValueError(f"{checkpoint} has another adapter ({differing['peft_config']}): resume with the former one.")
    unknown = set(accepted or ()) - set(differing)
    if unknown:
        raise ValueError(f"resume_with_changes: {sorted(unknown)} are equal in {checkpoint}: leave them out.")
    refused = []
    for name, values in differing.items():
        if name in NOT_APPLIED:
            logger.warning("%s: %s. It is not applied: the optimizer continues with its saved state.", name, values)
        elif _matches(name, FREE) or name in (accepted or ()):
            logger.warning("%s: %s. The run continues with the new value.", name, values)
        else:
            refused.append(f"{name} ({values})")
    if refused:
        names = " ".join(name.partition(" ")[0] for name in refused)
        what = f"{checkpoint} is from a run with other settings: {', '.join(refused)}"
        raise ValueError(f"{what}. Use their former values, or accept the new ones by resume_with_changes: {names}")
    return {name: before["settings"][name] for name in differing if name in NOT_APPLIED}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return `former, now other` for each difference; of an adapter or model, for its parts."""
    given = [name for name in sorted({*before["given"], *now["given"]}) if not _matches(name, PERSONAL)]
    pairs = {name: (before["settings"].get(name), now["settings"].get(name)) for name in given}
    pairs |= {name: (before[name], now[name]) for name in ("peft_config", "train_dataset", "reward_funcs")}
    pairs |= {f"model.{name}": (value, now["model"].get(name)) for name, value in before["model"].items()}
    return {name: _told(*values) for name, values in pairs.items() if values[0] != values[1]}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _told(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in before if before[name] != now.get(name)]
        before, now = ({name: one.get(name) for name in names} for one in (before, now))
    return f"{before} before, {now} now"
