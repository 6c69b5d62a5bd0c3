"""Encoded pairs of a prompt and an image: found again where all is the same, and never where anything differs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_editing import pictures, small_input  # noqa: F401 - of each test here too
from tiny import PROMPTS
from tiny_flux2 import tiny_kontext
from tiny_qwen import tiny_qwen_image_edit

from trl_tpgrpo.policies.base import FlowPolicy, Guidance
from trl_tpgrpo.policies.embeddings import Prompt, PromptEmbeddings, fingerprint
from trl_tpgrpo.policies.loading import build_policy


FAMILIES = {
    "kontext": lambda height=32: build_policy(tiny_kontext(), Guidance(height, 32, max_sequence_length=8)),
    "qwen_image_edit": lambda height=32: build_policy(tiny_qwen_image_edit(), Guidance(height, 32)),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def pair(image: Image.Image, prompt: str = PROMPTS[0]) -> Prompt:
    return Prompt.of({"prompt": prompt, "image": image}, takes_image=True)


def counted(policy: FlowPolicy) -> list[str]:
    """The texts that are encoded from now on."""
    encoded, encode = [], policy.encode_texts

    def counting(texts: list[str], images: list[Image.Image] | None) -> dict:
        encoded.extend(texts)
        return encode(texts, images)

    policy.encode_texts = counting
    return encoded


def change_vae(policy: FlowPolicy) -> None:
    with torch.no_grad():
        next(policy.pipeline.vae.parameters()).view(-1)[3] += 1e-6


def change_preprocessing(policy: FlowPolicy) -> None:
    policy.pipeline.image_processor.register_to_config(resample="bilinear")


def change_scale(policy: FlowPolicy) -> None:
    policy.pipeline.vae.register_to_config(scaling_factor=0.5, latents_mean=[0.5] * 16)


def change_tokenizers_template(policy: FlowPolicy) -> None:
    policy.pipeline.tokenizer.chat_template = "{{ messages }}"


def change_processors_template(policy: FlowPolicy) -> None:
    policy.pipeline.processor.chat_template = "{{ messages }}"


def change_image_size(policy: FlowPolicy) -> None:
    policy.pipeline.processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 2048}


def change_normalisation(policy: FlowPolicy) -> None:
    policy.pipeline.processor.image_processor.image_mean = [0.5, 0.5, 0.5]


def change_own_template(policy: FlowPolicy) -> None:
    policy.pipeline.prompt_template_encode += " "


def change_start(policy: FlowPolicy) -> None:
    policy.pipeline.prompt_template_encode_start_idx += 1


OF_ALL = (change_vae, change_preprocessing, change_scale, change_tokenizers_template)
OF_A_READER = (
    change_processors_template, change_image_size, change_normalisation, change_own_template, change_start,
)  # fmt: skip
CHANGES = [(name, change) for name in FAMILIES for change in OF_ALL]
CHANGES += [("qwen_image_edit", change) for change in OF_A_READER]


@pytest.mark.parametrize(("family", "change"), CHANGES)
def test_another_part_or_template_never_hits(family: str, change: Callable[[FlowPolicy], None]) -> None:
    policy = FAMILIES[family]()
    change(policy)
    assert fingerprint(policy) != fingerprint(FAMILIES[family]())


@every_family
def test_another_size_never_hits_and_the_same_does(family: Callable[..., FlowPolicy]) -> None:
    assert fingerprint(family(16)) != fingerprint(family())
    assert fingerprint(family()) == fingerprint(family())


@every_family
@pytest.mark.parametrize("on_disk", [False, True])
def test_pairs_are_encoded_once_and_another_image_is_another_pair(
    family: Callable[..., FlowPolicy], on_disk: bool, tmp_path: Path
) -> None:
    policy, (one, other, _) = family(), pictures()
    encoded, kept = counted(policy), PromptEmbeddings(policy, tmp_path if on_disk else None)
    first = kept([pair(one), pair(other)])
    assert encoded == [PROMPTS[0]] * 2
    again = kept([pair(other.copy()), pair(one.convert("RGBA")), pair(one, PROMPTS[1])])
    assert encoded == [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    images = [conditioning.tensors["image_latents"] for conditioning in (first, again)]
    assert torch.equal(images[1], images[0][[1, 0, 0]]) and not torch.equal(images[0][0], images[0][1])


def test_a_later_run_finds_the_pairs_on_disk(tmp_path: Path) -> None:
    images, later = pictures(), FAMILIES["kontext"]()
    first = PromptEmbeddings(FAMILIES["kontext"](), tmp_path)([pair(image) for image in images])
    encoded = counted(later)
    again = PromptEmbeddings(later, tmp_path)([pair(image) for image in images])
    assert encoded == []
    assert all(torch.equal(value, again.tensors[name]) for name, value in first.tensors.items())


def test_an_offloaded_vae_is_on_the_device_only_while_it_encodes() -> None:
    policy, moved = FAMILIES["kontext"](), []
    latents = policy.encode_texts([PROMPTS[0]], pictures()[:1])
    parts = {"vae": policy.pipeline.vae, **policy.text_encoders()}
    for name, part in parts.items():
        part.to = lambda device, name=name: moved.append((name, device.type))
    policy.device = torch.device("meta")  # stands for a GPU
    policy.encode_texts = lambda texts, images: moved.append("encode") or latents
    PromptEmbeddings(policy)._encode_missing([pair(pictures()[0])], 1, lambda number: None)
    assert moved.index(("vae", "meta")) < moved.index("encode") < moved.index(("vae", "cpu"))
