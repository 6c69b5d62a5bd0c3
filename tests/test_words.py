"""The words world, its judge, and what makes its pipeline."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import critic  # noqa: E402
import gradient_snr  # noqa: E402
import pretrain  # noqa: E402
from words import judge, world  # noqa: E402


WORDS = pretrain.WORLDS["words"]


def renders(number: int) -> tuple[list[Image.Image], list[str]]:
    rng, prompts = np.random.default_rng(0), world.split_prompts()["heldout"][:number]
    return [Image.fromarray(world.draw(prompt, rng)) for prompt in prompts], prompts


def test_splits_cover_all_words_once_and_pretraining_sees_none_that_is_held_out() -> None:
    splits = world.split_prompts()
    assert sorted(sum(splits.values(), [])) == sorted(world.all_prompts())
    assert len(set(world.all_prompts())) == 18**3
    prompts, pictures = world.draw_prompted_pictures(200, np.random.default_rng(0))
    assert not set(prompts) & set(splits["heldout"])
    assert pictures.shape == (200, 3, 32, 64) and -1 <= pictures.min() < pictures.max() <= 1


def test_every_character_is_one_token_of_its_own() -> None:
    tokenizer = pretrain.build_tokenizer(WORDS)
    tokens = tokenizer(" ".join(world.CHARACTERS), add_special_tokens=False).input_ids
    assert len(set(tokens)) == len(tokens) == 18
    prompts = tokenizer(world.all_prompts()[:50]).input_ids
    assert {len(one) for one in prompts} == {WORDS.prompt_length}


def test_recogniser_reads_renders() -> None:
    images, prompts = renders(150)
    assert np.mean(judge.strict_reward(images, prompts)) >= 0.97


def test_reward_falls_by_a_third_for_every_wrong_character() -> None:
    images, prompts = renders(1)
    first, second, third = prompts[0].split()
    other = next(one for one in world.CHARACTERS if one not in prompts[0])
    wrong = [prompts[0], f"{first} {other} {third}", f"{other} {other} {third}", f"{other} {other} {other}"]
    assert judge.words_reward(images * 4, wrong) == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert judge.strict_reward(images * 4, wrong) == [1, 0, 0, 0]
    assert judge.words_reward([Image.new("RGB", (64, 32), "navy")], prompts) == [0]


def test_interrupted_training_ends_where_the_other_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 0)
    monkeypatch.setattr(pretrain, "BATCH_SIZE", 4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def run(folder: Path, judged: Callable[..., Any] = lambda images, prompts: [0.0]) -> None:
        replaced = pretrain.World(**{**vars(WORDS), "strict_reward": judged})
        options: dict[str, Any] = {"num_evaluations": 2, "distillation_steps": 4, "state_dir": folder}
        pretrain.pretrain(replaced, folder / "pipeline", 6, 4, 16, seed=0, **options)

    def interrupt_once(images: list, prompts: list) -> list[float]:
        part = "transformer" if interrupted == [] else "student"
        if part not in interrupted and (broken / f"{part}.pt").exists():
            interrupted.append(part)
            raise KeyboardInterrupt
        return [0.0]

    interrupted: list[str] = []
    run(whole)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(broken, interrupt_once)
    run(broken, interrupt_once)
    assert interrupted == ["transformer", "student"]
    for part in interrupted:
        states = [torch.load(folder / f"{part}.pt") for folder in (whole, broken)]
        assert states[0]["step"] == states[1]["step"] == 4
        for name, weight in states[0]["0"].items():
            assert torch.equal(weight, states[1]["0"][name]), name


def test_a_student_learns_what_the_teacher_draws_with_guidance() -> None:
    teacher, student = (pretrain.build_pipeline(WORDS) for _ in range(2))
    for parameter in teacher.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    student.transformer.load_state_dict(teacher.transformer.state_dict())
    for name in ("text_encoder", "text_encoder_2"):
        getattr(student, name).load_state_dict(getattr(teacher, name).state_dict())
    clean, texts = torch.randn(4, 8, 8, 16), world.all_prompts()[:4]
    losses = [pretrain.distillation_loss(student, teacher, scale, clean, texts) for scale in (1.0, 4.0)]
    assert losses[0] < 1e-10 < 1e-4 < losses[1]
    assert pretrain.distillation_loss(student, teacher, 4.0, clean, [""] * 4) < 1e-10


def test_profile_is_that_of_known_gradients() -> None:
    rng = torch.Generator().manual_seed(0)
    gains, directions = torch.tensor([2.0, 1.0, 0.0]), torch.eye(3)
    batches = []
    for _ in range(40):
        actions = torch.randn(64, 3, generator=rng)
        rewards = torch.cat([torch.zeros(64, 1), (actions * gains).cumsum(1)], 1)
        batches.append(gradient_snr.Batch(rewards, actions[..., None] * directions, 8.0, actions))
    found = gradient_snr.profile(batches, {"start": 0, "stop": 3, "group": 8})
    assert found["signal"] == pytest.approx([4, 1, 0], abs=0.2)
    assert found["from_here"] == pytest.approx([1, 0.2, 0], abs=0.03)
    assert 0 < found["share_error"][1] < 0.05


def test_critic_explains_what_a_linear_function_can_and_no_more() -> None:
    rng = torch.Generator().manual_seed(0)
    features, noise = torch.randn(3200, 2, 3, generator=rng), torch.randn(3200, generator=rng)
    rewards = features[:, 1] @ torch.tensor([1.0, -1.0, 0.0]) + noise  # 2/3 of the variance, and at step 1 only
    rewards += torch.arange(400.0).repeat_interleave(8)  # means of groups are not explained
    weights = critic.fit(features[:1600], rewards[:1600], 8, penalty=0.01)
    values = critic.predict(features[1600:], weights, 8)
    assert critic.explained(values, rewards[1600:], 8) == pytest.approx([0, 2 / 3], abs=0.03)
    assert values.unflatten(0, (-1, 8)).mean(1).abs().max() < 1e-6
