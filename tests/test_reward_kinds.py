"""Rewards of latents, of noisy states and of whole groups: what they are given, what a run with them takes, trains and
refuses."""

import asyncio
import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from test_evaluate import options as evaluation
from test_trainer import PROMPTS, SIZE, assert_same, brightness, build, logged, prompts, trained

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.algorithm.rollout import EXACT
from trl_tpgrpo.callbacks.costs import count
from trl_tpgrpo.commands import evaluate, fidelity, plan
from trl_tpgrpo.rewards import RewardError
from trl_tpgrpo.rewards.contract import declared
from trl_tpgrpo.rewards.remote import RemoteReward
from trl_tpgrpo.rewards.scorer import ImageBatch, Scorer
from trl_tpgrpo.rewards.serving.functions import ServedReward
from trl_tpgrpo.testbed import PIPELINE_KWARGS, TESTBED, prompt_dataset


NUM_STEPS = 4  # T of `build`, of which K = 3 are SDE steps


class Recorder:
    """Takes latents, and says how large the first channel is; keeps what it was given."""

    __name__ = "recorder"

    def __init__(self, **attributes: Any):
        self.calls: list[dict[str, Any]] = []
        vars(self).update({"image_type": "latent"} | attributes)

    def __call__(self, latents: torch.Tensor, prompts: list[str], **given: Any) -> list[float]:
        self.calls.append({"latents": latents.clone(), "prompts": prompts, **given})
        values = latents.flatten(1).mean(1).tolist()
        latents.zero_()  # its own copy
        return values


def states(**attributes: Any) -> Recorder:
    return Recorder(image_type="latent", scores_states=True, **attributes)


def ranks(images: list[Image.Image], prompts: list[str], **columns: Any) -> list[float]:
    """The share of the group that is no brighter."""
    ranks.calls.append((len(images), *dict.fromkeys(prompts)))
    order = np.argsort(np.argsort(brightness(images)))
    return [float(place) / max(len(images) - 1, 1) for place in order]


ranks.scores_groups, ranks.calls = True, []


def counts(trainer: TPGRPOTrainer, *names: str) -> list[float]:
    return [sum(logged(trainer, name)) for name in names]


