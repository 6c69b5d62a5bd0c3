"""Killed runs go on as if nothing had happened, whatever they were doing, and never from half a checkpoint."""

import json
import pickle
import random
import shutil
import signal
import sys
import threading
import types
from collections import deque
from pathlib import Path

import pytest
import torch
from processes import CPU, LAUNCH, Python
from test_trainer import assert_same, build, lora, trained

from trl_tpgrpo.batches import SAVED_CLASSES
from trl_tpgrpo.callbacks import checkpoints
from trl_tpgrpo.callbacks.checkpoints import INCOMPLETE, is_complete, last_complete
from trl_tpgrpo.callbacks.storage import CHECKSUMS, write_checksums
from trl_tpgrpo.policies import weights


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from test_trainer import brightness, build, lora, trained

out, calls, number, options = Path(sys.argv[1]), [], int(sys.argv[2]), json.loads(sys.argv[3])
resume, rank = sys.argv[4] == "resume", int(os.environ.get("RANK", 0))

def counted(images, **columns):
    calls.append(len(images))
    if len(calls) == number and rank == 0:
        os.kill(os.getpid(), getattr(signal, options["signal"]))
    return brightness(images)

counted.__name__ = "brightness"  # a resumed run has the same rewards
settings = {name: value for name, value in options.items() if name not in ("signal", "rank")}
trainer = build(
    out, reward_funcs=counted, peft_config=lora(r=options["rank"]), save_strategy="steps", save_steps=1, **settings
)
trainer.train(resume_from_checkpoint=resume or None)
torch.save((trained(trainer), bool(trainer.stop_on_signal.stopped), trainer.state.global_step), out / f"end-{rank}.pt")
"""
SETTINGS = {"max_steps": 5, "rank": 4, "signal": "SIGKILL"}
SMALL_BATCHES = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 2}
CASES = {
    "inside an epoch": {"per_device_train_batch_size": 2, "num_generations": 2},
    "in the second epoch": {"per_device_train_batch_size": 6},
    "inside a generation cycle": SMALL_BATCHES,
    "two passes over a rollout": {"num_iterations": 2, **SMALL_BATCHES},
    "an average": {"ema_update_every": 1},
    "an 8-bit optimizer": {"optim": "adamw_bnb_8bit", "rank": 256},
    "two processes": {"sde_window_size": 1, "sde_window_range": [0, 3], "processes": 2, **SMALL_BATCHES},
}


def run(output_dir: Path, number: int, options: dict, resume: bool = False) -> Python:
    """A run in a process of its own that sends itself a signal as it scores for the `number`-th time."""
    options = {**SETTINGS, **options}
    launch = LAUNCH if options.pop("processes", 1) == 2 else []
    output_dir.mkdir(exist_ok=True)
    script = output_dir.parent / "script.py"
    script.write_text(SCRIPT)
    how = "resume" if resume else "begin"
    return Python(*launch, script, output_dir, number, json.dumps(options), how, env=CPU)


def finished(output_dir: Path, number: int, options: dict, resume: bool = False) -> tuple:
    """The trained weights of a run, whether a signal stopped it, and its last update."""
    if number < 0 and "processes" not in options:  # no signal: it may as well run here
        settings = {name: value for name, value in {**SETTINGS, **options}.items() if name not in ("signal", "rank")}
        adapter = lora(r=options.get("rank", SETTINGS["rank"]))
        trainer = build(output_dir, peft_config=adapter, save_strategy="steps", save_steps=1, **settings)
        trainer.train(resume_from_checkpoint=resume or None)
        return trained(trainer), bool(trainer.stop_on_signal.stopped), trainer.state.global_step
    process = run(output_dir, number, options, resume)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return torch.load(output_dir / "end-0.pt")


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(case: str, tmp_path: Path) -> None:
    """SIGKILL in a rollout drawn at random, but the first, before which there is no checkpoint."""
    rollouts = {"inside a generation cycle": 2, "two passes over a rollout": 1, "two processes": 2}.get(case, 4)
    number = random.randrange(1, rollouts + 1) + 1
    whole, *_ = finished(tmp_path / "whole", -1, CASES[case])
    process = run(tmp_path / "killed", number, CASES[case])
    _, errors = process.communicate()
    by_signal = -signal.SIGKILL if "processes" not in CASES[case] else 1  # the launcher's own end
    assert process.returncode == by_signal, errors[-3000:]
    assert not (tmp_path / "killed/end-0.pt").exists(), f"rollout {number} was not reached"
    resumed, *_ = finished(tmp_path / "killed", -1, CASES[case], resume=True)
    assert_same(whole, resumed)


def test_sigterm_saves_after_the_update_and_stops(tmp_path: Path) -> None:
    whole, stopped, step = finished(tmp_path / "whole", -1, {})
    assert not stopped and step == 5
    options = {"signal": "SIGTERM"}
    _, stopped, step = finished(tmp_path / "stopped", 3, options)
    assert stopped and step == 3
    assert last_complete(tmp_path / "stopped").name == "checkpoint-3"
    resumed, *_ = finished(tmp_path / "stopped", -1, options, resume=True)
    assert_same(whole, resumed)


def test_sigterm_to_one_process_stops_all_after_the_same_update(tmp_path: Path) -> None:
    options = {**CASES["two processes"], "signal": "SIGTERM"}
    _, stopped, step = finished(tmp_path / "stopped", 2, options)
    _, other_stopped, other_step = torch.load(tmp_path / "stopped/end-1.pt")
    assert stopped and other_stopped and step == other_step == 3  # the second rollout begins with the third update


def test_signals_are_left_alone_outside_of_training_and_in_other_threads(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer = build(tmp_path, max_steps=1)
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


# Crashes while a checkpoint is written


class Crash(BaseException):
    """Nothing of the package catches it."""


POINTS = {
    "before anything": (checkpoints.Path, "mkdir"),
    "the rollout": (checkpoints.torch, "save"),
    "the weights": (weights, "save_weights"),
    "the optimizer": ("trainer", "_save_optimizer_and_scheduler"),
    "the random states": ("trainer", "_save_rng_state"),
    "the trainer's state": ("state", "save_to_json"),
    "the end of writing": (checkpoints.Path, "unlink"),
    "old checkpoints deleted": (checkpoints, "rotate_checkpoints"),
}


CRASHING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "ema_update_every": 2, "max_steps": 4}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    trainer = build(tmp_path_factory.mktemp("whole"), **{**CRASHING, "save_strategy": "no"})
    trainer.train()
    return trained(trainer)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_a_crash_while_writing_leaves_a_checkpoint_to_resume_from(
    point: str, after: bool, uninterrupted: dict, tmp_path: Path, monkeypatch
) -> None:
    """At each thing that is written, before and after it, with only one checkpoint kept."""
    trainer = build(tmp_path / "crashed", **CRASHING)
    holder, name = POINTS[point]
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at_step(3, trainer, patch, holder, name, after)
        trainer.train()
    complete = last_complete(tmp_path / "crashed")
    assert is_complete(complete)
    resumed = build(tmp_path / "crashed", **CRASHING)
    resumed.train(resume_from_checkpoint=True)
    assert_same(uninterrupted, trained(resumed))


def crash_at_step(step: int, trainer, patch, holder, name: str, after: bool) -> None:
    """Make a function raise as the checkpoint of `step` is written."""
    saving, save = [], trainer._save_checkpoint

    def save_checkpoint(*inputs) -> None:
        saving.append(trainer.state.global_step)
        if trainer.state.global_step == step:
            target = (
                {"trainer": trainer, "state": trainer.state}.get(holder, holder) if isinstance(holder, str) else holder
            )
            original = getattr(target, name)

            def crashing(*args, **kwargs):
                if after:
                    original(*args, **kwargs)
                raise Crash

            patch.setattr(target, name, crashing)
        save(*inputs)

    patch.setattr(trainer, "_save_checkpoint", save_checkpoint)


def test_an_incomplete_checkpoint_is_an_error_if_it_is_named(tmp_path: Path) -> None:
    build(tmp_path, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-2" / INCOMPLETE).touch()
    with pytest.raises(FileNotFoundError, match="checkpoint-2 is not a checkpoint, or is incomplete"):
        build(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert last_complete(tmp_path).name == "checkpoint-1"
    with pytest.raises(FileNotFoundError, match="no complete checkpoint to resume from"):
        build(tmp_path / "none").train(resume_from_checkpoint=True)


INSIDE_A_ROLLOUT = {
    "num_iterations": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 2,
    "ema_update_every": 1,
}


def as_version_0_1_0_saved(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewrite the file of a rollout with the classes where they were, and two attributes for the encoded prompts."""
    with torch.serialization.safe_globals(SAVED_CLASSES):
        saved = torch.load(path, weights_only=True)
    encoded = saved["buffered_inputs"][0].conditioning
    assert saved["step"] == 1 and set(encoded.tensors) == {"prompt_embeds", "pooled_prompt_embeds"}
    for conditioning in (encoded, encoded.negative):
        vars(conditioning).update(vars(conditioning).pop("tensors"))
    saved["guard_rails"]["grad_norms"] = deque(saved["guard_rails"]["grad_norms"], maxlen=50)
    with monkeypatch.context() as patch:
        for known, former in (one for one in SAVED_CLASSES if isinstance(one, tuple)):
            name = former.rpartition(".")[0]
            module = sys.modules.get(name) or types.ModuleType(name)
            setattr(module, known.__name__, known)
            patch.setitem(sys.modules, name, module)
            patch.setattr(known, "__module__", name)
        torch.save(saved, path)
    (path.parent / CHECKSUMS).unlink()


