"""Tiny real pipelines whose text encoder is a Qwen: Qwen-Image, Qwen-Image-Edit and Z-Image; see `tiny.py`.

Tokens are 8 x 8 pixels. Every word of the captions and of the pipelines' own templates is one token, as in the real
vocabulary, so that the prefix which the pipelines cut off by its length is as long as theirs.
"""

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny import LATENT_CHANNELS, TEXT_WIDTH, _ready, _vae, _words
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3Model,
)


VISION_PATCH = 4  # pixels; four of them are a token of the text encoder
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_IMAGE_SYSTEM = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
QWEN_IMAGE_EDIT_SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain "
    "how the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
TEXT_SIZES = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 2 * TEXT_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": TEXT_WIDTH // 2,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,  # wider than usual, so that prompts differ before any training
}


def tiny_qwen_image(dtype: torch.dtype = torch.float32, seed: int = 0) -> QwenImagePipeline:
    """A Qwen-Image pipeline, with its scheduler's settings: sigmas are shifted by the resolution and end at 0.02.

    Args:
        dtype: Of every module.
        seed: Of the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _ready(QwenImagePipeline(**_qwen_image_parts()), dtype)


def tiny_qwen_image_edit(dtype: torch.dtype = torch.float32, seed: int = 0) -> QwenImageEditPipeline:
    """A Qwen-Image-Edit pipeline, whose processor makes do without torchvision.

    Args:
        dtype: Of every module.
        seed: Of the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = _qwen_image_parts()
        return _ready(QwenImageEditPipeline(**parts, processor=_processor(parts["tokenizer"])), dtype)


def tiny_z_image(dtype: torch.dtype = torch.float32, seed: int = 0) -> ZImagePipeline:
    """A Z-Image pipeline: one refiner each for image and text, and two blocks.

    Args:
        dtype: Of every module.
        seed: Of the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        pipeline = ZImagePipeline(
            transformer=_z_image_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **TEXT_SIZES)),
            tokenizer=tokenizer,
        )
    return _ready(pipeline, dtype)


def _qwen_image_parts() -> dict[str, object]:
    tokenizer = _tokenizer()
    return {
        "transformer": _qwen_image_transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        "vae": _qwen_image_vae(),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(_qwen2_5_vl_config(tokenizer)),
        "tokenizer": tokenizer,
    }


def _qwen_image_transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def _qwen_image_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.7, 0.1, 0.9, 0.4],
        latents_std=[2.8, 1.4, 2.3, 1.6],
    )


def _z_image_transformer() -> ZImageTransformer2DModel:
    transformer = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)  # which is 0, or in old versions what the memory held
    return transformer


def _qwen2_5_vl_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    names = {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    names |= {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    return Qwen2_5_VLConfig(
        text_config=TEXT_SIZES
        | {
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": VISION_PATCH,
            "window_size": 4 * VISION_PATCH,
            "out_hidden_size": TEXT_WIDTH,
            "fullatt_block_indexes": [0],
            "initializer_range": 0.3,
        },
        **{setting: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for setting, name in names.items()},
    )


class ProcessorOfImages(Qwen2VLProcessor):
    """The real processor without its part for videos, which cannot be built without torchvision."""

    def __init__(self, image_processor: Qwen2VLImageProcessorPil, tokenizer: Qwen2Tokenizer):
        super().__init__(image_processor, tokenizer)


def _processor(tokenizer: Qwen2Tokenizer) -> ProcessorOfImages:
    pixels = {"shortest_edge": 64, "longest_edge": 1024}  # of an image that the text encoder sees
    return ProcessorOfImages(Qwen2VLImageProcessorPil(patch_size=VISION_PATCH, size=pixels), tokenizer)


def _tokenizer() -> Qwen2Tokenizer:
    """One token a word, with and without the space before it; all else is spelt in bytes."""
    pieces = _pieces()
    characters = sorted({character for piece in pieces for character in piece})
    merges = [(piece[:end], piece[end]) for piece in pieces for end in range(1, len(piece))]
    merges = list(dict.fromkeys(merges))
    vocabulary = [*SPECIAL_TOKENS, *characters, *(left + right for left, right in merges)]
    return Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=merges,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def _pieces() -> list[str]:
    """What the tokenizer cuts captions and templates into before it merges, in an order that merges each into one."""
    cut = Qwen2Tokenizer(vocab={SPECIAL_TOKENS[0]: 0}, merges=[]).backend_tokenizer.pre_tokenizer
    words = [space + word for word in _words() for space in ("", " ")]
    texts = [*words, QWEN_IMAGE_SYSTEM, QWEN_IMAGE_EDIT_SYSTEM, "system\nuser\nassistant"]
    pieces = {piece for text in texts for piece, _ in cut.pre_tokenize_str(text)}
    return sorted(pieces, key=lambda piece: (piece.isascii(), -len(piece), piece))
