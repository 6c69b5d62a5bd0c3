"""What a run pushes to the Hub, when, what comes back from there, and what is said when the Hub fails."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from hub_server import READ, WRITE, HubServer
from huggingface_hub import HfApi, ModelCard, snapshot_download
from PIL import Image
from safetensors.torch import load_file
from test_model_card import parsed
from test_trainer import SIZE, assert_same, build, config, trained
from tiny import tiny_sd3

from trl_tpgrpo import cli
from trl_tpgrpo.commands import train
from trl_tpgrpo.hub import HubError, HubRepository


ROOT = Path(__file__).parents[1]
CARD = {"README.md", "recipe.yaml"}
IMAGES = {f"images/sample_{number}.png" for number in range(4)}
ADAPTER = {"pytorch_lora_weights.safetensors"}
TRANSFORMER = {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}
RESUMABLE = {
    "checksums.json", "pytorch_lora_weights.safetensors", "last/pytorch_lora_weights.safetensors", "optimizer.pt",
    "rng_state.pth", "rollout_0.pt", "scheduler.pt", "settings.json", "trainer_state.json", *CARD,
}  # fmt: skip


def environment(server: HubServer, tmp_path: Path, token: str = WRITE) -> dict[str, str]:
    """The same for another process."""
    return {
        **os.environ, "HF_ENDPOINT": server.endpoint, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip


def pushing(output_dir: Path, **changes: object):
    """A run that saves after each of two updates; its average moves each time."""
    settings = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "ema_update_every": 1, **changes}
    return build(output_dir, **settings)


def steps(*numbers: int) -> list[str]:
    """Return the ends of the messages of the commits of whole checkpoints."""
    return [f"step {number}{what}" for number in numbers for what in ("", ", checkpoint")]


def images_of(pipeline: DiffusionPipeline) -> list[Image.Image]:
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(2)]
    settings = {**SIZE, "guidance_scale": 2.0, "num_inference_steps": 3}
    return pipeline(["a red circle", "two blue squares"], generator=generators, **settings).images


def same_images(one: list[Image.Image], other: list[Image.Image]) -> bool:
    return all(first.tobytes() == second.tobytes() for first, second in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------- there and back again


def test_adapter_comes_back_from_the_hub_as_it_was_trained(hub: HubServer, tmp_path: Path) -> None:
    trainer = pushing(tmp_path / "run", hub_strategy="end")
    trainer.train()
    info = trainer.push_to_hub()
    assert info.commit_url.startswith(f"{hub.endpoint}/me/run/commit/")
    assert set(hub.files("me/run")) == CARD | ADAPTER | IMAGES
    plain = tiny_sd3()
    untrained = images_of(plain)
    plain.load_lora_weights("me/run")
    with trainer.averaged.in_use():
        expected = images_of(trainer.policy.pipeline)
    assert same_images(images_of(plain), expected)
    assert not same_images(untrained, expected)


def test_transformer_comes_back_from_the_hub_as_it_was_trained(hub: HubServer, tmp_path: Path) -> None:
    trainer = pushing(tmp_path / "full", full=True, hub_strategy="end")
    trainer.train()
    trainer.push_to_hub()
    assert set(hub.files("me/full")) == CARD | TRANSFORMER | IMAGES
    plain = tiny_sd3()
    plain.transformer = SD3Transformer2DModel.from_pretrained("me/full", subfolder="transformer")
    with trainer.averaged.in_use():
        expected = images_of(trainer.policy.pipeline)
    assert same_images(images_of(plain), expected)


@pytest.mark.parametrize("full", [False, True])
def test_the_usage_snippet_of_the_card_runs(full: bool, hub: HubServer, tmp_path: Path) -> None:
    tiny_sd3().save_pretrained(tmp_path / "base")
    HfApi().create_repo("me/tiny-sd3")
    HfApi().upload_folder(repo_id="me/tiny-sd3", folder_path=tmp_path / "base")
    trainer = build(tmp_path / "run", DiffusionPipeline.from_pretrained("me/tiny-sd3"), full=full, max_steps=1)
    trainer.train()
    trainer.push_to_hub()
    card = ModelCard.load("me/run")
    assert card.data.base_model == "me/tiny-sd3"
    assert card.data.base_model_relation == ("finetune" if full else "adapter")
    snippet = re.search(r"```python\n(.+?)```", card.text, re.DOTALL)[1]
    names: dict = {}
    exec(snippet.replace("cuda", "cpu").replace("bfloat16", "float32"), names)
    assert names["image"].size == (16, 16)


def test_a_run_goes_on_from_a_pushed_checkpoint(hub: HubServer, tmp_path: Path) -> None:
    whole = pushing(tmp_path / "whole", push_to_hub=False, save_strategy="no", max_steps=4)
    whole.train()
    pushing(tmp_path / "run", hub_strategy="checkpoint").train()
    assert {path for path in hub.files("me/run")} == CARD | ADAPTER | {f"last-checkpoint/{name}" for name in RESUMABLE}
    folder = snapshot_download("me/run", allow_patterns="last-checkpoint/*", local_dir=tmp_path / "elsewhere")
    resumed = pushing(tmp_path / "elsewhere", push_to_hub=False, save_strategy="no", max_steps=4)
    resumed.train(resume_from_checkpoint=f"{folder}/last-checkpoint")
    assert_same(trained(resumed), trained(whole))


# --------------------------------------------------------------------------------------------- what is pushed when


@pytest.mark.parametrize(
    ("strategy", "during", "messages"),
    [
        ("end", None, []),
        ("every_save", CARD | ADAPTER, ["step 1", "step 2"]),
        ("checkpoint", CARD | ADAPTER | {f"last-checkpoint/{name}" for name in RESUMABLE}, steps(1, 2)),
        (
            "all_checkpoints",
            CARD | ADAPTER | {f"checkpoint-{step}/{name}" for step in (1, 2) for name in RESUMABLE},
            steps(1, 2),
        ),
    ],
)
def test_strategies(strategy: str, during: set | None, messages: list, hub: HubServer, tmp_path: Path) -> None:
    trainer = pushing(tmp_path / "run", hub_strategy=strategy, hub_always_push=True, hub_token=WRITE)
    trainer.train()
    assert set(hub.files("me/run")) == (during or set())
    trainer.push_to_hub()
    files, repository = hub.files("me/run"), hub.repositories["me/run"]
    assert set(files) == CARD | ADAPTER | IMAGES | (during or set())
    assert repository.messages == [f"Training in progress, {step}" for step in messages] + ["End of training"]
    assert not any(WRITE.encode() in content or str(tmp_path).encode() in content for content in files.values())
    assert not list((tmp_path / "run").rglob("training_args.bin"))


def test_save_model_pushes_as_in_transformers(hub: HubServer, tmp_path: Path) -> None:
    trainer = pushing(tmp_path / "run", max_steps=1, hub_strategy="end", precompute_prompt_embeds=True)
    trainer.train()
    trainer.save_model()
    assert set(hub.files("me/run")) == CARD | ADAPTER | IMAGES
    assert hub.repositories["me/run"].messages == ["Model save"]


def test_only_the_card_of_a_run_is_pushed_from_its_folder(hub: HubServer, tmp_path: Path) -> None:
    trainer = pushing(tmp_path / "run", max_steps=1)
    for name in ("notes.txt", "images/grid.png", "runs/events", "transformer/of_another_run"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("private")
    trainer.train()
    trainer.push_to_hub()
    assert set(hub.files("me/run")) == CARD | ADAPTER | IMAGES


def test_a_pushed_folder_replaces_the_one_before(hub: HubServer, tmp_path: Path) -> None:
    HfApi().create_repo("me/run")
    for name in ("last-checkpoint/last/stale.safetensors", "images/sample_9.png", "LICENSE"):
        HfApi().upload_file(repo_id="me/run", path_or_fileobj=b"old", path_in_repo=name)
    trainer = pushing(tmp_path / "run", max_steps=1, hub_strategy="checkpoint")
    trainer.train()
    trainer.push_to_hub()
    checkpoint = {f"last-checkpoint/{name}" for name in RESUMABLE}
    assert set(hub.files("me/run")) == CARD | ADAPTER | IMAGES | checkpoint | {"LICENSE"}


def test_private_repository_on_a_branch_with_a_token_of_its_own(hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READ)
    given = {"hub_model_id": "me/secret", "hub_private_repo": True, "hub_revision": "trial", "hub_token": WRITE}
    trainer = pushing(tmp_path / "run", max_steps=1, **given)
    trainer.train()
    trainer.push_to_hub()
    assert hub.repositories["me/secret"].private
    assert set(hub.files("me/secret", "trial")) == CARD | ADAPTER | IMAGES and not hub.files("me/secret")


def test_push_without_push_to_hub_creates_the_repository(hub: HubServer, tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", max_steps=1)
    trainer.train()
    trainer.push_to_hub(private=True, commit_message="By hand")
    assert hub.repositories["me/run"].private and hub.repositories["me/run"].messages == ["By hand"]
    assert 'load_lora_weights("me/run")' in hub.files("me/run")["README.md"].decode()


def test_a_checkpoint_is_not_deleted_while_it_is_pushed(hub: HubServer, tmp_path: Path) -> None:
    """The first push waits until training has ended; the newest checkpoint that was passed over follows it."""
    go_on = threading.Event()
    hub.before_commit = lambda: go_on.wait(30)
    trainer = pushing(tmp_path / "run", hub_strategy="checkpoint", max_steps=4, save_total_limit=1)
    seen = []
    finish = trainer.hub.finish

    def release() -> None:
        seen.extend(sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")))
        go_on.set()
        finish()

    trainer.hub.finish = release
    trainer.train()
    assert seen == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
    assert hub.repositories["me/run"].messages == [f"Training in progress, {step}" for step in steps(1, 4)]


def test_sampling_for_the_card_changes_no_training(hub: HubServer, tmp_path: Path) -> None:
    one, other = (build(tmp_path / name, max_steps=2) for name in ("one", "other"))
    one.train()
    other.push_to_hub()
    other.train()
    assert_same(trained(one), trained(other))


def test_two_processes_push_once(hub: HubServer, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom test_hub import HubError, pushing\n"
        "trainer = pushing(Path(sys.argv[1]) / 'run', hub_strategy='checkpoint', per_device_train_batch_size=2,\n"
        "                  per_device_rollout_batch_size='auto', max_steps=1, hub_always_push=True)\n"
        "trainer.train()\nresult = trainer.push_to_hub()\n"
        "assert (result is None) == (trainer.accelerator.process_index > 0)\n"
        "try:\n    trainer.push_to_hub(token='hf_expired')\n    failed = False\nexcept HubError:\n    failed = True\n"
        "assert failed == trainer.is_world_process_zero()\n"
        "trainer.accelerator.wait_for_everyone()\ntrainer.end()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    run = subprocess.run(
        [*launch, str(script), str(tmp_path)],
        env=environment(hub, tmp_path), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    messages = [*(f"Training in progress, {step}" for step in steps(1)), "End of training"]
    assert hub.repositories["me/run"].messages == messages
    resumable = (RESUMABLE - {"rng_state.pth"}) | {"rollout_1.pt", "rng_state_0.pth", "rng_state_1.pth"}
    assert set(hub.files("me/run")) == CARD | ADAPTER | IMAGES | {f"last-checkpoint/{name}" for name in resumable}


# ------------------------------------------------------------------------------------------- what the Hub may do


def later(error: Exception | str) -> list[str]:
    """The command that a message names."""
    line = next(line for line in str(error).splitlines() if line.startswith("    hf upload"))
    return shlex.split(line)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (("POST", "/commit/", 500), r"the Hub has answered 500: a fault of the test\. This is a failure of the Hub"),
        (("POST", "/preupload/", 503), "the Hub has answered 503"),
        (("POST", "/commit/", 401), "it does not accept the token, which has expired.*hf auth login"),
        (("POST", "/preupload/", 403), "the token may not write to me/run"),
        (("PUT", "/lfs/", None), "(RemoteProtocolError|ReadError|WriteError)"),
        (("POST", "/validate-yaml", 400), "Invalid metadata in README.md"),
    ],
)
def test_a_push_that_fails_loses_nothing_and_names_the_command(
    fault: tuple, message: str, hub: HubServer, tmp_path: Path
) -> None:
    trainer = build(tmp_path / "run", max_steps=1)
    trainer.train()
    hub.fail(*fault)
    with pytest.raises(HubError, match=message) as caught:
        trainer.push_to_hub()
    assert "Pushing to me/run failed" in str(caught.value) and "Nothing is lost" in str(caught.value)
    on_disk = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert on_disk >= CARD | ADAPTER | IMAGES
    hub.faults.clear()
    subprocess.run([f"{sys.prefix}/bin/hf", *later(caught.value)[1:]], env=environment(hub, tmp_path), check=True)
    assert set(hub.files("me/run")) == CARD | ADAPTER | IMAGES
    trainer.push_to_hub()


def test_a_hub_that_cannot_be_reached_stops_a_run_before_it_begins(hub: HubServer, tmp_path: Path) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(
        HubError, match=r"The repository run cannot be created: ConnectError.*Nothing has been trained yet"
    ):
        pushing(tmp_path / "run")


def test_a_hub_that_cannot_be_reached_at_the_end_keeps_the_model(hub: HubServer, tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", max_steps=1)
    trainer.train()
    hub.shutdown()
    hub.server_close()
    with pytest.raises(HubError, match="The repository run cannot be created.*Nothing is lost") as caught:
        trainer.push_to_hub(private=True)
    assert later(caught.value)[:5] == ["hf", "upload", "run", str(tmp_path / "run"), "."]
    assert later(caught.value)[-1] == "--private"
    assert all((tmp_path / "run" / name).exists() for name in CARD | ADAPTER | IMAGES)


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_expired", "401: it does not accept the token"), (READ, "403: the token may not write to me/run")],
)
def test_a_token_that_does_not_do_is_seen_before_training(
    token: str, message: str, hub: HubServer, tmp_path: Path
) -> None:
    with pytest.raises(HubError, match=message):
        pushing(tmp_path / "run", hub_token=token, hub_model_id="me/run")


def test_a_failure_in_mid_run_is_warned_of_with_the_command_that_makes_up_for_it(
    hub: HubServer, tmp_path: Path, caplog
) -> None:
    trainer = pushing(tmp_path / "run", hub_strategy="all_checkpoints")
    hub.fail("POST", "/commit/", 500, times=2)
    trainer.train()
    warnings = [record.message for record in caplog.records if record.name == "trl_tpgrpo.hub.repository"]
    assert len(warnings) == 2 and all("the Hub has answered 500" in warning for warning in warnings)
    trainer.push_to_hub()
    messages = [*(f"Training in progress, {step}" for step in steps(2)), "End of training"]
    assert hub.repositories["me/run"].messages == messages
    assert not any(path.startswith("checkpoint-1/") for path in hub.files("me/run"))
    subprocess.run([f"{sys.prefix}/bin/hf", *later(warnings[1])[1:]], env=environment(hub, tmp_path), check=True)
    checkpoints = {f"checkpoint-{step}/{name}" for step in (1, 2) for name in RESUMABLE}
    assert set(hub.files("me/run")) == CARD | ADAPTER | IMAGES | checkpoints


def test_a_skipped_checkpoint_that_has_been_deleted_is_warned_of(hub: HubServer, tmp_path: Path, caplog) -> None:
    go_on = threading.Event()
    hub.before_commit = lambda: go_on.wait(30)
    repository = HubRepository(config(tmp_path / "run"), is_lora=True)
    repository.create()
    for step in (1, 2):
        checkpoint = tmp_path / f"run/checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
        repository.push_checkpoint(checkpoint, step)
    shutil.rmtree(tmp_path / "run/checkpoint-2")
    go_on.set()
    repository.finish()
    assert hub.repositories["me/run"].messages == ["Training in progress, step 1"]
    assert "checkpoint-2' is not a directory" in caplog.text and not (tmp_path / "run/checkpoint-2").exists()


def test_a_push_that_does_not_block_tells_of_its_failure(hub: HubServer, tmp_path: Path, caplog) -> None:
    trainer = build(tmp_path / "run", max_steps=1)
    trainer.train()
    hub.fail("POST", "/commit/", 500, times=1)
    future = trainer.push_to_hub(blocking=False)
    assert future.exception(timeout=30) is not None
    assert trainer.push_to_hub(blocking=False).result(timeout=30).oid
    assert "the Hub has answered 500" in caplog.text


# ------------------------------------------------------------------------------------------------ the command line


def arguments(tmp_path: Path, *options: str) -> list[str]:
    small = [
        "--num_generations",
        "2",
        "--per_device_train_batch_size",
        "4",
        "--max_steps",
        "1",
        "--disable_tqdm",
        "true",
        "--eval_strategy",
        "no",
        "--eval_on_start",
        "false",
    ]
    recipe = str(ROOT / "examples/recipes/testbed.yaml")
    return ["--config", recipe, "--output_dir", str(tmp_path / "shapes"), "--use_cpu", "true", *small, *options]


def test_train_pushes_and_its_recipe_trains_again(hub: HubServer, tmp_path: Path) -> None:
    """It pushes from a process of its own, with HF_ENDPOINT: nothing in it has been patched."""
    run = subprocess.run(
        [sys.executable, "-m", "trl_tpgrpo", "train", *arguments(tmp_path, "--push_to_hub", "true")],
        env=environment(hub, tmp_path), capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"Pushed to {hub.endpoint}/me/shapes." in run.stdout
    assert set(hub.files("me/shapes")) == CARD | ADAPTER | IMAGES
    assert "datasets" not in ModelCard(hub.files("me/shapes")["README.md"].decode()).data.to_dict()
    (tmp_path / "recipe.yaml").write_bytes(hub.files("me/shapes")["recipe.yaml"])
    script, model, _, args, *_ = parsed(tmp_path / "recipe.yaml", "--output_dir", str(tmp_path / "again"))
    first_script, first_model, _, first, *_ = train.make_parser().parse_args_and_config(arguments(tmp_path))
    assert script == first_script and model == first_model
    assert args.given | {"output_dir": first.output_dir, "disable_tqdm": True} == first.given
    train.main(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "again")])
    one, other = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("shapes", "again"))
    assert_same(one, other)


def test_train_ends_with_the_message_and_no_traceback(hub: HubServer, tmp_path: Path, capsys) -> None:
    hub.fail("POST", "/commit/", 403)
    assert cli.main(["train", *arguments(tmp_path, "--push_to_hub", "true")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("trl-tpgrpo train: error: Pushing to me/shapes failed")
    assert "hf upload me/shapes" in message
    assert (tmp_path / "shapes/pytorch_lora_weights.safetensors").exists()
