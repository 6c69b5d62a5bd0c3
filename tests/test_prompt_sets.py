"""The scripts that make prompt sets: what they write is what the rewards and the command line read."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset


SCRIPTS = Path(__file__).parents[1] / "examples/datasets"
sys.path.insert(0, str(SCRIPTS))

import compositional  # noqa: E402
import pick_a_pic  # noqa: E402
import text_rendering  # noqa: E402


def run(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, SCRIPTS / script, *arguments], check=True, capture_output=True, timeout=120)


def test_compositional_prompts_say_what_they_ask_for(tmp_path: Path) -> None:
    run("compositional.py", "--output_dir", str(tmp_path), "--num_train", "600", "--num_test", "60")
    splits = load_dataset(str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 600, "test": 60}
    assert set(Counter(splits["train"]["tag"])) == set(compositional.all_rows())
    assert not set(splits["train"]["prompt"]) & set(splits["test"]["prompt"])
    for row in splits["train"]:
        for wanted in row["include"]:
            assert wanted["class"] in compositional.CLASSES
            assert wanted["color"] is None or f"{wanted['color']} {wanted['class']}" in row["prompt"]
            if wanted["position"]:
                assert f"{wanted['class']} {wanted['position']['relation']} " in row["prompt"]
                assert row["include"][wanted["position"]["of"]]["class"] in row["prompt"]


@pytest.mark.parametrize(
    ("tag", "prompt", "include", "exclude"),
    [
        ("single_object", "a photo of an apple", [("apple", 1, None, None)], []),
        ("single_object", "a photo of scissors", [("scissors", 1, None, None)], []),
        ("two_object", "a photo of a dog and an umbrella", [("dog", 1, None, None), ("umbrella", 1, None, None)], []),
        ("counting", "a photo of three knives", [("knife", 3, None, None)], [("knife", 4)]),
        ("colors", "a photo of a pink bus", [("bus", 1, "pink", None)], []),
        ("position", "a photo of a cat left of a tv", [("tv", 1, None, None), ("cat", 1, None, ("left of", 0))], []),
        (
            "color_attr",
            "a photo of a red bicycle and an orange car",
            [("bicycle", 1, "red", None), ("car", 1, "orange", None)],
            [],
        ),
    ],
)
def test_each_kind_of_compositional_prompt(tag: str, prompt: str, include: list, exclude: list) -> None:
    (row,) = [row for row in compositional.all_rows()[tag] if row["prompt"] == prompt]
    assert row["include"] == [compositional.thing(*wanted) for wanted in include]
    assert row["exclude"] == [{"class": name, "count": count} for name, count in exclude]


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
