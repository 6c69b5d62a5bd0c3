"""`trl-tpgrpo train`: arguments as in `trl grpo`, from YAML recipes, the command line, or both."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from datasets import Dataset
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_dataset
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from ..config import TPGRPOConfig, described, non_defaults
from ..testbed import TESTBED, prompt_dataset
from .checks import given
from .options import read_recipes
from .prompts import chosen, read_prompts
from .rewards import load_reward


@described
@dataclass
class TPGRPOScriptArguments(ScriptArguments):
    """
    Script arguments of `trl-tpgrpo train`: TRL's, the reward functions and the column of prompts.

    Parameters:
        reward_funcs (`list[str]`): Reward functions: built-in names, import paths (`my_rewards.mine`, also from the
            current folder; classes are created without arguments), or URLs (`http://host:8000/pick_score`).
        eval_reward_funcs (`list[str]`, *optional*): Reward functions for evaluation only, logged and not trained on.
        dataset_name (`str`): Prompts: a Hub id, a folder, a `.csv`, `.json`, `.jsonl`, `.parquet` or `.txt` file (a
            prompt per line), or `testbed`.
        prompt_column (`str`, *optional*): Column of the prompts. It is renamed to `prompt`.
    """

    _argument_group_name = "Script"

    reward_funcs: list[str] | None = None
    eval_reward_funcs: list[str] | None = None
    dataset_name: str | None = None
    prompt_column: str | None = None


@described
@dataclass
class TPGRPOModelConfig(ModelConfig):
    """
    TRL's `ModelConfig` with the paper's LoRA and without options for language models.

    Parameters:
        model_name_or_path (`str`): Model: a Hub id, a folder, a `.safetensors` file of a transformer, or `testbed`.
        dtype (`str`, *optional*): Data type of the model. `None`: the precision of the run for LoRA, else `float32`.
        lora_r (`int`, *optional*, defaults to `32`): Rank of the LoRA.
        lora_alpha (`int`, *optional*, defaults to `64`): Alpha of the LoRA; its scale is alpha / rank.
        lora_dropout (`float`, *optional*, defaults to `0.0`): Dropout of the LoRA. Must be 0, because the trained
            policy must be the sampled one.
        init_lora_weights (`str`, *optional*): Initialization of the LoRA, such as `"gaussian"` (the paper's code).
            `None`: PEFT's default.
        lora_task_type (`str`, *optional*): Not used: tasks are for language models.
    """

    _argument_group_name = "Model"

    model_name_or_path: str | None = None
    dtype: str | None = field(default=None, metadata={"choices": ["bfloat16", "float16", "float32"]})
    lora_r: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.0
    init_lora_weights: str | None = field(default=None, metadata={"choices": ["gaussian"]})
    lora_task_type: str | None = None

    def __post_init__(self) -> None:
        targets: Any = self.lora_target_modules  # type: ignore[has-type]
        super().__post_init__()
        self.lora_target_modules = targets  # TRL makes one name a string, a regular expression in PEFT


def main(argv: list[str]) -> int:
    """Train in this process, or by `accelerate launch` with its options or several GPUs."""
    parser = make_parser()
    own_options = launch("train", parser, argv)
    if isinstance(own_options, int):
        return own_options
    options = parser.parse_args_and_config(own_options, fail_with_unknown_args=False)[:4]  # a namespace follows
    script_args, model_args, dataset_args, training_args = options
    settings = non_defaults(script_args) | non_defaults(model_args) | non_defaults(dataset_args) | training_args.given
    trainer = build_trainer(*options)
    trainer.recipe_settings = settings
    exit_code = run(trainer, script_args.dataset_name)
    trainer.accelerator.end_training()
    return exit_code


def launch(command: str, parser: TrlParser, argv: list[str]) -> list[str] | int:
    """Return the command's options, or run it by `accelerate launch` and return the exit code, see `main`."""
    launch_options, own_options = split_options(parser, argv)
    if "LOCAL_RANK" in os.environ or not (launch_options or torch.cuda.device_count() > 1):
        return own_options
    arguments = launch_command_parser().parse_args([*launch_options, "--module", "trl_tpgrpo", command, *own_options])
    number = arguments.num_processes or 1
    if number > 1 and not torch.accelerator.is_available():  # accelerate would start one
        remedy = f"torchrun --nproc_per_node {number} -m trl_tpgrpo {command} ... --use_cpu true"
        raise ValueError(f"num_processes={number} needs GPUs, but there are none. On a CPU: {remedy}.")
    try:
        launch_command(arguments)
    except ChildFailedError as error:  # which has printed the reason
        return error.get_first_failure()[1].exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def split_options(parser: TrlParser, argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the options of `accelerate launch` in recipe and command line, and the command line without them.

    No config is built, because it may be valid only for the launched number of processes. Unknown options raise a
    ValueError.
    """
    actions = {action.dest: action for action in reversed(parser._actions)}  # `--no_...` comes after its option
    for name, values in given(argv).items():
        if len(values) > 1 and name in actions and actions[name].nargs in (None, "?"):
            raise ValueError(f"--{name} accepts one value, got {len(values)}: {' '.join(values)}.")
    arguments, unknown = parser.parse_known_args(argv)
    recipe = read_recipes(arguments.config)
    names = {*actions, "env"}
    others = [item for name, value in recipe.items() if name not in names for item in (f"--{name}", str(value))]
    launch_options = resolve_accelerate_config_argument(others + unknown)
    _, refused = launch_command_parser().parse_known_args([*launch_options, "script"])
    if refused:
        raise ValueError(f"Unknown options: {' '.join(refused)}. See {parser.prog} --help.")
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


class TrainingParser(TrlParser):
    """TRL's parser with several recipes, values as on the command line, and errors as exceptions."""

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError, shown in one line by the command line."""
        raise ValueError(message)

    def parse_args_and_config(self, args: list[str], fail_with_unknown_args: bool = True) -> tuple[Any, ...]:
        """Return an instance of each dataclass, and a namespace; later recipes override earlier ones, `args` all."""
        recipe = read_recipes(self.parse_known_args(args)[0].config)
        os.environ |= {name: str(value) for name, value in (recipe.pop("env", None) or {}).items()}
        unknown = self.set_defaults_with_config(**recipe)
        if unknown and fail_with_unknown_args:
            raise ValueError(f"Unknown keys in the recipe: {' '.join(unknown)}.")
        return self.parse_args_into_dataclasses(args)

    def set_defaults_with_config(self, **recipe: Any) -> list[str]:
        """Set a recipe's values as defaults, and return unknown keys."""
        actions = {action.dest: action for action in reversed(self._actions)}  # `--no_...` comes after its option
        meant = {name: self._meant(actions[name], value) for name, value in recipe.items() if name in actions}
        return super().set_defaults_with_config(**recipe | meant)

    def _meant(self, action: Any, value: Any) -> Any:
        items = value if isinstance(value, list) else [value]
        if any(item is None or isinstance(item, dict | list) for item in items):
            return value
        is_bool = getattr(action.type, "__name__", "") == "string_to_bool"
        words = {"on": "true", "off": "false"} if is_bool else {}  # of YAML, unknown to the parser
        parsed = [self._get_value(action, words.get(str(item), str(item))) for item in items]
        for item in parsed:
            self._check_value(action, item)
        return parsed if isinstance(value, list) or action.nargs == "+" else parsed[0]


def make_parser(prog: str = "trl-tpgrpo train", own_types: tuple[type, ...] = ()) -> TrainingParser:
    """Return the parser of the training options, after those of `own_types`; `help_text` is its help."""
    types = (*own_types, TPGRPOScriptArguments, TPGRPOModelConfig, DatasetMixtureConfig, TPGRPOConfig)
    parser = TrainingParser(types, prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", default=[])
    return parser


def run(trainer: Any, dataset_name: str | None) -> int:
    """Train, save and, if set, push; return the exit code: 128 + signal number if a signal stopped the run."""
    resume = trainer.args.resume_from_checkpoint  # a path, "true" or one of YAML's words for false
    words = {"true": True, "false": None, "no": None, "off": None}
    trainer.train(resume_from_checkpoint=words.get(str(resume).lower(), resume))
    trainer.save_model(_internal_call=True)
    if signal := trainer.stop_on_signal.stopped:
        trainer.accelerator.wait_for_everyone()  # a launcher kills the other processes after an error
        how = "resume with --resume_from_checkpoint true"
        trainer.accelerator.print(f"Stopped by {signal.name}, with a checkpoint and the current weights saved: {how}.")
        return 128 + signal
    trainer.accelerator.print(f"Trained weights saved to {trainer.args.output_dir}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"Pushed to {trainer.hub.url}.")
    return 0


def model_path(name: str) -> str | Path:
    """Return the model's name or path; for `testbed`, the folder of the bundled toy model."""
    return TESTBED if name == "testbed" else name


def build_trainer(
    script_args: TPGRPOScriptArguments,
    model_args: TPGRPOModelConfig,
    dataset_args: DatasetMixtureConfig,
    training_args: TPGRPOConfig,
    prompts: tuple[Dataset | None, Dataset | None] | None = None,
) -> Any:  # a TPGRPOTrainer
    """Return a trainer with the data, rewards and model of the options, loaded in this order.

    `prompts` are those of training and evaluation, if already loaded.
    """
    evaluates = training_args.eval_strategy != "no" or training_args.eval_on_start
    train_dataset, eval_dataset = prompts or load_prompts(script_args, dataset_args, evaluates)
    reward_funcs = list(map(load_reward, script_args.reward_funcs or []))
    eval_reward_funcs = list(map(load_reward, script_args.eval_reward_funcs or []))
    dtype = {} if model_args.dtype is None else {"dtype": model_args.dtype}
    kwargs = {"revision": model_args.model_revision} | dtype | (training_args.model_init_kwargs or {})
    training_args.model_init_kwargs = kwargs
    from trl import get_peft_config  # imports diffusers, so after checks of options

    from ..trainer import TPGRPOTrainer

    peft_config = get_peft_config(model_args)
    if peft_config is not None and model_args.init_lora_weights is not None:
        peft_config.init_lora_weights = model_args.init_lora_weights
    return TPGRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        eval_reward_funcs=eval_reward_funcs,
    )


def load_prompts(
    script_args: TPGRPOScriptArguments, dataset_args: DatasetMixtureConfig, evaluate: bool
) -> tuple[Dataset, Dataset | None]:
    """Load the prompts of training and, if set, of evaluation; raise ValueError if dataset or split are missing."""
    name, column = script_args.dataset_name, script_args.prompt_column
    splits = [script_args.dataset_train_split] + ([script_args.dataset_test_split] if evaluate else [])
    if dataset_args.datasets:
        found = chosen(get_dataset(dataset_args), splits, column)
    elif name == "testbed":
        found = [prompt_dataset("train"), prompt_dataset("heldout")][: len(splits)]
    elif name:
        found = read_prompts(name, script_args.dataset_config, splits, column, dataset_args.test_split_size)
    else:
        raise ValueError("--dataset_name is missing: a Hub id, a folder, a file, or 'testbed' (or `datasets`).")
    return found[0], found[1] if evaluate else None
