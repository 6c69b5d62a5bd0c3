"""What a disk may do to a run: bits that flip, files that end early, a clock set back, a second run, no room."""

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from processes import CPU, LAUNCH, Python, run_python
from test_trainer import assert_same, brightness, build, prompts, trained
from tiny import tiny_sd3

from trl_tpgrpo import TPGRPOTrainer
from trl_tpgrpo.callbacks.checkpoints import last_complete
from trl_tpgrpo.callbacks.storage import CHECKSUMS, LOCK
from trl_tpgrpo.commands.sample import load_adapter
from trl_tpgrpo.policies.loading import load_pipeline


SAVES = {"save_strategy": "steps", "save_steps": 1, "ema_update_every": 1}
FILES = [
    "checksums.json", "last/pytorch_lora_weights.safetensors", "optimizer.pt", "pytorch_lora_weights.safetensors",
    "rng_state.pth", "rollout_0.pt", "scheduler.pt", "settings.json", "trainer_state.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all that there may be in one: an average, and a rollout that is in use."""
    folder = tmp_path_factory.mktemp("written")
    build(folder, max_steps=2, num_iterations=2, **SAVES).train()
    checkpoint = folder / "checkpoint-1"
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(checkpoint)) for path in files) == sorted(FILES)
    return checkpoint


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> TPGRPOTrainer:
    """A trainer that refuses a checkpoint before it changes."""
    return build(tmp_path_factory.mktemp("resumed"), max_steps=2, num_iterations=2, **SAVES)


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARM = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 7),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(name: str, harm: str, written: Path, resumed: TPGRPOTrainer, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(written, tmp_path / "checkpoint-1")
    HARM[harm](checkpoint / name)
    if name == CHECKSUMS and harm == "deleted":
        return  # as of an earlier version, see below
    named = "checkpoint-1/.* is damaged" if name == CHECKSUMS else f"checkpoint-1/{name} is damaged"
    kinds = (ValueError, FileNotFoundError)  # the latter: without trainer_state.json it is no checkpoint
    with pytest.raises(kinds, match=f"{named}|checkpoint-1 is not a checkpoint, or is incomplete"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("harm", ["truncated", "emptied"])
@pytest.mark.parametrize("name", FILES[1:])
def test_a_damaged_file_of_an_earlier_version_is_named(
    name: str, harm: str, written: Path, resumed: TPGRPOTrainer, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(written, tmp_path / "checkpoint-1")
    (checkpoint / CHECKSUMS).unlink()
    HARM[harm](checkpoint / name)
    with pytest.raises(ValueError, match=f"checkpoint-1/{name} is damaged: it is empty or incomplete"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_without_checksums_is_resumed_with_a_warning(written: Path, tmp_path: Path, caplog) -> None:
    checkpoint = shutil.copytree(written, tmp_path / "checkpoint-1")
    (checkpoint / CHECKSUMS).unlink()
    trainer = build(tmp_path / "run", max_steps=2, num_iterations=2, **SAVES)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2 and "has no checksums.json (of an earlier version?)" in caplog.text


@pytest.mark.parametrize("harm", ["truncated", "emptied"])
def test_damaged_weights_and_prompts_are_named_elsewhere_too(harm: str, written: Path, tmp_path: Path) -> None:
    """Of an adapter, a pipeline's folder, and the encoded prompts of earlier runs."""
    adapter = shutil.copytree(written, tmp_path / "adapter")
    HARM[harm](adapter / "pytorch_lora_weights.safetensors")
    with pytest.raises(OSError, match="adapter/pytorch_lora_weights.safetensors"):  # of diffusers
        load_adapter(tiny_sd3(), str(adapter))
    tiny_sd3().save_pretrained(tmp_path / "model")
    for part in ("vae", "transformer", "text_encoder"):
        shutil.copytree(tmp_path / "model", tmp_path / part)
        HARM[harm](next((tmp_path / part / part).glob("*.safetensors")))
        with pytest.raises((ValueError, OSError), match=f"{tmp_path / part}"):
            load_pipeline(tmp_path / part)
    build(tmp_path / "run", prompt_embeds_dir=str(tmp_path / "texts"), max_steps=1).train()
    for path in (tmp_path / "texts").rglob("*.safetensors"):
        HARM[harm](path)
    with pytest.raises(ValueError, match=rf"{tmp_path}/texts/.+\.safetensors is damaged"):
        build(tmp_path / "run", prompt_embeds_dir=str(tmp_path / "texts"), max_steps=1).train()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_clock_that_was_set_back_deletes_no_new_checkpoint(tmp_path: Path) -> None:
    build(tmp_path, max_steps=2, **SAVES).train()
    for path in tmp_path.glob("checkpoint-*"):
        os.utime(path, (4e9, 4e9))  # as if written in the year 2096
    trainer = build(tmp_path, max_steps=4, save_total_limit=2, **SAVES)
    trainer.train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]


def test_a_run_that_goes_on_from_an_earlier_checkpoint_keeps_what_it_writes(tmp_path: Path, caplog) -> None:
    """The later ones of before are kept, and neither taken for newer nor written over."""
    whole = build(tmp_path, max_steps=4, **SAVES)
    whole.train()
    branch = build(tmp_path, max_steps=3, save_total_limit=2, beta=1.0, resume_with_changes=["beta"], **SAVES)
    before = (tmp_path / "checkpoint-3/optimizer.pt").read_bytes()
    branch.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"] and last_complete(tmp_path).name == "checkpoint-3"
    assert names(tmp_path / "abandoned-1") == ["checkpoint-3", "checkpoint-4"]
    assert (tmp_path / "abandoned-1/checkpoint-3/optimizer.pt").read_bytes() == before
    assert (tmp_path / "checkpoint-3/optimizer.pt").read_bytes() != before
    assert "checkpoint-3, checkpoint-4 was moved to" in caplog.text
    again = build(tmp_path, max_steps=5, **SAVES)
    again.train(resume_from_checkpoint=str(tmp_path / "abandoned-1/checkpoint-4"))
    whole = build(tmp_path / "whole", max_steps=5, **SAVES)
    whole.train()
    assert_same(trained(whole), trained(again))


def test_a_checkpoint_that_is_written_twice_is_the_same_one(tmp_path: Path) -> None:
    """By a signal after the update that ends an epoch, at whose end another is due."""

    def signalling(images: list, **columns: Any) -> list[float]:
        if columns["trainer_state"].global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return brightness(images)

    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "epoch", "reward_funcs": signalling}
    trainer = build(tmp_path, **settings)
    saves = []
    save = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *inputs: (saves.append(trainer.state.global_step), save(*inputs))
    trainer.train()
    assert saves == [3, 3] and names(tmp_path) == ["checkpoint-3"] and not (tmp_path / "abandoned-1").exists()
    build(tmp_path, **settings).train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_kept_though_its_path_was_relative(tmp_path: Path, monkeypatch) -> None:
    """As versions wrote it that did not make `output_dir` absolute."""
    monkeypatch.chdir(tmp_path)
    calls: list[int] = []

    def falling(images: list, **columns: Any) -> list[float]:
        calls.append(0)
        return [-float(len(calls))] * len(images)

    tracked = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "reward", "greater_is_better": True}
    settings: dict[str, Any] = {"reward_funcs": falling, "eval_dataset": prompts(1), **tracked, **SAVES}
    build(Path("run"), max_steps=2, **settings).train()
    path = tmp_path / "run/checkpoint-2/trainer_state.json"
    path.write_text(path.read_text().replace(f"{tmp_path}/", ""))
    assert '"best_model_checkpoint": "run/checkpoint-1"' in path.read_text()
    (path.parent / CHECKSUMS).unlink()
    build(Path("run"), max_steps=4, save_total_limit=2, **settings).train(resume_from_checkpoint=True)
    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-4"]


def test_a_reward_that_changes_the_folder_moves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def wandering(images: list, **columns: Any) -> list[float]:
        os.chdir(tmp_path / "elsewhere")
        return brightness(images)

    trainer = build(Path("run"), reward_funcs=wandering, prompt_embeds_dir="texts", max_steps=1, **SAVES)
    assert trainer.args.output_dir == str(tmp_path / "run")
    trainer.train()
    trainer.save_model()
    assert not list((tmp_path / "elsewhere").iterdir()) and list((tmp_path / "texts").iterdir())
    assert names(tmp_path / "run") == ["checkpoint-1"]
    os.chdir(tmp_path)
    build(Path("run"), max_steps=2, reward_funcs=wandering, prompt_embeds_dir="texts", **SAVES).train(
        "run/checkpoint-1"
    )


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    other = build(tmp_path, max_steps=1)

    def meanwhile(images: list, **columns: Any) -> list[float]:
        where = f"{re.escape(str(tmp_path))} is in use by process {os.getpid()} on "
        with pytest.raises(ValueError, match=where + ".*: wait until it ends, or choose another folder"):
            other.train()
        return brightness(images)

    build(tmp_path, reward_funcs=meanwhile, max_steps=1).train()
    other.train()


HOLDING = """
import sys, time
from accelerate import Accelerator
from trl_tpgrpo.callbacks.storage import locked
with locked(Accelerator(cpu=True), sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""
TWICE = """
import sys
from accelerate import Accelerator
from trl_tpgrpo.callbacks.storage import locked
accelerator, refused = Accelerator(cpu=True), False
with locked(accelerator, sys.argv[1]):
    try:
        with locked(accelerator, sys.argv[1]):
            pass
    except ValueError as error:
        refused = "is in use by process" in str(error)
assert refused and accelerator.num_processes == 2
open(f"{sys.argv[1]}/refused-{accelerator.process_index}", "w").close()
"""


def test_a_run_that_was_killed_holds_no_lock(tmp_path: Path) -> None:
    process = Python("-c", HOLDING, tmp_path, env=CPU)
    assert process.stdout.readline() == "held\n"
    trainer = build(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=f"is in use by process {process.process.pid} on "):
        trainer.train()
    os.kill(process.process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK).exists()
    trainer.train()


def test_all_processes_of_a_second_run_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWICE)
    ended = run_python(*LAUNCH, script, tmp_path, env=CPU)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("refused-*")} == {"refused-0", "refused-1"}


def test_a_folder_without_locks_is_used_with_a_warning(tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr("trl_tpgrpo.callbacks.storage.fcntl", None)
    build(tmp_path, max_steps=1).train()
    assert f"{tmp_path} is not protected from a second run" in caplog.text


ON_A_SMALL_DISK = """
import ctypes, os, subprocess, sys
from pathlib import Path
folder, size = Path(sys.argv[1]), sys.argv[2]
if ctypes.CDLL(None).unshare(0x00020000):  # mounts of its own
    sys.exit(77)
if subprocess.run(["mount", "--make-rprivate", "/"]).returncode:
    sys.exit(77)
if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder]).returncode:
    sys.exit(77)
