"""Options and recipes, read without importing PyTorch, so that help and error messages are fast."""

import argparse
import ast
import difflib
import importlib.util
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml


TRAININGS = ("train", "evaluate", "fidelity", "plan")  # commands with the options of training

# Classes whose fields are options, in the order of `--help`, with headings; the first with a field counts.
CLASSES = {
    ("trl_tpgrpo/commands/train.py", "TPGRPOScriptArguments"): "Script",
    ("trl/scripts/utils.py", "ScriptArguments"): "Script",
    ("trl/scripts/utils.py", "DatasetMixtureConfig"): "Script",
    ("trl_tpgrpo/commands/train.py", "TPGRPOModelConfig"): "Model",
    ("trl/trainer/model_config.py", "ModelConfig"): "Model",
    ("trl_tpgrpo/config/settings.py", "TPGRPOConfig"): "transformers.TrainingArguments",  # except for its own headings
    ("trl/trainer/base_config.py", "_BaseConfig"): "transformers.TrainingArguments",
    ("transformers/training_args.py", "TrainingArguments"): "transformers.TrainingArguments",
}
# Options of TRL with a different option here, or none
REFUSED = {
    "load_in_4bit": "is for language models: use --quantization nf4",
    "load_in_8bit": "is LLM.int8, whose layers compute differently in training than in rollouts: use --quantization "
    "int8 (torchao, weights only) or nf4",
    "trust_remote_code": "is for language models: for a pipeline with custom Python code, use "
    "--model_init_kwargs '{\"trust_remote_code\": true}'",
    "attn_implementation": "is for language models: use --attention_backend",
    "dataset_streaming": "is not supported: rollouts select prompts by index",
    "streaming": "is not supported: rollouts select prompts by index",
}
# Others for language models, or with only the default supported
HIDDEN = ("bnb_4bit_quant_storage", "bnb_4bit_quant_type", "ignore_bias_buffers", "lora_dropout",
          "lora_modules_to_save", "lora_task_type", "use_bnb_nested_quant", "debug", "derived", "help",
          *REFUSED)  # fmt: skip

# A heading or a parameter in a docstring: its name, type and default, and its description
DOCUMENTED = re.compile(
    r"^ {4}(?:> (?P<heading>.+)|(?P<name>\w+) ?\((?P<kind>.+?)\):(?P<text>.*(?:\n {8}.+)*))", re.MULTILINE
)
HEADING = re.compile(r"Parameters that control (?:the )?(.+)")
LAUNCH = re.compile(r"\w+\.add_argument\((?:'-\w', )?'--(\w+)'")
HELP = re.compile(r"""help'?[=:] ?('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")  # in the source of an option or a field


class Option(NamedTuple):
    """An option in `--help`."""

    group: str
    kind: str
    text: str


def near(name: str, names: Iterable[str]) -> str:
    """Return the end of a sentence: `: did you mean ...?` with the most similar name, or a full stop."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f": did you mean {found[0]}?" if found else "."


def read_options(command: str) -> dict[str, Option]:
    """Read the options of a command of `TRAININGS` from source code, its own first and the launcher's last."""
    found: dict[str, Option] = {}
    for node in _tree(f"trl_tpgrpo/commands/{command}.py").body:
        if command != "train" and isinstance(node, ast.ClassDef) and "_argument_group_name" in ast.unparse(node):
            found |= _fields(node, command.capitalize())
    for (file, name), group in CLASSES.items():
        node = next(node for node in _tree(file).body if isinstance(node, ast.ClassDef) and node.name == name)
        found = {**found, **_fields(node, group), **found}
    calls = [ast.unparse(node) for node in ast.walk(_tree("accelerate/commands/launch.py")) if type(node) is ast.Call]
    named = {match[1]: line for line in calls if (match := LAUNCH.match(line))}
    launch = {name: Option("accelerate launch", "value", _help(line)) for name, line in named.items()}
    launch["accelerate_config"] = Option("accelerate launch", "value", "A config_file, or the name of one of TRL's.")
    return {**found, **launch, **found}


def _tree(file: str) -> ast.Module:
    package, _, path = file.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return ast.parse((Path(spec.origin).parent / path).read_text("utf-8"))


def _help(line: str) -> str:
    found = HELP.search(line)
    return ast.literal_eval(found[1]) if found else ""


def _fields(node: ast.ClassDef, group: str) -> dict[str, Option]:
    """Return the fields of a dataclass, with help from its docstring or metadata."""
    documented, heading = {}, group
    for match in DOCUMENTED.finditer(inspect.cleandoc(ast.get_docstring(node) or "")):
        if match["heading"]:
            own = HEADING.match(match["heading"])
            heading = f"TP-GRPO: {own[1]}" if own else group
        else:
            documented[match["name"]] = Option(heading, match["kind"], match["text"])
    lines = {ast.unparse(line.target): ast.unparse(line) for line in node.body if isinstance(line, ast.AnnAssign)}
    names = [name for name in lines if not name.startswith("_")]
    return {name: documented.get(name, Option(group, "value", _help(lines[name]))) for name in names}


def help_text(command: str, description: str) -> str:
    """Return the `--help` text of a command of `TRAININGS`."""
    usage = "%(prog)s [--config RECIPE.yaml ...] [--option value ...]"
    parser = argparse.ArgumentParser(prog=f"trl-tpgrpo {command}", description=description, usage=usage)
    recipes = "options in YAML files; later files override earlier ones, the command line overrides all"
    parser.add_argument("--config", metavar="RECIPE.yaml ...", help=recipes)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    lines = [ast.unparse(node) for node in _tree("trl_tpgrpo/config/settings.py").body]
    unsupported = ast.literal_eval(next(line for line in lines if line.startswith("UNSUPPORTED")).partition("= ")[2])
    groups: dict[str, Any] = {}
    for name, option in read_options(command).items():
        if name not in (*HIDDEN, *unsupported):
            if option.group not in groups:
                groups[option.group] = parser.add_argument_group(option.group)
            kind, _, default = _plain(option.kind).partition(", *optional*, defaults to ")
            text = _plain(option.text) + (f" (default: {default})" if default else "")
            groups[option.group].add_argument(f"--{name}", metavar=kind.partition(", *optional")[0], help=text)
    return parser.format_help()


def _plain(text: str) -> str:
    return re.sub(r"\[`~?(.+?)`\]", r"\1", " ".join(text.split())).replace("`", "").replace("%", "%%")


def read_recipes(paths: Iterable[str]) -> dict[str, Any]:
    """Read recipes (later ones override earlier ones), with booleans as written; errors name the recipe."""
    merged: dict[str, Any] = {}
    for path in map(Path, paths):
        if not path.is_file():
            hint = near(path.name, [other.name for other in path.parent.glob("*.y*ml")])
            raise FileNotFoundError(f"There is no recipe {path}{hint}")
        text = path.read_text("utf-8-sig")
        try:
            node, recipe = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"The recipe {path} is not valid YAML: {error}") from error
        if not isinstance(recipe, dict):
            raise ValueError(f"The recipe {path} must be a mapping of options to values, got {type(recipe).__name__}.")
        words = {key.value: value.value.lower() for key, value in node.value if value.tag == "tag:yaml.org,2002:bool"}
        merged |= recipe | words
    return merged
