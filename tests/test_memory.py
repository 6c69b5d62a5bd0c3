"""Quantised bases and the options for memory and speed.

What they must not change, and that they do what they are for.
"""

from pathlib import Path

import bitsandbytes
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from PIL import Image
from test_trainer import PROMPTS, assert_same, brightness, build, config, logged, lora, prompts, trained
from tiny import tiny_flux, tiny_sd3
from tiny_qwen import tiny_z_image

from trl_tpgrpo import TPGRPOTrainer, batches
from trl_tpgrpo.batches import sweeps
from trl_tpgrpo.commands import sample
from trl_tpgrpo.policies.base import FlowPolicy, on_device
from trl_tpgrpo.policies.loading import load_policy
from trl_tpgrpo.policies.sharding import check_sharded_optimizer
from trl_tpgrpo.testbed import TESTBED


WIDE = {"r": 256, "lora_alpha": 256}  # bitsandbytes keeps 8-bit states from 4,096 elements on


@pytest.fixture(params=["sd3", "flux"])
def folder(request, tmp_path: Path) -> Path:
    """A saved pipeline in bfloat16, as quantised bases start from."""
    pipeline = {"sd3": tiny_sd3, "flux": tiny_flux}[request.param](dtype=torch.bfloat16)
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def nf4_on_cpu(monkeypatch) -> None:
    """diffusers refuses NF4 without a GPU, though bitsandbytes can; and its packed CPU format has no gradient."""
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *args, **kwargs: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "support_avx512bf16_for_cpu", False, raising=False)


def quantized(folder: Path, output_dir: Path, quantization: str, **changes: object) -> TPGRPOTrainer:
    settings = {
        "quantization": quantization,
        "model_init_kwargs": {"dtype": "bfloat16"},
        "bf16": True,
        "beta": 0.1,
        "optim": "adamw_bnb_8bit",
        "activation_checkpointing": True,
        "learning_rate": 1e-3,
        "max_steps": 4,
        **changes,
    }
    return TPGRPOTrainer(str(folder), brightness, config(output_dir, **settings), prompts(), peft_config=lora(**WIDE))


def check_a_quantized_run(folder: Path, tmp_path: Path, quantization: str) -> TPGRPOTrainer:
    """Ratio 1 before the first update, 8-bit states, an adapter that reloads.

    A resumed run is like the uninterrupted one.
    """
    whole = quantized(folder, tmp_path / "whole", quantization, save_strategy="steps", save_steps=2)
    whole.train()
    assert logged(whole, "ratio/max_deviation")[0] == 0.0
    assert logged(whole, "kl")[0] == 0.0 < logged(whole, "kl")[-1]
    states = [state["state1"] for state in whole.optimizer.optimizer.state.values()]
    assert any(state.dtype == torch.uint8 for state in states)
    assert all(value.dtype == torch.float32 for value in trained(whole).values())

    resumed = quantized(folder, tmp_path / "resumed", quantization)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert_same(trained(whole), trained(resumed))

    whole.save_model()
    pipeline = DiffusionPipeline.from_pretrained(str(folder), dtype=torch.bfloat16)
    pipeline.load_lora_weights(tmp_path / "whole")
    loaded = {name: value for name, value in pipeline.transformer.state_dict().items() if "lora_" in name}
    assert len(loaded) == len(trained(whole))
    return whole


def check_that_it_samples(folder: Path, tmp_path: Path, quantization: str) -> None:
    """The quantised base with the adapter makes other pictures than without.

    Not in NF4: the CPU kernel of bitsandbytes for a single row fails at these sizes.
    """
    options = ["--model_name_or_path", str(folder), "--quantization", quantization, "--prompt", "a red circle"]
    options += ["--num_inference_steps", "2", "--height", "32", "--width", "32", "--max_sequence_length", "16"]
    options += ["--device", "cpu", "--dtype", "bfloat16", "--guidance_scale", "1"]
    sample.main([*options, "--output_dir", str(tmp_path / "plain")])
    sample.main([*options, "--output_dir", str(tmp_path / "adapted"), "--adapter", str(tmp_path / "whole")])
    plain, adapted = (Image.open(tmp_path / side / "000-a-red-circle-0.png") for side in ("plain", "adapted"))
    assert plain.tobytes() != adapted.tobytes()


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_quantized_base_trains_resumes_and_saves(quantization: str, folder: Path, tmp_path: Path) -> None:
    trainer = check_a_quantized_run(folder, tmp_path, quantization)
    check_that_it_samples(folder, tmp_path, quantization)
    kinds = {
        type(module.weight).__name__ for module in trainer.policy.pipeline.transformer.modules() if is_base(module)
    }
    assert kinds == {"int8": {"Int8Tensor"}, "fp8": {"Float8Tensor"}}[quantization]