def test_a_checkpoint_of_version_0_1_0_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a rollout, whose file had the classes of modules that are elsewhere now."""
    whole = build(tmp_path, **INSIDE_A_ROLLOUT)
    whole.train()
    as_version_0_1_0_saved(tmp_path / "checkpoint-1/rollout_0.pt", monkeypatch)
    written = (tmp_path / "checkpoint-1/rollout_0.pt").read_bytes()
    assert b"trl_tpgrpo.trajectories" in written and b"trl_tpgrpo.policies.base" in written
    resumed = build(tmp_path / "resumed", **INSIDE_A_ROLLOUT)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(trained(whole), trained(resumed))


class Planted:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


PICKLED = ["rollout_0.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.fixture(scope="module")
def inside_a_rollout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inside")
    build(folder, **INSIDE_A_ROLLOUT).train()
    assert sorted(PICKLED) == sorted(path.name for path in (folder / "checkpoint-1").rglob("*.pt*"))
    return folder / "checkpoint-1"


@pytest.mark.parametrize("name", PICKLED)
def test_nothing_in_a_checkpoint_is_executed(name: str, inside_a_rollout: Path, tmp_path: Path) -> None:
    """The checksums are the attacker's too."""
    checkpoint = shutil.copytree(inside_a_rollout, tmp_path / "checkpoint-1")
    torch.save({"step": Planted(tmp_path / "executed")}, checkpoint / name)
    write_checksums(checkpoint, INCOMPLETE)
    with pytest.raises(pickle.UnpicklingError):
        build(tmp_path / "other", **INSIDE_A_ROLLOUT).train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "executed").exists()
    torch.load(checkpoint / name, weights_only=False)  # which would have
    assert (tmp_path / "executed").exists()


