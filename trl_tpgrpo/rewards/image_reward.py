"""ImageReward: predicts how annotators rate an image for a prompt."""

import json
from typing import Any

import torch
from torch import Tensor

from .base import CLIP_MEAN, CLIP_STD, ModelReward, hub_file, linear_head, normalize, renamed, resize_and_crop


HEAD_WIDTH = 64  # in BLIP's vision transformers, base and large alike
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # published, for the raw scores
VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
)


class ImageReward(ModelReward):
    """ImageReward v1.0: BLIP, whose text encoder attends to the image, and five linear layers (arXiv 2304.05977).

    Standardised scores, mostly in [-2.3, 2]; 0 is an average image. The published checkpoint is loaded into
    transformers' own BLIP classes, since the package image-reward of 2023 asks for old versions of timm, fairscale and
    transformers. Prompts are truncated to 35 tokens. Weights: Apache-2.0.

    Known ways to hack it: close-up subjects, bright and over-saturated. Details that are not in the prompt have no
    effect.

    `model`, a repository on the Hub or a folder, has `ImageReward.pt` and `med_config.json`; `tokenizer` is BERT's;
    the other arguments are those of `ModelReward`.
    """

    __name__ = "image_reward"

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        tokenizer: str = "google-bert/bert-base-uncased",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        from transformers import AutoTokenizer

        weights = torch.load(hub_file(model, "ImageReward.pt"), map_location="cpu", weights_only=True)
        text_config = json.loads(hub_file(model, "med_config.json").read_text())
        super().__init__(build(weights, text_config), device, dtype, batch_size)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        vision, text = self.model["vision"], self.model["text"]
        pixels = normalize(resize_and_crop(images, vision.config.image_size), CLIP_MEAN, CLIP_STD)
        seen = vision(pixel_values=pixels.to(self.dtype)).last_hidden_state
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=35, return_tensors="pt")
        read = text(
            input_ids=tokens.input_ids.to(self.device),
            attention_mask=tokens.attention_mask.to(self.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state
        return (self.model["head"](read[:, 0]).squeeze(-1).float() - MEAN) / STD


def build(weights: dict[str, Tensor], text_config: dict) -> torch.nn.ModuleDict:
    """Build image encoder, text encoder (which attends to the image) and linear layers with the published weights."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionModel

    seeing = _part(weights, "blip.visual_encoder.")
    vision = BlipVisionModel(_vision_config(seeing))
    vision.load_state_dict(renamed(seeing, VISION_NAMES))
    text_config = text_config | {"encoder_hidden_size": vision.config.hidden_size, "is_decoder": True}
    text = BlipTextModel(BlipTextConfig(**text_config), add_pooling_layer=False)
    text.load_state_dict(_part(weights, "blip.text_encoder."))
    head = linear_head(text.config.hidden_size)
    head.load_state_dict(_part(weights, "mlp.layers."))
    return torch.nn.ModuleDict({"vision": vision, "text": text, "head": head})


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights below a prefix, without the position ids, a constant that old versions saved."""
    return {
        name.removeprefix(prefix): weight
        for name, weight in weights.items()
        if name.startswith(prefix) and not name.endswith("position_ids")
    }


def _vision_config(vision: dict[str, Tensor]) -> Any:
    """Derive the image encoder's config from the shapes of weights: the published package has no file of it."""
    from transformers import BlipVisionConfig

    width, _, _, patch_size = vision["patch_embed.proj.weight"].shape
    num_patches = vision["pos_embed"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(vision["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in vision if name.startswith("blocks.")),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch_size * round(num_patches**0.5),
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )
