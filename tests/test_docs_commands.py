"""Each command of the documentation is one that exists, with options and values that its parser takes.

A block of bash is run by bash itself, so that quotes, braces, variables and continued lines mean what they mean to a
reader, but every program in it is a stand-in that writes down how it was called. Those of this package and its scripts
are then given to the parsers. Commands within sentences are treated alike.
"""

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from documents import PAGES, ROOT, Block, blocks, inline_code, read_training
from torch.distributed.run import get_args_parser
from transformers import HfArgumentParser

from trl_tpgrpo.algorithm.completion import CompletionRule
from trl_tpgrpo.cli import COMMANDS
from trl_tpgrpo.commands import demo, evaluate, fidelity, plan, sample
from trl_tpgrpo.commands.rewards import BUILT_IN_REWARDS
from trl_tpgrpo.rewards.serving.program import make_parser as make_serving_parser


CHECKED = ("trl-tpgrpo", "python", "python3", "accelerate", "torchrun", "make", "pip", "pytest")
NOT_CHECKED = (
    "conda",
    "cp",
    "curl",
    "docker",
    "git",
    "hf",
    "ls",
    "mkdocs",
    "mypy",
    "nvidia-smi",
    "pre-commit",
    "ruff",
    "scontrol",
    "ssh",
    "twine",
)
"""Of others: what they take is not for these tests to know. A program that is in neither list makes the test fail."""

REAL = ("bash", "cat", "head", "mkdir")
STAND_IN = f"""#!{sys.executable} -S
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
print("first")
"""
WITHIN_A_SENTENCE = re.compile(r"(?:trl-tpgrpo [\w-]+ --|(?:OMP_NUM_THREADS=1 )?python (?:-m )?\w+[./]|make \w+$)")
SCRIPTS = [
    block
    for page in PAGES
    for block in [
        *blocks(page, "bash", "sh", "shell", "console"),
        *(block for block in inline_code(page) if WITHIN_A_SENTENCE.match(block.text)),
    ]
]
RECIPES = {
    "train": (),
    "plan": (plan.PlanArguments,),
    "fidelity": (fidelity.FidelityArguments,),
    "evaluate": (evaluate.EvaluateArguments,),
}
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "sample": sample.make_parser,
    "serve-reward": make_serving_parser,
    "demo": demo.make_parser,
}


def calls(text: str, folder: Path) -> list[list[str]]:
    """The programs that a script calls, each with its arguments.

    Raises:
        AssertionError: If it calls one that no list above has, or bash does not understand it.
    """
    programs, written = folder / "programs", folder / "calls"
    programs.mkdir()
    written.touch()
    for name in (*CHECKED, *NOT_CHECKED):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    for name in REAL:
        (programs / name).symlink_to(str(shutil.which(name)))
    (programs / "srun").write_text('#!/bin/bash\nexec "$@"\n')
    (programs / "srun").chmod(0o755)
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    for name in (*CHECKED, *NOT_CHECKED):
        (folder / ".venv/bin" / name).symlink_to(programs / name)
    prelude = "set -eu; cd() { :; };\n"
    environment = {"PATH": str(programs), "CALLS": str(written), "HOME": str(folder), **SLURM}
    command = [str(shutil.which("bash")), "-c", prelude + text]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in written.read_text().splitlines()]


