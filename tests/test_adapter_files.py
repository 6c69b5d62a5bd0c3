"""A saved adapter means the same to every loader, whether or not it knows of alpha, and resumes to the bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from test_trainer import PROMPTS, SIZE, assert_same, build, lora, trained
from tiny import tiny_flux, tiny_sd3
from torch import Tensor

from trl_tpgrpo.policies.weights import LORA_FILE, UNSCALED_FILE, load_weights, save_weights


ADAPTERS = {
    "alpha of twice the rank": {"r": 4, "lora_alpha": 8},
    "alpha of the rank": {"r": 4, "lora_alpha": 4},
    "a scale that rounds": {"r": 4, "lora_alpha": 7},
    "rank-stabilised": {"r": 8, "lora_alpha": 5, "use_rslora": True},
    "other ranks and alphas in some layers": {
        "r": 4, "lora_alpha": 6, "rank_pattern": {"attn.to_q": 2, "attn.to_k": 3}, "alpha_pattern": {"attn.to_q": 5},
    },
    "weight-decomposed": {"r": 4, "lora_alpha": 6, "use_dora": True},
}  # fmt: skip
every_adapter = pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)


def adapted(pipeline: DiffusionPipeline, options: dict, folder: Path, seed: int = 1) -> PeftModel:
    """The trainer's model, whose adapter does something: its second matrices are not zero."""
    model = build(folder, pipeline, peft_config=LoraConfig(**options)).model
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def image(pipeline: DiffusionPipeline) -> np.ndarray:
    options = {**SIZE, "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
    return pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), **options).images[0]


def changes_of_layers(model: PeftModel) -> dict[str, Tensor]:
    """What the trained adapter adds to the layers' weights, by PEFT itself."""
    layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def changes_by_keys(weights: dict[str, Tensor], up: str, down: str) -> dict[str, Tensor]:
    """The same by the rule of ComfyUI: alpha / rank where a key `X.alpha` tells it, else a scale of 1."""
    changes = {}
    for name in [key.removesuffix(f".{up}.weight") for key in weights if key.endswith(f".{up}.weight")]:
        first, second = weights[f"{name}.{down}.weight"], weights[f"{name}.{up}.weight"]
        alpha = weights.get(f"{name}.alpha")
        changes[name] = second @ first * (1.0 if alpha is None else alpha.item() / len(first))
    return changes


@every_adapter
@pytest.mark.parametrize("family", [tiny_sd3, tiny_flux])
def test_diffusers_makes_the_trained_model_of_a_folder_and_of_a_state_dict(family, options: dict, tmp_path: Path):
    pipeline = family()
    untrained = image(pipeline)
    save_weights(adapted(pipeline, options, tmp_path), tmp_path, type(pipeline))
    expected = image(pipeline)
    assert np.abs(expected - untrained).max() > 1e-3
    for source in (tmp_path, load_file(tmp_path / LORA_FILE)):
        fresh = family()
        fresh.load_lora_weights(source)
        np.testing.assert_allclose(image(fresh), expected, rtol=0, atol=1e-5)


