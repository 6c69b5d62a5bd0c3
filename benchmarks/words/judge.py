"""The judge of the words world: the recogniser of RapidOCR (PP-OCRv6 small, Apache-2.0), without its detector.

The model is called by onnxruntime, on the whole picture enlarged to its height of 48 pixels. In each of its 12 columns
it gives a character or none; repeated ones count once (CTC: Graves et al., 2006). Case does not matter.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


MODEL = "models/PP-OCRv6_rec_small.onnx"  # in RapidOCR's wheel
HEIGHT = 48
BATCH_SIZE = 16


class Recogniser:
    """The recogniser with its characters; the first stands for none. Needs `pip install 'trl-tpgrpo[ocr]'`."""

    def __init__(self) -> None:
        import onnxruntime  # here, so that the shapes world does without
        import rapidocr

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = Path(rapidocr.__file__).parent / MODEL
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (self.input,) = (one.name for one in self.session.get_inputs())
        self.characters = ["", *self.session.get_modelmeta().custom_metadata_map["character"].splitlines(), " "]

    def read(self, images: list[Image.Image]) -> list[str]:
        """Return the text in each of N images of one size."""
        found = []
        for start in range(0, len(images), BATCH_SIZE):
            pixels = np.stack([self._prepared(image) for image in images[start : start + BATCH_SIZE]])
            (scores,) = self.session.run(None, {self.input: pixels})  # (N, columns, characters)
            for best in scores.argmax(-1):
                changed = np.append(True, best[1:] != best[:-1])
                found.append("".join(self.characters[index] for index in best[changed]))
        return found

    def _prepared(self, image: Image.Image) -> np.ndarray:
        width = round(HEIGHT / image.height * image.width)
        enlarged = image.convert("RGB").resize((width, HEIGHT), Image.Resampling.BILINEAR)
        return np.asarray(enlarged, dtype=np.float32)[..., ::-1].transpose(2, 0, 1) / 127.5 - 1  # BGR


@lru_cache
def recogniser() -> Recogniser:
    """Load the recogniser, once a process."""
    return Recogniser()


def words_reward(images: list[Image.Image], prompts: list[str], **columns: Any) -> list[float]:
    """Return rewards in [0, 1]: 1 minus Levenshtein's distance to the word over its length."""
    from rapidfuzz.distance import Levenshtein

    return [1 - min(Levenshtein.distance(text, word), len(word)) / len(word) for text, word in _pairs(images, prompts)]


def strict_reward(images: list[Image.Image], prompts: list[str], **columns: Any) -> list[float]:
    """Return rewards 0 or 1: whether exactly the word is read."""
    return [float(text == word) for text, word in _pairs(images, prompts)]


def _pairs(images: list[Image.Image], prompts: list[str]) -> list[tuple[str, str]]:
    """Return what is read and what should be, in capitals and without spaces."""
    texts = recogniser().read(images)
    return [tuple("".join(one.split()).upper() for one in pair) for pair in zip(texts, prompts, strict=True)]
