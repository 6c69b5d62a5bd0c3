"""Encoded prompts: each is encoded once, kept off the device or on disk, and the encoders make room in between.

A prompt is always encoded alone, so that its encoding does not depend on those that happen to be encoded with it.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .base import Conditioning, FlowPolicy, on_device


KEPT_IN_MEMORY = 1024
"""Prompts; one of FLUX.1-dev takes 4 MB."""


class PromptEmbeddings:
    """The encoded prompts of a policy.

    Args:
        policy: Policy whose text encoders are on the device while they encode, and on the CPU otherwise.
        folder: Folder for encoded prompts; `None`: the latest `KEPT_IN_MEMORY` in memory. A subfolder is named after
            everything that an encoded prompt depends on, weights included, so that another encoder, dtype, length or
            negative prompt never finds these.
    """

    def __init__(self, policy: FlowPolicy, folder: str | Path | None = None):
        self.policy = policy
        self.folder = None if folder is None else Path(folder) / fingerprint(policy)
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()
        self._negative: Conditioning | None = None
        self._has_encoders = True

    def __call__(self, prompts: list[str], on_prompt: Callable[[int], object] | None = None) -> Conditioning:
        """Return encoded prompts, one row each, on the policy's device.

        Args:
            prompts: Prompts, of which those that are new are encoded.
            on_prompt: Callback with how many more have been done, for a progress bar.

        Raises:
            ValueError: If one is new and the encoders have been dropped.
        """
        self._encode_missing(prompts, on_prompt)
        encoded = [self._read(prompt).tensors for prompt in prompts]
        tensors = {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}
        negative = self._negative and self._negative.expand(len(prompts))
        return Conditioning(tensors, negative).to(self.policy.device)

    def precompute(self, prompts: list[str], transformer: torch.nn.Module, display: Any) -> None:
        """Encode all of them now, while the transformer is not on the device, and drop the encoders.

        Args:
            prompts: Prompts of all datasets.
            transformer: Model that makes room.
            display: Display of the phase, with a method `phase`.

        Raises:
            ValueError: If they are too many to be kept in memory and there is no folder.
        """
        distinct = list(dict.fromkeys(prompts))
        if self.folder is None and len(distinct) > KEPT_IN_MEMORY:
            raise ValueError(
                f"precompute_prompt_embeds: {len(distinct)} prompts are more than the {KEPT_IN_MEMORY} that are kept in "
                "memory: set prompt_embeds_dir, a folder to keep them in."
            )
        loaded_onto = next(transformer.parameters()).device  # for a quantised one the GPU
        transformer.to("cpu")
        with display.phase("encode prompts", len(distinct), alone=True) as advance:
            self._encode_missing(distinct, advance)
        transformer.to(loaded_onto)
        self.policy.drop_text_encoders()
        self._has_encoders = False

    def _encode_missing(self, prompts: list[str], on_prompt: Callable[[int], object] | None = None) -> None:
        missing = [prompt for prompt in dict.fromkeys(prompts) if not self._has(prompt)]
        if not missing:
            if self._negative is None and self.policy.uses_negative_prompt:
                self._negative = Conditioning(load_file(self._file(None)))
            return
        if not self._has_encoders:
            raise ValueError(
                f"The prompt {missing[0]!r} has not been encoded before, and precompute_prompt_embeds has dropped the "
                "text encoders: pass all datasets to the trainer, or leave precompute_prompt_embeds out."
            )
        report = on_prompt or (lambda number: None)
        report(len(prompts) - len(missing))
        with on_device(self.policy.text_encoders().values(), self.policy.device):
            for prompt in missing:
                self._keep(prompt, self.policy.encode([prompt]).to(torch.device("cpu")))
                report(1)
        while len(self._kept) > max(KEPT_IN_MEMORY, len(prompts)):
            self._kept.popitem(last=False)

    def _has(self, prompt: str) -> bool:
        return prompt in self._kept if self.folder is None else self._file(prompt).exists()

    def _keep(self, prompt: str, encoded: Conditioning) -> None:
        self._negative = encoded.negative
        if self.folder is None:
            self._kept[prompt] = Conditioning(encoded.tensors)
            return
        if encoded.negative is not None and not self._file(None).exists():
            _write(self._file(None), encoded.negative)
        _write(self._file(prompt), encoded)

    def _read(self, prompt: str) -> Conditioning:
        if self.folder is not None:
            return Conditioning(load_file(self._file(prompt)))
        self._kept.move_to_end(prompt)
        return self._kept[prompt]

    def _file(self, prompt: str | None) -> Path:
        """Name the file of a prompt, or of the negative prompt for `None`."""
        assert self.folder is not None
        name = "negative_prompt" if prompt is None else hashlib.sha256(prompt.encode()).hexdigest()
        return self.folder / f"{name}.safetensors"


def _write(path: Path, encoded: Conditioning) -> None:
    """Write a file whole or not at all, whatever other processes write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({name: value.contiguous() for name, value in encoded.tensors.items()}, written)
    written.replace(path)


def fingerprint(policy: FlowPolicy) -> str:
    """Hash everything that an encoded prompt depends on but the prompt."""
    parts: list[str] = [type(policy).__name__, str(policy.dtype), json.dumps(policy.encoding_settings, sort_keys=True)]
    for name, encoder in policy.text_encoders().items():
        weights = {key: checksum(value) for key, value in encoder.state_dict().items()}
        parts += [name, type(encoder).__name__, json.dumps(weights, sort_keys=True)]
    for name, tokenizer in policy.tokenizers().items():
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
        parts += [name, type(tokenizer).__name__, str(tokenizer.model_max_length), vocabulary]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def checksum(values: Tensor) -> str:
    """Sum up a tensor's dtype, shape and bits, at the speed of memory; not for secrets."""
    bits = values.detach().contiguous().flatten().view(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(torch.int64)
    factors = torch.arange(len(bits), device=bits.device) * 2 + 1
    total = ((bits ^ (bits >> 29)) * factors).sum().item()  # modulo 2 ** 64
    return f"{values.dtype} {list(values.shape)} {total}"
