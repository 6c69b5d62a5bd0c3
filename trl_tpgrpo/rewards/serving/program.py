"""The program that serves: its options, its start, its end."""

from __future__ import annotations

import argparse
import logging
import signal
import threading
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from .functions import ServedReward, find_function
from .server import Limits, RewardServer


logger = logging.getLogger(__name__)


def main(argv: list[str], find: Callable[[str], Callable[..., Any]] = find_function) -> int:
    """Serve until SIGTERM or SIGINT, then answer what has been taken and return.

    Args:
        argv: The options.
        find: From a name in `--reward_funcs` to the function.

    Raises:
        ValueError: If the options do not go together.
    """
    args = make_parser().parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s")
    token = read_token(args.token_file)
    if token is None and not is_loopback(args.host):
        raise ValueError(
            f"--host {args.host} can be reached from other machines: give a --token_file, or --host 127.0.0.1 and a "
            "tunnel."
        )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    rewards = [ServedReward(find(name), args.device) for name in args.reward_funcs]
    limits = Limits(args.max_queue, args.max_payload * 2**20, args.max_image_pixels, args.num_kept_answers)
    server = RewardServer((args.host, args.port), rewards, limits, token, package_version())
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    host = f"[{args.host}]" if ":" in args.host else args.host
    for name in server.workers:
        print(f"Serving http://{host}:{server.server_port}/{name}", flush=True)  # noqa: T201
    stop.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # who asks twice does not want to wait
    logger.warning("Stopping: what has been taken is scored and answered.")
    server.drain()
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-tpgrpo serve-reward",
        description="Serve reward functions to trainers on other machines or in other environments.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = Limits()
    parser.add_argument(
        "--reward_funcs", nargs="+", required=True, metavar="NAME", help="built-in names or dotted import paths"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; others than this need a token")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--token_file", help="a file with the token that clients must show")
    parser.add_argument("--device", help="where the functions' models are moved, such as cuda:0")
    parser.add_argument(
        "--max_queue", type=int, default=defaults.max_queue, help="images that may wait, for each function"
    )
    parser.add_argument(
        "--max_payload", type=int, default=defaults.max_payload // 2**20, help="size of a request in MiB"
    )
    parser.add_argument("--max_image_pixels", type=int, default=defaults.max_image_pixels, help="width times height")
    parser.add_argument(
        "--num_kept_answers", type=int, default=defaults.num_kept_answers, help="for clients that ask again"
    )
    return parser


def read_token(path: str | None) -> str | None:
    """The token in a file.

    Raises:
        ValueError: If there is none in it.
    """
    if path is None:
        return None
    token = Path(path).read_text().strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError(f"--token_file {path} must have one line of printable ASCII characters.")
    return token


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def package_version() -> str:
    try:
        return version("trl-tpgrpo")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
