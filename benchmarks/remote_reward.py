"""What it costs to have a reward function behind HTTP: the figures of docs/remote_rewards.md.

python benchmarks/remote_reward.py --size 512

Server and clients share this machine and its processors, so that images a second are a lower bound for two machines.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from trl_tpgrpo.rewards.remote import RemoteReward, base64_png
from trl_tpgrpo.rewards.serving.protocol import Limits, parse_request


def instant(images: list[Image.Image], **columns: object) -> list[float]:
    """A reward that takes no time, so that what is measured is the way to it and back."""
    return [float(image.getpixel((0, 0))[0]) for image in images]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=int, default=64, help="for each figure (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="width and height (default: %(default)s)")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    images = [smooth_picture(rng, args.size) for _ in range(args.num_images)]
    costs(images)
    command = [
        sys.executable,
        "-m",
        "trl_tpgrpo.rewards.serving",
        "--reward_funcs",
        "remote_reward.instant",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().split()[1].rsplit("/", 1)[0]
        try:
            for num_clients in (1, 8):
                for batch_size, concurrency in ((1, 1), (1, 4), (16, 1), (16, 4)):
                    throughput(url, images, num_clients, batch_size, concurrency)
        finally:
            process.terminate()


def smooth_picture(rng: np.random.Generator, size: int) -> Image.Image:
    """Return coarse noise, enlarged, with a little grain: about as hard to compress as a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray((smooth + rng.integers(-3, 4, smooth.shape)).clip(0, 255).astype(np.uint8))


def costs(images: list[Image.Image]) -> None:
    """Measure each side's work on an image, on one processor."""
    start = time.process_time()
    encoded = [base64_png(image) for image in images]
    encoding = time.process_time() - start
    bodies = [json.dumps({"id": "x", "images": [text], "prompts": [""]}).encode() for text in encoded]
    start = time.process_time()
    for body in bodies:
        parse_request(body, Limits()).decode()
    decoding = time.process_time() - start
    size = sum(map(len, encoded)) / len(images) / 1000
    encoding, decoding = encoding / len(images) * 1000, decoding / len(images) * 1000
    show(f"{size:.0f} kB an image; {encoding:.1f} ms to encode, {decoding:.1f} ms to decode")


def throughput(url: str, images: list[Image.Image], num_clients: int, batch_size: int, concurrency: int) -> None:
    share = len(images) // num_clients

    def client(number: int) -> list[float | None]:
        own = images[number * share : (number + 1) * share]
        reward = RemoteReward(url, "instant", batch_size=batch_size, concurrency=concurrency, num_retries=100)
        return asyncio.run(reward(own, [""] * len(own)))

    start = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as pool:
        rewards = [reward for part in pool.map(client, range(num_clients)) for reward in part]
    seconds = time.perf_counter() - start
    assert rewards == instant(images[: share * num_clients])
    setting = f"{num_clients} clients, batch_size {batch_size:>2}, concurrency {concurrency}"
    show(f"{setting}: {len(rewards) / seconds:6.1f} images/s, {seconds / len(rewards) * 1000:5.1f} ms an image")


def show(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
