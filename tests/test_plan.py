"""What `trl-tpgrpo plan` says, against what runs log, what PyTorch allocates, and what is published of the models."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from safetensors.torch import load_file
from test_trainer import PROMPTS, build, config, logged, lora, prompts
from test_trainer_cost import every_transition
from tiny import tiny_flux, tiny_sd3
from tiny_flux2 import tiny_chroma, tiny_flux2, tiny_flux2_klein, tiny_krea2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.algorithm.rollout import EXACT, roll_out
from trl_tpgrpo.batches import Trajectories
from trl_tpgrpo.callbacks.costs import Counts, count, count_sampling
from trl_tpgrpo.commands import plan as command
from trl_tpgrpo.commands.architectures import FOLDERS, architecture_folder, load_architecture, load_part
from trl_tpgrpo.commands.hours import GIB, UTILISATION, Flops, count_evaluated, count_flops, find_gpu, time_rows
from trl_tpgrpo.commands.plan import (
    CONTEXT,
    REWARD_MODELS,
    PlannedConfig,
    PlannedModel,
    advise,
    changed,
    elsewhere,
    estimate,
    optimizer_size,
    peak,
    read_options,
    savings,
    weights_size,
)
from trl_tpgrpo.policies.base import FlowPolicy, Guidance
from trl_tpgrpo.policies.loading import build_policy, prepare_transformer


SD3, FLUX, QWEN = "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev", "Qwen/Qwen-Image"
SD3_LARGE, KREA, CHROMA = "stabilityai/stable-diffusion-3.5-large", "krea/Krea-2-Raw", "lodestones/Chroma1-HD"
Z_IMAGE, KLEIN = "Tongyi-MAI/Z-Image", "black-forest-labs/FLUX.2-klein-base-4B"
FLUX2 = "black-forest-labs/FLUX.2-dev"
ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "examples/recipes"


# ---------------------------------------------------------------------------------------------------------- the counts


NFE, CALLS, IMAGES = "NFE in sampling", "model calls in sampling", "images decoded and scored"
TRAIN_NFE = "NFE in training"


def total(trainer: TPGRPOTrainer, name: str) -> float:
    """Return the sum over a whole run."""
    return sum(logged(trainer, name))


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
def test_counts_are_those_that_a_run_logs(name: str, family, tmp_path: Path, monkeypatch, capsys) -> None:
    trainer = build(tmp_path, family(), **{"guidance_scale": 1.0, **CASES[name]})
    monkeypatch.setattr(Trajectories, "contributing", every_transition)  # the most there may be, with beta = 0 too
    capsys.readouterr()
    trainer.train()
    counts = count(trainer.args, len(trainer.train_dataset))
    rollouts = counts.num_rollouts
    nfe = total(trainer, "nfe") + total(trainer, "nfe_train")
    at_most = "" if trainer.args.beta else "at most "
    assert capsys.readouterr().out.splitlines()[1].endswith(f"rollouts, {at_most}{nfe:,.0f} function evaluations")
    assert trainer.state.global_step == counts.num_updates
    for name, counted in (
        ("nfe", NFE),
        ("num_calls", CALLS),
        ("num_decoded_images", IMAGES),
        ("num_scored_images", IMAGES),
        ("nfe_train", TRAIN_NFE),
    ):
        assert [total(trainer, name)] == [rollouts * number for number in counts.rollout[counted]]


@pytest.mark.parametrize("options", [{"eval_steps": 2}, {"eval_steps": 0.3}, {"eval_strategy": "no"}, {}])
def test_counts_of_evaluations_are_those_that_a_run_logs(options: dict, tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "num_inference_steps_eval": 3, "num_generations_eval": 2, "max_steps": 5}
    changes |= {"per_device_eval_batch_size": 2, "eval_on_start": options.get("eval_strategy") != "no"} | options
    trainer = build(tmp_path, eval_dataset=prompts(3), **changes)
    trainer.train()
    images = count_evaluated(trainer.args, 5, 3)
    logs = [entry for entry in trainer.state.log_history if "eval_nfe" in entry]
    assert sum(entry["eval_num_scored_images"] for entry in logs) == images
    assert sum(entry["eval_nfe"] for entry in logs) == 3 * images
    assert count_evaluated(trainer.args, None, None) == (0 if options.get("eval_strategy") else None)


def test_counts_of_a_random_window_are_a_mean_and_a_range(tmp_path: Path) -> None:
    trainer = build(tmp_path, num_inference_steps=6, sde_window_size=2, sde_window_range=[0, 5], max_steps=8)
    trainer.train()
    args = trainer.args
    drawn = [trainer.rollouts.windows.draw(generation) for generation in range(8)]
    fixed = [changed(args, {"sde_window_range": [window.start, window.stop]}) for window in drawn]
    assert logged(trainer, "nfe") == [count(each).rollout[NFE][0] for each in fixed]
    assert len(set(logged(trainer, "nfe"))) > 1
    nfe = count(args).rollout[NFE]
    assert (min(nfe), sum(nfe) / len(nfe), max(nfe)) == (4 * 9, 4 * 12, 4 * 15)


def test_a_measured_window_takes_at_most_what_is_said(tmp_path: Path) -> None:
    trainer = build(tmp_path, sde_window_share=0.5, num_inference_steps=6, share_initial_noise=True)
    trainer.train()
    counts = count(trainer.args).rollout
    first, second = logged(trainer, "nfe")
    assert [first - second] == count_sampling(trainer.args, 4, EXACT)[0]
    assert second <= counts[NFE][0]
    assert logged(trainer, "nfe_train")[1] <= counts[TRAIN_NFE][0]


def test_checks_of_completions_are_counted(tmp_path: Path) -> None:
    trainer = build(tmp_path, completion="one_step", completion_check_every=2)
    trainer.train()
    first, second = logged(trainer, "nfe")
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
        (SD3_LARGE, "transformer", 8.06e9),
        (QWEN, "transformer", 20.43e9),
        (QWEN, "text_encoder", 8.29e9),
        (QWEN, "vae", 127e6),
        (Z_IMAGE, "transformer", 6.15e9),
        (Z_IMAGE, "text_encoder", 4.02e9),
        (KLEIN, "transformer", 3.876e9),
        (KLEIN, "text_encoder", 4.02e9),
        (KLEIN, "vae", 84.0e6),
        (FLUX2, "transformer", 32.22e9),
        (FLUX2, "text_encoder", 24.01e9),
        (KREA, "transformer", 12.82e9),
        (KREA, "text_encoder", 4.44e9),
        (CHROMA, "transformer", 8.9e9),
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


@pytest.mark.parametrize("name", FOLDERS)
def test_each_architecture_has_all_parts_but_tokenizers_and_processors(name: str) -> None:
    with torch.device("meta"):
        pipeline = load_architecture(name, torch.bfloat16, scheduler=load_part(FOLDERS[name], "scheduler"))
    missing = {key for key, part in pipeline.components.items() if part is None}
    assert {key for key in missing if not key.startswith("tokenizer")} <= {"image_encoder", "feature_extractor"}
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)


def test_options_of_a_pipeline_are_those_of_its_index(tmp_path: Path) -> None:
    shutil.copytree(FOLDERS[KREA], tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"is_distilled": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with torch.device("meta"):
        pipelines = [load_architecture(folder, scheduler=None) for folder in (FOLDERS[KREA], tmp_path)]
    assert [pipeline.config.is_distilled for pipeline in pipelines] == [False, True]
    assert len(pipelines[0].text_encoder_select_layers) == pipelines[0].transformer.config.num_text_layers


@pytest.mark.parametrize(
    ("build", "length"), [(tiny_flux2_klein, 24), (tiny_flux2, 48), (tiny_krea2, 16), (tiny_chroma, 8)]
)
def test_other_families_are_planned(build: Callable, length: int, tmp_path: Path) -> None:
    pipeline = build()
    pipeline.save_pretrained(tmp_path)
    args = PlannedConfig("x", height=32, width=16, max_sequence_length=length, beta=0)
    model = PlannedModel(tmp_path, args, lora(), torch.bfloat16)
    blocks = pipeline.transformer._repeated_blocks
    assert model.num_text_tokens == length
    assert model.hidden == (4 * 2 + length) * 32
    assert model.layers == len(blocks)


def test_what_is_no_pipeline_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="has no model_index.json"):
        architecture_folder(tmp_path)
    with pytest.raises(ValueError, match="'nobody/nothing' is not a folder, and its configs cannot be downloaded"):
        architecture_folder("nobody/nothing")


# ---------------------------------------------------------------------------------------------------- FLOPs and hours


def on_meta(name: str | Path, peft_config: LoraConfig | None = None, **guidance: object) -> tuple:
    """Return the policy of an architecture without weights, and the model to train."""
    args = PlannedConfig("x", beta=0, **guidance)
    settings = Guidance(**{name: getattr(args, name) for name in Guidance.__dataclass_fields__})
    with torch.device("meta"):
        pipeline = load_architecture(name, scheduler=load_part(architecture_folder(name), "scheduler"))
        policy = build_policy(pipeline, settings)
        model, _ = prepare_transformer(policy, peft_config, args)
    policy.device = torch.device("cpu")
    return policy, model


def products(model: nn.Module, tokens: dict[str, int]) -> int:
    """FLOPs of linear layers, by hand: those whose name has the key run on so many tokens, all others on one."""
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    number = {name: next((n for key, n in tokens.items() if key in name), 1) for name in linear}
    return sum(2 * number[name] * part.in_features * part.out_features for name, part in linear.items())


def test_flops_of_flux_are_those_of_its_products() -> None:
    """Of 1,024 tokens of image and 128 of text."""
    policy, model = on_meta(FLUX, height=512, width=512, max_sequence_length=128)
    text, image = 128, 1024
    tokens = {"norm": 1, "ff_context": text, "add_": text, "to_add_out": text, "context_embedder": text, "time_": 1}
    tokens |= {"single_transformer_blocks": text + image, "transformer_blocks": image, "x_embedder": image}
    tokens |= {"proj_out": image}
    layers, width = 19 + 38, 24 * 128
    attention = layers * 4 * (text + image) ** 2 * width
    counted = count_flops(policy, is_adapter=True, recomputes=True)
    assert counted.evaluation == products(model, tokens) + attention
    assert counted.transition == 3 * counted.evaluation
    assert count_flops(policy, is_adapter=False, recomputes=False).transition == 3 * counted.evaluation


def test_guidance_is_two_rows_of_sd3() -> None:
    guided, plain = (
        count_flops(on_meta(SD3, max_sequence_length=128, guidance_scale=scale)[0], True, False)
        for scale in (4.5, 1.0)
    )
    assert guided.evaluation == 2 * plain.evaluation and guided.image == plain.image


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_training_are_near_those_of_a_backward_pass(full: bool, checkpointing: bool, tmp_path: Path) -> None:
    """On a tiny model, of which an adapter of rank 1 is a larger part than of a real one."""
    tiny_flux().save_pretrained(tmp_path)
    adapter = LoraConfig(r=1, target_modules=["to_q"])
    policy, model = on_meta(tmp_path, None if full else adapter, height=64, width=64, max_sequence_length=8)
    if checkpointing:
        policy.pipeline.transformer.activation_checkpointing_enable()
    latents = policy.initial_noise([torch.Generator()]).to("meta").requires_grad_()
    with FlopCounterMode(display=False) as counter:
        conditioning = policy.empty_conditioning().to(torch.device("meta"))
        policy.velocity(model.train(), latents, policy.schedule(1)[0], conditioning).sum().backward()
    expected = count_flops(policy, not full, checkpointing).transition
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_flops_of_a_rollout_are_those_of_its_phases() -> None:
    """Two transitions, each trained on twice, with the reference's velocity once."""
    names = [NFE, IMAGES, "transitions trained on", TRAIN_NFE]
    counts = Counts(dict(zip(names, ([10, 20], [3], [2], [2 * 2 + 2]), strict=True)), 1, 7, 7)
    phases = Flops(evaluation=1000, image=10, transition=3000).of_rollout(counts, num_iterations=2)
    assert phases == {"sampling": 15 * 1000, "decoding": 3 * 10, "training": 4 * 3000 + 2 * 1000}


