"""The command line: `trl-tpgrpo train | plan | sample | evaluate | fidelity | serve-reward | demo`."""

import argparse
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml


COMMANDS = {
    "train": "fine-tune a model, with a YAML recipe or options, on one device or many",
    "sample": "make images with a model, with or without a trained adapter",
    "evaluate": "did it work? compare a model with and without what was trained, prompt by prompt",
    "fidelity": "measure how faithful cheap completions are on a model, its prompts and its reward",
    "plan": "what a run will cost: evaluations, memory per device, and what to change if it does not fit",
    "serve-reward": "serve reward functions over HTTP, from a machine or an environment of their own",
    "demo": "train the embedded tiny model in a few minutes and show what it learned",
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand, and import only what that one needs."""
    argv = list(sys.argv[1:] if argv is None else argv)
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {help_text}" for name, help_text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="trl-tpgrpo",
        description="TurningPoint-GRPO for flow-matching text-to-image models.",
        epilog=f"commands:\n{listing}\n\nEach has its own help: trl-tpgrpo train --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="command", help="one of the commands below")
    if not argv:
        parser.print_help()
        return 0
    command = parser.parse_args(argv[:1]).command
    if command != "train":  # notices of libraries would hide the little that these commands print
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
            logging.getLogger(library).setLevel(logging.ERROR)
    with one_recipe(argv[1:]) as arguments:
        return importlib.import_module(f"trl_tpgrpo.commands.{command.replace('-', '_')}").main(arguments)


@contextmanager
def one_recipe(argv: list[str]) -> Iterator[list[str]]:
    """Yield arguments with the recipes of `--config` merged, later over earlier; raise ValueError for no mapping."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="*", default=[])
    recipes, others = parser.parse_known_args(argv)
    if len(recipes.config) < 2:
        yield argv
        return
    merged: dict = {}
    for path in recipes.config:
        recipe = yaml.safe_load(Path(path).read_text())
        if not isinstance(recipe, dict):
            raise ValueError(f"The recipe {path} must be a mapping of options to values, got {type(recipe).__name__}.")
        merged |= recipe
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(merged))
        yield [*others, "--config", str(path)]