from test_storage import fill
fill(folder)
"""


def fill(folder: Path) -> None:
    """Train on a disk that has room for one checkpoint and a half; then make room, and go on."""
    (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free - 200_000))
    with pytest.raises(OSError, match="full") as caught:
        build(folder, max_steps=3, **SAVES).train()
    said = (
        rf"The disk of {folder} is full \(.+\)\. Complete checkpoints in {folder}: checkpoint-1\. .+ resume by resume"
    )
    assert re.match(said, str(caught.value)), caught.value
    assert names(folder) == ["checkpoint-1"]  # what was begun is deleted
    (folder / "ballast").unlink()
    again = build(folder, max_steps=3, **SAVES)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


def test_a_full_disk_is_said_in_words_with_what_is_kept(tmp_path: Path) -> None:
    """A real one of 2 MB, where this process may mount it."""
    (tmp_path / "disk").mkdir()
    ended = run_python("-c", ON_A_SMALL_DISK, tmp_path / "disk", 2000, env=CPU)
    if ended.returncode == 77:
        pytest.skip("this process may not mount")
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_a_file_that_cannot_be_written_for_want_of_room_is_said_too(tmp_path: Path, monkeypatch) -> None:
    """By the device that is always full."""
    trainer = build(tmp_path, max_steps=2, **SAVES)
    save = trainer.state.__class__.save_to_json

    def save_to_json(state: Any, path: str) -> None:
        if state.global_step == 2:
            os.symlink("/dev/full", path)
        save(state, path)

    monkeypatch.setattr(trainer.state.__class__, "save_to_json", save_to_json)
    with pytest.raises(
        OSError, match=r"is full \(.+No space left.+\)\. Complete checkpoints in .+: checkpoint-1\. Free space"
    ):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-1"]