def test_hours_are_flops_over_the_stated_share_of_the_peak(tmp_path: Path) -> None:
    names = [NFE, IMAGES, "transitions trained on", TRAIN_NFE]
    counts = Counts(dict.fromkeys(names, [0]) | {NFE: [10]}, 1, 4, 4)
    flops = Flops(evaluation=10**17, image=10**15, transition=0)
    args = PlannedConfig(str(tmp_path), num_processes=2, num_inference_steps_eval=5)
    rollout, run = row("\n".join(time_rows(args, counts, 2, flops, ["H100"], flops)), "hours on H100")
    pace = 2 * 989e12 * UTILISATION * 3600
    assert float(rollout) == pytest.approx(10 * 1e17 / pace, rel=5e-3)
    assert float(run) == pytest.approx((4 * 10 * 1e17 + 2 * (5 * 1e17 + 1e15)) / pace, rel=5e-3)


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
        trainer.policy.velocity(trainer.model, one.latents, one.step, one.conditioning)

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
    assert 0.5 * most < FlowPolicy.decoding * 4 * 2 * 64 * 64 < 1.1 * most


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


def test_reward_models_are_on_the_device_unless_they_are_offloaded(tmp_path: Path) -> None:
    tiny_flux().save_pretrained(tmp_path / "model")
    size = 4 * (986e6 + 305e6)
    for offloads in (False, True):
        args = config(tmp_path, offload_between_phases=offloads)
        names = ["pick_score", "aesthetic_score", "ocr", "my_rewards.mine"]
        model = PlannedModel(tmp_path / "model", args, lora(), torch.float32, names)
        memory = estimate(args, model)
        assert memory["score"]["reward models"] == size
        assert memory["train"]["reward models"] == (0 if offloads else size)
    assert "score" not in estimate(args, planned_model(tmp_path / "model", args, lora()))


