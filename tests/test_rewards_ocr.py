"""The OCR reward: its formula by hand, and the real recogniser on rendered text where RapidOCR is installed."""

import builtins
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trl_tpgrpo.rewards.ocr import OCRReward, similarity, wanted_text


BENCHMARK = Path(__file__).parents[1] / "benchmarks/ocr.py"


@pytest.fixture(scope="module")
def reward() -> OCRReward:
    pytest.importorskip("rapidocr")
    return OCRReward(num_threads=1)


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARK))


@pytest.mark.parametrize(
    ("prompt", "given", "text"),
    [
        ('a shop sign that says "Open 24 Hours" at night', None, "Open 24 Hours"),
        ('"One" above "Two"', None, "One"),
        ("a poster with \u201cMoon Base\u201d on it", None, "Moon Base"),
        ('a sign that says "Open"', "Closed", "Closed"),
        ("a dog's bone", None, None),
        ('nothing between "" and " "', None, " and "),
        ('two inches: 2"', None, None),
    ],
)
def test_text_asked_for(prompt: str, given: str | None, text: str | None) -> None:
    assert wanted_text(prompt, given) == text


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="The column text is ' ' for the prompt 'a sign'"):
        wanted_text("a sign", " ")


@pytest.mark.parametrize(
    ("read", "target", "score"),
    [
        ("helloworld", "Hello World", 1),  # case and spaces are ignored
        ("xxhello worldxx", "Hello World", 1),  # what is around it costs nothing
        ("helo", "Hello", 4 / 5),  # one letter is missing
        ("hallo!", "Hello", 3 / 5),  # one is wrong, one too many
        ("", "Hello", 0),
        ("something else altogether", "Ok", 0),  # never below 0
    ],
)
def test_formula(read: str, target: str, score: float) -> None:
    pytest.importorskip("rapidfuzz")
    assert similarity(read, target) == pytest.approx(score)


def test_rendered_text_is_read(reward: OCRReward, benchmark: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    texts = benchmark["TEXTS"][:5]
    fonts = benchmark["FONTS"]
    images = [
        benchmark["render"](text, fonts[row % len(fonts)], 24 + 4 * row, 25 * (row % 2), row % 4 > 0, rng)
        for row, text in enumerate(texts)
    ]
    right = reward(images, [f'a sign that says "{text}"' for text in texts])
    wrong = reward(images[:2], ['a sign that says "Fresh Bread"', 'a sign that says "Mind the Gap"'])
    assert np.mean(right) > 0.97
    assert np.mean(wrong) < 0.4


def test_text_column_extra_and_rows_without_text(reward: OCRReward, benchmark: dict[str, Any]) -> None:
    """An empty image reads as nothing; rows that ask for no text are not scored."""
    sign = benchmark["render"]("Taxi", "DejaVuSans", 48, 0)
    blank = Image.new("RGB", (32, 32), "white")
    shown: dict[str, list] = {}
    scores = reward(
        images=[sign, blank, sign],
        prompts=["a car", 'a sign that says "Taxi"', "a car"],
        text=["TAXI", None, None],
        log_extra=shown.__setitem__,
        trainer_state=None,
    )
    assert scores == [1.0, 0.0, None]
    assert shown == {"ocr_text": ["Taxi", "", None]}


def test_benchmark_writes_its_table(
    reward: OCRReward, benchmark: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ocr.py", "--num_texts", "2"])
    benchmark["main"]()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 9 and all(len(row.split("|")) == 8 for row in rows)
    assert rows[2].startswith("| 24 px | 0 | plain | 1.00 | 1.000 |")
    assert "another text" in rows[-1] and float(rows[-1].split("|")[4]) == 0


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_onnxruntime(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name=name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_onnxruntime)
    with pytest.raises(ImportError, match=r"ocr needs onnxruntime: pip install 'trl-tpgrpo\[ocr\]'"):
        OCRReward()
