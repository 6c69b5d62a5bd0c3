"""What wrong values of settings end in: every field of `TPGRPOConfig`, in Python, on the command line and in a recipe.

    python benchmarks/fuzz.py [FIELD ...]

Nothing is trained. It prints how many values were accepted, how many refused with the field's name, and each that
ended in another error, of which one makes the exit status 1.
"""

import argparse
import contextlib
import dataclasses
import io
import logging
import math
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from trl_tpgrpo import TPGRPOConfig
from trl_tpgrpo.cli import MISTAKES
from trl_tpgrpo.commands.train import TrainingParser, make_parser, split_options


FIELDS = [item.name for item in dataclasses.fields(TPGRPOConfig)]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 10**30, -(10**30), 10**400, 2.5, 0.5, -0.5, -0.0, 1e-300, 1e300, math.inf,
    -math.inf, math.nan, "", " ", "x", "1", "0.5", "nan", "true", "None", "no", "auto", "{", "{}", '{"a": 1}', "[1]",
    "a/b:c.d", "%s {0}", "\xe4" * 5000, [], [1], [1, -1], [0, 3], ["x"], [None], [[1]], [math.inf] * 9, {}, {"x": 1},
]  # fmt: skip
"""What a recipe can hold too."""
OBJECTS: list[Any] = [
    1j, b"x", "\0", "\ud800", (), (0, 3), set(), range(3), iter([]), {1: object()}, {"x": {1}}, [0.5, math.nan],
    Decimal("1.5"), Path("x"), np.float32(0.5), np.float64(np.nan), np.int64(2), np.bool_(True), np.array([1, 2]),
    np.array([]), torch.tensor(1.0), torch.ones(2), object(), print, int, TPGRPOConfig, math, NotImplemented, ...,
]  # fmt: skip
WORDS = [
    "", " ", "x", "0", "1", "-1", "3", "2.5", "1e-300", "1e400", "nan", "inf", "-inf", "1" * 30, "1" * 5000, "true",
    "no", "maybe", "None", "null", "auto", "{", "{}", '{"a": 1}', "[1]", "a/b:c.d", "%s", "\xe4", "1 2", "0.5 nan",
    "x y", None,
]  # fmt: skip
"""Of an option on the command line, which takes those between spaces one by one; `None`: no value."""
ENDS = ("accepted", "refused by name")


def use(config: TPGRPOConfig) -> None:
    """Do what is done with a config before anything is trained: copy it, write it down, read what follows from it."""
    dataclasses.replace(config)
    TPGRPOConfig(**config.to_dict())
    config.settle_changes()
    _ = config.window_starts, config.credit_rule, config.loss_rule, config.completion_rule, config.rollout_batch_size
    config.window(*config.sde_window_limits)


def outcome(name: str, attempt: Callable[[], object]) -> str:
    """Return what an attempt to set a field ends in: one of `ENDS`, or the type and text of another error."""
    try:
        attempt()
    except MISTAKES as error:  # the command line makes one line of these
        named = rf"(?<![a-z_]){name.replace('_', '[-_]')}(?![a-z_])|Unknown options: "
        is_clear = not isinstance(error, TypeError | RuntimeError) and re.search(named, str(error), re.IGNORECASE)
        return ENDS[1] if is_clear else f"{type(error).__name__}: {error}"
    except BaseException as error:  # whatever a library raises, SystemExit too
        return f"{type(error).__name__}: {error}"
    return ENDS[0]


def in_python(name: str, values: Sequence[Any] = (*VALUES, *OBJECTS)) -> Iterator[tuple[Any, str]]:
    """Build a config with each value of a field."""
    for value in values:
        settings = {"output_dir": "unused", "use_cpu": True, name: value}
        yield value, outcome(name, lambda settings=settings: use(TPGRPOConfig(**settings)))


def changed_later(name: str, values: Sequence[Any] = (*VALUES, *OBJECTS)) -> Iterator[tuple[Any, str]]:
    """Change a field of a config, as the trainer finds it."""

    def change(value: Any) -> None:
        config = TPGRPOConfig("unused", use_cpu=True)
        setattr(config, name, value)
        config.settle_changes()

    for value in values:
        yield value, outcome(name, lambda value=value: change(value))


def on_the_command_line(name: str, values: Sequence[Any] = WORDS) -> Iterator[tuple[Any, str]]:
    """Give a field's option on the command line."""
    parser = make_parser()
    for value in values:
        words = [f"--{name}", *([] if value is None else value.split() or [value])]
        arguments = ["--use_cpu", "true", "--output_dir", "unused", *words]
        yield value, outcome(name, lambda arguments=arguments: use(parsed(parser, arguments)))


def in_a_recipe(name: str, values: Sequence[Any] = VALUES) -> Iterator[tuple[Any, str]]:
    """Give a field in a recipe."""
    for value in values:
        Path("recipe.yaml").write_text(yaml.safe_dump({"use_cpu": True, "output_dir": "unused", name: value}))
        yield value, outcome(name, lambda: use(parsed(make_parser(), ["--config", "recipe.yaml"])))


def parsed(parser: TrainingParser, arguments: list[str]) -> TPGRPOConfig:
    """Parse as `trl-tpgrpo train` does."""
    split_options(parser, arguments)
    return parser.parse_args_and_config(arguments, fail_with_unknown_args=False)[3]


def main() -> int:
    """Fuzz the fields and print the totals, in a table, and what was no clear error; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fields", nargs="*", help="(default: all)")
    names = parser.parse_args().fields
    logging.disable()
    warnings.simplefilter("ignore")
    deep: list[str] = []
    print("| | values | accepted | refused by name | other errors |\n|---|---|---|---|---|")  # noqa: T201
    for way in (in_python, changed_later, on_the_command_line, in_a_recipe):
        counts: Counter[str] = Counter()
        for name in names or FIELDS:
            with contextlib.redirect_stderr(io.StringIO()):
                ends = list(way(name))
            counts.update(end for _, end in ends if end in ENDS)
            wrong = [(value, end) for value, end in ends if end not in ENDS]
            counts["other errors"] += len(wrong)
            deep += [ascii(f"{way.__name__}: {name}={value!r:.40}: {end:.200}") for value, end in wrong]
        numbers = [counts.total(), *(counts[end] for end in (*ENDS, "other errors"))]
        print("|", " | ".join([way.__name__.replace("_", " "), *map(str, numbers)]), "|", flush=True)  # noqa: T201
    print(*deep, sep="\n")  # noqa: T201
    return 1 if deep else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.exit(main())
