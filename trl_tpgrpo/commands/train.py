"""`trl-tpgrpo train`: arguments as those of `trl grpo`, from a YAML recipe, the command line, or both."""

import inspect
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from datasets import Dataset, load_dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_dataset, get_peft_config
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from ..config import PARAMETER, TPGRPOConfig, described, non_defaults
from ..hub import HubError
from ..rewards import RewardFunc
from ..rewards.remote import remote_reward_from_url
from ..rewards.serving.functions import find_function
from ..testbed import TESTBED, prompt_dataset
from ..trainer import TPGRPOTrainer


BUILT_IN_REWARDS = {
    "aesthetic_score": "trl_tpgrpo.rewards.AestheticScore",
    "brightness": "trl_tpgrpo.rewards.brightness",
    "clip_score": "trl_tpgrpo.rewards.CLIPScore",
    "colourfulness": "trl_tpgrpo.rewards.colourfulness",
    "geneval": "trl_tpgrpo.rewards.GenEval",
    "graded_reward": "trl_tpgrpo.testbed.checker.graded_reward",
    "hps_v2": "trl_tpgrpo.rewards.HPSv2",
    "image_reward": "trl_tpgrpo.rewards.ImageReward",
    "jpeg_compressibility": "trl_tpgrpo.rewards.jpeg_compressibility",
    "jpeg_incompressibility": "trl_tpgrpo.rewards.jpeg_incompressibility",
    "ocr": "trl_tpgrpo.rewards.OCRReward",
    "pick_score": "trl_tpgrpo.rewards.PickScore",
    "shapes_reward": "trl_tpgrpo.testbed.checker.shapes_reward",
    "strict_reward": "trl_tpgrpo.testbed.checker.strict_reward",
}

# Options of TRL's models that have another one here
REFUSED = {
    "load_in_4bit": "for language models: use --quantization nf4",
    "load_in_8bit": "LLM.int8, whose layers compute otherwise in training than in evaluation: use --quantization int8 "
    "(torchao, weights only) or nf4",
    "attn_implementation": "for language models: use --attention_backend",
}

# The heading of a group of parameters in a docstring
HEADING = re.compile(r" {4}> Parameters (?:that control (?:the )?(.+))?")


REWARDS = f"""Reward functions: {", ".join(BUILT_IN_REWARDS)}, dotted import paths (my_rewards.mine; found in the
current folder too, a class is created without arguments), or URLs (http://host:8000/pick_score)."""
HELD_OUT = "Reward functions for evaluation only, which are logged and not trained on."


@dataclass
class TPGRPOScriptArguments(ScriptArguments):
    """Script arguments of `trl-tpgrpo train`: TRL's and the reward functions."""

    _argument_group_name = "Script"

    reward_funcs: list[str] | None = field(default=None, metadata={"help": REWARDS})
    eval_reward_funcs: list[str] | None = field(default=None, metadata={"help": HELD_OUT})


@described
@dataclass
class TPGRPOModelConfig(ModelConfig):
    """
    TRL's `ModelConfig` with the paper's LoRA and without what is for language models.

    Parameters:
        dtype (`str`, *optional*): Data type of the model. `None`: the precision of the run for LoRA, else `float32`.
        lora_r (`int`, *optional*, defaults to `32`): Rank of the LoRA.
        lora_alpha (`int`, *optional*, defaults to `64`): Scale of the LoRA times the rank.
        lora_dropout (`float`, *optional*, defaults to `0.0`): Dropout of the LoRA. Only 0 works, since the trained
            policy must be the one that sampled.
        lora_task_type (`str`, *optional*): Leave it out: tasks are for language models.
    """

    _argument_group_name = "Model"

    dtype: str | None = field(default=None, metadata={"choices": ["bfloat16", "float16", "float32"]})
    lora_r: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.0
    lora_task_type: str | None = None

    def __post_init__(self) -> None:
        targets: Any = self.lora_target_modules  # type: ignore[has-type]
        super().__post_init__()
        self.lora_target_modules = targets  # TRL makes a string, a regular expression to PEFT, of a single name
        for name, hint in REFUSED.items():
            if getattr(self, name):
                raise ValueError(f"{name} is {hint}.")


