"""What bounds an update besides the clip of a step's ratio: chunks of steps, divergence masks, normalised ratios."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_config import config
from test_trainer import assert_same, build, logged, trained
from tiny import tiny_flux, tiny_sd3
from torch import Tensor

from trl_tpgrpo.algorithm.chunks import chunk_means, chunks_by_change, relative_change, step_weights
from trl_tpgrpo.algorithm.losses import LossRule, clipped_surrogate, masked_surrogate, normalized_log_ratio
from trl_tpgrpo.algorithm.sde import Transition, kl_divergence, log_prob, transition
from trl_tpgrpo.batches import Trajectories
from trl_tpgrpo.callbacks.costs import count


TWO_UPDATES = {  # the second is off policy
    "steps_per_generation": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, "max_steps": 2,
    "learning_rate": 1e-2, "num_inference_steps": 5,
}  # fmt: skip
GAUSSIAN = {"sde_type": "flow_sde", "log_prob_type": "gaussian", "noise_level": 0.7}
LOSSES = {
    "dppo": {"loss_type": "dppo"},
    "ratio_norm": {"ratio_norm": True, **GAUSSIAN},
    "chunk": {"importance_sampling_level": "chunk", "chunk_sizes": [1, 3]},
    "chunks by change": {"importance_sampling_level": "chunk"},
    "trajectory": {"importance_sampling_level": "trajectory"},
}


# Formulas


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(size: float = 1e-2) -> tuple[Transition, Transition, Tensor]:
    """A new and an old transition of 64 latents and the states that the old one drew."""
    old = Transition(draw(64, 4, 8), torch.tensor(0.3))
    return (
        Transition(old.mean + size * draw(64, 4, 8, seed=1), old.std),
        old,
        old.mean + old.std * draw(64, 4, 8, seed=2),
    )


def test_a_mask_leaves_out_what_is_far_and_would_go_further() -> None:
    new, old, after = pair()
    log_ratio, advantages = log_prob(new, after) - log_prob(old, after), draw(64, seed=3)
    kl = kl_divergence(new, old)
    threshold = float(kl.median())
    surrogate = masked_surrogate(log_ratio, advantages, kl, threshold)
    ratio, a = np.exp(log_ratio.numpy()), advantages.numpy()
    distance = ((new.mean - old.mean).numpy() ** 2).mean((1, 2)) / (2 * 0.3**2)
    masked = ((a > 0) & (ratio > 1) | (a < 0) & (ratio < 1)) & (distance >= threshold)
    np.testing.assert_array_equal(surrogate.left_out.numpy(), masked)
    np.testing.assert_allclose(surrogate.loss.numpy(), np.where(masked, 0, -ratio * a), rtol=1e-6)
    assert 5 < masked.sum() < 40


def test_an_infinite_threshold_masks_nothing_and_an_overflow_stays_out() -> None:
    log_ratio = torch.tensor([100.0, 1.0, -1.0], requires_grad=True)
    advantages, divergence = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([9.0, 9.0, 9.0])
    assert not masked_surrogate(log_ratio, advantages, divergence, float("inf")).left_out.any()
    masked = masked_surrogate(log_ratio, advantages, divergence, 1.0)
    assert masked.left_out.all() and torch.equal(masked.loss, torch.zeros(3))
    masked.loss.sum().backward()
    assert torch.equal(log_ratio.grad, torch.zeros(3))


def test_the_normalised_ratio_is_the_published_one() -> None:
    """`std * (log ratio + KL)`, in float64, of which the direct form in float32 is the rounding."""
    new, old, after = pair()
    computed = normalized_log_ratio(new, old, after)
    new, old, after = Transition(new.mean.double(), new.std), Transition(old.mean.double(), old.std), after.double()
    squares = [((after - one.mean) ** 2).flatten(1).mean(1) / (2 * 0.3**2) for one in (new, old)]
    published = 0.3 * (squares[1] - squares[0] + ((new.mean - old.mean) ** 2).flatten(1).mean(1) / (2 * 0.3**2))
    torch.testing.assert_close(computed.double(), published, rtol=1e-4, atol=1e-9)


def test_the_mean_of_the_normalised_ratio_is_one_where_that_of_the_plain_log_ratio_is_below() -> None:
    new, old, after = pair(size=0.3)
    plain, normalised = log_prob(new, after) - log_prob(old, after), normalized_log_ratio(new, old, after)
    spread = float(normalised.std()) / 8
    assert abs(float(normalised.mean())) < 3 * spread
    assert float(plain.mean()) < -3 * float(plain.std()) / 8


@pytest.mark.parametrize("rule", [LossRule(), LossRule("dppo", kl_mask_threshold=1e-6), LossRule(ratio_norm=True)])
def test_at_a_ratio_of_one_every_loss_is_the_plain_policy_gradient(rule: LossRule) -> None:
    weight = torch.ones(64, requires_grad=True)
    _, old, after = pair()
    new = Transition(weight[:, None, None] * old.mean, old.std)
    log_prob_now = log_prob(new, after)
    log_ratio = normalized_log_ratio(new, old, after) if rule.ratio_norm else log_prob_now - log_prob_now.detach()
    advantages = draw(64, seed=3)
    surrogate = rule.surrogate(log_ratio, advantages, new, old)
    assert torch.equal(surrogate.ratio, torch.ones(64)) and not surrogate.left_out.any()
    (gradient,) = torch.autograd.grad(surrogate.loss.sum(), weight, retain_graph=True)
    (plain,) = torch.autograd.grad((-advantages * log_prob_now).sum(), weight)
    scale = float(old.std) if rule.ratio_norm else 1.0
    torch.testing.assert_close(gradient, scale * plain)


def test_chunks_share_the_geometric_mean_of_their_ratios_and_weigh_equally() -> None:
    log_ratios, sizes = draw(3, 9), (2, 3, 4)
    ratios = np.exp(log_ratios.numpy())
    shared = np.exp(chunk_means(log_ratios, sizes).numpy())
    for start, stop in ((0, 2), (2, 5), (5, 9)):
        expected = ratios[:, start:stop].prod(1) ** (1 / (stop - start))
        np.testing.assert_allclose(shared[:, start:stop], np.repeat(expected[:, None], stop - start, 1), rtol=1e-5)
    weights = np.array(step_weights(sizes))
    np.testing.assert_allclose([weights[:2].sum(), weights[2:5].sum(), weights[5:].sum()], [3, 3, 3])
    assert step_weights((1, 1, 1)) == [1.0, 1.0, 1.0] and step_weights((3,)) == [1.0, 1.0, 1.0]
    assert torch.equal(chunk_means(log_ratios, (1,) * 9), log_ratios)


def test_the_change_of_latents_is_relative() -> None:
    states = draw(2, 4, 3, 3)
    x = states.numpy()
    expected = np.abs(x[:, 1:] - x[:, :-1]).sum((2, 3)) / np.abs(x[:, :-1]).sum((2, 3))
    np.testing.assert_allclose(relative_change(states).numpy(), expected.mean(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "sizes"),
    [
        ([5, 4, 3, 2, 3, 4, 5, 6], (3, 3, 2)),  # rises after its fourth value; the five steps that rise are too many
        ([1, 2, 4, 8, 16, 32], (3, 3)),  # never turns
        ([3, 2, 1, 5, 4, 3], (2, 1, 3)),
        ([1, 2, 1, 2], (1, 1, 2)),
        ([1.0], (1,)),
        ([1.0, 2.0], (2,)),
        ([3.0, 2.0, 4.0], (1, 2)),
    ],
)
def test_chunks_end_where_the_change_turns(change: list[float], sizes: tuple[int, ...]) -> None:
    assert chunks_by_change(torch.tensor(change)) == sizes


# Training


def weights_after(tmp_path: Path, name: str, **changes) -> dict[str, Tensor]:
    trainer = build(tmp_path / name, **TWO_UPDATES | changes)
    trainer.train()
    return trained(trainer)


def test_chunks_of_one_step_are_steps_to_the_bit(tmp_path: Path) -> None:
    ones = {"importance_sampling_level": "chunk", "chunk_sizes": [1] * 4}
    assert_same(weights_after(tmp_path, "step"), weights_after(tmp_path, "chunk", **ones))


def test_without_a_bound_mask_and_clip_are_the_same_to_the_bit(tmp_path: Path) -> None:
    mask = weights_after(tmp_path, "mask", loss_type="dppo", kl_mask_threshold=float("inf"))
    clip = weights_after(tmp_path, "clip", epsilon=1e6)
    bounded = weights_after(tmp_path, "bounded", loss_type="dppo", kl_mask_threshold=1e-30)
    assert_same(mask, clip)
    assert any(not torch.equal(mask[name], bounded[name]) for name in mask)


@pytest.mark.parametrize("family", [tiny_sd3, tiny_flux])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_update_has_a_ratio_of_exactly_one(family, loss: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, family(), **TWO_UPDATES | LOSSES[loss])
    trainer.train()
    first, second = logged(trainer, "ratio/max_deviation")
    assert first == 0.0 and second > 0.0
    if loss == "dppo":
        assert logged(trainer, "divergence/max")[0] == 0.0 < logged(trainer, "divergence/mean")[1]
        assert logged(trainer, "mask_ratio")[0] == 0.0 < logged(trainer, "mask_ratio")[1]


@pytest.mark.parametrize("offload", [False, True])
def test_old_means_are_those_of_the_rollout(offload: bool, tmp_path: Path) -> None:
    trainer = build(tmp_path, **TWO_UPDATES | LOSSES["ratio_norm"], offload_trajectories=offload)
    trajectories, position = first_micro_batch(trainer), 2
    inputs = trajectories.transitions(position)
    with torch.no_grad():
        velocity = trainer.policy.velocity(trainer.model, inputs.latents, inputs.step, inputs.conditioning)
    assert torch.equal(inputs.transition(velocity).mean, inputs.old_means)
    assert trajectories.means.shape == (4, 4, *trajectories.states.shape[2:])


def test_recomputed_means_are_those_of_training(tmp_path: Path) -> None:
    changes = {"recompute_old_log_probs": True, "per_device_rollout_batch_size": 3}
    trainer = build(tmp_path, **TWO_UPDATES | LOSSES["dppo"] | changes)
    trainer.train()
    first, second = logged(trainer, "divergence/max")
    assert first == 0.0 < second


def first_micro_batch(trainer) -> Trajectories:
    trainer.model.train()
    return trainer._prepare_inputs([row for row in trainer.get_train_dataloader()][0])


@pytest.mark.parametrize("sizes", [[1, 3], [2, 2], [4]])
def test_gradients_step_by_step_are_those_of_the_product_of_ratios(sizes: list[int], tmp_path: Path) -> None:
    """GCPO's objective in one graph: the mean over trajectories and chunks of the clipped chunk ratio."""
    level = {"importance_sampling_level": "chunk", "chunk_sizes": sizes, "credit": "outcome", "beta": 0.0}
    trainer = build(tmp_path, **TWO_UPDATES | level | GAUSSIAN, epsilon=1e-5, full=True)
    trajectories = first_micro_batch(trainer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1e-3 * draw(*parameter.shape))
    now = trainer.rollouts.recomputed(trajectories, trainer.compute_loss_context_manager)
    inputs = trajectories.with_chunk_ratios(now)
    for position in range(4):
        (trainer.compute_loss(trainer.model, inputs.transitions(position)) / 4).backward()
    stepwise = {name: value.grad.clone() for name, value in trainer.model.named_parameters() if value.grad is not None}
    trainer.model.zero_grad()
    log_ratios = []
    for position in range(4):
        one = trajectories.transitions(position)
        velocity = trainer.policy.velocity(trainer.model, one.latents, one.step, one.conditioning)
        log_ratios.append(one.log_prob(one.transition(velocity)) - one.old_log_probs)
    advantages = trajectories.table.advantages[trajectories.rows][:, 0]
    ratios = [chunk.mean(1).exp() for chunk in torch.stack(log_ratios, 1).split(sizes, 1)]
    losses = [-torch.minimum(ratio * advantages, ratio.clamp(1 - 1e-5, 1 + 1e-5) * advantages) for ratio in ratios]
    torch.stack(losses).mean().backward()
    clipped = [clipped_surrogate(ratio.log(), advantages, 1e-5, 1e-5).left_out for ratio in ratios]
    assert 0 < torch.cat(clipped).float().mean() < 1
    for name, gradient in stepwise.items():
        torch.testing.assert_close(gradient, trainer.model.get_parameter(name).grad, rtol=1e-3, atol=1e-7)


