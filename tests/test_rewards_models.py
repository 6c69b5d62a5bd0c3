"""Rewards on models, from tiny checkpoints of the real classes, against scores of published packages or libraries."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_scorers import (
    IMAGE_SIZE,
    MED_CONFIG,
    PROMPTS,
    as_tensor,
    drawn,
    head_shapes,
    image_reward_shapes,
    open_clip_shapes,
    pictures,
    save_bert_tokenizer,
    save_clip,
)
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from trl_tpgrpo.rewards.aesthetic_score import AestheticScore
from trl_tpgrpo.rewards.base import CLIP_MEAN, CLIP_STD, ModelReward, eight_bits, normalize, resize_and_crop
from trl_tpgrpo.rewards.clip_score import CLIPScore
from trl_tpgrpo.rewards.hps_v2 import HPSv2, from_open_clip
from trl_tpgrpo.rewards.image_reward import ImageReward
from trl_tpgrpo.rewards.pick_score import PickScore


# Of HPSv2 1.2.0's and ImageReward 1.5's own modules, with the weights of `drawn`, on these prompts and four pictures
PUBLISHED_HPS = [0.1743455, 0.1218224, 0.1680550, 0.1321643]
PUBLISHED_IMAGE_REWARD = [-6.432271, 28.434767, 10.123221, 11.969155]
SQUARES = ((IMAGE_SIZE, IMAGE_SIZE),) * 4


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("head")
    torch.save(drawn(head_shapes("", 32)), folder / "aesthetic-model.pth")
    return str(folder)


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hps")
    torch.save({"epoch": 1, "state_dict": drawn(open_clip_shapes())}, folder / "HPS_v2.1_compressed.pt")
    return str(folder)


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_bert_tokenizer(tmp_path_factory.mktemp("image_reward"))
    unused = {"blip.vision_proj.weight": torch.zeros(2, 2), "blip.text_encoder.embeddings.position_ids": torch.ones(1)}
    torch.save(drawn(image_reward_shapes()) | unused, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    return str(folder)


@pytest.fixture(scope="module")
def rewards(clip: str, head: str, hps: str, image_reward: str) -> dict[str, Callable[..., ModelReward]]:
    return {
        "clip_score": lambda **settings: CLIPScore(clip, **settings),
        "pick_score": lambda **settings: PickScore(clip, clip, **settings),
        "hps_v2": lambda **settings: HPSv2(hps, processor=clip, **settings),
        "aesthetic_score": lambda **settings: AestheticScore(clip, head, **settings),
        "image_reward": lambda **settings: ImageReward(image_reward, image_reward, **settings),
    }


def library_logits(clip: str, images: list[Image.Image]) -> torch.Tensor:
    """What transformers' own processor and model say of images and prompts, the scale included."""
    model = CLIPModel.from_pretrained(clip).eval()
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(clip), CLIPScore(clip).tokenizer)
    inputs = processor(text=PROMPTS, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**inputs).logits_per_image.diagonal()


@pytest.mark.parametrize("size", [(32, 32), (40, 40), (64, 48), (30, 50), (512, 512), (100, 333)])
def test_pixels_are_those_of_the_processor(size: tuple[int, int]) -> None:
    """To one grey level, where Pillow's fixed-point sums round to the other side."""
    images = pictures((size,) * 4)
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop)
    expected = processor(images, return_tensors="pt").pixel_values
    pixels = normalize(resize_and_crop(eight_bits(as_tensor(images)), IMAGE_SIZE), CLIP_MEAN, CLIP_STD)
    levels = (pixels - expected).abs() * 255 * torch.tensor(CLIP_STD)[:, None, None]
    assert levels.max() < 1.1
    assert levels.mean() < 0.2


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (512, 512)])
def test_clip_score_is_the_library_s(clip: str, size: tuple[int, int]) -> None:
    images = pictures((size,) * 4)
    scores = CLIPScore(clip)(images=as_tensor(images), prompts=PROMPTS, trainer_state=None, other_column=[1, 2, 3, 4])
    scale = CLIPModel.from_pretrained(clip).logit_scale.exp().item()
    assert scores == pytest.approx((library_logits(clip, images) * 100 / scale).tolist(), abs=0.02)
    assert max(scores) - min(scores) > 5


def test_pick_score_is_the_model_s_logit(clip: str) -> None:
    images = pictures(SQUARES)
    scores = PickScore(clip, clip)(as_tensor(images), PROMPTS)
    assert scores == pytest.approx(library_logits(clip, images).tolist(), abs=1e-4)