def is_base(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and not module.weight.requires_grad


@pytest.mark.usefixtures("nf4_on_cpu")
def test_a_base_in_nf4_trains_resumes_and_saves(folder: Path, tmp_path: Path) -> None:
    trainer = check_a_quantized_run(folder, tmp_path, "nf4")
    layers = [m for m in trainer.policy.pipeline.transformer.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert layers and all(layer.weight.quant_state.nested for layer in layers)


# What changes no weight

OPTIONS = {
    "checkpointed activations": {"activation_checkpointing": True},
    "trajectories on the CPU": {"offload_trajectories": True},
    "offloading between phases": {"offload_between_phases": True},
    "precomputed prompts": {"precompute_prompt_embeds": True},
    "old log-probabilities recomputed": {"recompute_old_log_probs": True},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", [tiny_sd3, tiny_flux])
def test_options_change_no_weight(family, option: str, tmp_path: Path) -> None:
    """To the bit: none of them computes anything in another order."""
    weights = []
    for changes in ({}, OPTIONS[option]):
        trainer = build(tmp_path, family(), beta=0.1, num_iterations=2, max_steps=4, **changes)
        trainer.train()
        weights.append(trained(trainer))
    assert_same(*weights)


@pytest.mark.parametrize(
    "changes", [{"offload_reference": True}, {"offload_reference": True, "offload_trajectories": True}]
)
def test_an_offloaded_reference_changes_no_weight(changes: dict, tmp_path: Path) -> None:
    runs = [build(tmp_path, full=True, beta=0.1, max_steps=4, learning_rate=1e-4, **more) for more in ({}, changes)]
    for run in runs:
        run.train()
    assert_same(*map(trained, runs))
    assert logged(runs[0], "kl") == logged(runs[1], "kl")
    assert logged(runs[0], "nfe_train") == logged(runs[1], "nfe_train")


def decoded(policy: FlowPolicy, latents: torch.Tensor) -> torch.Tensor:
    return policy.decode(latents).float()


def test_slices_change_images_by_rounding_and_tiles_at_most_at_their_borders(tmp_path: Path) -> None:
    """Of the testbed's trained VAE.

    Convolutions round otherwise at other batch sizes. Images of one tile are not tiled; smaller tiles do not see
    across their borders and normalise over themselves, hence a mean of 8 of 255 levels, here at 16 pixels a tile.
    """
    options = {"max_sequence_length": 0, "guidance_scale": 1.0, "height": 32, "width": 32}
    whole, sliced, tiled = (
        load_policy(TESTBED, config(tmp_path, **{**options, **more}), use_lora=True)
        for more in ({}, {"vae_slicing": True}, {"vae_tiling": True})
    )
    pipeline = whole.pipeline
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        PROMPTS[:3], num_inference_steps=8, guidance_scale=1.0, output_type="latent", height=32, width=32,
        max_sequence_length=0, generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    expected = decoded(whole, latents)
    assert (expected - decoded(sliced, latents)).abs().max() <= 1
    assert torch.equal(expected, decoded(tiled, latents))
    tiled.pipeline.vae.tile_latent_min_size, tiled.pipeline.vae.tile_sample_min_size = 4, 16
    assert 0 < (expected - decoded(tiled, latents)).abs().mean() < 8


# That they do what they are for


def test_between_phases_models_are_on_the_device_only_while_they_work() -> None:
    """Seen with the device "meta", as there is no GPU."""
    module = torch.nn.Linear(2, 2)
    with on_device([module], torch.device("cpu"), offload=True):
        assert module.weight.device.type == "cpu"
    with on_device([module], torch.device("meta"), offload=False):
        assert module.weight.device.type == "cpu"
    places = []

    class Model:
        def to(self, device: torch.device) -> None:
            places.append(torch.device(device).type)

    with pytest.raises(OSError), on_device([Model()], torch.device("meta"), offload=True):
        assert places == ["meta"]
        raise OSError
    assert places == ["meta", "cpu"]


def test_reward_models_are_moved(tmp_path: Path) -> None:
    class Judge:
        __name__ = "judge"
        places: list[str] = []

        def to(self, device: torch.device) -> None:
            self.places.append(torch.device(device).type)

        def __call__(self, images, **columns: object) -> list[float]:
            self.places.append("called")
            return brightness(images)

    build(tmp_path, reward_funcs=Judge(), max_steps=1).train()
    assert Judge.places == ["cpu", "called"]
    Judge.places.clear()
    build(tmp_path, reward_funcs=Judge(), max_steps=1, offload_between_phases=True).train()
    assert Judge.places == ["cpu", "called", "cpu"]


def test_offloaded_states_are_those_of_the_rollout(tmp_path: Path) -> None:
    rollouts = []
    for offload in (False, True):
        trainer = build(tmp_path, offload_trajectories=offload)
        rows, window = [{"prompt": PROMPTS[0], "topic": 0}] * 2, trainer.rollouts.windows.draw(0)
        rollouts.append(trainer.sample_and_score(rows, trainer.rollouts.generators(0, 0, 2), window).rollout)
    assert torch.equal(rollouts[0].states, rollouts[1].states)


def test_recomputed_log_probs_make_the_ratio_one(tmp_path: Path) -> None:
    """With a model that computes a little otherwise when it needs no gradients, as fused kernels do."""
    deviations, evaluations = [], []
    for recompute in (False, True):
        trainer = build(
            tmp_path, recompute_old_log_probs=recompute, beta=0.0, advantage_baseline="completion",
            scale_rewards="batch", per_device_train_batch_size=2, steps_per_generation=4,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        velocity = trainer.policy.velocity
        trainer.policy.velocity = lambda *inputs, velocity=velocity: (
            velocity(*inputs) * (1 if torch.is_grad_enabled() else 1 + 1e-3)
        )
        trainer.train()
        deviations.append(logged(trainer, "ratio/max_deviation"))
        evaluations.append(sum(logged(trainer, "nfe_train")))
    assert deviations[0][0] > 1e-6 and deviations[1][0] == 0.0
    assert deviations[1][1] > 0  # the second update's policy has moved
    assert evaluations[1] == evaluations[0] + 4 * 3  # the transitions of the second update alone


def test_the_rollout_that_is_recomputed_twice_gives_the_same(tmp_path: Path) -> None:
    trainer = build(tmp_path, recompute_old_log_probs=True, num_iterations=2)
    trainer.model.train()
    (chunk,) = [trainer._prepare_inputs([{"prompt": PROMPTS[0], "topic": 0}] * 4)]
    again = trainer.rollouts.recomputed(chunk, trainer.compute_loss_context_manager)
    assert torch.equal(chunk.log_probs, again.log_probs)
    assert not chunk.log_probs.requires_grad


# Compilation and attention


@pytest.mark.parametrize("family", [tiny_sd3, tiny_flux])
def test_compiled_blocks_train_alike_and_compile_once_for_all_batch_sizes(family, tmp_path: Path) -> None:
    """The backend "eager" traces as "inductor" does, without its minutes in a compiler.

    The batch of 6 is as large as no other dimension, for which it would be taken at first.
    """
    torch._dynamo.reset()
    weights = []
    for backend in (None, "eager"):
        trainer = build(
            tmp_path, family(), beta=0.1, compile_backend=backend, max_steps=1, per_device_train_batch_size=6
        )
        trainer.train()
        weights.append(trained(trainer))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-4)  # other kernels; Adam steps of 1e-2
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    rows = [{"prompt": prompt, "topic": 0} for prompt in PROMPTS]
    for number in (2, 3, 5, 6):
        trainer.sample_and_score(
            rows[:number], trainer.rollouts.generators(0, 0, number), trainer.rollouts.windows.draw(0), None
        )
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("family", [tiny_flux, tiny_z_image])
def test_a_transformer_takes_an_attention_backend(family, tmp_path: Path) -> None:
    weights = []
    for backend in (None, "_native_math"):
        trainer = build(tmp_path, family(), attention_backend=backend, optim="sgd")
        trainer.train()
        weights.append(trained(trainer))
    modules = trainer.policy.pipeline.transformer.modules()
    processors = [module.processor for module in modules if hasattr(module, "processor")]
    assert {processor._attention_backend.value for processor in processors} == {"_native_math"}
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-4)


# What is refused


def test_options_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for build_it, message in {
        lambda: build(tmp_path, attention_backend="_native_math"): "no effect on SD3Transformer2DModel",
        lambda: build(tmp_path, tiny_flux(), attention_backend="flush"): "attention_backend='flush' cannot be used",
        lambda: build(tmp_path, tiny_flux(), attention_backend="_native_cudnn"): "cuDNN's gradients are wrong",
        lambda: build(tmp_path, quantization="int8"): "quantization needs a model given by name",
        lambda: build(tmp_path, quantization="int3"): "quantization must be one of",
        lambda: build(tmp_path, offload_reference=True): "offload_reference is for full fine-tuning",
        lambda: build(tmp_path, full=True, beta=0.0, offload_reference=True): "there is no reference model",
        lambda: build(tmp_path, torch_compile=True): "set compile_backend",
    }.items():
        with pytest.raises(ValueError, match=message):
            build_it()


def test_a_quantized_base_needs_an_adapter(folder: Path, tmp_path: Path) -> None:
    settings = {"quantization": "int8", "model_init_kwargs": {"dtype": "bfloat16"}}
    with pytest.raises(ValueError, match="Quantised weights cannot be trained: pass a peft_config"):
        TPGRPOTrainer(str(folder), brightness, config(tmp_path, **settings), prompts())


def test_llm_int8_computes_otherwise_in_training_than_in_evaluation() -> None:
    """Why it is refused: of the same input and weights, in bitsandbytes itself."""
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0)
    layer.weight = bitsandbytes.nn.Int8Params(torch.randn(64, 64), requires_grad=False, has_fp16_weights=False)
    layer, inputs = layer.to("cpu"), torch.randn(16, 64, dtype=torch.bfloat16)
    trained, evaluated = layer.train()(inputs), layer.eval()(inputs)
    assert not torch.equal(trained, evaluated)


def test_llm_int8_is_refused_with_the_reason(tmp_path: Path) -> None:
    pipeline = tiny_sd3(dtype=torch.bfloat16)
    pipeline.transformer.quantization_method = "bitsandbytes"
    pipeline.transformer.register_to_config(quantization_config=type("Config", (), {"load_in_8bit": True})())
    with pytest.raises(ValueError, match="compute differently in training than in rollouts"):
        build(tmp_path, pipeline)


@pytest.mark.parametrize(
    "optim", ["adamw_bnb_8bit", "paged_adamw_32bit", "lion_8bit", "adamw_torch_8bit", "adamw_torch_fused", "sgd"]
)
def test_optimizers_of_bitsandbytes_are_refused_under_fsdp(optim: str) -> None:
    check_sharded_optimizer(optim, is_fsdp_enabled=False)
    if "torch" in optim or optim == "sgd":
        check_sharded_optimizer(optim, is_fsdp_enabled=True)
    else:
        with pytest.raises(ValueError, match="use 'adamw_torch_8bit'"):
            check_sharded_optimizer(optim, is_fsdp_enabled=True)


def test_too_many_prompts_for_the_memory_need_a_folder(tmp_path: Path) -> None:
    many = Dataset.from_dict({"prompt": [f"a red circle {number}" for number in range(1025)]})
    with pytest.raises(ValueError, match="set prompt_embeds_dir"):
        build(tmp_path, train_dataset=many, precompute_prompt_embeds=True, max_steps=1000)


# Sweeps


@pytest.mark.parametrize("changes", [{}, {"share_initial_noise": True}, {"completion": "at_2"}])
def test_a_rollout_in_several_sweeps_is_the_same(changes: dict, tmp_path: Path, monkeypatch) -> None:
    """To the bit, if the model is given one latent at a time however many are under way."""
    runs, images = [], []
    for size in (64, 2):
        monkeypatch.setattr(batches, "SWEEP", size)
        seen: list[int] = []

        def reward(images: list, seen: list[int] = seen, **columns: object) -> list[float]:
            seen.append(len(images))
            return brightness(images)

        one_by_one = {"per_device_rollout_batch_size": 1, "per_device_train_batch_size": 6, "max_steps": 3}
        run = build(tmp_path, reward_funcs=reward, **one_by_one, **changes)
        run.train()
        runs.append(run)
        images.append(seen)
    assert_same(*map(trained, runs))
    assert logged(runs[0], "nfe") == logged(runs[1], "nfe")
    assert len(images[1]) == 3 * len(images[0]) and sum(images[1]) == sum(images[0])


@pytest.mark.parametrize(
    ("rows", "group", "batch", "sizes"), [(1152, 24, 9, [72] * 16), (100, 8, 96, [96, 4]), (12, 24, 6, [12])]
)
def test_sweeps_are_of_whole_groups_that_fill_a_batch(rows: int, group: int, batch: int, sizes: list[int]) -> None:
    args = config(
        Path("x"), num_generations=group, per_device_train_batch_size=group, per_device_rollout_batch_size=batch
    )
    assert [len(range(rows)[part]) for part in sweeps(rows, args)] == sizes
