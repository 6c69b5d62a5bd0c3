"""A run's life: interrupted, begun again, resumed with other settings, finished."""

import json
import logging
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import StableDiffusion3Pipeline
from processes import Python, run_python
from safetensors.torch import load_file
from test_checkpoints import CASES, run
from test_trainer import PROMPTS, assert_same, brightness, build, logged, lora, prompts, trained
from tiny import tiny_sd3

from trl_tpgrpo.callbacks.checkpoints import last_complete
from trl_tpgrpo.callbacks.resuming import SETTINGS, fingerprint
from trl_tpgrpo.rewards import RewardError


SAVES = {"save_strategy": "steps", "save_steps": 1}


def darkness(images: list, **columns: object) -> list[float]:
    return [-value for value in brightness(images)]


def saved_run(folder: Path, **settings: object) -> Path:
    """Train two updates with a checkpoint after each, and return the first checkpoint."""
    build(folder, **SAVES, **settings).train()
    return folder / "checkpoint-1"


# Interrupted


@pytest.mark.parametrize("case", ["inside an epoch", "two processes"])
def test_ctrl_c_saves_after_the_update_and_stops(case: str, tmp_path: Path) -> None:
    """To one process of a run; all stop after the same update."""
    process = run(tmp_path / "stopped", 2, {**CASES[case], "signal": "SIGINT"})
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert "SIGINT: the run stops after this update" in errors
    steps = []
    for end in (tmp_path / "stopped").glob("end-*.pt"):
        _, stopped, step = torch.load(end)
        assert stopped
        steps.append(step)
    assert len(steps) == (2 if case == "two processes" else 1) and len(set(steps)) == 1
    assert last_complete(tmp_path / "stopped").name == f"checkpoint-{steps[0]}"


TWICE = """
import os, signal, sys, time
from pathlib import Path
from test_trainer import brightness, build

def reward(images, **columns):
    os.kill(os.getpid(), signal.SIGINT)
    if sys.argv[2] == "later":
        while not trainer.stop_on_signal._received:  # in the main thread, which may be long in coming to it
            time.sleep(0.01)
        time.sleep(2.5)
    os.kill(os.getpid(), signal.SIGINT)
    return brightness(images)

trainer = build(Path(sys.argv[1]), reward_funcs=reward)
trainer.train()
print("stopped after update", trainer.state.global_step)
"""


@pytest.mark.parametrize("second", ["at once", "later"])
def test_a_second_ctrl_c_ends_at_once_but_not_a_launchers_repetition(second: str, tmp_path: Path) -> None:
    ended = run_python("-c", TWICE, tmp_path, second)
    if second == "later":
        assert ended.returncode != 0 and "KeyboardInterrupt" in ended.stderr
    else:
        assert ended.returncode == 0 and "stopped after update 1" in ended.stdout, ended.stderr[-2000:]


# A folder that has been used


def test_a_folder_with_checkpoints_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    saved_run(tmp_path)
    before = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    other = build(tmp_path, reward_funcs=darkness, **SAVES)
    with pytest.raises(ValueError, match=r"has checkpoints of an earlier run \(checkpoint-1, checkpoint-2\): resume"):
        other.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == before
    build(tmp_path / "fresh", **SAVES).train()


# Resumed with other settings


def resume(checkpoint: Path, folder: Path, pipeline=None, **changes: object):
    trainer = build(folder, pipeline, **{"max_steps": 3, **changes})
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


