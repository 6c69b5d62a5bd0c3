"""The program that serves: its options, its start, its end."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .functions import ServedReward, find_function
from .protocol import Limits, is_loopback
from .server import RewardServer


logger = logging.getLogger(__name__)


def main(argv: list[str], find: Callable[[str], Callable[..., Any]] = find_function) -> int:
    """Serve until SIGTERM or SIGINT, then answer what has been taken and return; `find` finds a reward by its name."""
    args = make_parser().parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s")
    token = read_token(args.token_file)
    if token is None and not is_loopback(args.host):
        remedy = "give a --token_file, or --host 127.0.0.1 and a tunnel"
        raise ValueError(f"--host {args.host} can be reached from other machines: {remedy}.")
    rewards = [ServedReward(find(name), args.device) for name in args.reward_funcs]
    given = {name: value for name, value in vars(args).items() if name in Limits.__dataclass_fields__}
    limits = Limits(**{**given, "max_payload": args.max_payload * 2**20, "max_unpacked": args.max_unpacked * 2**20})
    host = f"[{args.host}]" if ":" in args.host else args.host
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with RewardServer((args.host, args.port), rewards, limits, token) as server:
        for name in server.workers:
            print(f"Serving http://{host}:{server.port}/{name}", flush=True)  # noqa: T201
        stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # who asks twice does not want to wait
        limited = f"for at most {args.drain_timeout:g} seconds (--drain_timeout)"
        logger.warning("Stopping: what has been taken is scored and answered, %s.", limited)
        faulthandler.dump_traceback_later(args.drain_timeout, exit=True)  # in any case, with what hangs
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-tpgrpo serve-reward",
        description="Serve reward functions to trainers on other machines or in other environments.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    max_payload, max_unpacked = Limits.max_payload // 2**20, Limits.max_unpacked // 2**20
    add = parser.add_argument
    add("--reward_funcs", nargs="+", required=True, metavar="NAME", help="built-in names or dotted import paths")
    add("--host", default="127.0.0.1", help="address to listen at; others than this need a token")
    add("--port", type=int, default=8000, help="0 takes a free one")
    add("--token_file", help="a file with the token that clients must show")
    add("--device", help="where the functions' models are moved, such as cuda:0")
    add("--max_queue", type=int, default=Limits.max_queue, help="images that may wait, for each function")
    add("--max_payload", type=int, default=max_payload, help="size of a request in MiB")
    add("--max_image_pixels", type=int, default=Limits.max_image_pixels, help="width times height")
    add("--max_unpacked", type=int, default=max_unpacked, help="size of a request in MiB with its images decoded")
    add("--num_kept_answers", type=int, default=Limits.num_kept_answers, help="for clients that ask again")
    add("--call_timeout", type=_seconds, default=Limits.call_timeout, help="seconds, where a function declares none")
    add("--drain_timeout", type=_seconds, default=60, help="seconds for what has been taken, after SIGTERM")
    return parser


def _seconds(text: str) -> float:
    if not 0 < float(text) <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 seconds")
    return float(text)


def read_token(path: str | None) -> str | None:
    """Read the token in a file, or raise a `ValueError` if there is none in it."""
    if path is None:
        return None
    token = Path(path).read_text().strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError(f"--token_file {path} must have one line of printable ASCII characters.")
    return token