@every_adapter
@pytest.mark.parametrize("family", [tiny_sd3, tiny_flux])
def test_keys_alone_tell_the_trained_change(family, options: dict, tmp_path: Path) -> None:
    """Of the file, as ComfyUI reads it, and in kohya's layout, which diffusers converts to with alpha = rank."""
    pipeline = family()
    model = adapted(pipeline, options, tmp_path)
    save_weights(model, tmp_path, type(pipeline))
    weights, expected = load_file(tmp_path / LORA_FILE), changes_of_layers(model)
    by_file = changes_by_keys(weights, "lora_B", "lora_A")
    by_kohya = changes_by_keys(convert_state_dict_to_kohya(weights), "lora_up", "lora_down")
    assert by_file.keys() == {f"transformer.{name}" for name in expected}
    assert len(by_kohya) == len(expected)
    for name, change in expected.items():
        torch.testing.assert_close(by_file[f"transformer.{name}"], change, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(by_kohya[f"transformer.{name}".replace(".", "_")], change, rtol=1e-5, atol=1e-7)


@every_adapter
def test_loading_undoes_the_scale_to_the_bit(options: dict, tmp_path: Path) -> None:
    saved, restored = (adapted(tiny_sd3(), options, tmp_path, seed) for seed in (1, 2))
    save_weights(saved, tmp_path, type(tiny_sd3()))
    load_weights(restored, tmp_path)
    assert_same(*(dict(model.named_parameters()) for model in (saved, restored)))


def test_there_is_a_second_file_only_where_dividing_would_round(tmp_path: Path) -> None:
    for alpha, names in {8: {LORA_FILE}, 7: {LORA_FILE, UNSCALED_FILE}}.items():
        folder = tmp_path / str(alpha)
        save_weights(adapted(tiny_sd3(), {"r": 4, "lora_alpha": alpha}, tmp_path), folder, type(tiny_sd3()))
        assert {path.name for path in folder.iterdir()} == names


def test_a_second_file_of_another_adapter_is_not_taken(tmp_path: Path) -> None:
    """As where an adapter was written over one whose scale rounds; and a lone file loads, but for rounding."""
    first, second = (adapted(tiny_sd3(), {"r": 4, "lora_alpha": 7}, tmp_path, seed) for seed in (1, 2))
    save_weights(first, tmp_path, type(tiny_sd3()))
    save_weights(second, tmp_path / "second", type(tiny_sd3()))
    (tmp_path / LORA_FILE).write_bytes((tmp_path / "second" / LORA_FILE).read_bytes())
    load_weights(first, tmp_path)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_another_alpha_makes_the_same_model_of_a_file(tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 8}
    saved = adapted(tiny_sd3(), options, tmp_path)
    restored = adapted(tiny_sd3(), options | {"lora_alpha": 7}, tmp_path, seed=2)
    save_weights(saved, tmp_path, type(tiny_sd3()))
    load_weights(restored, tmp_path)
    expected = changes_of_layers(saved)
    for name, change in changes_of_layers(restored).items():
        torch.testing.assert_close(change, expected[name], rtol=1e-5, atol=1e-8)


def save_as_version_0_1_0(model: PeftModel, folder: Path) -> None:
    """Unscaled weights, with the trained config as the header."""
    weights = get_peft_model_state_dict(model)
    layers = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    config = model.peft_config["default"].to_dict()
    type(tiny_sd3()).save_lora_weights(folder, layers, transformer_lora_adapter_metadata=config)


@every_adapter
def test_a_file_of_version_0_1_0_is_read_as_it_was_written(options: dict, tmp_path: Path) -> None:
    saved, restored = (adapted(tiny_sd3(), options, tmp_path, seed) for seed in (1, 2))
    save_as_version_0_1_0(saved, tmp_path)
    load_weights(restored, tmp_path)
    assert_same(*(dict(model.named_parameters()) for model in (saved, restored)))


def test_a_file_of_version_0_1_0_with_another_scale_is_refused(tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 16}
    save_as_version_0_1_0(adapted(tiny_sd3(), options, tmp_path), tmp_path)
    for change, message in {
        ("lora_alpha", 5): "lora_alpha=16, the trained one has 5",
        ("use_rslora", True): "use_rslora=False, the trained one has True",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_weights(adapted(tiny_sd3(), options | dict([change]), tmp_path), tmp_path)


def test_a_run_whose_scale_rounds_is_resumed_to_the_bit(tmp_path: Path) -> None:
    """With the moving average, of which a checkpoint has both."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ema_update_every": 1}
    whole = build(tmp_path / "whole", peft_config=lora(lora_alpha=7), **options)
    whole.train()
    resumed = build(tmp_path / "resumed", peft_config=lora(lora_alpha=7), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert_same(trained(whole), trained(resumed))
    with whole.averaged.in_use(), resumed.averaged.in_use():
        assert_same(trained(whole), trained(resumed))


def test_the_header_says_that_the_scale_is_1(tmp_path: Path) -> None:
    options = ADAPTERS["other ranks and alphas in some layers"] | {"use_rslora": True}
    save_weights(adapted(tiny_sd3(), options, tmp_path), tmp_path, type(tiny_sd3()))
    with safe_open(tmp_path / LORA_FILE, framework="pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert header["transformer.lora_alpha"] == header["transformer.r"] == 4
    assert header["transformer.alpha_pattern"] == header["transformer.rank_pattern"] == options["rank_pattern"]
    assert header["transformer.use_rslora"] is False
