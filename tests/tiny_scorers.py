"""Tiny checkpoints of the real classes that reward models are made of, with reproducible random weights, on disk."""

import json
import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)


IMAGE_SIZE = 32
PROMPTS = ["a red circle", "two blue squares", "a red circle", "a dog left of a cat"]


def pictures(sizes: tuple[tuple[int, int], ...], seed: int = 0) -> list[Image.Image]:
    """Pictures of these widths and heights: soft colours with some noise, neither flat nor all noise."""
    rng = np.random.default_rng(seed)
    result = []
    for width, height in sizes:
        blobs = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height), 3)
        noisy = np.asarray(blobs) + rng.normal(0, 20, (height, width, 3))
        result.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    return result


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    """What the trainer hands to a reward on tensors: (N, 3, H, W) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])


def save_clip(folder: Path, seed: int = 0, width: int = 64) -> Path:
    """A CLIP model with tokenizer and image processor. The end token has the highest number, as in the real ones."""
    tokenizer = clip_tokenizer()
    tower = {"intermediate_size": 2 * width, "num_hidden_layers": 2, "hidden_size": width, "hidden_act": "gelu"}
    text = tower | {
        "vocab_size": len(tokenizer),
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {"num_attention_heads": 1, "image_size": IMAGE_SIZE, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=32, initializer_factor=3.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)
    return folder


def clip_tokenizer() -> CLIPTokenizer:
    """Letter by letter."""
    letters = string.ascii_lowercase + ","
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)}, merges=[], model_max_length=24
    )


def save_bert_tokenizer(folder: Path) -> Path:
    """Letter by letter too, lower case."""
    letters = string.ascii_lowercase
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of these names and shapes, the same everywhere: scales of norms near 1, all else near 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shapes[name], generator=generator) * 0.2 + ("norm" in name.lower() and "weight" in name)
        for name in sorted(shapes)
    }


def open_clip_shapes(width: int = 64, projection: int = 32, patch: int = 8) -> dict[str, tuple[int, ...]]:
    """Names and shapes of open_clip's CLIP (as in HPS_v2.1_compressed.pt) at the size of `save_clip`."""
    tokenizer = clip_tokenizer()
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "positional_embedding": (tokenizer.model_max_length, width),
        "text_projection": (width, projection),
        "token_embedding.weight": (len(tokenizer), width),
        "visual.class_embedding": (width,),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.positional_embedding": ((IMAGE_SIZE // patch) ** 2 + 1, width),
        "visual.proj": (width, projection),
    }
    for norm in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for tower in ("transformer", "visual.transformer"):
        for layer in (0, 1):
            block = f"{tower}.resblocks.{layer}"
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            shapes |= linear(f"{block}.attn.out_proj", width, width)
            shapes |= linear(f"{block}.mlp.c_fc", width, 2 * width) | linear(f"{block}.mlp.c_proj", 2 * width, width)
    return shapes


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def head_shapes(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    """The five layers of the aesthetic predictor and of ImageReward."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number, inputs, outputs in ((0, width, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        shapes |= linear(f"{prefix}layers.{number}", inputs, outputs)
    return shapes


MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 57,
    "encoder_width": 32,
    "add_cross_attention": True,
}


def image_reward_shapes(width: int = 128, patch: int = 16) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parts of ImageReward.pt that count, at two layers each."""
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    shapes: dict[str, tuple[int, ...]] = {
        f"{vision}.cls_token": (1, 1, width),
        f"{vision}.pos_embed": (1, (IMAGE_SIZE // patch) ** 2 + 1, width),
        f"{vision}.patch_embed.proj.weight": (width, 3, patch, patch),
        f"{vision}.patch_embed.proj.bias": (width,),
    } | norm(f"{vision}.norm", width)
    for layer in (0, 1):
        block = f"{vision}.blocks.{layer}"
        shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        shapes |= linear(f"{block}.attn.qkv", width, 3 * width) | linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.fc1", width, 4 * width) | linear(f"{block}.mlp.fc2", 4 * width, width)
    hidden, inner = MED_CONFIG["hidden_size"], MED_CONFIG["intermediate_size"]
    shapes |= norm(f"{text}.embeddings.LayerNorm", hidden) | {
        f"{text}.embeddings.word_embeddings.weight": (MED_CONFIG["vocab_size"], hidden),
        f"{text}.embeddings.position_embeddings.weight": (MED_CONFIG["max_position_embeddings"], hidden),
    }
    for layer in (0, 1):
        block = f"{text}.encoder.layer.{layer}"
        for attention, source in (("attention", hidden), ("crossattention", width)):
            shapes |= linear(f"{block}.{attention}.self.query", hidden, hidden)
            shapes |= linear(f"{block}.{attention}.self.key", source, hidden)
            shapes |= linear(f"{block}.{attention}.self.value", source, hidden)
            shapes |= linear(f"{block}.{attention}.output.dense", hidden, hidden)
            shapes |= norm(f"{block}.{attention}.output.LayerNorm", hidden)
        shapes |= linear(f"{block}.intermediate.dense", hidden, inner) | linear(f"{block}.output.dense", inner, hidden)
        shapes |= norm(f"{block}.output.LayerNorm", hidden)
    return shapes | head_shapes("mlp.", hidden)


def save_mask2former(folder: Path, num_labels: int = 80, seed: int = 0) -> Path:
    """A Mask2Former on Swin, whose classes are made as sure as those of a trained one."""
    backbone = SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=num_labels,
        num_queries=12,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Mask2FormerForUniversalSegmentation(config)
        model.class_predictor.weight.data *= 60
        model.save_pretrained(folder)
    return folder