def scored(trainer: TPGRPOTrainer, number: int = 4, completion: Any = EXACT, window: tuple[int, int] = (0, 3)) -> Any:
    rows = [{"prompt": PROMPTS[index // 2], "topic": index // 2} for index in range(number)]
    generators = trainer.rollouts.generators(0, 0, number)
    return trainer.sample_and_score(rows, generators, trainer.args.window(*window), completion)


# ------------------------------------------------------------------------------------------------------ end to end


def redness(latents: torch.Tensor, **columns: Any) -> torch.Tensor:
    return latents[:, 0].mean((1, 2))


def denoised(latents: torch.Tensor, sigmas: torch.Tensor, **columns: Any) -> torch.Tensor:
    """What a value model may say of a state: the more noise, the closer to the mean over all."""
    return (1 - sigmas) * latents[:, 0].mean((1, 2))


redness.image_type, denoised.scores_states = "latent", True


@pytest.mark.parametrize("function", [redness, denoised, ranks])
def test_each_kind_trains_the_testbed(function, tmp_path: Path) -> None:
    """T = 6 and a window of 3: 6 + 5 + 4 + 3 NFE a trajectory with completions, else Flow-GRPO's 6."""
    ranks.calls.clear()
    args = TPGRPOConfig(
        str(tmp_path), **PIPELINE_KWARGS, guidance_scale=1.0, num_inference_steps=6, num_inference_steps_eval=4,
        sde_window_size=3, num_generations=2, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        max_steps=2, learning_rate=1e-3, use_cpu=True, save_strategy="no", disable_tqdm=True, report_to="none",
    )  # fmt: skip
    trainer = TPGRPOTrainer(TESTBED, function, args, prompt_dataset("train"), peft_config=LoraConfig(r=4))
    before = trained(trainer)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in trained(trainer).items())
    assert np.isfinite(logged(trainer, "loss")).all() and min(logged(trainer, "reward_group_std")) > 0
    expected = 6 if function is denoised else 6 + 5 + 4 + 3
    images = 4 * 4 * 2
    assert counts(trainer, "nfe", "num_decoded_images", "num_scored_images") == [
        expected * 4 * 2, images if function is ranks else 0, images,
    ]  # fmt: skip
    assert ("image_variety" in trainer.state.log_history[0]) == (function is ranks)
    assert function is not ranks or [size for size, *_ in ranks.calls] == [2] * (2 * 4 * 2)
    counted = count(trainer.args, None, trainer.reward_funcs).rollout
    assert counted["NFE in sampling"] == [expected * 4]
    assert counted["images decoded and scored" if function is ranks else "latents scored"] == [images // 2]


# --------------------------------------------------------------------------------------------- what they are given


def test_final_latents_are_the_pipelines_and_each_functions_own(tmp_path: Path) -> None:
    first, second = Recorder(__name__="first"), Recorder(__name__="second", runs_in="thread")
    trainer = build(
        tmp_path, reward_funcs=[first, second], eval_dataset=prompts(2), log_images_steps=None, guidance_scale=2.0
    )
    sampled = scored(trainer)
    for (call,) in (first.calls, second.calls):
        assert torch.equal(call["latents"], sampled.rollout.final_latents) and call["latents"].dtype == torch.float32
        assert call["topic"] == [0, 0, 1, 1] * 4 and "images" not in call and "sigmas" not in call
    assert not sampled.images and torch.equal(sampled.rewards[:, 0], sampled.rewards[:, 1])
    metrics = trainer.evaluate()
    assert metrics["eval_num_decoded_images"] == 0
    generators = trainer.rollouts.generators(2, 0, 2, 0)
    options = {**SIZE, "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
    latents = trainer.policy.pipeline(PROMPTS[:2], generator=generators, **options).images
    assert torch.allclose(first.calls[1]["latents"], latents, atol=1e-5)


@pytest.mark.parametrize("with_images", [False, True])
@pytest.mark.parametrize(
    ("settings", "window", "every"),
    [
        ({}, (0, 3), 1),
        ({"completion": "exact_every_2"}, (0, 3), 2),
        ({"share_initial_noise": True, "offload_trajectories": True}, (1, 3), 1),
    ],
)
def test_states_are_those_before_the_sde_steps(
    settings: dict, window: tuple[int, int], every: int, with_images: bool, tmp_path: Path
) -> None:
    """With and without completions, which functions of images need; the last is the trajectory's end at sigma 0."""
    recorder = states()
    functions = [recorder, brightness] if with_images else [recorder]
    limits = {"sde_window_range": list(window)}
    trainer = build(tmp_path, reward_funcs=functions, max_steps=1, log_images_steps=None, **limits, **settings)
    rollouts, roll_out = [], trainer.rollouts.roll_out
    trainer.rollouts.roll_out = lambda *given: rollouts.append(roll_out(*given)) or rollouts[-1]
    trainer.train()
    (rollout,), (call,) = rollouts, recorder.calls
    starts = list(range(0, window[1] - window[0], every))
    column = rollout.columns
    for index, sigma in enumerate([*trainer.policy.schedule(NUM_STEPS).sigmas[window[0] :][starts].tolist(), 0.0]):
        of_state = column == index
        rows = rollout.rows[of_state]
        assert len(rows) == (2 if settings.get("share_initial_noise") and index == 0 else 4)
        assert (call["sigmas"][of_state] == sigma).all()
        expected = rollout.states[rows, starts[index]] if sigma else rollout.final_latents[of_state]
        assert torch.equal(call["latents"][of_state], expected)
        assert call["topic"] and len(call["prompts"]) == len(column)
    decoded, made = counts(trainer, "num_decoded_images", "num_scored_images")
    assert (decoded, made) == (len(column) if with_images else 0, len(column))
    if not with_images:
        before_they_part = 2 * (window[0] + 1) if settings.get("share_initial_noise") else 0
        assert counts(trainer, "nfe") == [4 * NUM_STEPS - before_they_part]


def test_evaluation_and_outcome_credit_have_final_latents_alone(tmp_path: Path) -> None:
    recorder = states()
    trainer = build(tmp_path, reward_funcs=recorder, credit="outcome", max_steps=1, eval_dataset=prompts(2))
    trainer.train()
    trainer.evaluate()
    assert [call["sigmas"].tolist() for call in recorder.calls] == [[0.0] * 4, [0.0] * 2]


def test_states_beside_images_change_nothing_of_these(tmp_path: Path) -> None:
    """Of weight 0, a function of states leaves a run what it was, to the bit; the table has the rewards of both."""
    plain = build(tmp_path / "plain")
    mixed = build(tmp_path / "mixed", reward_funcs=[brightness, states()], reward_weights=[1.0, 0.0])
    for trainer in (plain, mixed):
        trainer.train()
    assert_same(trained(plain), trained(mixed))
    assert logged(plain, "rewards/brightness/mean") == logged(mixed, "rewards/brightness/mean")
    assert all(logged(mixed, f"rewards/recorder/mean_of_state_{state}") for state in range(4))
    assert counts(mixed, "nfe", "num_scored_images") == counts(plain, "nfe", "num_scored_images")


def test_a_window_is_measured_by_states_too(tmp_path: Path) -> None:
    trainer = build(tmp_path, reward_funcs=states(), sde_window_share=0.1, max_steps=1)
    trainer.train()
    assert counts(trainer, "nfe", "num_decoded_images") == [2 * 4 * NUM_STEPS, 0]


@pytest.mark.parametrize("settings", [{}, {"share_initial_noise": True}, {"runs_in": "thread"}])
def test_a_group_is_scored_at_once(settings: dict, tmp_path: Path) -> None:
    """A function that scores each image by itself gives the same weights whether it gets groups or all."""

    def grouped(images: list[Image.Image], prompts: list[str], topic: list[int], **columns: Any) -> list[float]:
        sizes.append(len(images))
        assert len(set(prompts)) == len(set(topic)) == 1
        return brightness(images)

    sizes: list[int] = []
    grouped.scores_groups, grouped.runs_in = True, settings.pop("runs_in", "main")
    runs = [build(tmp_path, reward_funcs=function, **settings) for function in (brightness, grouped)]
    for run in runs:
        run.train()
    assert_same(*map(trained, runs))
    of_first = [1, 1] if settings else [2, 2]
    assert sizes == 2 * [*of_first, 2, 2, 2, 2, 2, 2]


def test_groups_of_states_async_and_in_evaluation(tmp_path: Path) -> None:
    sizes: list[int] = []

    async def compared(latents: torch.Tensor, sigmas: torch.Tensor, prompts: list[str], **columns: Any) -> list[float]:
        await asyncio.sleep(0)
        assert len(set(prompts)) == len(set(sigmas.tolist())) == 1
        sizes.append(len(latents))
        values = latents.flatten(1).mean(1)
        return (values - values.mean()).tolist()

    compared.scores_states = compared.scores_groups = True
    trainer = build(tmp_path, reward_funcs=compared, max_steps=1, eval_dataset=prompts(4), num_generations_eval=3)
    trainer.train()
    assert sizes == [2] * 2 * 4
    metrics = trainer.evaluate()
    assert sizes[8:] == [3] * 4 and metrics["eval_reward"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="scores groups: 3 rows are no multiple of 2 images"):
        scored(trainer, 3)


def test_samples_are_decoded_only_if_they_are_shown(tmp_path: Path) -> None:
    """With logs of samples on, the first group's images, which those who look would have seen of a decoded rollout."""
    trainer = build(
        tmp_path, reward_funcs=Recorder(), max_steps=1, log_completions=True, eval_dataset=prompts(6)
    )  # fmt: skip
    trainer.train()
    assert counts(trainer, "num_decoded_images") == [2 * NUM_STEPS]
    assert len(list((tmp_path / "completions/step_000001").glob("*.png"))) == 2
    assert trainer.evaluate()["eval_num_decoded_images"] == 6
    assert len(list((tmp_path / "images/eval").glob("*.png"))) == 1
    rows = [{"prompt": prompt, "topic": 0} for prompt in PROMPTS[:2]]
    sampled, _ = trainer.rollouts.evaluate(rows, 0, 2)
    own = trainer.rollouts.decode(sampled.rollout.final_latents).permute(0, 2, 3, 1).numpy()
    (shown,) = trainer.rollouts.shown_images(sampled, [1])
    assert np.array_equal(np.asarray(shown), own[1]) and trainer.rollouts.shown_images(sampled, []) == []


# --------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("kind", [{}, {"scores_states": True}])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda n: [float("nan")] * n, r"'failing' returned nan .* for row 0, prompt '.*'"),
        (lambda n: [1.0], "'failing' returned 1 rewards for 16 latents"),
        (lambda n: 1.0, "'failing' must return a list of numbers, got float"),
        (lambda n: ["good"] * n, "'failing' returned 'good', which is not a number, for row 0, prompt '.*'"),
    ],
)
def test_wrong_rewards_of_latents_are_errors(values, message: str, kind: dict, tmp_path: Path) -> None:
    def failing(latents: torch.Tensor, **columns: Any) -> object:
        return values(len(latents))

    vars(failing).update({"image_type": "latent"} | kind)
    with pytest.raises(RewardError, match=message):
        build(tmp_path, reward_funcs=failing).train()
    assert len(list((tmp_path / "reward_failures").iterdir())) == 1  # there is no image to be kept


GROUPS = ImageBatch([Image.new("RGB", (2, 2))] * 5, None, ["a", "a", "b", "b", "b"], {}, group_sizes=[2, 3])


def failing_group(how: str) -> Any:
    def failing(images: list[Image.Image], prompts: list[str], **columns: Any) -> list[float]:
        calls.append(len(images))
        if prompts[0] == "b":
            if how == "raises":
                raise OSError("no disk")
            if how == "hangs":
                threading.Event().wait(2)
            return [1.0, float("nan"), 2.0] if how == "NaN" else [1.0]
        return [1.0, 2.0]

    calls: list[int] = []
    failing.scores_groups, failing.timeout, failing.calls = True, 0.2 if how == "hangs" else None, calls
    return failing


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "raised OSError: no disk for the group of the prompt 'b'"),
        ("NaN", "returned nan .* for row 3, prompt 'b'"),
        ("short", "returned 1 rewards for 3 images for the group of the prompt 'b'"),
        ("hangs", "has not returned within its timeout of 0.2 seconds for the group of the prompt 'b'"),
    ],
)
def test_a_failure_is_that_of_the_whole_group(how: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        Scorer().start([failing_group(how)], GROUPS, {}).result()
    function = failing_group(how)
    found = Scorer("skip").start([function], GROUPS, {}).result()
    assert found.failed.tolist() == [False, False, True, True, True] and len(found.errors) == 1
    assert found.rewards[0, :2].tolist() == [1.0, 2.0] and found.rewards[0, 2:].isnan().all()
    assert function.calls == [2, 3]  # no image is tried by itself


def test_a_group_that_fails_is_left_out(tmp_path: Path) -> None:
    def failing(images: list[Image.Image], topic: list[int], **columns: Any) -> list[float]:
        if topic[0] == 0:
            raise OSError("no disk")
        return brightness(images)

    failing.scores_groups = True
    trainer = build(
        tmp_path, reward_funcs=failing, reward_failures="skip", per_device_train_batch_size=12, max_steps=1
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "num_failed_images") == [2 * NUM_STEPS] and np.isfinite(logged(trainer, "reward")).all()


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"image_type": "latents"}, "has image_type='latents'; it must be one of"),
        ({"scores_states": 3}, "has scores_states=3; it must be one of"),
        ({"scores_groups": "yes"}, "has scores_groups='yes'; it must be one of"),
        ({"image_type": "pt", "scores_states": True}, "has scores_states and image_type='pt'; leave it out"),
        ({"scores_groups": True, "batch_size": 4}, "has scores_groups and batch_size; leave it out"),
    ],
)
def test_declarations_that_exclude_each_other_are_refused(attributes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"The reward function 'recorder' {message}"):
        declared(Recorder(**attributes))


