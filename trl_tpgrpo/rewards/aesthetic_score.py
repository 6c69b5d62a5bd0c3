"""LAION's aesthetic predictor: how much people like an image, regardless of the prompt."""

import torch
from torch import Tensor

from .base import CLIP_MEAN, CLIP_STD, ModelReward, hub_file, linear_head, normalize, resize_and_crop


class AestheticScore(ModelReward):
    """LAION's improved aesthetic predictor (`sac+logos+ava1-l14-linearMSE`): five linear layers on CLIP ViT-L/14.

    Trained on ratings from 1 to 10; most images are between 4 and 7. It ignores the prompt, so combine it with a
    reward that reads the prompt. Weights: the predictor Apache-2.0 (christophschuhmann/improved-aesthetic-predictor on
    GitHub), here from the repository that TRL's DDPO example used; CLIP MIT.

    Known ways to hack it: one painterly style and a few subjects for all prompts, within some hundred updates
    (arXiv 2305.13301 shows it).

    `model` is CLIP in transformers' format, of which the image encoder is used. The weights of the five layers are
    `head_filename` in `head`, a Hub repository or folder. The other arguments are those of `ModelReward`.
    """

    __name__ = "aesthetic_score"

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        head_filename: str = "aesthetic-model.pth",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        from transformers import CLIPModel

        # The whole model is loaded, then halved: CLIPVisionModelWithProjection takes the projection's width from
        # another field of the config, and draws a random projection where the two differ.
        clip = CLIPModel.from_pretrained(model)
        layers = linear_head(clip.config.projection_dim)
        weights = torch.load(hub_file(head, head_filename), map_location="cpu", weights_only=True)
        layers.load_state_dict({name.removeprefix("layers."): weight for name, weight in weights.items()})
        parts = {"vision": clip.vision_model, "projection": clip.visual_projection, "head": layers}
        super().__init__(torch.nn.ModuleDict(parts), device, dtype, batch_size)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        vision = self.model["vision"]
        pixels = normalize(resize_and_crop(images, vision.config.image_size), CLIP_MEAN, CLIP_STD)
        features = self.model["projection"](vision(pixel_values=pixels.to(self.dtype)).pooler_output)
        return self.model["head"](torch.nn.functional.normalize(features, dim=-1)).squeeze(-1)