def test_the_loss_of_a_normalised_ratio_is_divided_by_the_length_of_the_step(tmp_path: Path) -> None:
    trainer = build(tmp_path, **TWO_UPDATES | LOSSES["ratio_norm"])
    inputs = first_micro_batch(trainer).transitions(1)
    velocity = torch.ones_like(inputs.latents)
    rule, (sigma, sigma_next) = trainer.args.loss_rule, inputs.step.sigmas
    step = transition("flow_sde", inputs.latents, velocity, sigma, sigma_next, 0.7)
    advantages = draw(len(velocity))
    weighted = inputs.surrogate(step, advantages, rule).loss
    old = Transition(inputs.old_means, step.std)
    plain = rule.surrogate(normalized_log_ratio(step, old, inputs.next_latents), advantages, step, old).loss
    torch.testing.assert_close(weighted, plain / (sigma - sigma_next))


def test_chunks_take_evaluations_of_their_own_after_the_first_update(tmp_path: Path) -> None:
    trainer = build(tmp_path, **TWO_UPDATES | LOSSES["trajectory"])
    trainer.train()
    first, second = logged(trainer, "nfe_train")
    assert second == first + 4 * 4
    assert count(trainer.args).rollout["NFE in training"] == [first + second]


@pytest.mark.parametrize("loss", ["dppo", "ratio_norm", "trajectory"])
def test_another_loss_inside_a_rollout_is_refused_on_resuming(loss: str, tmp_path: Path) -> None:
    sampled = first_micro_batch(build(tmp_path, **TWO_UPDATES | GAUSSIAN))
    sampled.check_loss(config(**GAUSSIAN))
    sampled.check_loss(config(**GAUSSIAN, importance_sampling_level="chunk", chunk_sizes=[1] * 9))
    with pytest.raises(ValueError, match="inside a rollout that was sampled for another loss"):
        sampled.check_loss(config(**GAUSSIAN | LOSSES[loss]))


