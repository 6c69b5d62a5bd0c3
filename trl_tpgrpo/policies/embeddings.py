"""Encoded prompts: each is encoded once, kept in CPU memory or on disk; encoders leave the device in between.

Each prompt is encoded alone, so that its encoding does not depend on other prompts. In editing, each pair of prompt
and image is encoded once, and again if evaluation uses another image size.
"""

import hashlib
import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .base import FlowPolicy, on_device
from .conditioning import Conditioning
from .weights import whole_file


logger = logging.getLogger(__name__)

KEPT_IN_MEMORY = 1024  # prompts; one of FLUX.1-dev takes 4 MB
MUCH = 10e9  # bytes of encoded prompts from which a run warns about disk space


@dataclass(frozen=True)
class InputImage:
    """An input image for editing; images with the same pixels are equal."""

    digest: str
    image: Image.Image = field(compare=False)


class Prompt(NamedTuple):
    """A text and, in editing, its input image."""

    text: str
    image: InputImage | None = None
    is_negative: bool = False
    eval_size: tuple[int, int] | None = None  # height and width of the image, if not those of training

    @classmethod
    def of(cls, row: dict[str, Any], takes_image: bool) -> "Prompt":
        """Return the prompt of a dataset's row."""
        if not takes_image:
            return cls(row["prompt"])
        image = row["image"].convert("RGB")
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        return cls(row["prompt"], InputImage(digest, image))


class PromptEmbeddings:
    """The encoded prompts of a policy; text encoders are on the device only while they encode.

    They are kept in a subfolder of `folder`, whose name is a hash of everything that they depend on, weights included:
    another encoder, dtype, length or negative prompt does not find them. Without a folder, the latest stay in memory.
    """

    def __init__(self, policy: FlowPolicy, folder: str | Path | None = None):
        self.policy = policy
        self.folder = None if folder is None else Path(folder) / fingerprint(policy)
        self._kept: OrderedDict[Prompt, dict[str, Tensor]] = OrderedDict()  # without a batch dimension
        self._size = policy.input_size  # of training
        self._negative = [policy.guidance.negative_prompt or ""] if policy.uses_negative_prompt else []

    def __call__(self, prompts: list[Prompt], on_prompt: Callable[[int], object] | None = None) -> Conditioning:
        """Return encoded prompts, one row each, on the policy's device; call `on_prompt` with how many are new."""
        prompts = self._sized(prompts)
        negative = self._negative_of(prompts)
        self._encode_missing([*prompts, *negative], len(prompts), on_prompt or (lambda number: None))
        conditioning = Conditioning.of(self._rows(prompts))
        if negative:
            conditioning = replace(conditioning, negative=Conditioning.of(self._rows(negative)))
        while len(self._kept) > max(KEPT_IN_MEMORY, len(prompts)) + len(set(negative)):
            self._kept.popitem(last=False)
        return conditioning.to(self.policy.device)

    def precompute(
        self, rows: list[dict[str, Any]], eval_rows: list[dict[str, Any]], transformer: nn.Module, display: Any
    ) -> None:
        """Encode the prompts of a run while the transformer is not on the device, then free the encoders."""
        of_rows, of_eval_rows = (
            [Prompt.of(row, self.policy.takes_image) for row in part] for part in (rows, eval_rows)
        )
        with self.policy.at_eval_size():
            distinct = list(dict.fromkeys([*of_rows, *self._sized(of_eval_rows)]))
        if self.folder is None and len(distinct) > KEPT_IN_MEMORY:
            number = f"{len(distinct)} prompts do not fit in memory (at most {KEPT_IN_MEMORY})"
            raise ValueError(f"precompute_prompt_embeds: {number}: set prompt_embeds_dir, a folder to keep them in.")
        each = self.policy.dtype.itemsize * sum(map(math.prod, self.policy.text_shapes().values()))
        if each * len(distinct) > MUCH:
            size = f"{len(distinct):,} prompts of {each / 1e6:.1f} MB take {each * len(distinct) / 1e9:.1f} GB in"
            logger.warning("%s %s: lower max_steps or max_sequence_length if that is too much.", size, self.folder)
        loaded_onto = next(transformer.parameters()).device  # for a quantised one the GPU
        transformer.to("cpu")
        with display.phase("encode prompts", len(distinct), alone=True) as advance:
            self._encode_missing([*distinct, *self._negative_of(distinct)], len(distinct), advance)
        transformer.to(loaded_onto)
        for name in self.policy.text_encoders():
            setattr(self.policy.pipeline, name, None)

    def _sized(self, prompts: list[Prompt]) -> list[Prompt]:
        """Mark prompts whose images have another size now than in training."""
        size = self.policy.input_size
        is_other = self.policy.takes_image and size != self._size
        return (
            [Prompt(prompt.text, prompt.image, prompt.is_negative, size) for prompt in prompts]
            if is_other
            else prompts
        )

    def _negative_of(self, prompts: list[Prompt]) -> list[Prompt]:
        return [Prompt(text, prompt.image, True, prompt.eval_size) for text in self._negative for prompt in prompts]

    @torch.no_grad()
    def _encode_missing(self, prompts: list[Prompt], number: int, on_prompt: Callable[[int], object]) -> None:
        missing = [prompt for prompt in dict.fromkeys(prompts) if not self._has(prompt)]
        if not missing:
            return
        encoders = self.policy.text_encoders().values()
        if not encoders:
            reason = "was not encoded in advance, and precompute_prompt_embeds has removed the text encoders"
            remedy = "pass all datasets and max_steps to the trainer, or leave out precompute_prompt_embeds"
            raise ValueError(f"The prompt {missing[0].text!r} {reason}: {remedy}.")
        on_prompt(number - len(missing))  # negative: negative prompts come in addition
        vae = self.policy.pipeline.vae  # may be offloaded
        images = [vae] if self.policy.takes_image and vae.device != self.policy.device else []
        with on_device([*encoders, *images], self.policy.device):
            for prompt in missing:
                image = None if prompt.image is None else [prompt.image.image]
                encode = self.policy.encode_negatives if prompt.is_negative else self.policy.encode_texts
                with self.policy.at_eval_size() if prompt.eval_size else nullcontext():
                    encoded = Conditioning.of(encode([prompt.text], image)).to(self.policy.dtype)
                on_cpu = encoded.to(torch.device("cpu")).tensors
                self._keep(prompt, {name: value[0] for name, value in on_cpu.items()})
                on_prompt(1)

    def _rows(self, prompts: list[Prompt]) -> dict[str, list[Tensor]]:
        encoded = {prompt: self._read(prompt) for prompt in dict.fromkeys(prompts)}
        return {name: [encoded[prompt][name] for prompt in prompts] for name in self.policy.text_shapes()}

    def _read(self, prompt: Prompt) -> dict[str, Tensor]:
        if self.folder is not None:
            with whole_file(self._file(prompt)):
                return load_file(self._file(prompt))
        self._kept.move_to_end(prompt)
        return self._kept[prompt]

    def _has(self, prompt: Prompt) -> bool:
        return prompt in self._kept if self.folder is None else self._file(prompt).exists()

    def _keep(self, prompt: Prompt, tensors: dict[str, Tensor]) -> None:
        if self.folder is None:
            self._kept[prompt] = tensors
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        written = self._file(prompt).with_suffix(f".{os.getpid()}.tmp")
        save_file({name: value.contiguous() for name, value in tensors.items()}, written)
        written.replace(self._file(prompt))  # complete or absent, even if other processes write too

    def _file(self, prompt: Prompt) -> Path:
        assert self.folder is not None
        key = prompt.text if prompt.image is None else f"{prompt.image.digest} {prompt.text}"
        kind = "-negative" if prompt.is_negative else ""
        kind += "" if prompt.eval_size is None else "-{}x{}".format(*prompt.eval_size)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}{kind}.safetensors"


