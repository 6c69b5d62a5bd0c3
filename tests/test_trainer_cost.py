"""What the trainer leaves out, shares or measures to be cheap, and that it changes nothing else."""

from pathlib import Path

import pytest
import torch
from test_trainer import assert_same, brightness, build, logged, prompts, trained
from tiny import tiny_sd3

from trl_tpgrpo import TPGRPOTrainer
from trl_tpgrpo.algorithm.completion import CompletionRule
from trl_tpgrpo.algorithm.credit import CreditRule, shortest_window, step_reward_variances
from trl_tpgrpo.algorithm.fidelity import compare
from trl_tpgrpo.algorithm.rollout import EXACT
from trl_tpgrpo.batches import Trajectories
from trl_tpgrpo.rollouts import NOISE
from trl_tpgrpo.rollouts.sampling import _measure_batch_size


def coarse(images, **columns: object) -> list[float]:
    """Brightness in few levels, so that many steps add exactly nothing."""
    return [round(value * 40) / 40 for value in brightness(images)]


# What is left out


def every_transition(trajectories: Trajectories, **options: bool) -> dict[int, torch.Tensor]:
    """Leave none out, as if no advantage were 0."""
    return dict.fromkeys(range(len(trajectories.window)), torch.arange(len(trajectories)))


def run_all_transitions(trainer: TPGRPOTrainer) -> TPGRPOTrainer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trajectories, "contributing", every_transition)
        trainer.train()
    return trainer


def test_transitions_without_advantage_are_not_run_and_would_change_nothing(tmp_path: Path) -> None:
    options = {"reward_funcs": coarse, "beta": 0.0, "num_inference_steps": 6, "learning_rate": 1e-3}
    lean = build(tmp_path, **options)
    lean.train()
    whole = run_all_transitions(build(tmp_path, **options))
    ran, would_run = logged(lean, "nfe_train"), logged(whole, "nfe_train")
    shares = logged(lean, "advantages/frac_zero")
    assert sum(shares) > 0.1
    assert would_run == [4 * 5] * 2
    assert ran == pytest.approx(
        [number * (1 - share) for number, share in zip(would_run, shares, strict=True)], abs=1.01
    )
    for name, value in trained(whole).items():
        torch.testing.assert_close(trained(lean)[name], value, rtol=1e-3, atol=1e-6)


def test_a_share_of_the_transitions_is_drawn_and_run(tmp_path: Path) -> None:
    options = {"beta": 0.0, "num_inference_steps": 6, "learning_rate": 1e-3}
    drawn = build(tmp_path, transition_share=0.4, **options)
    drawn.train()
    expected = 0.4 * 4 * 5
    assert set(logged(drawn, "nfe_train")) <= {expected, expected + 1}  # one if the last step had none
    assert logged(drawn, "advantages/frac_zero") == [0.0] * 2  # which are all that were credited
    again = build(tmp_path, transition_share=0.4, **options)
    again.train()
    assert_same(trained(drawn), trained(again))


def test_weights_of_steps_weigh_their_gradients(tmp_path: Path) -> None:
    def first_norm(step_weights: list[float] | None) -> float:
        trainer = build(tmp_path, beta=0.0, max_steps=1, step_weights=step_weights)
        trainer.train()
        return logged(trainer, "grad_norm")[0]

    norm = first_norm(None)
    assert first_norm([3.0] * 3) == pytest.approx(3 * norm, rel=1e-4)
    assert first_norm([1.0, 2.0, 0.5]) != pytest.approx(norm, rel=1e-3)


def test_with_a_kl_term_every_transition_is_run(tmp_path: Path) -> None:
    trainer = build(tmp_path, reward_funcs=coarse, beta=0.1, max_steps=1)
    trainer.train()
    assert logged(trainer, "nfe_train") == [2 * 4 * 3]


def test_a_micro_batch_without_any_advantage_still_makes_an_update(tmp_path: Path) -> None:
    trainer = build(tmp_path, reward_funcs=lambda images, **columns: [1.0] * len(images), beta=0.0, weight_decay=0.0)
    before = trained(trainer)
    trainer.train()
    assert trainer.state.global_step == 2
    assert logged(trainer, "nfe_train") == [1, 1]
    assert logged(trainer, "grad_norm") == [0, 0]
    assert_same(before, trained(trainer))


def test_the_reference_is_asked_once_if_a_rollout_is_trained_on_twice(tmp_path: Path) -> None:
    trainer = build(tmp_path, beta=0.1, num_iterations=2, max_steps=2)
    trainer.train()
    assert logged(trainer, "nfe_train") == [2 * 4 * 3, 4 * 3]
    kls = logged(trainer, "kl")
    assert kls[0] == 0 and kls[1] > 0


# What is shared