# Settings


def test_published_bounds_are_the_defaults_of_each_loss() -> None:
    assert (config().epsilon, config().epsilon_high, config().kl_mask_threshold) == (1e-5, 1e-5, None)
    dppo = config(loss_type="dppo")
    assert (dppo.epsilon, dppo.epsilon_high, dppo.kl_mask_threshold) == (None, None, 1e-6)
    assert config(**LOSSES["ratio_norm"]).epsilon == 2e-6
    assert config(**LOSSES["chunks by change"], **GAUSSIAN).epsilon_high == 5e-5
    assert config(**LOSSES["chunks by change"]).epsilon == 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "ppo"}, r"loss_type must be one of \('clip', 'dppo'\), got 'ppo'"),
        ({"importance_sampling_level": "token"}, "importance_sampling_level must be one of"),
        ({"loss_type": "dppo", "epsilon": 1e-5}, "epsilon=1e-05 has no effect with loss_type='dppo': leave it out"),
        ({"loss_type": "dppo", "epsilon_high": 1e-5}, "epsilon_high=1e-05 has no effect"),
        ({"loss_type": "dppo", "ratio_norm": True, **GAUSSIAN}, "ratio_norm=True has no effect"),
        ({"kl_mask_threshold": 1e-6}, "kl_mask_threshold=1e-06 has no effect with loss_type='clip'"),
        ({"loss_type": "dppo", "kl_mask_threshold": 0.0}, "kl_mask_threshold must be above 0"),
        ({"ratio_norm": True}, "ratio_norm needs sde_type='flow_sde' or 'dance_sde'.*got 'cps' with 'squared_error'"),
        ({"ratio_norm": True, "sde_type": "flow_sde", "log_prob_type": "squared_error"}, "ratio_norm needs"),
        ({"loss_type": "dppo", "importance_sampling_level": "chunk"}, "'chunk' and loss_type='dppo' cannot be comb"),
        ({"ratio_norm": True, **GAUSSIAN, "importance_sampling_level": "trajectory"}, "and ratio_norm cannot be comb"),
        ({"chunk_sizes": [4, 5]}, "need importance_sampling_level='chunk', got 'step'"),
        ({"importance_sampling_level": "chunk", "chunk_sizes": [4, 4]}, r"9 SDE steps together, got \[4, 4\]"),
        ({"importance_sampling_level": "chunk", "chunk_sizes": [0, 9]}, "at least 1 each"),
        ({"importance_sampling_level": "chunk", "chunk_sizes": [9], "sde_window_share": 0.5}, "measures the number"),
    ],
)
def test_bounds_without_effect_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)
