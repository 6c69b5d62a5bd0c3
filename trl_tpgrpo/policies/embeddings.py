"""Encoded prompts: each is encoded once, kept off the device or on disk, and the encoders make room in between.

A prompt is always encoded alone, so that its encoding does not depend on those that happen to be encoded with it.
"""

import hashlib
import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .base import FlowPolicy, on_device
from .conditioning import Conditioning


logger = logging.getLogger(__name__)

KEPT_IN_MEMORY = 1024  # prompts; one of FLUX.1-dev takes 4 MB
MUCH = 10e9  # bytes of prompts, of which a run should know before it fills a disk with them


class PromptEmbeddings:
    """The encoded prompts of a policy, whose text encoders are on the device only while they encode.

    They are kept in a subfolder of `folder`, named after all that an encoded prompt depends on, weights included, so
    that another encoder, dtype, length or negative prompt never finds them; without a folder the latest in memory.
    """

    def __init__(self, policy: FlowPolicy, folder: str | Path | None = None):
        self.policy = policy
        self.folder = None if folder is None else Path(folder) / fingerprint(policy)
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()  # of a text, without a batch dimension
        self._negative = [policy.guidance.negative_prompt or ""] if policy.uses_negative_prompt else []

    def __call__(self, prompts: list[str], on_prompt: Callable[[int], object] | None = None) -> Conditioning:
        """Return encoded prompts, one row each, on the policy's device; call `on_prompt` with how many are new."""
        self._encode_missing(prompts, on_prompt or (lambda number: None))
        negative = Conditioning.of(self._rows(self._negative * len(prompts))) if self._negative else None
        conditioning = replace(Conditioning.of(self._rows(prompts)), negative=negative)
        while len(self._kept) > max(KEPT_IN_MEMORY, len(prompts)) + len(self._negative):
            self._kept.popitem(last=False)
        return conditioning.to(self.policy.device)

    def precompute(self, prompts: list[str], transformer: nn.Module, display: Any) -> None:
        """Encode the prompts of a run while the transformer is not on the device, and drop the encoders."""
        distinct = list(dict.fromkeys(prompts))
        if self.folder is None and len(distinct) > KEPT_IN_MEMORY:
            number = f"{len(distinct)} prompts, more than the {KEPT_IN_MEMORY} that are kept in memory"
            raise ValueError(f"precompute_prompt_embeds: {number}: set prompt_embeds_dir, a folder to keep them in.")
        each = self.policy.dtype.itemsize * sum(map(math.prod, self.policy.text_shapes().values()))
        if each * len(distinct) > MUCH:
            size = f"{len(distinct):,} prompts of {each / 1e6:.1f} MB take {each * len(distinct) / 1e9:.1f} GB in"
            logger.warning("%s %s: lower max_steps or max_sequence_length if that is too much.", size, self.folder)
        loaded_onto = next(transformer.parameters()).device  # for a quantised one the GPU
        transformer.to("cpu")
        with display.phase("encode prompts", len(distinct), alone=True) as advance:
            self._encode_missing(distinct, advance)
        transformer.to(loaded_onto)
        for name in self.policy.text_encoders():
            setattr(self.policy.pipeline, name, None)

    @torch.no_grad()
    def _encode_missing(self, prompts: list[str], on_prompt: Callable[[int], object]) -> None:
        missing = [text for text in dict.fromkeys(prompts + self._negative) if not self._has(text)]
        if not missing:
            return
        encoders = self.policy.text_encoders().values()
        if not encoders:
            reason = "has not been encoded before, and precompute_prompt_embeds has dropped the text encoders"
            remedy = "give the trainer all datasets and max_steps, or leave precompute_prompt_embeds out"
            raise ValueError(f"The prompt {missing[0]!r} {reason}: {remedy}.")
        on_prompt(len(prompts) - len(missing))  # -1, where the negative prompt comes on top
        with on_device(encoders, self.policy.device):
            for text in missing:
                encoded = Conditioning.of(self.policy.encode_texts([text])).to(self.policy.dtype)
                on_cpu = encoded.to(torch.device("cpu")).tensors
                self._keep(text, {name: value[0] for name, value in on_cpu.items()})
                on_prompt(1)

    def _rows(self, texts: list[str]) -> dict[str, list[Tensor]]:
        encoded = {text: self._read(text) for text in dict.fromkeys(texts)}
        return {name: [encoded[text][name] for text in texts] for name in self.policy.text_shapes()}

    def _read(self, text: str) -> dict[str, Tensor]:
        if self.folder is not None:
            return load_file(self._file(text))
        self._kept.move_to_end(text)
        return self._kept[text]

    def _has(self, text: str) -> bool:
        return text in self._kept if self.folder is None else self._file(text).exists()

    def _keep(self, text: str, tensors: dict[str, Tensor]) -> None:
        if self.folder is None:
            self._kept[text] = tensors
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        written = self._file(text).with_suffix(f".{os.getpid()}.tmp")
        save_file({name: value.contiguous() for name, value in tensors.items()}, written)
        written.replace(self._file(text))  # which is whole or absent, whatever other processes write

    def _file(self, text: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"


def fingerprint(policy: FlowPolicy) -> str:
    """Hash everything that an encoded prompt depends on but the prompt."""
    settings = {name: getattr(policy.guidance, name) for name in ("negative_prompt", "max_sequence_length")}
    settings["negative"] = policy.uses_negative_prompt
    parts = [type(policy).__name__, str(policy.dtype), json.dumps(settings, sort_keys=True)]
    parts += [_templates(policy.pipeline)]
    for name, encoder in policy.text_encoders().items():
        weights = {key: checksum(value) for key, value in encoder.state_dict().items()}
        parts += [name, type(encoder).__name__, json.dumps(weights, sort_keys=True)]
    for name, part in policy.pipeline.components.items():
        if isinstance(part, PreTrainedTokenizerBase | ProcessorMixin):
            parts += [name, *_tokenization(part)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _tokenization(part: Any) -> list[str]:
    """Describe a tokenizer, or a processor with what it consists of."""
    described = [type(part).__name__, str(getattr(part, "chat_template", None))]
    if isinstance(part, ProcessorMixin):
        held = [getattr(part, name) for name in part.get_attributes()]
        return [*described, *(text for one in held for text in _tokenization(one))]
    if isinstance(part, PreTrainedTokenizerBase):
        vocabulary = json.dumps(part.get_vocab(), sort_keys=True)
        return [*described, str(part.model_max_length), part.padding_side, vocabulary]
    return [*described, part.to_json_string()]  # of images


def _templates(pipeline: Any) -> str:
    """Return the pipeline's own plain attributes and settings, templates of prompts among them."""
    plain = (str, int, float, bool, list, tuple)
    found = {**pipeline.config, **vars(pipeline), "class": type(pipeline).__name__}
    return json.dumps(
        {name: value for name, value in found.items() if name[0] != "_" and isinstance(value, plain)}, sort_keys=True
    )


def checksum(values: Tensor) -> str:
    """Sum up a tensor's dtype, shape and bits, at the speed of memory; not for secrets."""
    bits = values.detach().contiguous().flatten().view(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(torch.int64)
    factors = torch.arange(len(bits), device=bits.device) * 2 + 1
    total = ((bits ^ (bits >> 29)) * factors).sum().item()  # modulo 2 ** 64
    return f"{values.dtype} {list(values.shape)} {total}"