CHANGES = {
    "beta": ({"beta": 0.1}, r"beta \(0\.0004 before, 0\.1 now\)"),
    "noise_level": ({"noise_level": 0.5}, r"noise_level \(0\.7 before, 0\.5 now\)"),
    "credit": ({"credit": "incremental"}, r"credit \(consistent before, incremental now\)"),
    "guidance_scale": ({"guidance_scale": 1.0}, r"guidance_scale \(2\.0 before, 1\.0 now\)"),
    "reward_funcs": ({"reward_funcs": darkness}, r"reward_funcs \(\['brightness'\] before, \['darkness'\] now\)"),
    "train_dataset": ({"train_dataset": prompts(4)}, r"train_dataset \(6 prompts, \w+ before, 4 prompts, \w+ now\)"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_changes_the_run_stops_it_unless_it_is_accepted(name: str, tmp_path: Path, caplog) -> None:
    checkpoint = saved_run(tmp_path / "first")
    changes, message = CHANGES[name]
    with pytest.raises(ValueError, match=f"other settings: {message}.*resume_with_changes: {name}$"):
        resume(checkpoint, tmp_path / "second", **changes)
    with caplog.at_level(logging.WARNING):
        trainer = resume(checkpoint, tmp_path / "second", **changes, resume_with_changes=[name])
    assert trainer.state.global_step == 3
    assert f"{name}: " in caplog.text and "The run continues with the new value" in caplog.text


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path / "first")
    other = tiny_sd3()
    with torch.no_grad():
        next(other.transformer.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match=r"model\.transformer \(\w+ before, \w+ now\)"):
        resume(checkpoint, tmp_path / "second", other)


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path / "first")
    with pytest.raises(ValueError, match=r"has another adapter \(\{'r': 4\} before, \{'r': 8\} now\)"):
        resume(checkpoint, tmp_path / "second", peft_config=lora(r=8))
    with pytest.raises(ValueError, match=r"has another adapter \(.*'r': 4.* before, None now\)"):
        resume(checkpoint, tmp_path / "second", full=True)


def test_a_learning_rate_that_is_not_applied_says_so(tmp_path: Path, caplog) -> None:
    checkpoint = saved_run(tmp_path / "first")
    with caplog.at_level(logging.WARNING):
        trainer = resume(checkpoint, tmp_path / "second", learning_rate=1e-5)
    assert "learning_rate: 0.01 before, 1e-05 now. It is not applied" in caplog.text
    assert logged(trainer, "learning_rate")[-1] == 1e-2


def test_what_does_not_change_the_run_may_differ(tmp_path: Path, caplog, capsys) -> None:
    """It is listed; and the run says from where it goes on."""
    checkpoint = saved_run(tmp_path / "first")
    with caplog.at_level(logging.WARNING):
        resume(checkpoint, tmp_path / "second", save_strategy="epoch", logging_steps=2)
    assert "logging_steps: 1 before, 2 now. The run continues with the new value." in caplog.text
    assert f"Resuming from {checkpoint}, after update 1." in capsys.readouterr().out


def test_accepting_what_has_not_changed_is_an_error(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path / "first")
    with pytest.raises(ValueError, match=r"resume_with_changes: \['epsilon'\] are equal"):
        resume(checkpoint, tmp_path / "second", resume_with_changes=["epsilon"])
    with pytest.raises(ValueError, match="resume_with_changes is for a resumed run"):
        build(tmp_path / "third", resume_with_changes=["beta"]).train()


def test_a_checkpoint_keeps_no_token(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path, hub_token="secret")
    saved = json.loads((checkpoint / SETTINGS).read_text())
    assert "hub_token" not in saved["settings"] and "secret" not in (checkpoint / SETTINGS).read_text()


def test_models_of_one_architecture_are_told_apart() -> None:
    """By any weight; adapters are left out."""
    one, other = tiny_sd3(), tiny_sd3()
    assert fingerprint(one.transformer) == fingerprint(other.transformer)
    list(other.transformer.parameters())[-1].data.add_(1e-3)
    assert fingerprint(one.transformer) != fingerprint(other.transformer)
    one.transformer.add_adapter(lora(target_modules=["to_q"]))
    assert fingerprint(one.transformer) == fingerprint(tiny_sd3().transformer)


# Finished, and failed


