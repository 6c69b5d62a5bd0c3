"""GenEval: whether an image shows the objects, counts, colours and positions in the prompt."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from . import geneval_rules as rules
from .base import check_images, eight_bits, normalize
from .clip_score import CLIPScore


# COCO's 80 classes in its order, under the names that GenEval's prompts use
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LONGEST_TO_SHORTEST = 1333 / 800
SIZE_DIVISOR = 32
GROUND = 0.6  # GenEval's grey, #999, around an object for the colour check
COLOUR_TEXTS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


class GenEval:
    """GenEval (arXiv 2310.11513), graded as in Flow-GRPO, or right or wrong as in GenEval.

    Reads the columns of GenEval's metadata: `tag`, `include` and `exclude`, the latter two as lists or JSON. Rows
    without a tag are not scored. The graded score is at most 1 (all correct), and below 0 only with more than twice
    the requested objects (`geneval_rules.graded_score`). Otherwise, the score is 1.0 if the image is correct by
    GenEval's rules, else 0.0. The share of correct images is always logged as `geneval_right`.

    The detector is transformers' Mask2Former (Swin-S, COCO instances). The architecture is GenEval's, the weights are
    those of Mask2Former's authors; GenEval uses mmdetection's, so scores differ slightly. Boxes come from the masks.
    CLIP chooses among ten colours for the masked object on grey. Weights:
    Mask2Former CC BY-NC 4.0, which forbids commercial use (the code is MIT); CLIP MIT.

    Known ways to hack it: cut-out objects side by side on an empty background, one style for all prompts; shapes that
    only the detector recognises as objects. Image quality has no effect, so add a reward for quality.

    `detector` (for COCO's 80 classes, in transformers' format) and `clip` are on the Hub or on disk. `batch_size` and
    `image_size` (shorter edge in pixels) are for the detector. The other arguments are those of `ModelReward`.
    """

    __name__ = "geneval"
    image_type = "pt"

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        graded: bool = True,
        image_size: int = 800,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 8,
    ) -> None:
        try:
            import scipy  # noqa: F401 - Mask2Former's class asks for it
        except ImportError as error:
            raise ImportError("The reward geneval needs scipy: pip install 'trl-tpgrpo[geneval]'.") from error
        from transformers import Mask2FormerForUniversalSegmentation

        model = Mask2FormerForUniversalSegmentation.from_pretrained(detector)
        if model.config.num_labels != len(CLASSES):
            known = model.config.num_labels
            raise ValueError(f"detector {detector!r} has {known} classes instead of COCO's {len(CLASSES)}.")
        self.detector: Any = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self.clip = CLIPScore(clip, device=device, dtype=dtype)
        self.graded, self.image_size, self.batch_size = graded, image_size, batch_size
        self.colour_embeddings: dict[str, Tensor] = {}

    def to(self, device: str | torch.device) -> Self:
        """Move the models."""
        self.detector.to(device)
        self.clip.to(device)
        self.colour_embeddings.clear()
        return self

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        prompts: list[str],
        tag: Sequence[str | None],
        include: Sequence[Any],
        exclude: Sequence[Any] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Score images (N, 3, H, W) in [0, 1]; `None` where the row has no tag."""
        check_images(images)
        rows = [row for row, kind in enumerate(tag) if kind is not None]
        wanted = {row: rules.clauses(include[row]) for row in rows}
        unwanted = {row: rules.clauses(exclude[row] if exclude is not None else None) for row in rows}
        for row in rows:
            rules.check_metadata(str(tag[row]), wanted[row], unwanted[row], CLASSES)
        scores: list[float | None] = [None] * len(tag)
        num_right = 0
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            pixels = eight_bits(images[batch].to(self.clip.device))
            for row, image, found in zip(batch, pixels, self.detect(pixels), strict=True):
                objects, colours_of = rules.kept(found, str(tag[row])), self.colours_in(image)
                right = rules.is_right(objects, wanted[row], unwanted[row], colours_of)
                num_right += right
                scores[row] = rules.graded_score(objects, wanted[row], colours_of) if self.graded else float(right)
        if log_metric is not None and rows:
            log_metric("geneval_right", num_right / len(rows))
        return scores

    def detect(self, images: Tensor) -> list[rules.Objects]:
        """Find objects with a confidence over 0.3 in images (B, 3, H, W), with boxes and masks in pixels."""
        pixels = detector_pixels(images, self.image_size)
        height, width = _size_for_detector(images, self.image_size)
        outputs = self.detector(pixel_values=pixels.to(self.clip.dtype))
        result: list[rules.Objects] = []
        for class_logits, masks in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True):
            scores = class_logits.float().softmax(-1)[:, :-1]  # (queries, classes), without "nothing"
            best, indices = scores.flatten().topk(len(scores))
            indices = indices[best > rules.THRESHOLD]  # masks only lower the score
            if len(indices) == 0:
                result.append({})
                continue
            masks = masks[indices // scores.shape[1]][None].float()
            masks = interpolate(masks, pixels.shape[-2:], mode="bilinear")[..., :height, :width]
            masks = interpolate(masks, images.shape[-2:], mode="bilinear")[0]
            result.append(objects_from((indices % scores.shape[1]).tolist(), best[: len(indices)], masks))
        return result

    def colours_in(self, image: Tensor) -> rules.ColoursOf:
        """Return a function that finds, by CLIP, the colours of objects in an image (3, H, W), once per list."""
        known: dict[tuple[str, int], list[str]] = {}

        def colours_of(name: str, objects: list[rules.Detection]) -> list[str]:
            key = (name, len(objects))  # always the most confident ones
            if key not in known:
                seen = torch.cat([self.clip.encode_images(cut_out(image, one)[None]) for one in objects])
                known[key] = [rules.COLOURS[index] for index in (seen @ self._embeddings(name).T).argmax(-1).tolist()]
            return known[key]

        return colours_of

    def _embeddings(self, name: str) -> Tensor:
        """Return CLIP's embeddings (10, D) of a class in each colour: means over three texts, of length 1."""
        if name not in self.colour_embeddings:
            texts = [one.format(colour=colour, name=name) for colour in rules.COLOURS for one in COLOUR_TEXTS]
            means = self.clip.encode_texts(texts).unflatten(0, (len(rules.COLOURS), len(COLOUR_TEXTS))).mean(1)
            self.colour_embeddings[name] = torch.nn.functional.normalize(means, dim=-1)
        return self.colour_embeddings[name]


def objects_from(labels: list[int], class_scores: Tensor, mask_logits: Tensor) -> rules.Objects:
    """Group objects by class, from (N,) class probabilities and (N, H, W) mask logits."""
    inside = mask_logits > 0
    certainty = (mask_logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    confidences = (class_scores * certainty).tolist()  # as in Mask2Former's evaluation
    objects: rules.Objects = {}
    for label, score, mask in zip(labels, confidences, inside, strict=True):
        if mask.any():
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            left, top = columns[0].item(), rows[0].item()
            box = (left, top, columns[-1].item() + 1, rows[-1].item() + 1)
            objects.setdefault(CLASSES[label], []).append(rules.Detection(box, score, mask))
    return objects


def cut_out(image: Tensor, detection: rules.Detection) -> Tensor:
    """Cut the object's box out of an image (3, H, W), grey outside the object's mask."""
    if detection.mask is not None:
        image = torch.where(detection.mask, image, GROUND)
    left, top, right, bottom = (round(edge) for edge in detection.box)
    return image[:, top:bottom, left:right]


def _size_for_detector(images: Tensor, shortest: int) -> tuple[int, int]:
    height, width = images.shape[-2:]
    scale = min(shortest / min(height, width), shortest * LONGEST_TO_SHORTEST / max(height, width))
    return round(height * scale), round(width * scale)


def detector_pixels(images: Tensor, shortest: int) -> Tensor:
    """Resize images (B, 3, H, W) as COCO's are, normalise them, and pad right and below to multiples of 32."""
    height, width = _size_for_detector(images, shortest)
    resized = interpolate(images, (height, width), mode="bilinear", antialias=True)
    padding = (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR)
    return torch.nn.functional.pad(normalize(resized, IMAGENET_MEAN, IMAGENET_STD), padding)