def test_reward_models_have_the_sizes_of_their_documentation() -> None:
    page = (ROOT / "docs/rewards.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\d M+]+) \| ([\d.]+) GiB", page, re.MULTILINE)
    documented = {name: sum(1e6 * int(part.strip(" M")) for part in parts.split("+")) for name, parts, _ in rows}
    assert documented == REWARD_MODELS
    assert all(float(size) == pytest.approx(4 * documented[name] / GIB, rel=0.04) for name, _, size in rows)


def test_what_is_kept_off_the_device_is_what_a_run_keeps_there(tmp_path: Path) -> None:
    pipeline = tiny_flux()
    pipeline.save_pretrained(tmp_path / "model")
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    size = 4 * sum(value.numel() for part in encoders for value in [*part.parameters(), *part.buffers()])
    options = {"offload_trajectories": True, "precompute_prompt_embeds": True, "max_steps": 1}
    trainer = build(tmp_path, pipeline, prompt_embeds_dir=str(tmp_path / "prompts"), **options)
    chunk = trainer.rollouts.generate([{"prompt": PROMPTS[0], "topic": 0}] * 4, 0)
    written = [load_file(file) for file in (tmp_path / "prompts").rglob("*.safetensors")]
    sizes = {sum(value.nbytes for value in tensors.values()) for tensors in written}
    kept = elsewhere(trainer.args, planned_model(tmp_path / "model", trainer.args, lora()), 5)
    assert kept["states"] == chunk.states.nbytes and sizes == {kept["prompt embeddings on disk"] / 5}
    plain = elsewhere(config(tmp_path), planned_model(tmp_path / "model", config(tmp_path), lora()), 5000)
    assert plain == {"prompt embeddings": 1024 * sizes.pop(), "text encoders": size}


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
    assert "2 processes" in text and "it fits in 24 GiB" in text
    assert row(text, "NFE in sampling") == [f"{32 * 55:,}", f"{32 * 55 * 5:,}"]
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
    assert "The length of the run is unknown" in planned(capsys, *options, "--dataset_name", "somebody/somewhere")