def test_hps_is_that_of_the_published_package(hps: str, clip: str) -> None:
    scores = HPSv2(hps, processor=clip)(as_tensor(pictures(SQUARES)), PROMPTS)
    assert scores == pytest.approx(PUBLISHED_HPS, abs=1e-5)


def test_a_checkpoint_that_does_not_fit_is_an_error(hps: str, clip: str, tmp_path: Path) -> None:
    weights = drawn(open_clip_shapes())
    del weights["visual.proj"]
    torch.save({"state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(RuntimeError, match="Missing key"):
        HPSv2(str(tmp_path), processor=clip)
    assert "visual_projection.weight" in from_open_clip(drawn(open_clip_shapes()))


def test_image_reward_is_that_of_the_published_package(image_reward: str) -> None:
    scores = ImageReward(image_reward, image_reward)(as_tensor(pictures(SQUARES)), PROMPTS)
    assert scores == pytest.approx(PUBLISHED_IMAGE_REWARD, rel=1e-4)


def test_aesthetic_score_is_an_affine_map_of_clip_s_image_features(clip: str, head: str) -> None:
    images = pictures(SQUARES)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        features = CLIPModel.from_pretrained(clip).eval().get_image_features(pixel_values=pixels).pooler_output
    expected = (features / features.norm(dim=-1, keepdim=True)).double()
    weights = {name: weight.double() for name, weight in drawn(head_shapes("", 32)).items()}
    for number in (0, 2, 4, 6, 7):
        expected = expected @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
    assert AestheticScore(clip, head)(as_tensor(images), PROMPTS) == pytest.approx(expected[:, 0].tolist(), rel=1e-4)


NAMES = ["clip_score", "pick_score", "hps_v2", "aesthetic_score", "image_reward"]


@pytest.mark.parametrize("name", NAMES)
def test_contract_batches_and_precision(rewards: dict[str, Callable[..., ModelReward]], name: str) -> None:
    images = as_tensor(pictures(SQUARES))
    reward = rewards[name]()
    assert reward.__name__ == name and reward.image_type == "pt"
    scores = reward(images, PROMPTS)
    assert rewards[name](batch_size=3)(images, PROMPTS) == pytest.approx(scores, rel=1e-3, abs=1e-4)
    assert all(isinstance(score, float) for score in scores)
    rough = rewards[name](dtype=torch.bfloat16)
    assert next(rough.model.parameters()).dtype == torch.bfloat16
    assert torch.corrcoef(torch.tensor([rough(images, PROMPTS), scores]))[0, 1] > 0.98
    assert reward.to("meta") is reward and next(reward.model.parameters()).device.type == "meta"


def test_images_of_bfloat16_and_out_of_range_are_taken_at_256_levels(clip: str) -> None:
    reward, images = CLIPScore(clip), as_tensor(pictures(SQUARES))
    assert reward(images + 0.4 / 255, PROMPTS) == reward(images, PROMPTS)
    beyond = images.clone()
    beyond[:, :, 0, 0] = 1.7
    assert reward(beyond, PROMPTS) == reward(beyond.clamp(0, 1), PROMPTS)
    assert reward(images.bfloat16(), PROMPTS) == pytest.approx(reward(images, PROMPTS), abs=0.5)


def test_equal_prompts_are_encoded_once(clip: str) -> None:
    reward, seen = CLIPScore(clip), []
    reward.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    reward(as_tensor(pictures(SQUARES)), PROMPTS)
    assert seen == [3]


def test_long_prompts_are_cut_as_the_model_has_it(clip: str) -> None:
    reward, images = CLIPScore(clip), as_tensor(pictures(SQUARES))
    long = "a red circle and a blue square and a green one"
    letters = long.replace(" ", "")[:22]  # 24 tokens with start and end
    assert reward.tokenizer(long, truncation=True, max_length=24).input_ids[:-1] != reward.tokenizer(letters).input_ids
    assert reward(images, [long] * 4) == pytest.approx(reward(images, [long + " and so on"] * 4))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 32, 32, 3),
        torch.zeros(3, 32, 32),
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        pictures(SQUARES),
    ],
    ids=["channels last", "one image", "bytes", "Pillow's"],
)
def test_wrong_images_are_refused(clip: str, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be a float tensor of shape \(B, 3, H, W\) in \[0, 1\], got "):
        CLIPScore(clip)(images, ["a red circle"] * len(images))


def test_batch_size_of_zero_is_refused(clip: str) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        CLIPScore(clip, batch_size=0)
