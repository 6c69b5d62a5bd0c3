"""GenEval: the rules on drawn boxes, and a tiny Mask2Former and CLIP against what transformers makes of them."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_scorers import as_tensor, pictures, save_clip, save_mask2former
from transformers import CLIPImageProcessorPil, CLIPModel, Mask2FormerImageProcessorPil

from trl_tpgrpo.rewards.base import eight_bits
from trl_tpgrpo.rewards.geneval import CLASSES, GenEval, cut_out, detector_pixels
from trl_tpgrpo.rewards.geneval_rules import (
    COLOURS,
    Box,
    Detection,
    Objects,
    check_metadata,
    clauses,
    graded_score,
    is_right,
    kept,
    relative_position,
)


LEFT, RIGHT, TOP, CORNER = (0, 20, 20, 40), (40, 20, 60, 40), (20, 0, 40, 10), (44, 44, 64, 64)


def drawn(**boxes: list[tuple[Box, str]]) -> tuple[Objects, Any]:
    """Objects by class (underscores for spaces) as boxes and colours, and the function that names the colours."""
    objects: Objects = {}
    colours: dict[int, str] = {}
    for name, places in boxes.items():
        for place, colour in places:
            detection = Detection(place, 0.95)
            objects.setdefault(name.replace("_", " "), []).append(detection)
            colours[id(detection)] = colour
    return objects, lambda name, found: [colours[id(one)] for one in found]


@pytest.mark.parametrize(
    ("box", "other", "relations"),
    [
        # What the published function says of these boxes
        (LEFT, RIGHT, {"left of"}),
        (RIGHT, LEFT, {"right of"}),
        ((20, 0, 40, 20), (20, 40, 40, 60), {"above"}),
        ((20, 40, 40, 60), (20, 0, 40, 20), {"below"}),
        ((0, 0, 20, 20), (40, 40, 60, 60), {"left of", "above"}),
        ((0, 0, 10, 40), (12, 30, 50, 64), {"left of", "above"}),
        ((0, 0, 30, 30), (20, 50, 60, 64), {"above"}),
        ((10, 10, 50, 50), (14, 10, 54, 50), set()),  # an offset of 4, less than a tenth of both widths
        ((10, 10, 50, 50), (20, 10, 60, 50), set()),  # 2 of 10 are beyond that, less than half
        ((0, 0, 64, 64), (20, 20, 40, 40), set()),
        ((10, 10, 30, 30), (10, 10, 30, 30), set()),
    ],
)
def test_relative_positions(box: Box, other: Box, relations: set[str]) -> None:
    assert relative_position(box, other) == relations


def test_what_counts_as_seen() -> None:
    found = {"cat": [Detection(LEFT, 0.5), Detection(RIGHT, 0.95), Detection(TOP, 0.3)], "dog": [Detection(LEFT, 0.2)]}
    assert [one.score for one in kept(found, "two_object")["cat"]] == [
        0.95,
        0.5,
    ]  # best first, 0.3 itself is too little
    assert "dog" not in kept(found, "two_object")
    assert [one.score for one in kept(found, "counting")["cat"]] == [0.95]  # over 0.9 where things are counted
    crowd = {"bird": [Detection((at, 0, at + 9, 9), 0.99) for at in range(20)]}
    assert len(kept(crowd, "counting")["bird"]) == 16


@pytest.mark.parametrize(
    ("boxes", "include", "exclude", "right", "score"),
    [
        # single_object
        ({"cat": [(LEFT, "red")]}, [{"class": "cat", "count": 1}], [], True, 1),
        ({"dog": [(LEFT, "red")]}, [{"class": "cat", "count": 1}], [], False, 0),
        ({"cat": [(LEFT, "red"), (RIGHT, "red")]}, [{"class": "cat", "count": 1}], [], True, 0),
        # two_object
        (
            {"cat": [(LEFT, "red")], "dog": [(RIGHT, "red")]},
            [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}],
            [],
            True,
            1,
        ),
        ({"cat": [(LEFT, "red")]}, [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}], [], False, 0.5),
        # counting
        (
            {"cat": [(LEFT, "red"), (RIGHT, "red")]},
            [{"class": "cat", "count": 2}],
            [{"class": "cat", "count": 3}],
            True,
            1,
        ),
        (
            {"cat": [(LEFT, "red"), (RIGHT, "red"), (TOP, "red")]},
            [{"class": "cat", "count": 2}],
            [{"class": "cat", "count": 3}],
            False,
            0.5,
        ),
        (
            {"cat": [(LEFT, "red")] * 7},
            [{"class": "cat", "count": 2}],
            [{"class": "cat", "count": 3}],
            False,
            -1.5,
        ),
        # colors
        ({"car": [(LEFT, "red")]}, [{"class": "car", "count": 1, "color": "red"}], [], True, 1),
        ({"car": [(LEFT, "blue")]}, [{"class": "car", "count": 1, "color": "red"}], [], False, 0.5),
        ({}, [{"class": "car", "count": 1, "color": "red"}], [], False, 0),
        # the most confident one decides; graded, there is one too many
        ({"car": [(LEFT, "red"), (TOP, "blue")]}, [{"class": "car", "count": 1, "color": "red"}], [], True, 0),
        # position
        (
            {"dog": [(RIGHT, "red")], "cat": [(LEFT, "red")]},
            [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
            [],
            True,
            1,
        ),
        (
            {"dog": [(LEFT, "red")], "cat": [(RIGHT, "red")]},
            [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
            [],
            False,
            2 / 3,
        ),
        (
            {"cat": [(LEFT, "red")]},  # nothing that it could be left of
            [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
            [],
            False,
            1 / 3,
        ),
        # color_attr
        (
            {"car": [(LEFT, "red")], "bus": [(CORNER, "white")]},
            [{"class": "car", "count": 1, "color": "red"}, {"class": "bus", "count": 1, "color": "white"}],
            [],
            True,
            1,
        ),
        (
            {"car": [(LEFT, "white")], "bus": [(CORNER, "red")]},  # swapped
            [{"class": "car", "count": 1, "color": "red"}, {"class": "bus", "count": 1, "color": "white"}],
            [],
            False,
            0.5,
        ),
    ],
)
def test_the_six_kinds(boxes: dict, include: list[dict], exclude: list[dict], right: bool, score: float) -> None:
    objects, colours_of = drawn(**boxes)
    assert is_right(objects, include, exclude, colours_of) is right
    assert graded_score(objects, include, colours_of) == pytest.approx(score)


@pytest.mark.parametrize(
    ("tag", "include", "message"),
    [
        ("colours", [{"class": "cat", "count": 1}], "tag is 'colours'"),
        ("colors", [], "include is empty"),
        ("colors", [{"class": "mouse", "count": 1}], "class is 'mouse'"),
        ("counting", [{"class": "cat", "count": 0}], "count is 0 for 'cat'"),
        ("colors", [{"class": "cat", "count": 1, "color": "grey"}], "color is 'grey'"),
        ("position", [{"class": "cat", "count": 1, "position": ["left of", 0]}], "in clause 0"),
        (
            "position",
            [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["beside", 0]}],
            r"position is \['beside', 0\]",
        ),
        (
            "position",
            [{"class": "cat", "count": 1, "position": ["left of"]}],
            r"position is \['left of'\] in clause 0",
        ),
    ],
)
def test_wrong_metadata_is_named(tag: str, include: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_metadata(tag, include, [], CLASSES)


def test_clauses_survive_a_dataset() -> None:
    """As JSON; and as lists where there is no position, whose missing entries Arrow fills with `None`."""
    position = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    as_text = Dataset.from_list([{"include": json.dumps(position)}])[0]["include"]
    assert clauses(as_text) == position
    mixed = Dataset.from_list(
        [{"include": [{"class": "cat", "count": 1}, {"class": "car", "count": 1, "color": "red"}]}]
    )
    assert clauses(mixed[0]["include"])[0] == {"class": "cat", "count": 1}
    assert clauses(None) == []


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    detector = save_mask2former(tmp_path_factory.mktemp("mask2former"))
    return str(detector), str(save_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def reward(paths: tuple[str, str]) -> GenEval:
    return GenEval(*paths, image_size=64, batch_size=2)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (50, 50), (40, 50), (30, 90)])
def test_detector_is_given_what_its_processor_makes(size: tuple[int, int]) -> None:
    """With padding to multiples of 32, as in training and in GenEval, where the processor of today would stretch."""
    images = pictures((size,) * 2)
    processor = Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 107}, size_divisor=1)
    expected = processor(images, return_tensors="pt").pixel_values
    height, width = expected.shape[-2:]
    pixels = detector_pixels(eight_bits(as_tensor(images)), 64)
    assert pixels.shape[-2:] == (-(-height // 32) * 32, -(-width // 32) * 32)
    assert (pixels[..., :height, :width] - expected).abs().max() < 2.5 / 255 / 0.22  # two grey levels: Pillow rounds
    assert pixels[..., height:, :].abs().sum() == pixels[..., width:].abs().sum() == 0


def test_objects_are_those_of_transformers(reward: GenEval) -> None:
    """Up to the resolution of the masks: the library's are of 384 x 384, whatever the image."""
    images = pictures(((96, 64),) * 3)
    processor = Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 107}, size_divisor=32)
    with torch.no_grad():
        outputs = reward.detector(**processor(images, return_tensors="pt"))
    library = processor.post_process_instance_segmentation(outputs, threshold=0.3, target_sizes=[(64, 96)] * 3)
    found = [kept(objects, "two_object") for objects in reward.detect(eight_bits(as_tensor(images)))]
    assert sum(len(objects) for objects in found) > 0
    for objects, segments in zip(found, (entry["segments_info"] for entry in library), strict=True):
        theirs = sorted((CLASSES[segment["label_id"]], segment["score"]) for segment in segments)
        ours = sorted((name, one.score) for name, listed in objects.items() for one in listed)
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=0.01)


