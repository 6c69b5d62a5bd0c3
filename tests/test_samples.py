"""Samples: what callbacks get to see, which is what was rolled out and scored, and that looking changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import assert_same, brightness, build, prompts, trained

from trl_tpgrpo.algorithm.credit import CreditRule, RewardTable
from trl_tpgrpo.callbacks.samples import EvaluationSample, RolloutSample, SampleCallback


class Seen(SampleCallback):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.rollouts: list[tuple[int, RolloutSample]] = []
        self.evaluations: list[tuple[int, EvaluationSample]] = []

    def on_rollout_end(self, args: Any, state: Any, control: Any, sample: RolloutSample, **kwargs: Any) -> None:
        self.rollouts.append((state.global_step, sample))

    def on_evaluation_end(self, args: Any, state: Any, control: Any, sample: EvaluationSample, **kwargs: Any) -> None:
        self.evaluations.append((state.global_step, sample))


def sample(rewards: torch.Tensor, every: int = 1, num_steps: int | None = None, **rule: Any) -> RolloutSample:
    """Of a table of one reward function, without images."""
    rule = CreditRule(balanced=False, **rule)
    num_steps = num_steps or rewards.shape[1] - 1
    table = RewardTable(rewards[:, None], torch.ones(1), 2, num_steps, rule, every)
    return RolloutSample(["a"] * 2, [], table, ["reward"])


def test_a_sample_is_the_first_group_with_the_images_that_its_rewards_are_of(tmp_path: Path) -> None:
    trainer = build(tmp_path, num_generations=2, per_device_train_batch_size=4)
    seen = Seen()
    trainer.add_callback(seen)
    trainer.train()
    assert [step for step, _ in seen.rollouts] == [0, 1]
    for _, shown in seen.rollouts:
        assert len(shown.prompts) == 2 and len(set(shown.prompts)) == 1
        assert shown.rewards.shape == (2, 4) and shown.states == [0, 1, 2, 3]
        again = torch.tensor([brightness(images) for images in shown.images])
        assert torch.allclose(again, shown.rewards)
        assert shown.table.rewards.shape == (4, 4) and shown.reward_names == ["brightness"]


def test_more_samples_than_a_sweep_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_tpgrpo.batches.SWEEP", 2)
    trainer = build(tmp_path, max_steps=1, num_completions_to_print=3, per_device_rollout_batch_size=2)
    seen = Seen()
    trainer.add_callback(seen)
    trainer.train()
    ((_, shown),) = seen.rollouts
    assert len(shown.images) == 3
    assert torch.allclose(torch.tensor([brightness(images) for images in shown.images]), shown.rewards)


@pytest.mark.parametrize("credit", ["outcome", "consistent"])
def test_samples_of_any_credit(credit: str, tmp_path: Path) -> None:
    completion = {} if credit == "outcome" else {"completion": "exact_every_2"}
    trainer = build(tmp_path, max_steps=1, credit=credit, **completion)
    seen = Seen()
    trainer.add_callback(seen)
    trainer.train()
    ((_, shown),) = seen.rollouts
    assert shown.states == ([3] if credit == "outcome" else [0, 2, 3])
    assert shown.rewards.shape == (2, len(shown.states)) == (2, len(shown.images[0]))
    assert shown.turning_points.shape == (2, len(shown.states) - 1) and shown.advantages.shape == (2, 3)


def test_turning_points_of_blocks_of_steps() -> None:
    rewards = torch.tensor([[0.5, 0.2, 0.4, 0.9], [0.1, 0.2, 0.3, 0.4]])
    by_step, by_block = sample(rewards), sample(rewards, every=2, num_steps=5)
    assert by_step.turning_points.tolist() == [[False, True, False], [True, False, False]]
    assert by_block.turning_points.tolist() == by_step.turning_points.tolist()
    assert by_block.states == [0, 2, 4, 5]


def test_nothing_is_kept_for_those_who_want_nothing(tmp_path: Path) -> None:
    class Uninterested(Seen):
        def wants_rollout(self, args: Any, state: Any) -> bool:
            return False

    trainer = build(tmp_path, max_steps=1)
    seen = Uninterested()
    trainer.add_callback(seen)
    kept = []
    keep = trainer.samples.keep
    trainer.samples.keep = lambda *given: (keep(*given), kept.append(len(trainer.samples._images)))
    trainer.train()
    assert kept == [0] and not seen.rollouts


def test_evaluations_show_the_same_prompts_from_the_same_noise(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=1, eval_dataset=prompts(6), num_generations_eval=2, ema_decay=None)
    seen = Seen()
    trainer.add_callback(seen)
    trainer.evaluate()
    trainer.evaluate()
    trainer.train()
    metrics = trainer.evaluate()
    (_, first), (_, again), (step, after) = seen.evaluations
    assert first.prompts == after.prompts == prompts(6)["prompt"] and step == 1
    assert [len(images) for images in after.images] == [2] * 6
    pixels = [np.stack([np.asarray(images) for images in one.images]) for one in (first, again, after)]
    assert (pixels[0] == pixels[1]).all() and (pixels[0] != pixels[2]).any()
    assert np.mean(after.rewards) == pytest.approx(metrics["eval_reward"])


def test_each_of_several_datasets_has_its_sample(tmp_path: Path) -> None:
    trainer = build(tmp_path, eval_dataset={"a": prompts(2), "b": prompts(3)})
    seen = Seen()
    trainer.add_callback(seen)
    trainer.evaluate()
    assert [(shown.prefix, len(shown.prompts)) for _, shown in seen.evaluations] == [("eval_a", 2), ("eval_b", 3)]


def test_looking_changes_no_weight(tmp_path: Path) -> None:
    plain = build(tmp_path / "plain", max_steps=3)
    plain.train()
    watched = build(
        tmp_path / "watched",
        max_steps=3,
        report_to="tensorboard",
        log_images_steps=1,
        log_completions=True,
        disable_tqdm=False,
        eval_dataset=prompts(4),
        eval_strategy="steps",
        eval_steps=1,
    )
    watched.add_callback(Seen())
    watched.train()
    assert_same(trained(plain), trained(watched))
