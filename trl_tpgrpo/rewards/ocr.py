"""Text rendering: how much of the text between double quotes in the prompt can be read in the image."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image


QUOTED = re.compile(r"[\"\u201c\u201d]([^\"\u201c\u201d]*[^\"\u201c\u201d\s][^\"\u201c\u201d]*)[\"\u201c\u201d]")


class OCRReward:
    """Similarity of the text read in the image to the target text, from 0 to 1 (Flow-GRPO, arXiv 2505.05470).

    The target text is the dataset's column `text` or, without it, the first part of the prompt between double quotes.
    Without either, the reward does not apply (`None`). All lines read in the image are joined; case and spaces are
    ignored. The score is 1 if the target occurs in the lines, else `1 - min(distance, length) / length` with the
    Levenshtein distance to all lines and the length of the target. The lines are shown next to samples.

    RapidOCR reads on the CPU (PP-OCRv6 small, Apache-2.0, models in the wheel), with `num_threads` threads per
    process, and drops lines with a confidence below 0.5. To use another reader, override `read`.

    Known ways to hack it: large capital letters on a plain background; the text repeated, with any other text around
    it, because text around a match costs nothing; no image content besides the text.
    """

    __name__ = "ocr"
    runs_in = "thread"

    def __init__(self, num_threads: int = 4) -> None:
        try:
            import onnxruntime  # noqa: F401 - RapidOCR runs on it and does not require it
            import rapidfuzz  # noqa: F401 - its absence should show now rather than after the first rollout
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(f"The reward ocr needs {error.name}: pip install 'trl-tpgrpo[ocr]'.") from error
        self.engine = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_cls": False,  # upside-down text does not count
                "Det.limit_type": "max",  # the default enlarges images to 736 pixels, at twice the time for 512
                "Det.limit_side_len": 1024,
                "EngineConfig.onnxruntime.intra_op_num_threads": num_threads,
            }
        )

    def __call__(
        self,
        images: list[Image.Image],
        prompts: list[str],
        text: Sequence[str | None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Score N images; `None` where there is no target text."""
        scores: list[float | None] = []
        shown: list[str | None] = []
        for image, prompt, given in zip(images, prompts, text or [None] * len(prompts), strict=True):
            target = wanted_text(prompt, given)
            lines = [] if target is None else self.read(image)
            scores.append(None if target is None else similarity("".join(lines), target))
            shown.append(None if target is None else " ".join(lines))
        if log_extra is not None:
            log_extra("ocr_text", shown)
        return scores

    def read(self, image: Image.Image) -> list[str]:
        """Return the lines of text in the image, from top to bottom."""
        found: Any = self.engine(np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1]))  # BGR
        return list(found.txts or ())


def wanted_text(prompt: str, given: str | None = None) -> str | None:
    """Return the target text: `given`, else the first text in double quotes in the prompt, or `None`."""
    if given is None:
        quoted = QUOTED.search(prompt)
        return quoted[1] if quoted else None
    if not _normal(given):
        raise ValueError(f"The column text is {given!r} for the prompt {prompt!r}: use a text, or None for no text.")
    return given


def similarity(read: str, target: str) -> float:
    """Score a text from 0 to 1, see `OCRReward`."""
    from rapidfuzz.distance import Levenshtein

    read, target = _normal(read), _normal(target)
    if target in read:
        return 1.0
    return 1 - min(Levenshtein.distance(read, target), len(target)) / len(target)


def _normal(text: str) -> str:
    return "".join(text.split()).lower()
