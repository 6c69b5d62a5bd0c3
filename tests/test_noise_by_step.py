"""The noise of each step: given as a list, or calibrated before the first rollout, and what follows it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from test_config import config
from test_rollout import noise, schedule, seeded, velocity, window
from test_trainer import assert_same, build, logged, trained
from torch import Tensor

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.algorithm.calibration import calibrate, is_balanced
from trl_tpgrpo.algorithm.rollout import EXACT, roll_out
from trl_tpgrpo.algorithm.sde import SDE_TYPES
from trl_tpgrpo.callbacks.costs import count_sampling
from trl_tpgrpo.callbacks.progress import ProgressDisplay
from trl_tpgrpo.callbacks.storage import CHECKSUMS
from trl_tpgrpo.commands import plan
from trl_tpgrpo.commands.plan import changed
from trl_tpgrpo.commands.train import make_parser
from trl_tpgrpo.testbed import PIPELINE_KWARGS, TESTBED, prompt_dataset
from trl_tpgrpo.testbed.checker import graded_reward


LEVELS = [0.3, 0.6, 0.9]
CALIBRATES = {"noise_calibration_iterations": 2, "noise_calibration_step": 0.125}


# A list


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_a_constant_list_samples_as_the_number_to_the_bit(sde_type: str) -> None:
    number, of_each = (
        roll_out(velocity, noise(), schedule(10), window(2, 5, sde_type, level), seeded(0, 1, 2))
        for level in (0.7, (0.7, 0.7, 0.7))
    )
    assert torch.equal(number.states, of_each.states)
    assert torch.equal(number.log_probs, of_each.log_probs)


def test_a_constant_list_trains_as_the_number_to_the_bit(tmp_path: Path) -> None:
    number, of_each = build(tmp_path), build(tmp_path, noise_level=[0.7] * 3)
    for trainer in (number, of_each):
        trainer.train()
    assert_same(trained(number), trained(of_each))


def by_numpy(
    sde_type: str, x: np.ndarray, v: np.ndarray, sigma: float, after: float, level: float
) -> tuple[np.ndarray, float]:
    """Mean and standard deviation of a step, from the equations of the papers."""
    dt, x0, x1 = after - sigma, x - sigma * v, x + (1 - sigma) * v
    if sde_type == "cps":
        std = after * np.sin(level * np.pi / 2)
        return (1 - after) * x0 + np.sqrt(after**2 - std**2) * x1, std
    s = level * np.sqrt(sigma / (1 - (after if sigma == 1 else sigma))) if sde_type == "flow_sde" else level
    return x + (v + s**2 / (2 * sigma) * x1) * dt, s * np.sqrt(-dt)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_each_step_has_its_own_noise_in_rollout_and_loss(sde_type: str, tmp_path: Path) -> None:
    options = {"log_prob_type": "gaussian", "epsilon": 1e-3, "learning_rate": 1e-4}
    trainer = build(tmp_path, noise_level=LEVELS, sde_type=sde_type, max_steps=1, **options)
    trainer.model.train()
    trajectories = trainer._prepare_inputs([{"prompt": "a red circle", "topic": 0}] * 4)
    trainer._buffered_inputs = None
    for position, level in enumerate(LEVELS):
        step = trajectories.transitions(position)
        with torch.no_grad():
            predicted = trainer.policy.velocity(trainer.model, step.latents, step.step, step.conditioning)
        drawn, sigmas = step.transition(predicted), [float(sigma) for sigma in step.step.sigmas]
        x, v, arrived = (value.double().numpy() for value in (step.latents, predicted, step.next_latents))
        mean, std = by_numpy(sde_type, x, v, *sigmas, level)
        np.testing.assert_allclose(drawn.mean.numpy(), mean, rtol=1e-4, atol=1e-5)
        assert float(drawn.std) == pytest.approx(std, rel=1e-5)
        density = -((arrived - mean) ** 2) / (2 * std**2) - np.log(std) - np.log(2 * np.pi) / 2
        np.testing.assert_allclose(trajectories.log_probs[:, position], density.mean((1, 2, 3)), rtol=1e-3, atol=1e-3)
    trainer.train()
    assert logged(trainer, "ratio/max_deviation") == [0]


def test_noise_of_flow_sde_is_that_of_dance_sde_at_other_levels() -> None:
    """`flow_sde` with `a` is `dance_sde` with `a sqrt(sigma / (1 - sigma))`: the equivalence of docs/algorithm.md."""
    sigmas = schedule(10)[1:5]
    levels = tuple((0.7 * (sigma / (1 - sigma)).sqrt()).item() for sigma in sigmas[:3])
    flow, dance = (
        roll_out(velocity, noise(), schedule(10), window(1, 4, kind, level), seeded(0, 1, 2))
        for kind, level in (("flow_sde", 0.7), ("dance_sde", levels))
    )
    torch.testing.assert_close(flow.states, dance.states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flow.log_probs, dance.log_probs, rtol=1e-4, atol=1e-4)


def test_a_window_takes_the_noise_of_its_steps() -> None:
    made = config(noise_level=[0.1, 0.2, 0.3, 0.4], sde_window_range=[1, 5], sde_window_size=2)
    assert [made.window(start, start + 2).noise_level for start in made.window_starts] == [
        (0.1, 0.2), (0.2, 0.3), (0.3, 0.4),
    ]  # fmt: skip
    assert [made.window(2, 4).noise_of(step) for step in (2, 3)] == [0.2, 0.3]
    assert made.window(2, 4, [1.0, 0.9, 0.8, 0.7]).noise_level == (0.9, 0.8)


def test_the_command_line_and_recipes_take_a_number_or_a_list(tmp_path: Path) -> None:
    def parsed(line: str, *options: str) -> object:
        (tmp_path / "recipe.yaml").write_text(f"output_dir: unused\nnum_inference_steps: 4\n{line}\n")
        return (
            make_parser().parse_args_and_config(["--config", str(tmp_path / "recipe.yaml"), *options])[3].noise_level
        )

    assert parsed("") == 0.7
    assert parsed("noise_level: 0.5") == parsed("", "--noise_level", "0.5") == 0.5
    assert parsed("noise_level: [0.3, 0.6, 0.9]") == LEVELS
    assert parsed("noise_level: 0.5", "--noise_level", "0.3", "0.6", "0.9") == LEVELS
    assert TPGRPOConfig("unused", noise_level=(0.5,)).given["noise_level"] == 0.5


CPS = {"noise_level": [0.5, 1.5, 0.5], "num_inference_steps": 4}
WRONG = [
    (
        {"noise_level": [0.7] * 8},
        r"or 9 numbers, one per step of sde_window_range \[0, 9\), got 8: \[0.7, ",
    ),
    ({"noise_level": []}, "one number or 9 numbers"),
    (
        {"noise_level": [0.5] * 3, "sde_window_range": [1, 3]},
        r"2 numbers, .* sde_window_range \[1, 3\), got 3",
    ),
    ({"noise_level": [0.5, 0.0, 0.5]}, r"noise_level must be at least 0.0001, got \[0.5, 0.0, 0.5\]"),
    ({"noise_level": [0.5, float("nan")]}, "noise_level must be a finite number or a list, each a finite number"),
    ({"noise_level": "0.5"}, "noise_level must be a finite number or a list, each a finite number"),
    (CPS, r"at most 1 under cps, got \[0.5, 1.5, 0.5\]"),
    ({"noise_calibration_iterations": -1}, "noise_calibration_iterations must be at least 0"),
    ({"noise_calibration_iterations": 1, "noise_calibration_step": 0.0}, "noise_calibration_step must be above 0"),
    ({"noise_calibration_step": 0.1}, r"noise_calibration_step \(0.1\) needs noise_calibration_iterations above 0"),
    ({"noise_calibration_iterations": 1, "credit": "outcome"}, "leave out noise_calibration_iterations, got 1"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_wrong_noise_is_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)
    assert config(**CPS | {"sde_type": "flow_sde"}).noise_level == CPS["noise_level"]


def test_a_window_with_another_number_of_levels_or_none_in_a_step_is_refused() -> None:
    for levels, message in {
        (0.7,) * 2: "2 numbers for the 3 steps",
        (0.7, 0.0, 0.7): r"got \(0.7, 0.0, 0.7\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            roll_out(velocity, noise(), schedule(10), window(2, 5, noise_level=levels), seeded(0, 1, 2))


# The rule of the calibration


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [(0, 0, True), (1, 0, True), (2, 0, False), (0, 2, False), (2, 1, True), (12, 12, True), (14, 10, True),
     (15, 9, False), (9, 15, False), (201, 183, True), (202, 182, False)],
)  # fmt: skip
def test_a_step_is_balanced_within_two_samples_or_a_standard_deviation(
    positive: int, negative: int, expected: bool
) -> None:
    gained = torch.tensor([1.0] * positive + [-1.0] * negative + [0.0, torch.nan])
    assert is_balanced(torch.stack([torch.zeros_like(gained), gained], 1)).tolist() == [expected]


def damaging(harm: float, start: float, num_iterations: int, highest: float = 1.0) -> float:
    """Calibrate a step whose gain is `a e_i - harm a^2` for 100 even `e_i` from -0.99 to 0.99.

    The gain is above 0 where `e_i > harm a`, so that `n- - n+` is twice `50 harm a`, rounded. With a limit of 10 that
    is balanced where `a < 0.09 / harm`.
    """
    drawn, taken = (torch.arange(100, dtype=torch.float64) - 49.5) / 50, []

    def measure(noise_levels: Tensor, iteration: int) -> Tensor:
        taken.append(iteration)
        return torch.stack([torch.zeros_like(drawn), noise_levels * drawn - harm * noise_levels**2], 1)

    found = calibrate(measure, torch.tensor([start], dtype=torch.float64), 0.01, highest, num_iterations)
    assert taken == list(range(num_iterations))
    return found.item()


@pytest.mark.parametrize("start", [0.02, 0.7, 0.95])
@pytest.mark.parametrize("harm", [0.12, 0.18, 0.3, 0.9])
def test_noise_is_raised_and_lowered_to_where_signs_cease_to_be_balanced(start: float, harm: float) -> None:
    found = [damaging(harm, start, number) for number in (100, 101)]
    assert found == pytest.approx([0.09 / harm] * 2, abs=0.0101)
    assert abs(found[0] - found[1]) == pytest.approx(0.01)


def test_noise_stays_within_its_bounds() -> None:
    assert damaging(0.0, 0.7, num_iterations=3) == pytest.approx(0.73)
    assert damaging(0.0, 0.7, num_iterations=20, highest=0.8) == 0.8
    assert damaging(50.0, 0.1, num_iterations=20) == 0.01


# A training's


def test_calibrated_noise_is_taken_logged_and_kept_in_checkpoints(tmp_path: Path) -> None:
    """Inside a rollout, with the window measured after the noise, and an adapter that goes on with both."""
    options = {"sde_window_share": 0.5, "num_inference_steps": 6, "num_iterations": 2, "ema_decay": None, **CALIBRATES}
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = build(tmp_path, **options, **saves)
    whole.train()
    found, taken = whole.rollouts.windows.calibrated_noise, whole.rollouts.windows.measured
    assert len(found) == 5 and {round(abs(level - 0.7), 3) for level in found} <= {0.0, 0.125, 0.25}
    assert any(level != 0.7 for level in found)
    assert taken.noise_level == tuple(found[taken.start : taken.stop])
    assert [logged(whole, f"noise_level/step_{step}") for step in range(5)] == [[pytest.approx(one)] for one in found]
    whole.create_model_card()
    assert f"`noise_level/step_4`, calibrated: {found[4]:.4g}" in (tmp_path / "README.md").read_text()

    def not_again(*args: object) -> None:
        raise AssertionError("measured again")

    resumed = build(tmp_path / "resumed", **options, **saves)
    resumed.rollouts.windows._calibrate_noise = resumed.rollouts.windows._measure = not_again
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert (resumed.rollouts.windows.calibrated_noise, resumed.rollouts.windows.measured) == (found, taken)
    assert_same(trained(whole), trained(resumed))


def test_a_run_goes_on_from_before_with_other_noise_if_that_is_accepted(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1, "sde_window_share": 0.5}
    build(tmp_path, max_steps=1, **saves).train()
    path = tmp_path / "checkpoint-1/rollout_0.pt"
    with torch.serialization.safe_globals([type(window())]):
        saved = torch.load(path, weights_only=True)
    del saved["calibrated_noise"]
    torch.save(saved, path)
    (path.parent / CHECKSUMS).unlink()
    with pytest.raises(ValueError, match=r"noise_calibration_iterations \(0 before, 2 now\)"):
        build(tmp_path / "b", **saves, **CALIBRATES).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    listed = build(tmp_path / "d", **saves, noise_level=LEVELS, resume_with_changes=["noise_level"])
    listed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    taken = listed.rollouts.windows.measured
    assert taken.noise_level == tuple(LEVELS[taken.start : taken.stop])
    resumed = build(tmp_path / "c", **saves, **CALIBRATES, resume_with_changes=list(CALIBRATES))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    found, taken = resumed.rollouts.windows.calibrated_noise, resumed.rollouts.windows.measured
    assert taken.noise_level == tuple(found[taken.start : taken.stop])


def test_what_was_measured_in_other_steps_is_measured_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    windows = build(tmp_path, sde_window_range=[1, 3], **CALIBRATES).rollouts.windows
    windows.calibrated_noise = [0.4, 0.5]
    saved = windows.state_dict()
    same, other = (
        build(tmp_path, sde_window_range=steps, **CALIBRATES).rollouts.windows for steps in ([1, 3], [0, 3])
    )
    same.load_state_dict(saved)
    assert same.calibrated_noise == [0.4, 0.5] and not caplog.messages
    other.load_state_dict(saved)
    assert other.calibrated_noise is None and "sde_window_range or sde_type has changed" in caplog.text


def test_calibration_costs_what_the_plan_says_and_repeats(tmp_path: Path) -> None:
    options = {"num_inference_steps": 5, "sde_window_size": 2, "sde_window_range": [0, 4]}
    options |= {"noise_level": [0.4, 0.5, 0.6, 0.7], "max_steps": 1, **CALIBRATES}
    first, again = build(tmp_path, **options), build(tmp_path, **options)
    for trainer in (first, again):
        trainer.train()
    assert first.rollouts.windows.calibrated_noise == again.rollouts.windows.calibrated_noise
    later = first.rollouts.windows.draw(0)
    assert later.noise_level == tuple(first.rollouts.windows.calibrated_noise[later.start : later.stop])
    whole, drawn = ({"sde_window_range": limits} for limits in ([0, 4], [later.start, later.stop]))
    counted = [
        count_sampling(changed(first.args, limits, {"sde_window_size": size}), 4, EXACT)[0][0]
        for limits, size in ((whole, None), (drawn, 2))
    ]
    expected = 2 * counted[0] + counted[1]
    assert logged(first, "nfe") == [expected]


def test_only_a_training_calibrates_and_others_say_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"before the first rollout: set it to 0 here, and noise_level to"):
        build(tmp_path, **CALIBRATES).rollouts.windows.draw(0)


def test_progress_shows_the_iteration() -> None:
    progress = ProgressDisplay(shows_bar=False)
    parts = [slice(0, 4), slice(4, 8)]
    shown = [progress._part for _ in progress.sweeps(parts, "calibration 2/9, ")]
    assert shown == ["calibration 2/9, sweep 1/2, ", "calibration 2/9, sweep 2/2, "]
    assert [progress._part for _ in progress.sweeps(parts[:1], "calibration 2/9, ")] == ["calibration 2/9, "]


def test_the_plan_tells_of_the_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"height": 32, "width": 32, "max_sequence_length": 0, "num_inference_steps": 5, "num_generations": 4}
    sizes |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "sde_window_size": 2}
    options = {**sizes, "output_dir": "unused", "use_cpu": "true", "noise_calibration_iterations": 7}
    named = [item for name, value in options.items() for item in (f"--{name}", str(value))]
    plan.main(["--model_name_or_path", "testbed", *named])
    told = "noise_calibration_iterations: each adds 120 NFE and 40 images, 7 times."
    assert told in capsys.readouterr().out


def on_testbed(output_dir: Path, **changes: object) -> TPGRPOTrainer:
    settings = {
        "use_cpu": True, **PIPELINE_KWARGS, "guidance_scale": 1.0, "num_inference_steps": 4, "num_generations": 8,
        "sde_window_range": [0, 2], "per_device_train_batch_size": 64, "gradient_accumulation_steps": 1,
        "max_steps": 2, "sde_type": "flow_sde", "noise_level": 1.6, "epsilon": 1e-3, "beta": 0.0, "ema_decay": None,
        "learning_rate": 1e-5, "activation_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
        **changes,
    }  # fmt: skip
    args = TPGRPOConfig(str(output_dir), **settings)
    return TPGRPOTrainer(TESTBED, graded_reward, args, prompt_dataset("train"), peft_config=LoraConfig(r=4))


def test_calibration_brings_the_signs_of_step_rewards_nearer_to_balance(tmp_path: Path) -> None:
    """Two updates on the testbed with far too much noise, with and without calibration."""
    distance = {}
    for iterations in (0, 4):
        step = {"noise_calibration_step": 0.3} if iterations else {}
        trainer = on_testbed(tmp_path, noise_calibration_iterations=iterations, **step)
        trainer.train()
        shares = [logged(trainer, f"step_reward_frac_positive/step_{step}") for step in range(2)]
        distance[iterations] = abs(torch.tensor(shares).mean(1) - 0.5).mean().item()
    assert all(level < 1.6 for level in trainer.rollouts.windows.calibrated_noise)
    assert distance[4] < 0.7 * distance[0]