def test_encoded_prompts_are_kept_once_each(tmp_path: Path) -> None:
    trainer = build(tmp_path, per_device_train_batch_size=8, num_generations=4)
    trainer.model.train()
    rows = [{"prompt": prompt, "topic": 0} for prompt in prompts(2)["prompt"] for _ in range(4)]
    trajectories = trainer._prepare_inputs(rows)
    assert len(trajectories.conditioning.tensors["prompt_embeds"]) == 2
    transitions = trajectories.transitions(0, torch.tensor([1, 6]))
    expected = trainer.policy.encode([rows[1]["prompt"], rows[6]["prompt"]])
    torch.testing.assert_close(transitions.conditioning.tensors["prompt_embeds"], expected.tensors["prompt_embeds"])


def test_a_group_that_shares_its_noise_shares_its_first_image(tmp_path: Path) -> None:
    seen: list[int] = []

    def counting(images, prompts, **columns: object) -> list[float]:
        seen.append(len(images))
        return brightness(images)

    trainer = build(tmp_path, reward_funcs=counting, share_initial_noise=True, num_generations=4)
    trainer.model.train()
    rewards = trainer._prepare_inputs([{"prompt": "a red circle", "topic": 0}] * 4).table.rewards
    assert seen == [1 + 2 * 4 + 4]
    assert rewards.shape == (4, 4)
    assert rewards[:, 0].unique().numel() == 1
    assert rewards[:, 3].unique().numel() == 4
    trainer.train()


# Cheap completions


@pytest.mark.parametrize("completion", ["one_step", "euler_2", "ab2_2", "at_1_2", "exact_every_2"])
def test_it_trains_with_cheap_completions(completion: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, completion=completion, num_inference_steps=5, full=True, beta=0.0)
    trainer.train()
    assert logged(trainer, "grad_norm")[0] > 0
    assert logged(trainer, "nfe")[0] < 4 * 15


def test_from_1_completes_all_states_but_the_first(tmp_path: Path) -> None:
    trainer, whole = (build(tmp_path, completion=f"exact{end}", credit="incremental") for end in ("_from_1", ""))
    trainer.train()
    whole.train()
    assert logged(trainer, "num_scored_images") == [4 * 3] * 2
    assert logged(whole, "num_scored_images") == [4 * 4] * 2
    first, all_first = (
        logged(trainer, "rewards/brightness/mean_of_state_1"),
        logged(whole, "rewards/brightness/mean_of_state_1"),
    )
    assert first[0] == all_first[0]
    assert "rewards/brightness/mean_of_state_0" not in trainer.state.log_history[0]
    assert all(value > 0 for value in logged(trainer, "step_reward_std/step_0"))


def test_blocks_of_steps_get_the_credit_of_the_block(tmp_path: Path) -> None:
    trainer = build(tmp_path, completion="exact_every_2", num_inference_steps=6)
    trainer.model.train()
    table = trainer._prepare_inputs([{"prompt": "a red circle", "topic": 0}] * 4).table
    assert table.rewards.shape == (4, 4)
    assert table.advantages.shape == table.turning_points.shape == (4, 5)
    assert torch.equal(table.advantages[:, [0, 2]], table.advantages[:, [1, 3]])
    assert torch.equal(table.step_rewards[:, 4], table.rewards[:, 3] - table.rewards[:, 2])


def test_checks_compare_with_exact_completions_of_the_same_trajectories(tmp_path: Path) -> None:
    trainer = build(tmp_path, completion="one_step", completion_check_every=2, max_steps=3)
    trainer.train()
    assert len(logged(trainer, "completion_check/correlation")) == 2
    assert all(-1 <= value < 1 for value in logged(trainer, "completion_check/correlation"))
    exact = build(tmp_path, completion_check_every=1, max_steps=1)
    exact.train()
    assert logged(exact, "completion_check/correlation") == pytest.approx([1])
    assert logged(exact, "completion_check/sign_agreement") == [1]


def test_checks_change_no_weight(tmp_path: Path) -> None:
    weights = []
    for every in (None, 1):
        trainer = build(tmp_path, completion="euler_2", completion_check_every=every)
        trainer.train()
        weights.append(trained(trainer))
    assert_same(*weights)


# Fidelity


def test_fidelity_of_equal_rewards_is_perfect() -> None:
    rewards = torch.rand(30, 6)
    found = compare(rewards, rewards, CompletionRule(), CreditRule())
    assert found.overall() == pytest.approx({"correlation": 1, "sign_agreement": 1, "f1": 1})
    assert found.correlation.shape == (6,)