@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        (states(), {"completion": "ab2_2"}, "completion='ab2_2': all reward functions score noisy states"),
        (states(), {"completion_check_every": 2}, "completion_check_every=2: all reward functions score noisy states"),
        (ranks, {"noise_calibration_iterations": 2}, "noise_calibration_iterations: ranks compare the images of a gr"),
        (ranks, {"num_generations": 3, "generation_batch_size": 12, "eval_dataset": prompts(2),
                 "num_generations_eval": 3, "per_device_eval_batch_size": 4},
         r"'ranks' scores groups: 4 images per process are not a multiple of num_generations_eval \(3\)"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(function, settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path, reward_funcs=function, **settings)


def test_groups_on_two_processes_are_refused(tmp_path: Path, monkeypatch) -> None:
    from trl_tpgrpo.rewards.contract import check_settings

    settings = {"num_generations": 2, "per_device_train_batch_size": 3, "generation_batch_size": 6}
    args = plan.PlannedConfig(str(tmp_path), num_processes=2, **settings)
    with pytest.raises(ValueError, match=r"scores groups: 3 images per process are not a multiple of num_generations"):
        check_settings([ranks], [], args, evaluates=False)
    check_settings([brightness], [ranks], args, evaluates=False)


@pytest.mark.parametrize("name", ["latents", "sigmas"])
def test_columns_that_functions_get_as_something_else_are_refused(name: str, tmp_path: Path) -> None:
    dataset = Dataset.from_dict({"prompt": PROMPTS, name: list(range(6))})
    with pytest.raises(ValueError, match=f"has a column '{name}', a reserved argument of reward functions"):
        build(tmp_path, train_dataset=dataset)


def test_missing_columns_and_arguments_are_named_before_the_first_rollout(tmp_path: Path) -> None:
    def wanting(latents: torch.Tensor, prompts: list[str], answer: list[int], **columns: Any) -> list[float]:
        return [0.0] * len(latents)

    def narrow(latents: torch.Tensor, prompts: list[str], topic: list[int], trainer_state, log_metric, log_extra):
        return [0.0] * len(latents)

    wanting.image_type, narrow.scores_states = "latent", True
    with pytest.raises(
        TypeError, match="'wanting' cannot be called with .*latents.* missing a required argument: 'ans"
    ):
        build(tmp_path, reward_funcs=wanting)
    with pytest.raises(TypeError, match="'narrow' cannot be called with .*sigmas"):
        build(tmp_path, reward_funcs=narrow)


@pytest.mark.parametrize("attributes", [{"image_type": "latent"}, {"scores_states": True}, {"scores_groups": True}])
def test_servers_refuse_what_they_cannot_be_sent(attributes: dict, tmp_path: Path) -> None:
    (name,) = attributes
    served = functools.partial(brightness)
    vars(served).update({"__name__": "served"} | attributes)
    with pytest.raises(ValueError, match=f"The reward function 'served' has {name}"):
        ServedReward(served)
    if name != "scores_groups":
        remote = functools.partial(RemoteReward("http://127.0.0.1:1", "served"))
        vars(remote).update({"__name__": "served"} | attributes)
        with pytest.raises(
            TypeError, match="'served' cannot be called with .*: missing a required argument: 'images'"
        ):
            build(tmp_path, reward_funcs=remote)


# --------------------------------------------------------------------------------------------------------- commands


MODULE = """
def final(latents, **columns):
    return latents.flatten(1).mean(1)

def noisy(latents, sigmas, **columns):
    return (1 - sigmas) * latents.flatten(1).mean(1)

final.image_type, noisy.scores_states = "latent", True
"""


@pytest.mark.parametrize(("function", "nfe"), [("final", 55), ("noisy", 10), ("absent", 55)])
def test_a_plan_knows_what_is_completed_and_decoded(
    function: str, nfe: int, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / f"own_{function}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    options = ["--model_name_or_path", "testbed", "--dataset_name", "testbed", "--output_dir", "x", "--max_steps", "2"]
    options += ["--height", "32", "--width", "32", "--num_generations", "4", "--generation_batch_size", "8"]
    options += ["--per_device_train_batch_size", "4", "--max_sequence_length", "0", "--guidance_scale", "1"]
    options += ["--reward_funcs", f"own_{function}.{function}"]
    assert plan.main(options) == 0
    text = capsys.readouterr().out
    lines = {line[:28].strip(): line[28:].split() for line in text.splitlines() if line[:28].strip()}
    assert lines["NFE in sampling"][0] == str(8 * nfe)
    assert lines["images decoded and scored" if function == "absent" else "latents scored"][0] == "80"
    assert ("decoding 0%" in text) == (function != "absent")
    assert ("own_absent.absent cannot be imported here" in text) == (function == "absent")
    if function == "noisy":
        with pytest.raises(ValueError, match="completion='one_step': all reward functions score noisy states"):
            plan.main([*options, "--completion", "one_step"])


def test_evaluate_saves_images_that_its_reward_has_not_seen(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "own_evaluated.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    functions = {"reward_funcs": ["own_evaluated.noisy"], "eval_reward_funcs": ["own_evaluated.final"]}
    assert evaluate.main([*evaluation(tmp_path, num_inference_steps_eval=2, **functions), "--num_prompts", "3"]) == 0
    assert "| noisy | base | 3 |" in capsys.readouterr().out
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3 * 2


def test_fidelity_has_nothing_to_compare(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fidelity, "build_trainer", lambda *_: build(tmp_path, reward_funcs=states()))
    options = ["--model_name_or_path", "testbed", "--dataset_name", "testbed", "--output_dir", "x"]
    with pytest.raises(ValueError, match="All reward functions score noisy states"):
        fidelity.main([*options, "--reward_funcs", "x.y", "--num_inference_steps", "4"])