def test_the_command_prints_settings_that_fit_as_yaml(capsys) -> None:
    options = ["--config", str(RECIPES / "testbed.yaml"), "--guidance_scale", "2"]
    text = planned(capsys, *options, "--gpu", "1.1GB")
    assert "it does not fit in 1.1 GiB" in text and "two rows of the model's batch" in text
    assert row(text, "NFE in training")[-2:] == ["at", "most"]
    lines = text.split("With these settings, it needs")[1].splitlines()[1:]
    settings = yaml.safe_load("\n".join(line for line in lines if line.startswith("  ")))
    changes = [item for name, value in settings.items() for item in (f"--{name}", str(value).lower())]
    assert "it fits in 1.1 GiB" in planned(capsys, *options, "--gpu", "1.1GB", *changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model_name_or_path", SD3, "--gpu", "large"],
            "--gpu must be one of 3090, .* or a memory such as 24GB, got 'large'",
        ),
        (["--model_name_or_path", SD3, "--gpu", "0GB"], "--gpu must be"),
        (["--model_name_or_path", SD3, "--gpu", "4080"], "--gpu must be one of 3090, 4090"),
        (["--model_name_or_path", SD3, "--gpu", "24576"], "a memory such as 24GB, got '24576'"),
        ([], "--model_name_or_path is missing"),
        (["--model_name_or_path", SD3, "--lerning_rate", "1"], "Unknown options: --lerning_rate"),
        (["--model_name_or_path", SD3, "--dtype", "bfloat16"], "Without peft_config, all weights are trained"),
    ],
)
def test_wrong_calls_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.main(["--output_dir", "x", *options])