SLURM = {"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "host[0-1]"}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # of `python -m`, in this process
@pytest.mark.parametrize("block", SCRIPTS, ids=str)
def test_commands_exist_and_take_their_options(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = calls(block.text, tmp_path)
    assert found, "nothing is called"
    monkeypatch.chdir(tmp_path)
    for program, *arguments in found:
        if program in CHECKED:
            check(program.removesuffix("3"), arguments, monkeypatch)


def check(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if program == "trl-tpgrpo":
        check_command(arguments)
    elif program == "python":
        check_script(arguments, monkeypatch)
    elif program == "accelerate" and arguments[0] == "launch":
        check_launch(launch_command_parser().parse_args(arguments[1:]), "config_file", monkeypatch)
    elif program == "torchrun":
        check_launch(get_args_parser().parse_args(arguments), None, monkeypatch)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {argument for argument in arguments if "=" not in argument} <= targets
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"(?:\.|trl-tpgrpo)\[([\w,]+)\]", " ".join(arguments))
        assert {extra for group in named for extra in group.split(",")} <= set(extras)
    elif program == "pytest":
        check_tests(arguments)


def check_command(arguments: list[str]) -> None:
    """One of `trl-tpgrpo`, read as far as it goes without loading anything."""
    command, options = arguments[0], [item for item in arguments[1:] if item not in ("--help", "-h")]
    if command == "--help":
        return
    assert command in COMMANDS
    if command in PARSERS:
        if options:
            PARSERS[command]().parse_args(options)
        return
    configs = read_training(without_readers_recipe(options), RECIPES[command])
    if command == "fidelity":
        for name in configs[0].completions or []:
            CompletionRule.parse(name)
    for name in configs[len(RECIPES[command])].reward_funcs or []:
        assert name in BUILT_IN_REWARDS or "." in name or "://" in name


def without_readers_recipe(options: list[str]) -> list[str]:
    """The options without a recipe that only the reader has: one in no folder, or `...`."""
    if "--config" not in options:
        return options
    place = options.index("--config") + 1
    mine = place < len(options) and "/" not in options[place] and not Path(options[place]).exists()
    return options[: place - 1] + options[place + 1 :] if mine else options


def check_script(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python script.py` or `python -m module`: it exists, and its own parser takes the options."""
    if arguments[:2] == ["-m", "pytest"]:
        return check_tests(arguments[2:])
    if arguments[:2] == ["-m", "trl_tpgrpo.rewards.serving"]:
        make_serving_parser().parse_args(arguments[2:])
        return None
    if arguments[:2] == ["-m", "venv"]:
        return None
    if arguments[0] == "-m":
        path, options = ROOT / f"{arguments[1].replace('.', '/')}.py", arguments[2:]
    else:
        path, options = ROOT / arguments[0], arguments[1:]
    if "/" not in arguments[0] and arguments[0] != "-m":
        return None  # a script of the reader's
    assert path.exists()
    if "parse_args" not in path.read_text():
        assert not options
        return None
    parse(path, arguments[1] if arguments[0] == "-m" else None, options, monkeypatch)
    return None


class ParsedError(Exception):
    """The script has come as far as its options."""


def parse(path: Path, module: str | None, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script until it has read its options."""

    def reading(read: Callable) -> Callable:
        def then_stop(*args: object, **kwargs: object) -> None:
            read(*args, **kwargs)
            raise ParsedError

        return then_stop

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *options])
        patch.syspath_prepend(str(path.parent))
        patch.setattr(argparse.ArgumentParser, "parse_args", reading(argparse.ArgumentParser.parse_args))
        read = HfArgumentParser.parse_args_into_dataclasses
        patch.setattr(HfArgumentParser, "parse_args_into_dataclasses", reading(read))
        with pytest.raises(ParsedError):
            if module is None:
                runpy.run_path(str(path), run_name="__main__")
            else:
                runpy.run_module(module, run_name="__main__")


def check_launch(launch: argparse.Namespace, config: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher is asked to run exists, and so does its config."""
    if config is not None and getattr(launch, config) is not None:
        assert Path(getattr(launch, config)).exists()
    check_script([launch.training_script, *launch.training_script_args], monkeypatch)


def check_tests(arguments: list[str]) -> None:
    assert all((ROOT / item.split("::")[0]).exists() for item in arguments if "/" in item and not item.startswith("-"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trl-tpgrpo trian --config examples/recipes/testbed.yaml", "assert 'trian' in"),
        ("trl-tpgrpo train --config examples/recipes/no_such.yaml", "There is no recipe"),
        ("trl-tpgrpo train --no_such_option 1", "Unknown options: --no_such_option"),
        ("trl-tpgrpo train --learning_rate high", "invalid float value: 'high'"),
        ("trl-tpgrpo train --sde_type no_such", "invalid choice: 'no_such'"),
        ("trl-tpgrpo train --reward_funcs beauty", "assert .*'beauty' in"),
        ("trl-tpgrpo fidelity --completions no_such", "completion must be"),
        (
            "trl-tpgrpo sample --model_name_or_path testbed --prompt x --no_such_option 1",
            "arguments: --no_such_option",
        ),
        ("python benchmarks/no_such.py", "no_such.py"),
        ("python benchmarks/rollout.py --no_such_option 1", "arguments: --no_such_option"),
        ("python examples/datasets/compositional.py --output_dir x --no_such_option 1", "no_such_option"),
        ("python examples/tpgrpo.py --output_dir x", "output_dir"),
        ("accelerate launch --config_file examples/accelerate/no_such.yaml my_script.py", "no_such.yaml"),
        ("make coffee", "coffee"),
        ('pip install ".[no_such_extra]"', "no_such_extra"),
        ("no-such-program", "no-such-program: command not found"),
        ("trl-tpgrpo train --config 'unclosed", "unexpected EOF"),
    ],
)
def test_wrong_commands_are_found(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    block = Block(Path("page.md"), 1, "bash", text)
    with pytest.raises((AssertionError, SystemExit, ValueError, OSError)) as raised:
        test_commands_exist_and_take_their_options(block, tmp_path, monkeypatch)
    assert re.search(message, f"{raised.value} {capsys.readouterr().err}", re.DOTALL)


def test_stand_ins_leave_nothing_but_their_calls(tmp_path: Path) -> None:
    text = "A='1 2'\ntrl-tpgrpo train $A \\\n  --config {a,b}.yaml  # why\nX=1 python -c \"print('a b')\" &\nwait\n"
    assert sorted(calls(text, tmp_path)) == [
        ["python", "-c", "print('a b')"],
        ["trl-tpgrpo", "train", "1", "2", "--config", "a.yaml", "b.yaml"],
    ]
    assert os.environ.get("CALLS") is None
