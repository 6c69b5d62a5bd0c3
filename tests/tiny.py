"""Real pipelines with tiny, random, reproducible weights, built in code: no Hub, no network.

Images are made of 8 x 8 pixel patches, so heights and widths are multiples of 8; the tests use 32 x 32 or less. The
tokenizers know the words of `trl_tpgrpo.testbed`'s captions ("a red circle above a blue square").
"""

import copy

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from trl_tpgrpo.testbed.world import all_captions


IMAGE_SIZE = 32
PROMPTS = ("a red circle", "a blue square above a green circle", "two yellow triangles")
NEGATIVE_PROMPT = "a green square"
TEXT_WIDTH = 32
CLIP_WIDTH = TEXT_WIDTH // 2
LATENT_CHANNELS = 4
CLIP_PROMPT_LENGTH = 12


def tiny_sd3(
    t5: bool = True,
    shift: float = 3.0,
    dynamic_shift: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> StableDiffusion3Pipeline:
    """An SD3 pipeline with two CLIP encoders and, with `t5`, a T5 one; without it `max_sequence_length=0` is legal.

    Args:
        t5: Whether there is a T5 encoder and its tokenizer.
        shift: The scheduler's static shift; without effect under `dynamic_shift`.
        dynamic_shift: Whether the scheduler shifts by the resolution.
        dtype: Of every module.
        seed: Of the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _clip_tokenizer()
        pipeline = StableDiffusion3Pipeline(
            transformer=_sd3_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic_shift),
            vae=_vae(),
            text_encoder=CLIPTextModelWithProjection(_clip_config(tokenizer, CLIP_WIDTH)),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer, CLIP_WIDTH)),
            tokenizer_2=copy.deepcopy(tokenizer),
            text_encoder_3=_t5_encoder() if t5 else None,
            tokenizer_3=_t5_tokenizer() if t5 else None,
        )
    return _ready(pipeline, dtype)


def tiny_flux(guidance_embeds: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> FluxPipeline:
    """A FLUX.1 pipeline: one double and one single block, sigmas shifted by the resolution.

    Args:
        guidance_embeds: Whether the transformer is given the guidance scale (FLUX.1-dev is, schnell is not).
        dtype: Of every module.
        seed: Of the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _clip_tokenizer()
        pipeline = FluxPipeline(
            transformer=_flux_transformer(guidance_embeds),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
            vae=_vae(),
            text_encoder=CLIPTextModel(_clip_config(tokenizer, TEXT_WIDTH)),
            tokenizer=tokenizer,
            text_encoder_2=_t5_encoder(),
            tokenizer_2=_t5_tokenizer(),
        )
    return _ready(pipeline, dtype)


def _ready(
    pipeline: StableDiffusion3Pipeline | FluxPipeline, dtype: torch.dtype
) -> StableDiffusion3Pipeline | FluxPipeline:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
            if dtype != part.dtype:
                part.to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _sd3_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 4,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=IMAGE_SIZE // 8,
        qk_norm="rms_norm",
    )


def _flux_transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.1,
        scaling_factor=1.5,
    )


def _clip_tokenizer() -> CLIPTokenizer:
    """Letters, merged from left to right into the words of the captions.

    Not the testbed's, whose training breaks ties at random: every process must get the same one.
    """
    words = sorted(_words(), key=lambda word: (-len(word), word))
    letters = sorted(set("".join(words)))
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        merges += [("".join(pieces[:end]), pieces[end]) for end in range(1, len(pieces))]
    merges = list(dict.fromkeys(merges))
    vocabulary += [left + right for left, right in merges]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=merges,
        model_max_length=CLIP_PROMPT_LENGTH,
    )


def _words() -> list[str]:
    return sorted({word for caption in all_captions() for word in str(caption).split()})


def _clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """With weights drawn wider than usual, so that prompts differ before any training."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=3.0,
    )


def _t5_encoder() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(_t5_tokenizer()),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def _t5_tokenizer() -> T5TokenizerFast:
    """One token a word of the captions; any other word is unknown."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(vocab=special + [(f"\u2581{word}", -1.0) for word in _words()], extra_ids=0)