@pytest.mark.parametrize(
    ("given", "size", "cards"),
    [
        ("24GB", 24, ["3090", "4090"]),
        ("80 GiB", 80, ["A100-80GB", "H100"]),
        ("141gb", 141, ["H200"]),
        ("40", 40, ["A100-40GB"]),
        ("7.5GB", 7.5, []),
        ("320GB", 320, []),
        ("4090", 24, ["4090"]),
        ("RTX 5090", 32, ["5090"]),
        ("h100", 80, ["H100"]),
    ],
)
def test_gpus_are_found_by_name_or_memory(given: str, size: float, cards: list[str]) -> None:
    assert find_gpu(given) == (size * 2**30, cards)


# ------------------------------------------------------------------------------------------------------- the recipes


SIZES = {"1x24gb": "4090", "1x80gb": "A100-80GB", "paper": "H100"}
PAPERS = ["sd3.5-medium", "flux.1-dev"]
RUNS = [
    (folder.name, size)
    for folder in dict.fromkeys(FOLDERS.values())
    for size in SIZES
    if (RECIPES / f"{folder.name}_{size}.yaml").exists()
]


def recipe(*names: str) -> list[str]:
    return ["--output_dir", "x", "--config", *(str(RECIPES / f"{name}.yaml") for name in names)]


@pytest.mark.parametrize("task", ["composition", "text", "preference"])
@pytest.mark.parametrize(("model", "size"), RUNS)
def test_recipes_are_the_same_run_on_any_number_of_processes(model: str, size: str, task: str) -> None:
    argv = recipe(model, f"{model}_{size}", f"task_{task}")
    runs = {number: read_options([*argv, "--num_processes", str(number)])[4] for number in (1, 2, 8)}
    counts = [count(args) for args in runs.values()]
    assert [args.world_size for args in runs.values()] == [1, 2, 8]
    assert all(each.updates == 2 and each.num_updates == runs[1].max_steps for each in counts)
    assert all({**each.rollout, CALLS: None} == {**counts[0].rollout, CALLS: None} for each in counts)
    for interval in (runs[1].save_steps, runs[1].eval_steps, runs[1].log_images_steps):
        assert interval % counts[0].updates == 0 and interval <= runs[1].max_steps / 2
    text_length = (
        512 if model.startswith(("flux.2", "chroma")) else 128
    )  # where padding is attended to, the pipeline's own
    assert (runs[1].num_generations, runs[1].max_sequence_length) == (24, text_length)


def test_each_architecture_has_recipes() -> None:
    assert {model for model, _ in RUNS} == {folder.name for folder in FOLDERS.values()}
    recipes = [yaml.safe_load((RECIPES / f"{folder.name}.yaml").read_text()) for folder in FOLDERS.values()]
    named = {recipe["model_name_or_path"] for recipe in recipes}
    krea = yaml.safe_load((RECIPES / "flux.1-krea-dev.yaml").read_text())["model_name_or_path"]
    assert named | {krea} == set(FOLDERS)


@pytest.mark.parametrize("number", [1, 2, 8])
def test_the_recipe_of_the_testbed_is_planned_on_any_number_of_processes(number: int, capsys) -> None:
    text = planned(capsys, "--config", str(RECIPES / "testbed.yaml"), "--num_processes", str(number))
    assert row(text, "updates")[-1] == "140" and f"{number} process" in text


@pytest.mark.parametrize("model", PAPERS)
def test_the_papers_recipe_is_the_papers_run(model: str, tmp_path: Path) -> None:
    argv = recipe(model, f"{model}_paper", "task_text")
    _, script, chosen, _, args, _ = read_options(argv)
    paper = TPGRPOConfig(str(tmp_path), use_cpu=True)
    same = ("credit", "completion", "sde_type", "noise_level", "beta", "epsilon", "learning_rate", "ema_decay")
    assert all(getattr(args, name) == getattr(paper, name) for name in same)
    assert (args.generation_batch_size, args.prompts_per_generation, args.world_size) == (1152, 48, 8)
    assert (args.num_inference_steps, args.num_sde_steps) == ((10, 9) if model == "sd3.5-medium" else (6, 5))
    assert (args.fp16, args.bf16) == ((True, False) if model == "sd3.5-medium" else (False, True))
    assert chosen.init_lora_weights == "gaussian"


DAYS = [(model, size) for model, size in RUNS if size != "paper"]
OTHERS = {("flux.2-dev", "1x80gb"): ("H100", 24), ("krea-2-raw", "1x24gb"): ("4090", 48)}  # as their files say


@pytest.mark.parametrize(("model", "size"), DAYS)
def test_the_recipes_of_a_day_end_within_it_on_their_card(model: str, size: str, tmp_path: Path, capsys) -> None:
    """Evaluations included, on as many prompts as the largest of the examples' test sets has."""
    for split, number in {"train": 12_000, "test": 500}.items():
        Dataset.from_dict({"prompt": [f"a cat, {n}" for n in range(number)]}).to_parquet(tmp_path / f"{split}.parquet")
    card, most = OTHERS.get((model, size), (SIZES[size], 24))
    argv = recipe(model, f"{model}_{size}", "task_preference")
    command.main([*argv, "--dataset_name", str(tmp_path), "--gpu", card])
    text = capsys.readouterr().out
    assert most / 2 < float(row(text, f"hours on {card}")[1]) <= most
    assert f"it fits in {size[2:4]} GiB" in text
    assert int(row(text, "NFE in evaluation")[0].replace(",", "")) >= 2 * 500 * 28


def test_planned_settings_are_those_of_a_gpu_elsewhere(tmp_path: Path) -> None:
    args = PlannedConfig(str(tmp_path), num_processes=8, tf32=True)
    assert args.bf16 and args.world_size == 8
    assert not PlannedConfig(str(tmp_path), fp16=True).bf16