def test_boxes_hold_their_masks_and_nothing_found_is_no_error(reward: GenEval, paths: tuple[str, str]) -> None:
    (objects,) = reward.detect(eight_bits(as_tensor(pictures(((96, 64),)))))
    for one in (one for listed in objects.values() for one in listed):
        left, top, right, bottom = one.box
        assert one.mask.shape == (64, 96)
        assert one.mask[top:bottom, left:right].sum() == one.mask.sum() > 0
        assert one.mask[:, left].any() and one.mask[bottom - 1].any()
    unsure = GenEval(*paths, image_size=64)
    unsure.detector.class_predictor.weight.data *= 0
    scores = unsure(
        as_tensor(pictures(((32, 32),))), ["a cat"], tag=["single_object"], include=[[{"class": "cat", "count": 1}]]
    )
    assert scores == [0.0]


def test_colours_are_clip_s_choice_for_the_masked_object_on_grey(reward: GenEval, paths: tuple[str, str]) -> None:
    """Against Pillow's cut-out, transformers' processor and model, and embeddings averaged by hand."""
    (picture,) = pictures(((96, 64),))
    mask = torch.zeros(64, 96, dtype=torch.bool)
    mask[10:50, 20:60] = True
    mask[10:20, 20:30] = False
    objects = [Detection((20, 10, 60, 50), 0.9, mask), Detection((4, 4, 90, 60), 0.8)]
    image = as_tensor([picture])[0]
    ground = Image.new("RGB", picture.size, "#999")
    crops = [
        Image.composite(picture, ground, Image.fromarray(mask.numpy())).crop((20, 10, 60, 50)),
        picture.crop((4, 4, 90, 60)),
    ]
    for one, crop in zip(objects, crops, strict=True):
        assert torch.allclose(cut_out(image, one), as_tensor([crop])[0], atol=1e-6)
    clip = CLIPModel.from_pretrained(paths[1]).eval()
    pixels = torch.cat(
        [CLIPImageProcessorPil.from_pretrained(paths[1])(crop, return_tensors="pt").pixel_values for crop in crops]
    )
    texts = (
        [f"a photo of a {colour} car" for colour in COLOURS],
        [f"a photo of a {colour}-colored car" for colour in COLOURS],
    )
    texts += ([f"a photo of a {colour} object" for colour in COLOURS],)
    means = 0
    for listed in texts:
        tokens = reward.clip.tokenizer(listed, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            features = clip.get_text_features(**tokens).pooler_output
        means = means + features / features.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        expected = (
            clip.get_image_features(pixels).pooler_output @ (means / means.norm(dim=-1, keepdim=True)).T
        ).argmax(-1)
        assert reward.colours_in(image)("car", objects) == [COLOURS[index] for index in expected.tolist()]


def test_rows_columns_and_metrics(reward: GenEval, paths: tuple[str, str]) -> None:
    """Rows without a tag are not scored; the share of right ones is logged; graded and strict see the same objects."""
    images = as_tensor(pictures(((96, 64),) * 4))
    found = [kept(objects, "single_object") for objects in reward.detect(eight_bits(images))]
    seen = [next(iter(objects)) for objects in found]
    include = [[{"class": name, "count": len(objects[name])}] for name, objects in zip(seen, found, strict=True)]
    include[1], include[2] = json.dumps([{"class": "toothbrush", "count": 2}]), None
    exclude = [None, None, None, json.dumps([{"class": seen[3], "count": 1}])]
    logged: dict[str, float] = {}
    arguments = {"tag": ["single_object", "counting", None, "single_object"], "include": include, "exclude": exclude}
    scores = reward(images, [""] * 4, **arguments, log_metric=logged.__setitem__, trainer_state=None)
    assert scores == [1.0, 0.0, None, 1.0]
    assert logged == {"geneval_right": pytest.approx(1 / 3)}  # the fourth shows what it should not
    strict = GenEval(*paths, graded=False, image_size=64)
    assert strict(images, [""] * 4, **arguments) == [1.0, 0.0, None, 0.0]
    assert (reward.__name__, reward.image_type) == ("geneval", "pt")
    assert reward(images[:1], [""], tag=[None], include=[None]) == [None]


def test_bfloat16_and_moving(paths: tuple[str, str]) -> None:
    rough = GenEval(*paths, image_size=64, dtype=torch.bfloat16)
    clause = [{"class": "car", "count": 1, "color": "red"}]
    scores = rough(as_tensor(pictures(((96, 64),) * 2)), [""] * 2, tag=["colors"] * 2, include=[clause] * 2)
    assert all(isinstance(score, float) for score in scores)
    assert rough.to("meta") is rough
    parts = (rough.detector, rough.clip.model)
    assert {(weight.device.type, weight.dtype) for part in parts for weight in part.parameters()} == {
        ("meta", torch.bfloat16)
    }


def test_wrong_rows_and_detectors_are_refused(reward: GenEval, paths: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="class is 'unicorn'"):
        reward(as_tensor(pictures(((32, 32),))), [""], tag=["colors"], include=[[{"class": "unicorn", "count": 1}]])
    with pytest.raises(ValueError, match="has 3 classes instead of COCO's 80"):
        GenEval(str(save_mask2former(tmp_path, num_labels=3)), paths[1])


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_scipy(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "scipy":
            raise ModuleNotFoundError("No module named 'scipy'", name=name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ImportError, match=r"geneval needs scipy: pip install 'trl-tpgrpo\[geneval\]'"):
        GenEval()