def test_a_file_that_others_unpickle_is_named(inside_a_rollout: Path, tmp_path: Path, caplog) -> None:
    """As DeepSpeed and sharded checkpoints have them; not those of the run's own folder."""
    for place in ("own", "other"):
        caplog.clear()
        checkpoint = shutil.copytree(inside_a_rollout, tmp_path / place / "checkpoint-1")
        (checkpoint / "optimizer_0").mkdir()
        (checkpoint / "optimizer_0/.metadata").touch()
        build(tmp_path / "own", **INSIDE_A_ROLLOUT).train(resume_from_checkpoint=str(checkpoint))
        told = f"{checkpoint}/optimizer_0/.metadata: reading it runs any code in it"
        assert (told in caplog.text) == (place == "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 2}, "4 for per_device_train_batch_size, and this run has 2"),
        ({"seed": 7}, "42 for seed, and this run has 7"),
        ({"num_inference_steps": 5}, "4 for num_inference_steps, and this run has 5"),
    ],
)
def test_a_resume_with_other_batches_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    build(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **changes).train(resume_from_checkpoint=True)


def test_old_checkpoints_are_deleted_and_only_weights_kept(tmp_path: Path) -> None:
    build(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2, max_steps=4, save_only_model=True).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert not list(tmp_path.glob("checkpoint-*/rollout_0.pt"))
    with pytest.raises(FileNotFoundError, match="has no optimizer"):
        build(tmp_path, max_steps=6).train(resume_from_checkpoint=True)