@pytest.mark.parametrize("full", [False, True])
def test_a_finished_run_that_is_resumed_trains_nothing(full: bool, tmp_path: Path, capsys) -> None:
    whole = build(tmp_path, full=full, ema_update_every=1, **SAVES)
    whole.train()
    whole.save_model(str(tmp_path / "whole"))
    again = build(tmp_path, full=full, ema_update_every=1, **SAVES)
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == again.state.global_step == 2
    assert_same(trained(whole), trained(again))
    assert "has made all updates: there is nothing to train" in capsys.readouterr().out
    again.save_model(str(tmp_path / "again"))
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]
    assert files
    for file in files:
        assert_same(load_file(tmp_path / "whole" / file), load_file(tmp_path / "again" / file))


def test_what_a_failed_call_recorded_is_not_counted_by_the_next(tmp_path: Path) -> None:
    calls = []

    def reward(images: list, **columns: object) -> list[float]:
        calls.append(len(images))
        if len(calls) == 1:
            raise RuntimeError("once")
        return brightness(images)

    trainer = build(tmp_path, reward_funcs=reward, max_steps=1, per_device_rollout_batch_size=2)
    with pytest.raises(RewardError):
        trainer.train()
    trainer.train()
    whole = build(tmp_path, max_steps=1, per_device_rollout_batch_size=2)
    whole.train()
    assert logged(trainer, "nfe") == logged(whole, "nfe")


def test_the_weights_of_an_interrupted_command_are_found(tmp_path: Path) -> None:
    """By `load_lora_weights` in its folder, and its exit code tells it from a finished one."""
    (tmp_path / "rewards_of_a_test.py").write_text(
        "import os, signal\nfrom trl_tpgrpo.rewards import brightness\n\n"
        "def stopping(images, **columns):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    return brightness(images)\n"
    )
    tiny_sd3().save_pretrained(tmp_path / "model")
    Dataset.from_dict({"prompt": PROMPTS}).to_json(tmp_path / "data" / "train.json")
    command = [
        *("-m", "trl_tpgrpo", "train", "--model_name_or_path", str(tmp_path / "model")),
        *("--dataset_name", str(tmp_path / "data"), "--reward_funcs", "rewards_of_a_test.stopping", "--use_peft"),
        *("--height", "16", "--width", "16", "--num_inference_steps", "4", "--num_generations", "2", "--use_cpu"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--max_steps", "5"),
        *("--output_dir", str(tmp_path / "out"), "--report_to", "none", "--max_sequence_length", "8"),
    ]
    ended = run_python(*command, cwd=tmp_path)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr[-2000:]
    assert "Stopped by SIGTERM, with a checkpoint and the current weights saved" in ended.stdout
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "model")
    pipeline.load_lora_weights(tmp_path / "out")
    assert (tmp_path / "out/checkpoint-1").is_dir()


# Printing

PRINTING = """
import sys
from pathlib import Path
from datasets import Dataset
from test_trainer import brightness, build

prompts = Dataset.from_dict({"prompt": ["ein gr\\u00fcner Kreis \\U0001f7e2"] * 6, "topic": list(range(6))})
trainer = build(Path(sys.argv[1]), train_dataset=prompts, log_completions=True, disable_tqdm=sys.argv[2] == "lines")
if trainer.progress in trainer.callback_handler.callbacks:
    trainer.progress.__init__(shows_bar=True)
trainer.train()
Path(sys.argv[1], "ended").touch()
"""


@pytest.mark.parametrize("shows", ["lines", "bar"])
@pytest.mark.parametrize("terminal", ["ascii", "gone"])
def test_printing_never_ends_a_run(terminal: str, shows: str, tmp_path: Path) -> None:
    """On a terminal that lacks the prompt's letters, and through a pipe that nobody reads any more."""
    process = Python("-c", PRINTING, tmp_path, shows, env={"PYTHONIOENCODING": "ascii"})
    if terminal == "ascii":
        output, errors = process.communicate()
        assert "Samples of update" in output and "gr\\xfcner" in output, errors[-2000:]
    else:
        assert any("update 1" in line for line in process.stdout)
        process.stdout.close()
        process.stderr.close()
        process.wait()
    assert (tmp_path / "ended").exists()
