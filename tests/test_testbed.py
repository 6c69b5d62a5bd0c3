"""The shapes world, its judge, its prompts and the pretrained pipeline."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trl_tpgrpo.policies.loading import load_pipeline
from trl_tpgrpo.testbed import PIPELINE_KWARGS, prompt_dataset
from trl_tpgrpo.testbed.checker import detect, score_images, shapes_reward
from trl_tpgrpo.testbed.world import KINDS, Caption, Thing, all_captions, parse_caption, split_captions


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from pretrain import WORLDS, build_tokenizer, draw, draw_captioned_pictures  # noqa: E402


RED_CIRCLE, BLUE_SQUARE = Thing("red", "circle"), Thing("blue", "square")


def pictures(captions: list[Caption], seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(draw(caption, rng)) for caption in captions]


def test_captions_read_as_they_mean() -> None:
    assert str(Caption("single", (RED_CIRCLE,))) == "a red circle"
    assert str(Caption("count", (RED_CIRCLE,) * 3)) == "three red circles"
    assert str(Caption("pair", (RED_CIRCLE, BLUE_SQUARE))) == "a red circle and a blue square"
    assert str(Caption("position", (RED_CIRCLE, BLUE_SQUARE), "left of")) == "a red circle left of a blue square"


def test_every_caption_parses_back() -> None:
    captions = all_captions()
    assert len(captions) == len({str(caption) for caption in captions}) == 12 + 24 + 132 + 528
    assert all(parse_caption(str(caption)) == caption for caption in captions)


def test_unknown_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="'a purple cow' is not a caption of this world"):
        parse_caption("a purple cow")


def test_splits_cover_all_captions_and_share_no_things() -> None:
    splits = split_captions()
    assert sorted(map(str, sum(splits.values(), []))) == sorted(map(str, all_captions()))
    keys = {
        name: {(len(caption.things), tuple(sorted(map(str, caption.things)))) for caption in captions}
        for name, captions in splits.items()
    }
    assert not keys["train"] & keys["tuning"] and not keys["train"] & keys["heldout"]
    assert not keys["tuning"] & keys["heldout"]
    assert all({caption.kind for caption in captions} == set(KINDS) for captions in splits.values())


def test_pretraining_never_shows_a_held_out_composition() -> None:
    captions, _ = draw_captioned_pictures(400, np.random.default_rng(0))
    heldout = {str(caption) for caption in split_captions()["heldout"] if caption.kind in ("pair", "position")}
    assert not heldout & set(captions)


def test_true_pictures_are_right_and_wrong_ones_are_not() -> None:
    captions = [caption for caption in all_captions() for _ in range(2)]
    right = score_images(pictures(captions), [str(caption) for caption in captions])
    assert np.mean([score.strict for score in right]) > 0.98
    assert np.mean([score.graded for score in right]) > 0.98
    order = np.random.default_rng(1).permutation(len(captions))
    wrong = score_images(pictures(captions), [str(captions[index]) for index in order])
    assert np.mean([score.strict for score in wrong]) < 0.03
    assert np.mean([score.graded for score in wrong]) < 0.5


def test_detection_finds_things_where_they_are() -> None:
    image = Image.new("RGB", (32, 32), (26, 26, 31))
    image.paste((242, 38, 38), (4, 6, 14, 16))
    (found,) = detect([image])[0]
    assert (found.colour, found.shape, found.centre) == ("red", "square", (9.0, 11.0))
    assert found.quality == 1.0


@pytest.mark.parametrize(
    ("caption", "shown", "expected"),
    [
        ("a red circle", "two red circles", "nothing"),
        ("two red circles", "three red circles", "less"),
        ("two red circles", "a red circle", "less"),
        ("a red circle left of a blue square", "a red circle right of a blue square", "less"),
        ("a red circle and a blue square", "a red circle left of a blue square", "right"),
        ("a red circle", "a green triangle", "nothing"),
    ],
)
def test_graded_score_gives_credit_for_parts(caption: str, shown: str, expected: str) -> None:
    (score,) = score_images(pictures([parse_caption(shown)]), [caption])
    if expected == "right":
        assert score.strict == 1 and score.graded > 0.95
    elif expected == "less":
        assert score.strict == 0 and 0.3 < score.graded < 0.95
    else:
        assert score.strict == 0 and score.graded == 0


def test_empty_picture_scores_nothing() -> None:
    (score,) = score_images([Image.new("RGB", (32, 32))], ["a red circle"])
    assert (score.graded, score.strict) == (0.0, 0.0)
    assert shapes_reward([], []) == []


def test_other_image_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="32 x 32"):
        score_images([Image.new("RGB", (64, 64))], ["a red circle"])


def test_prompt_dataset_is_balanced_and_reproducible() -> None:
    dataset = prompt_dataset("heldout", 80)
    assert dataset.column_names == ["prompt", "kind"]
    assert {kind: dataset["kind"].count(kind) for kind in KINDS} == dict.fromkeys(KINDS, 20)
    assert dataset["prompt"][:] == prompt_dataset("heldout", 80)["prompt"][:]


@pytest.mark.parametrize(
    ("arguments", "message"), [(("test",), "split must be one of"), (("train", 3), "multiple of 4")]
)
def test_wrong_prompt_datasets_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_dataset(*arguments)


def test_tokenizer_knows_each_word_as_one_token() -> None:
    tokenizer = build_tokenizer(WORLDS["shapes"])
    words = {word for caption in all_captions() for word in str(caption).split()}
    assert len(words) == 19
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    longest = max((str(caption) for caption in all_captions()), key=lambda text: len(text.split()))
    assert len(tokenizer(longest).input_ids) <= tokenizer.model_max_length


def test_pretrained_pipeline_draws_what_it_is_told() -> None:
    pipeline = load_pipeline("testbed")
    pipeline.set_progress_bar_config(disable=True)
    prompts = prompt_dataset("train", 64)["prompt"][:]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    images = pipeline(
        prompts, generator=generators, num_inference_steps=8, guidance_scale=1.0, **PIPELINE_KWARGS
    ).images
    scores = score_images(images, prompts)
    assert np.mean([score.strict for score in scores]) > 0.3
    assert np.mean([score.graded for score in scores]) > 0.65
