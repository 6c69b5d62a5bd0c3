"""The command line: `trl-tpgrpo train | sample | fidelity | demo`."""

import argparse
import importlib
import logging
import os
import sys


COMMANDS = {
    "train": "fine-tune a model, with a YAML recipe or options, on one device or many",
    "sample": "make images with a model, with or without a trained adapter",
    "fidelity": "measure how faithful cheap completions are on a model, its prompts and its reward",
    "demo": "train the embedded tiny model in a few minutes and show what it learned",
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; heavy imports wait until it is known which."""
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
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return importlib.import_module(f"trl_tpgrpo.commands.{command}").main(argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
