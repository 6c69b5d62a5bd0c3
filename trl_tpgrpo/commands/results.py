"""What `trl-tpgrpo evaluate` has on disk as it goes, so that it can be interrupted."""

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
    """What has been sampled, on disk as it comes: images, and a file with a line for the rewards of each batch.

    `rewards` has by model, of which the base is the first, those of its first N images: (N, F). If an earlier call
    had other settings or other weights under a name, a ValueError names them.
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
        if written and not written[-1].endswith("\n"):  # a line that was interrupted
            self._lines.write_text("".join(written := written[:-1]))
        for line in map(json.loads, written):
            self._read(line)

    def _read(self, line: dict[str, Any]) -> None:
        before = without_secrets(line["settings"]) if "settings" in line else {line["model"]: line["digest"]}
        now = self.settings if "settings" in line else self.digests
        for name in filter(now.__contains__, before):
            if before[name] != now[name]:
                remedy = "choose another --output_dir, or delete that folder to begin anew"
                difference = f"{name}={before[name]!r}, and now it is {now[name]!r}"
                raise ValueError(f"The evaluation in {self.folder} was begun with {difference}: {remedy}.")
        if line.get("model") in self.rewards:
            rewards = torch.from_numpy(np.array(line["rewards"], np.float32))  # null becomes NaN
            self.rewards[line["model"]] = torch.cat([self.rewards[line["model"]], rewards])

    def append(self, name: str, rewards: Tensor) -> None:
        """Add the rewards (N, F) of a batch, whose images are on disk; called by the main process."""
        line = {"model": name, "digest": self.digests[name], "rewards": as_json(rewards.tolist())}
        self._read(line)
        with self._lines.open("a") as file:
            if file.tell() == 0:
                file.write(json.dumps({"settings": self.settings}) + "\n")
            file.write(json.dumps(line) + "\n")

    def file(self, name: str, index: int) -> Path:
        """Return where an image of a model is."""
        return self.folder / f"{Path(name).name}-{self.digests[name][:8]}".rstrip("-") / f"{index:05d}.png"


def digest(source: str) -> str:
    """Return the SHA-256 of weights on disk; of those on the Hub, that of their name."""
    files = [*Path(source).glob("*.safetensors"), *Path(source, "transformer").glob("*.safetensors")]
    parts = [hashlib.file_digest(path.open("rb"), "sha256").digest() for path in sorted(files)]
    return hashlib.sha256(b"".join(parts) or source.encode()).hexdigest()


def as_json(value: Any) -> Any:
    """Return what JSON gives back of a value: `None` for NaN, which is a reward that does not apply."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
