"""Encoded prompts: the same wherever they are kept, and never those of another encoder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_trainer import PROMPTS, SIZE, assert_same, build, config, prompts, trained
from tiny import tiny_flux, tiny_sd3

from trl_tpgrpo.data import needed_rows
from trl_tpgrpo.policies import embeddings
from trl_tpgrpo.policies.base import Conditioning, FlowPolicy, Guidance
from trl_tpgrpo.policies.embeddings import Prompt, PromptEmbeddings, checksum, fingerprint
from trl_tpgrpo.policies.loading import build_policy
from trl_tpgrpo.policies.sd3 import SD3Policy


def policy(family: Callable = tiny_sd3, **changes: object) -> FlowPolicy:
    return build_policy(family(), Guidance(**{**SIZE, "guidance_scale": 2.0, **changes}))


def counted(of: FlowPolicy) -> list[str]:
    """The prompts that are encoded from now on, without the negative one."""
    encoded, encode = [], of.encode_texts

    def counting(given: list[str], images: None) -> dict[str, torch.Tensor]:
        encoded.extend(text for text in given if text in PROMPTS)
        return encode(given, images)

    of.encode_texts = counting
    return encoded


def texts(prompts: list[str]) -> list[Prompt]:
    return [Prompt(prompt) for prompt in prompts]


def assert_equal(one: Conditioning, other: Conditioning) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())
    assert (one.negative is None) == (other.negative is None)
    if one.negative is not None:
        assert_equal(one.negative, other.negative)


GUIDED = {"true_cfg_scale": 2.0, "negative_prompt": "a green square"}
CASES = [(tiny_sd3, {}), (tiny_sd3, {"guidance_scale": 1.0}), (tiny_flux, {}), (tiny_flux, GUIDED)]


@pytest.mark.parametrize(("family", "changes"), CASES)
@pytest.mark.parametrize("on_disk", [False, True])
def test_prompts_are_encoded_once_and_come_back_to_the_bit(
    family, changes: dict, on_disk: bool, tmp_path: Path
) -> None:
    its_policy = policy(family, **changes)
    alone = {prompt: its_policy.encode([prompt]) for prompt in PROMPTS}
    encoded = counted(its_policy)
    kept = PromptEmbeddings(its_policy, tmp_path if on_disk else None)
    for chosen in (PROMPTS[:3], PROMPTS[1:5], [PROMPTS[2], PROMPTS[2]]):
        for row, prompt in enumerate(chosen):
            assert_equal(kept(texts(chosen))[torch.tensor([row])], alone[prompt])
    assert encoded == PROMPTS[:5]


class Prefixed(SD3Policy):
    """Encodes negative prompts in another way, as some pipelines do."""

    def encode_negatives(self, texts: list[str], images: None) -> dict[str, torch.Tensor]:
        return self.encode_texts([f"two {text}" for text in texts], images)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_negative_prompt_is_encoded_in_its_own_way_even_where_it_is_also_a_prompt(
    on_disk: bool, tmp_path: Path
) -> None:
    its_policy = Prefixed(tiny_sd3(), Guidance(**SIZE, guidance_scale=2.0, negative_prompt=PROMPTS[0]))
    kept, expected = PromptEmbeddings(its_policy, tmp_path if on_disk else None), its_policy.encode(PROMPTS[:1])
    assert not torch.equal(expected.texts()[0], expected.negative.texts()[0])
    assert_equal(kept(texts(PROMPTS[:1])), expected)


def test_a_later_run_finds_what_an_earlier_one_has_written(tmp_path: Path) -> None:
    first = PromptEmbeddings(policy(), tmp_path)(texts(PROMPTS))
    later = policy()
    encoded = counted(later)
    assert_equal(PromptEmbeddings(later, tmp_path)(texts(PROMPTS)), first)
    assert encoded == []


def other_weight() -> FlowPolicy:
    changed = policy()
    with torch.no_grad():
        next(changed.pipeline.text_encoder_2.parameters()).view(-1)[3] += 1e-6
    return changed


def swapped_weights() -> FlowPolicy:
    changed = policy()
    with torch.no_grad():
        values = next(changed.pipeline.text_encoder_2.parameters()).view(-1)
        values[[0, 1]] = values[[1, 0]]
    return changed


def half_precision() -> FlowPolicy:
    return build_policy(tiny_sd3(dtype=torch.bfloat16), Guidance(**SIZE, guidance_scale=2.0))


def shorter_tokens() -> FlowPolicy:
    changed = policy()
    changed.pipeline.tokenizer.model_max_length -= 1
    return changed


OTHERS = {
    "a weight": other_weight,
    "two weights in each other's place": swapped_weights,
    "the dtype": half_precision,
    "the length": lambda: policy(max_sequence_length=9),
    "the tokenizer's length": shorter_tokens,
    "the negative prompt": lambda: policy(negative_prompt="a blue circle"),
    "no guidance": lambda: policy(guidance_scale=1.0),
    "no T5": lambda: policy(lambda: tiny_sd3(t5=False)),
    "the family": lambda: policy(tiny_flux),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_encoder_or_length_never_hits(other: str) -> None:
    assert fingerprint(OTHERS[other]()) != fingerprint(policy())
    assert fingerprint(policy()) == fingerprint(policy())


def test_checksums_see_each_bit() -> None:
    values = torch.randn(13, generator=torch.Generator().manual_seed(0))
    sums = {checksum(values), checksum(values.view(1, 13)), checksum(values.double()), checksum(values.flip(0))}
    for place in range(13):
        changed = values.clone()
        changed[place] = torch.nextafter(changed[place], torch.tensor(9.0))
        sums.add(checksum(changed))
    assert len(sums) == 4 + 13


def test_the_oldest_leave_the_memory_first(monkeypatch) -> None:
    monkeypatch.setattr(embeddings, "KEPT_IN_MEMORY", 2)
    its_policy = policy()
    encoded, kept = counted(its_policy), PromptEmbeddings(its_policy)
    for chosen in (PROMPTS[:1], PROMPTS[1:2], PROMPTS[:1], PROMPTS[2:3], PROMPTS[:1], PROMPTS[1:2]):
        kept(texts(chosen))
    assert encoded == [PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[1]]
    assert len(kept(texts(PROMPTS)).tensors["prompt_embeds"]) == 6  # more than fit, at once


def test_encoders_are_on_the_device_only_while_they_encode() -> None:
    its_policy = policy()
    moved = []
    for encoder in its_policy.text_encoders().values():
        encoder.to = lambda device: moved.append(torch.device(device).type)
    its_policy.device = torch.device("cpu")
    kept = PromptEmbeddings(its_policy)
    kept(texts(PROMPTS[:2]))
    assert moved == ["cpu"] * 6  # three encoders, there and back
    kept(texts(PROMPTS[:2]))
    assert len(moved) == 6


def test_encoders_are_dropped_once_all_is_encoded(tmp_path: Path) -> None:
    trainer = build(
        tmp_path, precompute_prompt_embeds=True, eval_dataset=prompts(2), train_dataset=prompts(5), max_steps=3
    )
    assert trainer.policy.text_encoders() == {}
    trainer.train()
    trainer.evaluate()
    with pytest.raises(ValueError, match=f"{PROMPTS[5]!r} was not encoded in advance"):
        trainer.evaluate(prompts(6))


@pytest.mark.parametrize("changes", [{}, {"shuffle_dataset": False}, {"num_iterations": 2, "max_steps": 4}])
def test_prompts_are_encoded_as_far_as_a_run_takes_them(changes: dict, tmp_path: Path) -> None:
    """Two rollouts of two prompts each, and an evaluation."""
    seen: set[str] = set()

    def watching(images: list, prompts: list[str], **columns: object) -> list[float]:
        seen.update(prompts)
        return [float(index) for index in range(len(images))]

    names = [f"a {letter}" for letter in "abcdefghijklmnopqrst"]
    many = Dataset.from_dict({"prompt": names, "topic": [0] * len(names)})
    options = {"reward_funcs": watching, "train_dataset": many, "eval_dataset": prompts(2)}
    trainer = build(tmp_path, precompute_prompt_embeds=True, **options, **changes)
    encoded = {prompt.text for prompt in trainer.rollouts.embeddings._kept} - {""}
    trainer.train()
    trainer.evaluate()
    assert encoded == seen and len(seen) == 4 + 2


@pytest.mark.parametrize("max_steps", [-1, 5, 50])
def test_a_run_through_all_prompts_encodes_them_all(max_steps: int, tmp_path: Path) -> None:
    args = config(tmp_path, max_steps=max_steps)  # two prompts an update
    evaluated = {"one": prompts(1), "two": prompts(2)}
    of_train, of_evaluation = needed_rows(prompts(), evaluated, args, ["prompt"])
    assert [row["prompt"] for row in of_train] == PROMPTS
    assert [row["prompt"] for row in of_evaluation] == [*PROMPTS[:1], *PROMPTS[:2]]


def test_many_prompts_are_warned_of(tmp_path: Path, monkeypatch, caplog) -> None:
    size = sum(value.nbytes for value in policy().encode(PROMPTS[:1]).tensors.values())
    for much, warned in ((6 * size, 0), (6 * size - 1, 1)):
        monkeypatch.setattr(embeddings, "MUCH", much)
        build(tmp_path, precompute_prompt_embeds=True, prompt_embeds_dir=str(tmp_path / "prompts"), max_steps=-1)
        assert sum(text.startswith("6 prompts of 0.0 MB take 0.0 GB in") for text in caplog.messages) == warned


def test_kept_prompts_change_no_rollout(tmp_path: Path) -> None:
    options = [{}, {"prompt_embeds_dir": str(tmp_path / "prompts")}, {"precompute_prompt_embeds": True}]
    options += [{**options[1], **options[2]}, options[1]]  # once more, from the disk alone
    weights, states = [], []
    for changes in options:
        trainer = build(tmp_path, max_steps=3, **changes)  # so many take all prompts
        rows, window = [{"prompt": prompt, "topic": 0} for prompt in PROMPTS], trainer.rollouts.windows.draw(0)
        states.append(trainer.sample_and_score(rows, trainer.rollouts.generators(0, 0, 6), window).rollout.states)
        trainer.train()
        weights.append(trained(trainer))
    for other, of_other in zip(weights[1:], states[1:], strict=True):
        assert torch.equal(of_other, states[0])
        assert_same(other, weights[0])


def test_a_broken_write_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    """A crash in the middle of a file must not be taken for an encoded prompt."""

    def crash(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    kept = PromptEmbeddings(policy(), tmp_path)
    with monkeypatch.context() as broken, pytest.raises(OSError):
        broken.setattr(embeddings, "save_file", crash)
        kept(texts(PROMPTS[:1]))
    its_policy = policy()
    encoded = counted(its_policy)
    PromptEmbeddings(its_policy, tmp_path)(texts(PROMPTS[:1]))
    assert encoded == PROMPTS[:1]
