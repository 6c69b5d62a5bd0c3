"""The scripts that make prompt sets: what they write is what the rewards and the command line read."""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from processes import run_python

from trl_tpgrpo.rewards.geneval import CLASSES
from trl_tpgrpo.rewards.geneval_rules import check_metadata, clauses


SCRIPTS = Path(__file__).parents[1] / "examples/datasets"
sys.path.insert(0, str(SCRIPTS))

import compositional  # noqa: E402
import pick_a_pic  # noqa: E402
import text_rendering  # noqa: E402


def run(script: str, *arguments: str) -> None:
    run_python(SCRIPTS / script, *arguments).check_returncode()


def test_compositional_prompts_say_what_they_ask_for(tmp_path: Path) -> None:
    run("compositional.py", "--output_dir", str(tmp_path), "--num_train", "600", "--num_test", "60")
    splits = load_dataset(str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 600, "test": 60}
    assert set(Counter(splits["train"]["tag"])) == set(compositional.all_rows())
    assert not set(splits["train"]["prompt"]) & set(splits["test"]["prompt"])
    for row in splits["train"]:
        include, exclude = clauses(row["include"]), clauses(row["exclude"])
        check_metadata(row["tag"], include, exclude, CLASSES)
        for wanted in include:
            assert f"{wanted.get('color', '')} {wanted['class']}".strip() in row["prompt"] or wanted["count"] > 1
            if "position" in wanted:
                relation, other = wanted["position"]
                assert f"{wanted['class']} {relation} " in row["prompt"] and include[other]["class"] in row["prompt"]


@pytest.mark.parametrize(
    ("tag", "prompt", "include", "exclude"),
    [
        ("single_object", "a photo of an apple", [{"class": "apple", "count": 1}], []),
        ("single_object", "a photo of scissors", [{"class": "scissors", "count": 1}], []),
        (
            "two_object", "a photo of a dog and an umbrella",
            [{"class": "dog", "count": 1}, {"class": "umbrella", "count": 1}], [],
        ),
        ("counting", "a photo of three knives", [{"class": "knife", "count": 3}], [{"class": "knife", "count": 4}]),
        ("colors", "a photo of a pink bus", [{"class": "bus", "count": 1, "color": "pink"}], []),
        (
            "position", "a photo of a cat left of a tv",
            [{"class": "tv", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}], [],
        ),
        (
            "color_attr", "a photo of a red bicycle and an orange car",
            [{"class": "bicycle", "count": 1, "color": "red"}, {"class": "car", "count": 1, "color": "orange"}], [],
        ),
    ],
)  # fmt: skip
def test_each_kind_of_compositional_prompt(tag: str, prompt: str, include: list, exclude: list) -> None:
    (row,) = [row for row in compositional.all_rows()[tag] if row["prompt"] == prompt]
    assert clauses(row["include"]) == include and clauses(row["exclude"]) == exclude


def test_classes_are_those_that_the_reward_knows() -> None:
    assert tuple(compositional.CLASSES) == CLASSES


def test_more_prompts_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_train=10000000: there are not so many different prompts"):
        compositional.build(10_000_000, 10)


def test_texts_stand_between_quotes_and_are_new_in_the_test_split(tmp_path: Path) -> None:
    run("text_rendering.py", "--output_dir", str(tmp_path), "--num_train", "300", "--num_test", "50")
    splits = load_dataset(str(tmp_path))
    assert (len(splits["train"]), len(splits["test"])) == (300, 50)
    for split in splits.values():
        assert all(re.findall('"(.*)"', row["prompt"]) == [row["text"]] for row in split)
    assert not set(splits["train"]["text"]) & set(splits["test"]["text"])


def test_more_texts_than_there_are_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(text_rendering, "WORDS", ("one",))
    with pytest.raises(ValueError, match="num_train and num_test: there are not 100 different texts"):
        text_rendering.build(100, 0)


def test_prompts_of_pick_a_pic_are_different_and_of_a_suitable_length(tmp_path: Path) -> None:
    captions = ["a cat  on a mat", "a cat on a mat", "cat", "word " * 100] + [
        f"a picture number {n}" for n in range(20)
    ]
    (tmp_path / "source").mkdir()
    Dataset.from_dict({"caption": captions, "other": captions}).to_parquet(tmp_path / "source/train.parquet")
    run(
        "pick_a_pic.py", "--source", str(tmp_path / "source"), "--output_dir", str(tmp_path / "out"), "--num_test", "5"
    )
    splits = load_dataset(str(tmp_path / "out"))
    assert (len(splits["train"]), len(splits["test"])) == (16, 5)
    assert not {"cat", "word " * 100} & set(splits["train"]["prompt"])
    with pytest.raises(ValueError, match="num_test=500: of 24 captions only 21 prompts are left"):
        pick_a_pic.build(captions, 500)