def main(argv: list[str]) -> int:
    """Train in this process, or through `accelerate launch` if its options are given or there are several GPUs."""
    parser = make_parser()
    own_options = launch("train", parser, argv)
    if own_options is None:
        return 0
    options = parser.parse_args_and_config(own_options, fail_with_unknown_args=False)[:4]  # a namespace follows
    script_args, model_args, dataset_args, training_args = options
    settings = non_defaults(script_args) | non_defaults(model_args) | non_defaults(dataset_args) | training_args.given
    try:
        trainer = build_trainer(*options)
        trainer.recipe_settings = settings
        run(trainer, script_args.dataset_name)
    except HubError as error:
        raise SystemExit(f"trl-tpgrpo train: error: {error}") from error
    trainer.end()
    return 0


def launch(command: str, parser: TrlParser, argv: list[str]) -> list[str] | None:
    """Return the command's own options, or run it through `accelerate launch` and return `None`: see `main`."""
    launch_options, own_options = split_options(parser, argv)
    if "LOCAL_RANK" in os.environ or not (launch_options or torch.cuda.device_count() > 1):
        return own_options
    arguments = [*launch_options, "--module", "trl_tpgrpo", command, *own_options]
    launch_command(launch_command_parser().parse_args(arguments))
    return None


def split_options(parser: TrlParser, argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the options of `accelerate launch` in the recipe and the command line, and the command line without them.

    No config is built, since it may be valid for the launched number of processes only. An option that is neither the
    trainer's nor accelerate's raises a ValueError.
    """
    arguments, unknown = parser.parse_known_args(argv)
    recipe = yaml.safe_load(Path(arguments.config).read_text()) if arguments.config else {}
    names = {action.dest for action in parser._actions} | {"env"}
    others = [item for name, value in recipe.items() if name not in names for item in (f"--{name}", str(value))]
    launch_options = resolve_accelerate_config_argument(others + unknown)
    _, refused = launch_command_parser().parse_known_args([*launch_options, "script"])
    if refused:
        options = " ".join(refused)
        raise ValueError(f"Unknown options: {options}. See {parser.prog} --help and accelerate launch --help.")
    return launch_options, _without(argv, unknown)


def _without(arguments: list[str], removed: list[str]) -> list[str]:
    """Return `arguments` without the ordered subsequence `removed`."""
    kept, pending = [], list(removed)
    for argument in arguments:
        if pending and argument == pending[0]:
            pending.pop(0)
        else:
            kept.append(argument)
    return kept


def make_parser(
    prog: str = "trl-tpgrpo train",
    description: str = "Fine-tune a text-to-image model with TP-GRPO.",
    own_types: tuple[type, ...] = (),
) -> TrlParser:
    """Return the parser of all options of a training, which `--help` shows in groups, after those of `own_types`."""
    types = (*own_types, TPGRPOScriptArguments, TPGRPOModelConfig, DatasetMixtureConfig, TPGRPOConfig)
    parser = TrlParser(types, prog=prog, description=description)
    text = "Recipes with any of the options below; later ones override earlier ones, the command line all."
    parser.add_argument("--config", metavar="RECIPE.yaml ...", help=text)
    _group_own_options(parser)
    return parser


def _group_own_options(parser: TrlParser) -> None:
    """Show the options of TPGRPOConfig in the groups of its docstring, and the others after them."""
    others = group = parser._optionals
    for line in inspect.cleandoc(TPGRPOConfig.__doc__ or "").splitlines():
        if heading := HEADING.match(line):
            group = parser.add_argument_group(f"TP-GRPO: {heading[1]}") if heading[1] else others
        elif parameter := PARAMETER.match(line):
            actions = [action for action in others._group_actions if action.dest == parameter[1]]
            others._group_actions = [action for action in others._group_actions if action not in actions]
            group._group_actions += actions
    others.title = "transformers.TrainingArguments"
    parser._action_groups.remove(others)
    parser._action_groups.append(others)


def run(trainer: TPGRPOTrainer, dataset_name: str | None) -> None:
    """Train, save and, if asked to, push."""
    resume = trainer.args.resume_from_checkpoint  # the command line and YAML give a path, "true" or a boolean
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(resume).lower(), resume))
    if trainer.stop_on_signal.stopped:
        trainer.accelerator.print("Stopped by SIGTERM with a checkpoint. Go on with --resume_from_checkpoint true.")
        return
    trainer.save_model(_internal_call=True)
    trainer.accelerator.print(f"Trained weights saved to {trainer.args.output_dir}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"Pushed to {trainer.hub.url}.")


def model_path(name: str) -> str | Path:
    """Return what a model is loaded from: for `testbed` the bundled toy model's folder."""
    return TESTBED if name == "testbed" else name


def build_trainer(
    script_args: TPGRPOScriptArguments,
    model_args: TPGRPOModelConfig,
    dataset_args: DatasetMixtureConfig,
    training_args: TPGRPOConfig,
    prompts: tuple[Dataset | None, Dataset | None] | None = None,
) -> TPGRPOTrainer:
    """Return a trainer with the model, rewards and data of the options; raise ValueError if one is missing.

    `prompts`, if they are loaded already, are those of training and of evaluation.
    """
    if script_args.dataset_streaming:
        raise ValueError("--dataset_streaming is not supported: a rollout draws its prompts by number.")
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: a Hub id, a folder, or 'testbed'.")
    if not script_args.reward_funcs:
        raise ValueError(f"--reward_funcs is missing: any of {list(BUILT_IN_REWARDS)}, dotted import paths, or URLs.")
    chosen = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    training_args.model_init_kwargs = chosen | (training_args.model_init_kwargs or {})
    evaluate = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = prompts or load_prompts(script_args, dataset_args, evaluate)
    return TPGRPOTrainer(
        model=model_path(model_args.model_name_or_path),
        reward_funcs=list(map(load_reward, script_args.reward_funcs)),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
        eval_reward_funcs=list(map(load_reward, script_args.eval_reward_funcs or [])),
    )


def load_reward(name: str) -> RewardFunc:
    """Find the reward of a built-in name, dotted path or URL, or raise ValueError; a class is instantiated."""
    if name.startswith(("http://", "https://")):
        return remote_reward_from_url(name)
    path = BUILT_IN_REWARDS.get(name, name)
    if "." not in path:
        known = f"one of {list(BUILT_IN_REWARDS)}, a dotted import path such as my_rewards.mine, or a URL"
        raise ValueError(f"No reward function {name!r}: use {known}.")
    found: Any = find_function(path)
    return found() if isinstance(found, type) else found


def load_prompts(
    script_args: TPGRPOScriptArguments, dataset_args: DatasetMixtureConfig, evaluate: bool
) -> tuple[Dataset, Dataset | None]:
    """Load the prompts of training and, if asked to, of evaluation; raise ValueError if dataset or split lack."""
    if script_args.dataset_name == "testbed":
        return prompt_dataset("train"), prompt_dataset("heldout") if evaluate else None
    if dataset_args.datasets:
        splits = get_dataset(dataset_args)
    elif script_args.dataset_name:
        splits = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    else:
        raise ValueError("--dataset_name is missing: a Hub id, a folder, or 'testbed' (or `datasets` in a recipe).")
    wanted = [script_args.dataset_train_split] + ([script_args.dataset_test_split] if evaluate else [])
    for split in wanted:
        if split not in splits:
            options = "--dataset_train_split and --dataset_test_split"
            raise ValueError(f"The dataset has no split {split!r}, only {list(splits)}: see {options}.")
    return splits[wanted[0]], splits[wanted[1]] if evaluate else None
