"""What `trl-tpgrpo plan` says, against what runs log, what PyTorch allocates, and what is published of the models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig
from test_trainer import PROMPTS, build, config, logged, lora, prompts
from test_trainer_cost import every_transition
from tiny import tiny_flux, tiny_sd3
from torch import nn

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.algorithm.rollout import EXACT, roll_out
from trl_tpgrpo.batches import Trajectories
from trl_tpgrpo.commands import plan as command
from trl_tpgrpo.commands.architectures import FOLDERS, architecture_folder, load_architecture
from trl_tpgrpo.commands.plan import (
    CONTEXT,
    DECODING,
    GIB,
    PlannedConfig,
    PlannedModel,
    advise,
    changed,
    count,
    count_sampling,
    estimate,
    optimizer_size,
    peak,
    savings,
    weights_size,
)


SD3, FLUX = FOLDERS


# ---------------------------------------------------------------------------------------------------------- the counts


EVALUATIONS, CALLS, IMAGES = "evaluations in sampling", "model calls in sampling", "images decoded and scored"
TRAIN_EVALUATIONS = "evaluations in training"


def total(trainer: TPGRPOTrainer, name: str) -> float:
    """Return the sum over a whole run."""
    return sum(logged(trainer, f"num_{name}"))


CASES = {
    "exact": {},
    "cheap": {"completion": "at_1_2", "num_inference_steps": 5, "per_device_rollout_batch_size": 3},
    "every": {"completion": "exact_every_2", "num_inference_steps": 6},
    "shared": {"share_initial_noise": True, "num_generations": 4, "sde_window_range": [1, 3], "credit": "incremental"},
    "outcome": {"credit": "outcome"},
    "without a reference": {"beta": 0.0},
    "twice": {"num_iterations": 2, "max_steps": 4},
    "twice without a reference": {"num_iterations": 2, "beta": 0.0, "max_steps": 4},
    "two updates": {"steps_per_generation": 2, "max_steps": 4},
    "recomputed": {"steps_per_generation": 2, "max_steps": 4, "recompute_old_log_probs": True},
    "recomputed twice": {"recompute_old_log_probs": True, "num_iterations": 2, "max_steps": 4},
    "two rollouts an update": {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "by epochs": {"max_steps": -1, "num_train_epochs": 2},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", [tiny_sd3, tiny_flux])
def test_counts_are_those_that_a_run_logs(name: str, family, tmp_path: Path, monkeypatch) -> None:
    trainer = build(tmp_path, family(), **{"guidance_scale": 1.0, **CASES[name]})
    monkeypatch.setattr(Trajectories, "contributing", every_transition)  # the most there may be, with beta = 0 too
    trainer.train()
    counts = count(trainer.args, len(trainer.train_dataset))
    rollouts = counts.num_rollouts
    assert trainer.state.global_step == counts.num_updates
    for name, counted in (
        ("evaluations", EVALUATIONS),
        ("calls", CALLS),
        ("decoded_images", IMAGES),
        ("scored_images", IMAGES),
        ("train_evaluations", TRAIN_EVALUATIONS),
    ):
        assert [total(trainer, name)] == [rollouts * number for number in counts.rollout[counted]]


def test_counts_of_a_random_window_are_a_mean_and_a_range(tmp_path: Path) -> None:
    trainer = build(tmp_path, num_inference_steps=6, sde_window_size=2, sde_window_range=[0, 5], max_steps=8)
    trainer.train()
    args = trainer.args
    drawn = [trainer.rollouts.draw_window(generation) for generation in range(8)]
    fixed = [changed(args, {"sde_window_range": [window.start, window.stop]}) for window in drawn]
    assert logged(trainer, "num_evaluations") == [count(each).rollout[EVALUATIONS][0] for each in fixed]
    assert len(set(logged(trainer, "num_evaluations"))) > 1
    evaluations = count(args).rollout[EVALUATIONS]
    assert (min(evaluations), sum(evaluations) / len(evaluations), max(evaluations)) == (4 * 9, 4 * 12, 4 * 15)


def test_a_measured_window_takes_at_most_what_is_said(tmp_path: Path) -> None:
    trainer = build(tmp_path, sde_window_share=0.5, num_inference_steps=6, share_initial_noise=True)
    trainer.train()
    counts = count(trainer.args).rollout
    first, second = logged(trainer, "num_evaluations")
    assert [first - second] == count_sampling(trainer.args, 4, EXACT)[0]
    assert second <= counts[EVALUATIONS][0]
    assert logged(trainer, "num_train_evaluations")[1] <= counts[TRAIN_EVALUATIONS][0]


def test_checks_of_completions_are_counted(tmp_path: Path) -> None:
    trainer = build(tmp_path, completion="one_step", completion_check_every=2)
    trainer.train()
    first, second = logged(trainer, "num_evaluations")
    assert [first - second] == count_sampling(trainer.args, 2, EXACT)[0]


def test_counts_are_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    options = {"num_generations": 4, "per_device_train_batch_size": 4, "generation_batch_size": 32}
    one, four = (count(PlannedConfig(str(tmp_path), num_processes=number, **options)) for number in (1, 4))
    assert {**one.rollout, CALLS: None} == {**four.rollout, CALLS: None}
    by_steps = PlannedConfig(str(tmp_path), num_processes=4, num_generations=4, steps_per_generation=2)
    assert by_steps.generation_batch_size == 9 * 2 * 4
    assert count(by_steps).rollout["trajectories"] == [72]


def test_a_measured_batch_size_leaves_the_calls_open(tmp_path: Path) -> None:
    assert count(config(tmp_path, per_device_rollout_batch_size="auto")).rollout[CALLS] == []


# ------------------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize(
    ("name", "part", "expected"),
    [
        (FLUX, "transformer", 11.90e9),
        (FLUX, "text_encoder_2", 4.76e9),
        (FLUX, "text_encoder", 0.123e9),
        (SD3, "transformer", 2.24e9),
        (SD3, "text_encoder", 0.124e9),
        (SD3, "text_encoder_2", 0.695e9),
        (SD3, "text_encoder_3", 4.76e9),
        (SD3, "vae", 83.8e6),
    ],
)
def test_numbers_of_weights_are_the_published_ones(name: str, part: str, expected: float) -> None:
    with torch.device("meta"):
        pipeline = load_architecture(name, torch.bfloat16, scheduler=None)
    module = pipeline.components[part]
    assert sum(parameter.numel() for parameter in module.parameters()) == pytest.approx(expected, rel=5e-3)
    assert module.dtype == torch.bfloat16 and not module.training


def test_an_architecture_is_a_pipeline_with_weights_of_its_own(tmp_path: Path) -> None:
    own = tiny_sd3()
    own.save_pretrained(tmp_path)
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    pipeline = load_architecture(tmp_path, tokenizer=own.tokenizer)
    assert type(pipeline) is type(own) and pipeline.tokenizer is own.tokenizer
    assert pipeline.scheduler.sigmas.tolist() == own.scheduler.sigmas.tolist()
    for name in ("transformer", "vae", "text_encoder", "text_encoder_3"):
        shapes = [
            {key: value.shape for key, value in each.components[name].state_dict().items()} for each in (own, pipeline)
        ]
        assert shapes[0] == shapes[1]
    assert torch.get_default_dtype() == torch.float32


def test_what_is_no_pipeline_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="holds no model_index.json"):
        architecture_folder(tmp_path)
    with pytest.raises(ValueError, match="'nobody/nothing' is no folder, and its config files cannot be fetched"):
        architecture_folder("nobody/nothing")


# -------------------------------------------------------------------------------------------------------- the memory


def allocated(run: Callable[[], object]) -> int:
    """Return the most bytes that PyTorch's profiler sees allocated at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def saved(run: Callable[[], object], besides: nn.Module) -> int:
    """Return the bytes that autograd saves for the backward pass, besides a module's weights."""
    weights = {value.untyped_storage().data_ptr() for value in besides.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in weights:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def planned_model(folder: Path, args: TPGRPOConfig, peft_config: LoraConfig | None) -> PlannedModel:
    return PlannedModel(folder, args, peft_config, torch.float32)


@pytest.mark.parametrize("family", [tiny_sd3, tiny_flux])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_near_those_of_real_models(family, full: bool, checkpointing: bool, tmp_path: Path) -> None:
    """Compare with what autograd keeps (the plan errs to the safe side, by a third), and with peaks of tiny models."""
    pipeline = family()
    pipeline.save_pretrained(tmp_path / "model")
    options = {"height": 32, "width": 32, "num_generations": 8, "per_device_train_batch_size": 32, "beta": 0.1}
    trainer = build(tmp_path, pipeline, full=full, activation_checkpointing=checkpointing, max_steps=1, **options)
    model = planned_model(tmp_path / "model", trainer.args, None if full else lora())
    num_text_tokens = len(trainer.policy.encode(["a red circle"]).tensors["prompt_embeds"][0])
    model.hidden += (num_text_tokens - model.num_text_tokens) * 32  # tiny tokenizers are not in the config files
    trainer.train()
    trainer.model.train()
    trainer._step = 0
    chunk = trainer._prepare_inputs([{"prompt": prompt, "topic": 0} for prompt in PROMPTS[:4] for _ in range(8)])
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def train() -> None:
        trainer.compute_loss(trainer.model, chunk.transitions(0)).backward()

    def predict() -> None:
        one = chunk.transitions(0)
        trainer.policy.velocity(trainer.model, one.latents, one.timestep, one.conditioning)

    planned = model.activations(trainer.args, 32, trains=True)
    assert 0.6 < planned / allocated(train) < 1.4
    assert 1 < model.activations(trainer.args, 32) / allocated(torch.no_grad()(predict)) < 2
    if not checkpointing:
        assert 1 < planned / saved(predict, trainer.model) < 1.35


def test_what_the_vae_needs_is_what_is_allocated() -> None:
    """Compare with a CPU, whose convolutions take workspaces besides, which are not in the sum."""
    vae = load_architecture(
        SD3, **dict.fromkeys(("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"))
    ).vae
    latents = torch.zeros(2, 16, 8, 8)
    with torch.no_grad():
        most = allocated(lambda: vae.decode(latents))
    assert 0.5 * most < DECODING * 4 * 2 * 64 * 64 < 1.1 * most


def test_weights_and_states_are_those_of_real_tensors(tmp_path: Path) -> None:
    pipeline = tiny_flux()
    pipeline.save_pretrained(tmp_path / "model")
    trainer = build(tmp_path, pipeline, optim="adamw_torch")
    model = planned_model(tmp_path / "model", trainer.args, lora())
    items = estimate(trainer.args, model)["train"]
    trainer.train()
    adapter = [value for value in trainer.model.parameters() if value.requires_grad]
    states = [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
    assert items["adapter"] == items["gradients"] == sum(value.nbytes for value in adapter)
    assert items["optimizer's states"] == sum(value.nbytes for value in states)
    for name, size in (("transformer", items["transformer"]), ("vae", model.vae)):
        weights = [*pipeline.components[name].parameters(), *pipeline.components[name].buffers()]
        base = [value for value in weights if not any(value is other for other in adapter)]
        assert size == sum(value.nbytes for value in base)
    generators = [torch.Generator() for _ in range(4)]
    noise, window = trainer.policy.initial_noise(generators), trainer.args.window(0, 3)
    sigmas = trainer.policy.schedule(4).sigmas
    rollout = roll_out(lambda latents, *_: torch.zeros_like(latents), noise, sigmas, window, generators)
    assert items["states"] == rollout.states.nbytes
    prompts = trainer.policy.encode(PROMPTS[:2]).tensors.values()
    assert items["prompt embeddings"] == sum(value.nbytes for value in prompts)


class Layers(nn.Module):
    """A weight of 64 x 256 and one of 256 x 128, a bias of 256 and a convolution of 30 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(256, 64, bias=False), nn.Linear(128, 256)
        self.convolution = nn.Conv1d(3, 5, 2, bias=False)


def test_quantised_sizes_against_hand_computed_numbers() -> None:
    layers, number, others = Layers().to(torch.bfloat16), 64 * 256 + 256 * 128, 2 * (256 + 30)
    assert weights_size(layers) == 2 * number + others
    assert weights_size(layers, "nf4") == number / 2 + number / 64 + number / 64 / 64 + others
    assert weights_size(layers, "int8") == number + 2 * (64 + 256) + others
    assert weights_size(layers, "fp8") == number + 4 * (64 + 256) + others


@pytest.mark.parametrize(
    ("name", "states", "update"),
    [
        ("adamw_torch_fused", 8 * 6000, 0),
        ("adamw_torch", 8 * 6000, 4 * 6000),
        ("adamw_bnb_8bit", 2 * 5000 + 8 * 1000, 0),
        ("sgd", 0, 0),
        ("unheard_of", 8 * 6000, 4 * 6000),
    ],
)
def test_optimizer_states_against_hand_computed_numbers(name: str, states: int, update: int) -> None:
    assert optimizer_size(name, [5000, 1000]) == (states, update)


def moved(folder: Path, **changes: object) -> dict[str, dict[str, float]]:
    """Return the items by phase of a tiny FLUX, with an adapter unless `full`."""
    full = changes.pop("full", False)
    args = config(folder, per_device_train_batch_size=8, **changes)
    return estimate(args, planned_model(folder / "model", args, None if full else lora()))


def test_items_are_where_the_trainer_has_them(tmp_path: Path) -> None:
    pipeline = tiny_flux()
    pipeline.save_pretrained(tmp_path / "model")
    adapter, full = moved(tmp_path), moved(tmp_path, full=True, beta=0.1)
    weights = sum(value.nbytes for value in pipeline.transformer.parameters())
    assert adapter["train"]["transformer"] == full["train"]["reference"] == full["train"]["gradients"] == weights
    assert not adapter["train"]["reference"] and adapter["train"]["gradients"] < weights
    assert full["train"]["optimizer's states"] == 2 * weights
    assert full["train"]["moving average"] == weights
    assert not moved(tmp_path, ema_decay=None)["train"]["moving average"]
    states = 8 * 4 * (4 * 16)  # bytes of 8 latents in float32, each 4 tokens of 16 channels
    assert adapter["train"]["states"] == 4 * states
    assert adapter["decode"]["trajectories"] == 4 * states + 4 * states  # the states and an image of each
    assert "transformer" in adapter["encode"]
    assert "transformer" not in moved(tmp_path, precompute_prompt_embeds=True)["encode"]
    assert not moved(tmp_path, offload_between_phases=True)["train"]["VAE"]
    offloaded = moved(tmp_path, offload_trajectories=True)
    assert not offloaded["train"]["states"]
    assert offloaded["rollout"]["trajectories"] == adapter["rollout"]["trajectories"] - 4 * states
    spared = moved(tmp_path, full=True, beta=0.1, offload_reference=True)
    assert not spared["train"]["reference"] and spared["reference"]["reference"] == weights
    assert spared["train"]["reference's velocities"] == 3 * states


# -------------------------------------------------------------------------------------------------------- the advice


@pytest.fixture(scope="module")
def sd35() -> tuple[PlannedConfig, PlannedModel]:
    """Return SD3.5-medium with an adapter, all on one GPU."""
    args = PlannedConfig("x")
    return args, PlannedModel(architecture_folder(SD3), args, LoraConfig(r=32, lora_alpha=64), torch.bfloat16)


def test_a_run_that_does_not_fit_gets_settings_under_which_it_does(sd35) -> None:
    args, model = sd35
    assert peak(estimate(args, model)) > 16 * GIB
    assert peak(estimate(changed(args, advise(args, model, 16 * GIB)), model)) <= 16 * GIB


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_advice_fits_and_leaves_rollouts_and_updates_as_they_are(share: float, tmp_path: Path) -> None:
    tiny_flux().save_pretrained(tmp_path / "model")
    args = config(tmp_path, per_device_train_batch_size=32, height=32, width=32, beta=0.1)
    model = planned_model(tmp_path / "model", args, None)
    limit = CONTEXT + share * (peak(estimate(args, model)) - CONTEXT)
    again = changed(args, advise(args, model, limit))
    assert peak(estimate(again, model)) <= limit
    before, after = count(args), count(again)
    assert after.updates == before.updates
    assert {**after.rollout, CALLS: None} == {**before.rollout, CALLS: None}


def test_a_run_that_cannot_fit_gets_none(tmp_path: Path) -> None:
    tiny_flux().save_pretrained(tmp_path / "model")
    args = config(tmp_path)
    assert advise(args, planned_model(tmp_path / "model", args, lora()), CONTEXT) is None


def test_advice_asks_for_no_more_than_is_needed(sd35) -> None:
    args, model = sd35
    assert len(advise(args, model, 0.97 * peak(estimate(args, model)))) == 1
    assert advise(args, model, peak(estimate(args, model))) == {}


def test_smaller_micro_batches_make_a_valid_config_of_the_same_updates(tmp_path: Path) -> None:
    args = PlannedConfig(str(tmp_path), per_device_train_batch_size=12, num_generations=24)
    batches = [change for change in savings(args, is_adapter=True) if "generation_batch_size" in change]
    assert [change["per_device_train_batch_size"] for change in batches] == [6, 4, 3, 2, 1]
    for change in batches:
        again = PlannedConfig(str(tmp_path), **{"num_generations": 24, **change})
        assert count(again).updates == count(args).updates
        assert {**count(again).rollout, CALLS: None} == {**count(args).rollout, CALLS: None}


# ------------------------------------------------------------------------------------------------------- the command


def planned(capsys, *options: str) -> str:
    assert command.main(["--output_dir", "x", *options]) == 0
    return capsys.readouterr().out


def row(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(name))[len(name) :].split()


def test_the_command_plans_the_testbed_without_its_weights(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({
            "model_name_or_path": "testbed", "dataset_name": "testbed", "use_peft": True, "height": 32, "width": 32,
            "max_sequence_length": 0, "guidance_scale": 1.0, "num_processes": 2, "reward_funcs": ["no.such.reward"],
            "num_generations": 4, "generation_batch_size": 32, "per_device_train_batch_size": 4, "max_steps": 10,
        })
    )  # fmt: skip
    text = planned(capsys, "--config", str(recipe), "--gpu", "24GB", "--optim", "sgd")
    assert "2 processes" in text and "it fits into 24 GiB" in text
    assert row(text, "evaluations in sampling") == [f"{32 * 55:,}", f"{32 * 55 * 5:,}"]
    assert row(text, "updates") == ["2", "10"]
    assert row(text, "CUDA context") == ["1.00"] * 5


def test_the_command_knows_datasets_on_this_machine_alone(tmp_path: Path, capsys) -> None:
    tiny_sd3().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    prompts(6).to_json(tmp_path / "data" / "train.jsonl")
    options = ["--model_name_or_path", str(tmp_path / "model"), "--num_generations", "2", "--num_train_epochs", "2"]
    options += [
        "--generation_batch_size",
        "4",
        "--per_device_train_batch_size",
        "2",
        "--height",
        "32",
        "--width",
        "32",
    ]
    known = planned(capsys, *options, "--dataset_name", str(tmp_path / "data"))
    assert row(known, "rollouts") == ["6"]
    assert "The length of the run is not known" in planned(capsys, *options, "--dataset_name", "somebody/somewhere")


def test_the_command_prints_settings_that_fit_as_yaml(capsys) -> None:
    options = ["--config", str(Path(__file__).parents[1] / "examples/recipes/testbed.yaml"), "--guidance_scale", "2"]
    text = planned(capsys, *options, "--gpu", "1.1GB")
    assert "it does not fit into 1.1 GiB" in text and "two rows of the model's batch" in text
    assert row(text, "evaluations in training")[-2:] == ["at", "most"]
    lines = text.split("With these settings it takes")[1].splitlines()[1:]
    settings = yaml.safe_load("\n".join(line for line in lines if line.startswith("  ")))
    changes = [item for name, value in settings.items() for item in (f"--{name}", str(value).lower())]
    assert "it fits into 1.1 GiB" in planned(capsys, *options, "--gpu", "1.1GB", *changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model_name_or_path", SD3, "--gpu", "large"],
            "--gpu must be the memory of a GPU, such as 24GB, got 'large'",
        ),
        (["--model_name_or_path", SD3, "--gpu", "0GB"], "--gpu must be"),
        ([], "--model_name_or_path is missing"),
        (["--model_name_or_path", SD3, "--lerning_rate", "1"], "Unknown options: --lerning_rate"),
        (["--model_name_or_path", SD3, "--dtype", "bfloat16"], "Without peft_config all weights are trained"),
    ],
)
def test_wrong_calls_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.main(["--output_dir", "x", *options])


@pytest.mark.parametrize(("given", "size"), [("24GB", 24), ("80 GiB", 80), ("141gb", 141), ("40", 40), ("7.5GB", 7.5)])
def test_sizes_of_gpus_are_read_by_their_trade_name(given: str, size: float) -> None:
    assert command.gpu_size(given) == size * 2**30


def test_planned_settings_are_those_of_a_gpu_elsewhere(tmp_path: Path) -> None:
    args = PlannedConfig(str(tmp_path), num_processes=8, tf32=True)
    assert args.bf16 and args.world_size == 8
    assert not PlannedConfig(str(tmp_path), fp16=True).bf16