def test_fidelity_against_hand_computed_numbers() -> None:
    exact = torch.tensor([[0.0, 1.0, 0.5], [0.0, -1.0, 1.0]])  # gains 1, -0.5 and -1, 2; turning points: 0 and 1
    cheap = torch.tensor([[0.0, 1.0, 1.5], [0.0, 1.0, 1.0]])  # gains 1, 0.5 and 1, 0; turning points: 0 and none
    found = compare(exact, cheap, CompletionRule(), CreditRule(credit="turning_point"))
    assert found.sign_agreement.tolist() == pytest.approx([0.5, 0, 0.25])
    assert found.f1.tolist() == pytest.approx([2 * 1 / 3, 0, 2 * 1 / 4])
    assert found.correlation[0].isnan()  # the cheap gains of the first step have no spread
    gains, others = torch.tensor([1, -0.5, -1, 2]), torch.tensor([1, 0.5, 1, 0])
    assert found.correlation[-1].item() == pytest.approx(torch.corrcoef(torch.stack([gains, others]))[0, 1].item())


def test_fidelity_of_blocks_holds_each_step_against_its_block() -> None:
    exact = torch.tensor([[0.0, 1.0, 2.0, 0.0]]).expand(3, 4)
    found = compare(exact, exact[:, [0, 2, 3]], CompletionRule(every=2), CreditRule())
    assert found.sign_agreement.tolist() == [1, 1, 1, 1]


# Windows and batches that are measured


def test_variances_are_within_groups_alone() -> None:
    rewards = torch.tensor([[0.0, 1, 1], [0, 3, 3], [0, 11, 11], [0, 13, 13]])
    assert step_reward_variances(rewards, 2).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("variances", "share", "expected"),
    [
        ([4, 3, 2, 1], 0.7, (0, 2)),
        ([1, 5, 3, 1], 0.8, (1, 3)),
        ([1, 1, 1, 1], 0.5, (0, 2)),
        ([1, 2, 3], 1.0, (0, 3)),
        ([0, 0, 5], 0.9, (2, 3)),
    ],
)
def test_the_shortest_window_with_the_share_is_found(variances, share: float, expected: tuple[int, int]) -> None:
    assert shortest_window(torch.tensor(variances, dtype=torch.float32), share) == expected


def test_a_measured_window_is_taken_for_all_rollouts_and_kept_in_checkpoints(tmp_path: Path) -> None:
    options = {"sde_window_share": 0.5, "num_inference_steps": 6, "save_strategy": "steps", "save_steps": 1}
    trainer = build(tmp_path, max_steps=2, **options)
    trainer.train()
    window = trainer.rollouts.windows.measured
    assert 1 <= len(window) < 5
    first, second = logged(trainer, "nfe")
    assert first == second + 4 * 21  # the first has the measurement too: 21 evaluations of 4 trajectories

    def not_again(rows) -> None:
        raise AssertionError("measured again")

    resumed = build(tmp_path, max_steps=3, **options)
    resumed.rollouts.windows._measure = not_again
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.rollouts.windows.measured == window


def test_a_measured_batch_size_is_taken_and_changes_only_rounding(tmp_path: Path) -> None:
    fixed, measured = build(tmp_path), build(tmp_path, per_device_rollout_batch_size="auto")
    tables = []
    for trainer in (fixed, measured):
        trainer.model.train()
        tables.append(trainer._prepare_inputs([{"prompt": "a red circle", "topic": 0}] * 4).table.rewards)
    assert fixed.rollouts.batch_sizes == {"model": 4, "vae": 4}
    assert all(1 <= measured.rollouts.batch_sizes[part] <= 256 for part in ("model", "vae"))
    torch.testing.assert_close(tables[1], tables[0], rtol=0, atol=2 / 255)


def test_same_generators_give_the_same_trajectories_for_every_rule(tmp_path: Path) -> None:
    trainer = build(tmp_path, pipeline=tiny_sd3())
    rows, window = [{"prompt": "a red circle", "topic": 0}] * 2, trainer.rollouts.windows.draw(0)
    exact = trainer.sample_and_score(rows, trainer.rollouts.generators(NOISE, 0, 2), window, EXACT)
    none = trainer.sample_and_score(rows, trainer.rollouts.generators(NOISE, 0, 2), window, None)
    assert torch.equal(exact.rollout.states, none.rollout.states)
    assert torch.equal(exact.rewards[..., -1], none.rewards[..., -1])


def test_batches_that_do_not_fit_into_memory_are_not_chosen(tmp_path: Path) -> None:
    trainer = build(tmp_path, per_device_rollout_batch_size="auto")

    def run(batch_size: int) -> None:
        if batch_size > 6:
            raise torch.OutOfMemoryError

    assert 1 <= _measure_batch_size(run, trainer.accelerator) <= 6


@pytest.mark.parametrize(("given", "taken"), [(2, {"model": 2, "vae": 2}), ("auto", {"model": 4, "vae": 4})])
def test_a_resumed_run_takes_the_batch_size_it_is_given(given: int | str, taken: dict, tmp_path: Path) -> None:
    build(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    resumed = build(tmp_path, max_steps=2, per_device_rollout_batch_size=given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.rollouts.batch_sizes == taken
