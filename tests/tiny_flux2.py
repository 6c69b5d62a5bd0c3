"""More real pipelines with tiny, random, reproducible weights, as in `tiny`: FLUX.2, Krea 2, Chroma, FLUX Kontext.

Images are made of 8 x 8 pixel patches here too. The language models' tokenizer has one token for each word of the
captions and of the pipelines' templates, and bytes for all else, so that the templates are as long as the real ones.
"""

import re

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tiny import (
    IMAGE_SIZE,
    LATENT_CHANNELS,
    TEXT_WIDTH,
    _clip_config,
    _clip_tokenizer,
    _flux_transformer,
    _ready,
    _t5_encoder,
    _t5_tokenizer,
    _vae,
    _words,
)
from transformers import (
    CLIPTextModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode


FIRST_WORDS = "a two three system user assistant Describe You attribution".split()  # of texts and lines
LATER_WORDS = (
    "the image by detailing color shape size texture quantity text spatial relationships of objects and background"
)
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
)  # fmt: skip
KLEIN_LAYERS, DEV_LAYERS = 27, 30  # of the text encoders: the pipelines read the states after these
WIDER = 2.0
QWEN3_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% set text = message.content[0].text %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
    "{% else %}<|im_start|>{{ text }}<|im_end|>{% endif %}{% endfor %}"
)


def tiny_flux2_klein(distilled: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Flux2KleinPipeline:
    """A FLUX.2 klein pipeline: one double and one single block, no guidance embedding.

    Args:
        distilled: Whether the pipeline is marked as distilled, which switches classifier-free guidance off.
        dtype: Of every module.
        seed: Of the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _qwen_tokenizer(QWEN3_TEMPLATE)
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_flux2_vae(),
            text_encoder=Qwen3ForCausalLM(Qwen3Config(**_language_model(tokenizer, KLEIN_LAYERS))),
            tokenizer=tokenizer,
            transformer=_widened(_flux2_transformer(guidance_embeds=False)),
            is_distilled=distilled,
        )
    return _ready_as_loaded(pipeline, dtype)


def tiny_flux2(dtype: torch.dtype = torch.float32, seed: int = 0) -> Flux2Pipeline:
    """A FLUX.2 dev pipeline, with guidance as an input; a tokenizer stands for the processor, which reads text alike.

    Args:
        dtype: Of every module.
        seed: Of the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _qwen_tokenizer(MISTRAL_TEMPLATE)
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = Mistral3Config(
            text_config={"model_type": "mistral", **_language_model(tokenizer, DEV_LAYERS)},
            vision_config={"model_type": "pixtral", "head_dim": 8, **vision},
        )
        pipeline = Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_flux2_vae(),
            text_encoder=Mistral3ForConditionalGeneration(config),
            tokenizer=tokenizer,
            transformer=_widened(_flux2_transformer(guidance_embeds=True)),
        )
    return _ready_as_loaded(pipeline, dtype)


def tiny_krea2(distilled: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Krea2Pipeline:
    """A Krea 2 pipeline: one block, text from the states of two layers.

    Args:
        distilled: Whether the pipeline is marked as distilled, which fixes the shift of the sigmas.
        dtype: Of every module, but for the transformer's norms, which stay in float32 as diffusers loads them.
        seed: Of the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _qwen_tokenizer(QWEN3_TEMPLATE)
        pipeline = Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400
            ),
            vae=_qwen_image_vae(),
            text_encoder=Qwen3VLModel(_qwen3_vl_config(tokenizer)),
            tokenizer=tokenizer,
            transformer=_widened(_krea2_transformer()),
            text_encoder_select_layers=(1, 2),
            is_distilled=distilled,
        )
    return _ready_as_loaded(pipeline, dtype)


def tiny_chroma(dtype: torch.dtype = torch.float32, seed: int = 0) -> ChromaPipeline:
    """A Chroma pipeline: one double and one single block.

    Args:
        dtype: Of every module.
        seed: Of the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
            vae=_vae(),
            text_encoder=_t5_encoder(),
            tokenizer=_t5_tokenizer(),
            transformer=_chroma_transformer(),
        )
    return _ready(pipeline, dtype)


def tiny_kontext(dtype: torch.dtype = torch.float32, seed: int = 0) -> FluxKontextPipeline:
    """A FLUX.1 Kontext pipeline, of the parts of `tiny_flux`.

    Args:
        dtype: Of every module.
        seed: Of the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _clip_tokenizer()
        pipeline = FluxKontextPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
            vae=_vae(),
            text_encoder=CLIPTextModel(_clip_config(tokenizer, TEXT_WIDTH)),
            tokenizer=tokenizer,
            text_encoder_2=_t5_encoder(),
            tokenizer_2=_t5_tokenizer(),
            transformer=_flux_transformer(guidance_embeds=True),
        )
    return _ready(pipeline, dtype)


def _ready_as_loaded(pipeline: DiffusionPipeline, dtype: torch.dtype) -> DiffusionPipeline:
    """Keep in float32 what loading keeps there: the language model's frequencies, and a few modules of Krea 2."""
    encoders = [module for module in pipeline.text_encoder.modules() if hasattr(module, "inv_freq")]
    frequencies = [module.inv_freq.clone() for module in encoders]
    _ready(pipeline, dtype)
    for module, values in zip(encoders, frequencies, strict=True):
        module.inv_freq = values
    for name, module in pipeline.transformer.named_modules():
        if name.split(".")[-1] in (pipeline.transformer._keep_in_fp32_modules or ()):
            module.float()
    return pipeline


def _widened(transformer: torch.nn.Module) -> torch.nn.Module:
    """Make weights larger than usual, so that prompts matter before any training."""
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            parameter.data *= WIDER
    return transformer


def _flux2_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def _flux2_vae() -> AutoencoderKLFlux2:
    """With the statistics of latents that are neither centred nor of one scale."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.normal_(std=0.2)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def _krea2_transformer() -> Krea2Transformer2DModel:
    return Krea2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=TEXT_WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=64,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )


def _qwen_image_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.7, 0.3, 0.1, -0.2],
        latents_std=[2.8, 1.4, 2.3, 1.8],
    )


def _chroma_transformer() -> ChromaTransformer2DModel:
    return ChromaTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )


def _language_model(tokenizer: Qwen2Tokenizer, num_layers: int) -> dict:
    """The settings of a language model, with weights drawn wider than usual, so that prompts differ."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _qwen3_vl_config(tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    return Qwen3VLConfig(
        text_config={**_language_model(tokenizer, num_layers=2), "rope_parameters": rope},
        vision_config={**vision, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    )


def _qwen_tokenizer(chat_template: str) -> Qwen2Tokenizer:
    """Bytes, merged from left to right into the words of the captions and of the templates."""
    space, line_break = "\u0120", "\u010a"  # as the tokenizer writes them
    words = sorted({*_words(), *LATER_WORDS.split(), *re.findall("[A-Za-z]+", SYSTEM_MESSAGE)})
    merges = [(line_break, line_break)]
    for word in [f"{space}{word}" for word in words] + FIRST_WORDS:
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
    vocabulary = [*SPECIAL_TOKENS, *sorted(bytes_to_unicode().values()), *("".join(pair) for pair in merges)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(dict.fromkeys(vocabulary))},
        merges=list(dict.fromkeys(merges)),
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=1024,
    )
    tokenizer.chat_template = chat_template
    return tokenizer
