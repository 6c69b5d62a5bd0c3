"""The moving average of the weights: what it is, who sees it, and that training never does."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import assert_same, brightness, build, logged, prompts, trained

from trl_tpgrpo import TPGRPOConfig
from trl_tpgrpo.callbacks.storage import CHECKSUMS
from trl_tpgrpo.policies.weights import save_weights


def test_the_average_is_that_of_the_formula(tmp_path: Path) -> None:
    """Moves after updates 2, 4 and 6, with decays 0, 2 / 11 and the limit 0.25 (3 / 12 is not below it)."""
    trainer = build(tmp_path, max_steps=6, ema_decay=0.25, ema_update_every=2)
    weights = []

    def remember(model: torch.nn.Module) -> None:
        weights.append(trained(trainer))

    step_end = trainer.averaged.on_step_end

    def on_step_end(args, state, control, **kwargs) -> None:
        remember(trainer.model)
        step_end(args, state, control, **kwargs)

    trainer.averaged.on_step_end = on_step_end
    trainer.train()
    expected = weights[1]
    for decay, after in ((2 / 11, weights[3]), (0.25, weights[5])):
        expected = {name: decay * value + (1 - decay) * after[name] for name, value in expected.items()}
    with trainer.averaged.in_use():
        averaged = trained(trainer)
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value, rtol=0, atol=1e-6)
    assert trainer.averaged.num_moves == 3
    assert_same(trained(trainer), weights[5])


def test_the_average_never_changes_training(tmp_path: Path) -> None:
    runs = [
        build(tmp_path / str(decay), max_steps=4, ema_update_every=1, ema_decay=decay, eval_dataset=prompts(4),
              eval_steps=1, eval_strategy="steps", per_device_eval_batch_size=4, save_strategy="steps", save_steps=2)
        for decay in (None, 0.9)
    ]  # fmt: skip
    for run in runs:
        run.train()
    assert_same(*map(trained, runs))
    first, second = (logged(run, "eval_reward") for run in runs)
    assert first[0] == second[0] and first[1:] != second[1:]  # the first average is the weights themselves


def test_evaluation_sees_the_average_and_gives_the_weights_back_after_an_error(tmp_path: Path) -> None:
    seen = []

    def reward(images, **columns: object) -> list[float]:
        seen.append(trained(trainer))
        if len(seen) == 4:
            raise OSError("broken")
        return brightness(images)

    trainer = build(tmp_path, max_steps=3, ema_update_every=1, reward_funcs=reward, eval_dataset=prompts(4))
    trainer.train()
    own = trained(trainer)
    with trainer.averaged.in_use():
        averaged = trained(trainer)
    assert any(not torch.equal(own[name], averaged[name]) for name in own)
    with pytest.raises(Exception, match="broken"):
        trainer.evaluate()
    assert_same(seen[-1], averaged)
    assert_same(trained(trainer), own)


@pytest.mark.parametrize("full", [False, True])
def test_saved_weights_are_the_average(full: bool, tmp_path: Path) -> None:
    trainer = build(
        tmp_path, full=full, max_steps=3, ema_update_every=1, learning_rate=1e-3, save_strategy="steps", save_steps=3
    )
    trainer.train()
    name = "transformer/diffusion_pytorch_model.safetensors" if full else "pytorch_lora_weights.safetensors"
    checkpoint = tmp_path / "checkpoint-3"
    trainer.save_model(str(tmp_path / "saved"))
    saved, in_checkpoint, last = (
        load_file(folder / name) for folder in (tmp_path / "saved", checkpoint, checkpoint / "last")
    )
    assert_same(saved, in_checkpoint)
    assert any(not torch.equal(saved[key], last[key]) for key in saved)
    with trainer.averaged.in_use():
        save_weights(trainer.model, tmp_path / "expected", trainer.policy.pipeline_class)
    assert_same(saved, load_file(tmp_path / "expected" / name))


def test_until_the_first_move_the_weights_themselves_are_saved(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    trainer.train()
    save_weights(trainer.model, tmp_path / "expected", trainer.policy.pipeline_class)
    name = "pytorch_lora_weights.safetensors"
    assert_same(load_file(tmp_path / "checkpoint-3" / name), load_file(tmp_path / "expected" / name))
    assert not (tmp_path / "checkpoint-3/last").exists()


@pytest.mark.parametrize("full", [False, True])
def test_a_resumed_run_has_the_same_weights_and_average(full: bool, tmp_path: Path) -> None:
    options = {"full": full, "learning_rate": 1e-3, "ema_update_every": 2, "num_iterations": 2}
    whole = build(tmp_path / "whole", max_steps=6, save_strategy="steps", save_steps=1, **options)
    whole.train()
    with whole.averaged.in_use():
        expected = trained(whole)
    for step in (1, 3, 4):
        resumed = build(tmp_path / f"from-{step}", max_steps=6, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        assert_same(trained(resumed), trained(whole))
        with resumed.averaged.in_use():
            assert_same(trained(resumed), expected)
        assert resumed.averaged.num_moves == 3
    shutil.rmtree(tmp_path / "whole/checkpoint-4/last")
    (tmp_path / "whole/checkpoint-4" / CHECKSUMS).unlink()  # which earlier versions did not write
    with pytest.raises(FileNotFoundError, match=r"checkpoint-4/last is missing. It has the trained weights"):
        build(tmp_path / "lost", max_steps=6, **options).train(
            resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4")
        )


def test_the_best_average_is_loaded_at_the_end_and_saved(tmp_path: Path) -> None:
    trainer = build(
        tmp_path, max_steps=4, ema_update_every=1, learning_rate=0.1, eval_dataset=prompts(4), eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_reward", per_device_eval_batch_size=4,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    name = "pytorch_lora_weights.safetensors"
    assert_same(load_file(tmp_path / "saved" / name), load_file(Path(trainer.state.best_model_checkpoint) / name))
    best = max(entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry)
    assert trainer.evaluate()["eval_reward"] == best


@pytest.mark.parametrize("changes", [{"ema_decay": 1.0}, {"ema_decay": -0.1}, {"ema_update_every": 0}])
def test_impossible_averages_are_refused(changes: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        TPGRPOConfig(str(tmp_path), use_cpu=True, **changes)


def test_the_default_is_the_papers() -> None:
    config = TPGRPOConfig("x", use_cpu=True)
    assert (config.ema_decay, config.ema_update_every) == (0.9, 8)


def test_evaluations_of_several_datasets_leave_the_weights_as_they_were(tmp_path: Path) -> None:
    """Each is an evaluation within one of all."""
    settings = {"max_steps": 3, "ema_update_every": 1, "num_generations_eval": 2}
    trainer = build(tmp_path, eval_dataset={"some": prompts(4), "others": prompts(2)}, **settings)
    trainer.train()
    assert trainer.averaged.num_moves == 3
    before = trained(trainer)
    metrics = trainer.evaluate()
    assert {"eval_some_reward", "eval_others_reward"} <= set(metrics)
    assert_same(before, trained(trainer))
