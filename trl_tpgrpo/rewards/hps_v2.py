"""Human Preference Score v2.1: predicts which image people prefer for a prompt."""

import torch
from torch import Tensor

from .base import hub_file, renamed
from .clip_score import CLIPScore


class HPSv2(CLIPScore):
    """HPS v2.1: cosine of a CLIP-H trained on the Human Preference Dataset v2 (arXiv 2306.09341).

    In [-1, 1]; good images score about 0.25 to 0.35. The published checkpoint is in open_clip's format; the weights
    are renamed for transformers' CLIPModel, so that open_clip and the package hpsv2 are not needed. Non-square images
    are cropped to the centre, as for PickScore. Weights: Apache-2.0.

    Known ways to hack it: glossy, over-saturated and over-detailed images.

    `filename` is a checkpoint in `model` (version 2.0 is `HPS_v2_compressed.pt`); `processor` has the architecture's
    config, tokenizer and image processor. The other arguments are those of `ModelReward`.
    """

    __name__ = "hps_v2"

    def __init__(
        self,
        model: str = "xswu/HPSv2",
        filename: str = "HPS_v2.1_compressed.pt",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        self.filename, self.architecture = filename, processor
        super().__init__(model, processor, device, dtype, batch_size)

    def load(self, model: str) -> torch.nn.Module:
        from transformers import CLIPConfig, CLIPModel

        clip = CLIPModel(CLIPConfig.from_pretrained(self.architecture))
        checkpoint = torch.load(hub_file(model, self.filename), map_location="cpu", weights_only=True)
        clip.load_state_dict(from_open_clip(checkpoint["state_dict"]))
        return clip

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.cosines(images, prompts)


RENAMED = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of open_clip's CLIP for transformers' CLIPModel.

    Besides names, projections are transposed, and open_clip has one input matrix for attention, transformers three.
    """
    converted = {}
    for name, weight in renamed(weights, RENAMED).items():
        if ".in_proj_" in name:
            for part, rows in zip("qkv", weight.chunk(3), strict=True):
                converted[name.replace("in_proj_", f"{part}_proj.")] = rows.contiguous()
        else:
            converted[name] = weight.T.contiguous() if name.endswith("_projection.weight") else weight
    return converted
