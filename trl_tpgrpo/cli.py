"""The command line: `trl-tpgrpo train | plan | sample | evaluate | fidelity | serve-reward | demo`."""

import argparse
import importlib
import logging
import os
import signal
import subprocess
import sys
import traceback

from . import __version__
from .commands.options import TRAININGS, help_text, near


COMMANDS = {
    "train": "fine-tune a model, from a YAML recipe or options, on one or more devices",
    "sample": "sample images from a model, with or without a trained adapter",
    "evaluate": "compare a model with and without the trained weights, prompt by prompt",
    "fidelity": "compare cheap ODE completions with exact ones, for a model, prompts and reward",
    "plan": "estimate the cost of a run (NFE, memory per device, hours), and settings with which it fits",
    "serve-reward": "serve reward functions over HTTP, from another machine or environment",
    "demo": "train the bundled toy model for a few minutes and show the results",
}
MISTAKES = (ValueError, TypeError, OSError, ImportError, argparse.ArgumentError, RuntimeError)


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and import only its modules; a user's mistake is one line with status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {help_text}" for name, help_text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="trl-tpgrpo",
        description="TurningPoint-GRPO for flow-matching image models.",
        epilog=f"commands:\n{listing}\n\nEach has its own help: trl-tpgrpo train --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trl-tpgrpo {__version__}")
    parser.add_argument("command", metavar="command", help="one of the commands below")
    if not argv:
        parser.print_help()
        return 0
    command = parser.parse_args(argv[:1]).command
    try:
        return run(command, _without_debug(argv[1:]))
    except KeyboardInterrupt:
        hint = "; run the same command to continue" if command == "evaluate" else ""
        print(f"trl-tpgrpo {command}: interrupted{hint}", file=sys.stderr)  # noqa: T201
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader has ended, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except subprocess.CalledProcessError as error:  # of `accelerate launch`; the processes have printed the reason
        return error.returncode
    except MISTAKES as error:
        if "TRL_TPGRPO_DEBUG" in os.environ or not is_mistake(error):
            raise
        print(f"trl-tpgrpo {command}: error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 2


def run(command: str, arguments: list[str]) -> int:
    """Run a command, after checks without heavy imports."""
    if command not in COMMANDS:
        raise ValueError(f"there is no command {command!r}{near(command, COMMANDS)} See trl-tpgrpo --help.")
    if command in TRAININGS and {"-h", "--help"} & set(arguments):
        print(help_text(command, COMMANDS[command]), end="")  # noqa: T201
        return 0
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # their notices would hide an error message
        logging.getLogger(library).setLevel(logging.ERROR)
    if command != "train":  # notices of libraries would hide the output
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if command in TRAININGS:
        importlib.import_module("trl_tpgrpo.commands.checks").check_training(command, arguments)
    return importlib.import_module(f"trl_tpgrpo.commands.{command.replace('-', '_')}").main(arguments)


def is_mistake(error: Exception) -> bool:
    """Check whether an error is a user's mistake: almost any before training, in training those of this package."""
    if isinstance(error, RuntimeError):
        return type(error).__module__.startswith("trl_tpgrpo.")  # such as a RewardError
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    places = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame in frames]
    is_own = places[-1][0].startswith("trl_tpgrpo.") and not isinstance(error, TypeError)
    return is_own or ("trl_tpgrpo.trainer", "train") not in places


def _without_debug(arguments: list[str]) -> list[str]:
    """Return the arguments without a `--debug` without value, which is for this program."""
    for place, argument in enumerate(arguments):
        if argument == "--debug" and (arguments[place + 1 :] or ["--"])[0].startswith("--"):
            os.environ["TRL_TPGRPO_DEBUG"] = "1"
            return arguments[:place] + arguments[place + 1 :]
    return arguments
