"""The models that benchmarks run on where there is no GPU: the testbed, and a FLUX.1 of the same size."""

import copy
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

from trl_tpgrpo.policies.base import FlowPolicy, Guidance
from trl_tpgrpo.policies.loading import build_policy, load_pipeline
from trl_tpgrpo.testbed import PIPELINE_KWARGS, TESTBED
from trl_tpgrpo.testbed.world import all_captions


WIDTH = 128
NUM_TOKENS = 12


def load_policy(name: str) -> FlowPolicy:
    """Load the testbed (`"sd3"`), its like with random weights (`"flux"`), or the pipeline in a folder."""
    pipeline = {"sd3": lambda: load_pipeline(TESTBED), "flux": tiny_flux}.get(
        name, lambda: load_pipeline(Path(name))
    )()
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline, FluxPipeline):
        return build_policy(pipeline, Guidance(32, 32, guidance_scale=3.5, max_sequence_length=NUM_TOKENS))
    return build_policy(pipeline, Guidance(**PIPELINE_KWARGS, guidance_scale=1.0))


def tiny_flux(seed: int = 0) -> FluxPipeline:
    """Build a FLUX.1 with random weights around the testbed's VAE, tokenizer and sizes (2 double, 4 single blocks)."""
    testbed = load_pipeline(TESTBED)
    words = sorted({word for caption in all_captions() for word in str(caption).split()})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -1.0) for word in words)]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * testbed.vae.config.latent_channels,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH // 2,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    t5 = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    clip = copy.deepcopy(testbed.text_encoder.config)
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=testbed.vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=testbed.tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer,
    )
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline
