"""The server program: options, start and shutdown."""

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
    """Serve until SIGTERM or SIGINT, then answer accepted requests and return; `find` finds a reward by name."""
    args = make_parser().parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s")
    token = read_token(args.token_file)
    if token is None and not is_loopback(args.host):
        remedy = "set a --token_file, or use --host 127.0.0.1 and a tunnel"
        raise ValueError(f"--host {args.host} is reachable from other machines: {remedy}.")
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
            signal.signal(number, signal.SIG_DFL)  # a second signal ends it at once
        limited = f"for at most {args.drain_timeout:g} seconds (--drain_timeout)"
        logger.warning("Stopping: accepted requests are scored and answered, %s.", limited)
        faulthandler.dump_traceback_later(args.drain_timeout, exit=True)  # even if calls hang
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-tpgrpo serve-reward",
        description="Serve reward functions to trainers on other machines or in other environments.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    max_payload, max_unpacked = Limits.max_payload // 2**20, Limits.max_unpacked // 2**20
    add = parser.add_argument
    add("--reward_funcs", nargs="+", required=True, metavar="NAME", help="built-in names or import paths")
    add("--host", default="127.0.0.1", help="address to listen on; other addresses need a token")
    add("--port", type=int, default=8000, help="0: any free port")
    add("--token_file", help="file with the token that clients must send")
    add("--device", help="device for the functions' models, such as cuda:0")
    add("--max_queue", type=int, default=Limits.max_queue, help="maximum number of waiting images per function")
    add("--max_payload", type=int, default=max_payload, help="maximum size of a request in MiB")
    add("--max_image_pixels", type=int, default=Limits.max_image_pixels, help="maximum width times height")
    add("--max_unpacked", type=int, default=max_unpacked, help="maximum size of a request in MiB with decoded images")
    add("--num_kept_answers", type=int, default=Limits.num_kept_answers, help="answers kept for clients that retry")
    add("--call_timeout", type=_seconds, default=Limits.call_timeout, help="seconds per call, if none is declared")
    add("--drain_timeout", type=_seconds, default=60, help="seconds for accepted requests after SIGTERM")
    return parser


def _seconds(text: str) -> float:
    if not 0 < float(text) <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 seconds")
    return float(text)


def read_token(path: str | None) -> str | None:
    """Read the token from a file; raise a `ValueError` if there is none."""
    if path is None:
        return None
    token = Path(path).read_text().strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError(f"--token_file {path} must contain one line of printable ASCII characters.")
    return token
