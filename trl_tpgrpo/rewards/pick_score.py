"""PickScore: predicts which image people pick for a prompt."""

import torch
from torch import Tensor

from .clip_score import CLIPScore


class PickScore(CLIPScore):
    """PickScore v1: CLIP-H trained on Pick-a-Pic's choices, times its logit scale (arXiv 2305.01569).

    The scale is about 100, so scores are in [-100, 100], mostly between 18 and 26, as in the tables of TP-GRPO and
    Flow-GRPO. Flow-GRPO's code trains on the score divided by 26, so its curves are at about 0.9. Advantages are
    standardised, so this matters only in combination with other rewards. Weights: the model card names no license (the
    paper's code is MIT).

    Known ways to hack it: a glossy, saturated look with one centred subject for any prompt; low variety. The
    arguments are those of `CLIPScore`.
    """

    __name__ = "pick_score"

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        super().__init__(model, processor, device, dtype, batch_size)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.model.logit_scale.float().exp() * self.cosines(images, prompts)
