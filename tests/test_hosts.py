"""What the package overrides or uses of its hosts and they do not promise.

A release that takes a name away fails here, by name.
"""

import ast
import importlib
from pathlib import Path

import pytest
from trl.trainer.base_trainer import _BaseTrainer

import trl_tpgrpo
from trl_tpgrpo import TPGRPOTrainer


ROOT = Path(trl_tpgrpo.__file__).parent
OVERRIDDEN = {
    "_finish_current_push", "_get_eval_sampler", "_get_grad_norm", "_get_train_sampler", "_load_best_model",
    "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_name", "_paper", "_prepare_inputs",
    "_push_from_checkpoint", "_save_checkpoint", "_send_telemetry", "_set_signature_columns_if_needed", "_tag_names",
    "compute_loss", "create_model_card", "evaluate", "get_train_dataloader", "init_hf_repo", "log", "predict",
    "prediction_step", "push_to_hub", "save_model", "train", "training_step",
}  # fmt: skip
"""Methods of TRL's or transformers' trainer."""

USED = {
    "trl.trainer.base_config._BaseConfig",
    "trl.trainer.base_config._BaseConfig._VALID_DICT_FIELDS",
    "trl.trainer.base_trainer._BaseTrainer",
    "trl.trainer.utils.RepeatSampler",
    "trl.trainer.utils.get_comet_experiment_url",
    "trl.trainer.utils.get_trackio_space_url",
    "trl.cli.accelerate_config.resolve_accelerate_config_argument",
    "transformers.Trainer._get_dataloader",
    "transformers.Trainer._get_output_dir",
    "transformers.Trainer.compute_loss_context_manager",
    "transformers.integrations.deepspeed.deepspeed_config",
    "transformers.integrations.deepspeed.is_deepspeed_zero3_enabled",
    "transformers.trainer.TRAINER_STATE_NAME",
    "transformers.trainer_callback.CallbackHandler",
    "transformers.trainer_utils.PREFIX_CHECKPOINT_DIR",
    "transformers.trainer_utils.rotate_checkpoints",
    "accelerate.state.GradientState._set_sync_gradients",
    "accelerate.utils.fsdp_utils.fsdp2_prepare_model",
    "argparse.ArgumentParser._check_value",
    "argparse.ArgumentParser._get_value",
    "diffusers.ChromaPipeline._prepare_latent_image_ids",
    "diffusers.ChromaPipeline._unpack_latents",
    "diffusers.Flux2KleinPipeline._prepare_latent_ids",
    "diffusers.Flux2KleinPipeline._prepare_text_ids",
    "diffusers.Flux2KleinPipeline._unpatchify_latents",
    "diffusers.FluxKontextPipeline._encode_vae_image",
    "diffusers.FluxKontextPipeline._pack_latents",
    "diffusers.FluxPipeline._prepare_latent_image_ids",
    "diffusers.FluxPipeline._unpack_latents",
    "diffusers.Krea2Pipeline._unpack_latents",
    "diffusers.QwenImageEditPipeline._encode_vae_image",
    "diffusers.QwenImageEditPipeline._pack_latents",
    "diffusers.QwenImagePipeline._unpack_latents",
    "diffusers.configuration_utils.FrozenDict",
    "diffusers.pipelines.flux2.pipeline_flux2.compute_empirical_mu",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit.calculate_dimensions",
    "diffusers.pipelines.flux.pipeline_flux.calculate_shift",
    "diffusers.pipelines.flux.pipeline_flux.retrieve_timesteps",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3.retrieve_timesteps",
    "diffusers.training_utils.EMAModel.step",
    "torch._dynamo",
    "threading._register_atexit",
    "torch.serialization.safe_globals",
}
SET_BY_HOSTS = {
    "_actions": "argparse's parser, by trl",
    "_action_groups": "argparse's parser",
    "_attention_backend": "attention processors, by diffusers",
    "_group_actions": "argparse's groups",
    "_internal_dict": "models, by diffusers",
    "_is_accelerate_prepared": "models, by accelerate",
    "_optionals": "argparse's parser",
    "_signature_columns": "trainers, by transformers",
    "_train_batch_size": "trainers, by transformers",
    "_wrapped": "tqdm's ObjectWrapper",
}
"""Private attributes of instances, which a class does not show; the tests of what uses them fail without them."""


@pytest.mark.parametrize("name", sorted(USED))
def test_the_host_still_has_what_is_used(name: str) -> None:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        break
    for part in parts[length:]:
        assert hasattr(found, part), f"{name} is gone: {found!r} has no {part}"
        found = getattr(found, part)


@pytest.mark.parametrize("name", sorted(OVERRIDDEN))
def test_the_host_still_has_what_is_overridden(name: str) -> None:
    assert hasattr(_BaseTrainer, name), f"TRL's trainer has no {name} any more: nobody calls what overrides it"


def test_the_list_of_overrides_is_complete() -> None:
    own = {name for name in vars(TPGRPOTrainer) if not name.startswith("__")}
    assert {name for name in own if hasattr(_BaseTrainer, name)} == OVERRIDDEN


def test_the_list_of_private_names_is_complete() -> None:
    """Names with an underscore that no module of the package defines."""
    trees = [ast.parse(path.read_text()) for path in ROOT.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    defined |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    defined |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and node.attr not in defined}
    used |= {
        alias.name for node in nodes if isinstance(node, ast.ImportFrom) and not node.level for alias in node.names
    }
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    listed = {part for name in USED for part in name.split(".")} | set(SET_BY_HOSTS)
    assert private <= listed, private - listed