def fingerprint(policy: FlowPolicy) -> str:
    """Hash everything that an encoded prompt depends on, except the prompt."""
    names = ["negative_prompt", "max_sequence_length"] + ["height", "width"] * policy.takes_image
    settings = {name: getattr(policy.guidance, name) for name in names}
    settings["negative"] = policy.uses_negative_prompt
    parts = [str(type(policy)), str(policy.dtype), json.dumps(settings, sort_keys=True)]
    parts += [_templates(policy.pipeline)]
    encoders = policy.text_encoders()
    if policy.takes_image:
        encoders |= {"vae": policy.pipeline.vae}
        parts += [_plain_json(part.config) for part in (policy.pipeline.vae, policy.pipeline.image_processor)]
    for name, encoder in encoders.items():
        weights = {key: checksum(value) for key, value in encoder.state_dict().items()}
        parts += [name, type(encoder).__name__, json.dumps(weights, sort_keys=True)]
    for name, part in policy.pipeline.components.items():
        if isinstance(part, PreTrainedTokenizerBase | ProcessorMixin):
            parts += [name, *_tokenization(part)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _tokenization(part: Any) -> list[str]:
    """Describe a tokenizer, or a processor with its parts."""
    described = [type(part).__name__, str(getattr(part, "chat_template", None))]
    if isinstance(part, ProcessorMixin):
        held = [getattr(part, name) for name in part.get_attributes()]
        return [*described, *(text for one in held for text in _tokenization(one))]
    if isinstance(part, PreTrainedTokenizerBase):
        vocabulary = json.dumps(part.get_vocab(), sort_keys=True)
        return [*described, str(part.model_max_length), part.padding_side, vocabulary]
    return [*described, part.to_json_string()]  # of images


def _templates(pipeline: Any) -> str:
    """Return the pipeline's plain attributes and settings, including prompt templates."""
    return _plain_json({**pipeline.config, **vars(pipeline), "class": type(pipeline).__name__})


def _plain_json(settings: Mapping[str, Any]) -> str:
    plain = (str, int, float, bool, list, tuple)
    found = {name: value for name, value in settings.items() if name[0] != "_" and isinstance(value, plain)}
    return json.dumps(found, sort_keys=True)


def checksum(values: Tensor) -> str:
    """Compute a fast, non-cryptographic checksum of a tensor's dtype, shape and bits."""
    bits = values.detach().contiguous().flatten().view(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(torch.int64)
    factors = torch.arange(len(bits), device=bits.device) * 2 + 1
    total = ((bits ^ (bits >> 29)) * factors).sum().item()  # modulo 2 ** 64
    return f"{values.dtype} {list(values.shape)} {total}"
