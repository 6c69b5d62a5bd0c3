"""Results of `trl-tpgrpo evaluate` on disk, so that it can be interrupted and continued."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import without_secrets


BASE = "base"


class Results:
    """Results on disk: images, and a file with one line of rewards per batch.

    `rewards` has, for each model (the base first), the rewards (N, F) of its first N images. If an earlier call had
    other settings, or other weights under a name, a ValueError names them.
    """

    def __init__(self, output_dir: Path, settings: dict[str, Any], adapters: list[str], num_rewards: int) -> None:
        self.folder, self.settings = output_dir / "evaluation", settings
        self.digests = {BASE: ""} | {adapter: digest(adapter) for adapter in adapters}
        self.rewards = {name: torch.empty(0, num_rewards) for name in self.digests}
        self.num_images = settings["num_prompts"] * settings["num_generations_eval"]
        self._lines = self.folder / "results.jsonl"
        for name in self.rewards:
            self.file(name, 0).parent.mkdir(parents=True, exist_ok=True)
        written = self._lines.read_text().splitlines(keepends=True) if self._lines.exists() else []
        if written and not written[-1].endswith("\n"):  # an incomplete line
            self._lines.write_text("".join(written := written[:-1]))
        for line in map(json.loads, written):
            self._read(line)

    def _read(self, line: dict[str, Any]) -> None:
        before = without_secrets(line["settings"]) if "settings" in line else {line["model"]: line["digest"]}
        now = self.settings if "settings" in line else self.digests
        for name in filter(now.__contains__, before):
            if before[name] != now[name]:
                remedy = "choose another --output_dir, or delete that folder to start again"
                difference = f"{name}={before[name]!r}, but it is now {now[name]!r}"
                raise ValueError(f"The evaluation in {self.folder} was started with {difference}: {remedy}.")
        if line.get("model") in self.rewards:
            rewards = torch.from_numpy(np.array(line["rewards"], np.float32))  # null becomes NaN
            self.rewards[line["model"]] = torch.cat([self.rewards[line["model"]], rewards])

    def append(self, name: str, rewards: Tensor) -> None:
        """Append the rewards (N, F) of a batch whose images are saved; call it on the main process."""
        line = {"model": name, "digest": self.digests[name], "rewards": as_json(rewards.tolist())}
        self._read(line)
        with self._lines.open("a") as file:
            if file.tell() == 0:
                file.write(json.dumps({"settings": self.settings}) + "\n")
            file.write(json.dumps(line) + "\n")

    def file(self, name: str, index: int) -> Path:
        """Return the path of a model's image."""
        return self.folder / f"{Path(name).name}-{self.digests[name][:8]}".rstrip("-") / f"{index:05d}.png"


def digest(source: str) -> str:
    """Return the SHA-256 of weights on disk; for the Hub, of their name."""
    files = [*Path(source).glob("*.safetensors"), *Path(source, "transformer").glob("*.safetensors")]
    parts = [hashlib.file_digest(path.open("rb"), "sha256").digest() for path in sorted(files)]
    return hashlib.sha256(b"".join(parts) or source.encode()).hexdigest()


def as_json(value: Any) -> Any:
    """Return the JSON value of a value; `None` for NaN (reward not applicable)."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
