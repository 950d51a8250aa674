"""The step `text`: finds text laid over the picture, with RapidOCR's PP-OCRv6 models, which lie in its wheel.

Detection alone is not usable: it was measured to box 69% of a face. So a text counts if it could also be read.

Shape suffixes: N texts, M texts of another frame.
"""

from collections.abc import Sequence

import numpy as np

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.files.fingerprint import fingerprint
from mugv_ds.prepare.packages import folder_of, missing_extra
from mugv_ds.prepare.units import Step
from mugv_ds.prepare.views import ClipView, Row, Score, WeightsError, score_each

STEP = Step("text", 1, fields=("text.frames", "text.side", "text.confidence", "text.iou"))

_MODELS = ("PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx")
_LOWER = 0.75  # share of the height below which a text is a subtitle
_MOST_TEXTS, _MOST_LETTERS = 20, 200


def why_skipped(config: PrepareConfig) -> str | None:
    """Returns in words why the step cannot or shall not run; None if it runs."""
    if not config.text.enabled:
        return "text.enabled is false"
    return missing_extra("prepare-text", "rapidocr", "onnxruntime")


def weights(config: PrepareConfig) -> str:
    """Returns a hash of the models.

    Raises:
        WeightsError: the package does not have them.
    """
    try:
        return fingerprint([_model(name) for name in _MODELS])
    except OSError as error:
        raise WeightsError(f"{error.filename}: {error.strerror}; rapidocr 3.10 has it") from None


def load(config: PrepareConfig) -> Score:
    """Loads the models; returns what scores clips.

    `overlay` is the share of the picture under text that stays in place in two frames; text in a scene moves with the
    camera, so it is mostly not counted. `overlay_bottom` is the share of the height that would have to be cropped
    at the lower edge to be rid of it, null where text lies higher too.

    Raises:
        WeightsError: the package does not have the models.
    """
    from rapidocr import RapidOCR

    weights(config)  # else the package would download them
    section = config.text
    reader = RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.use_cls": False,  # of text upside down
            "Global.text_score": section.confidence,
            # More threads would be more than the runner's processes need, and sum in another order.
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Det.model_path": str(_model(_MODELS[0])),
            "Rec.model_path": str(_model(_MODELS[1])),
            # By default it enlarges to a short side of 736, which takes four times as long and finds the same titles.
            "Det.limit_type": "max",
            "Det.limit_side_len": section.side,
        }
    )

    def score(clip: ClipView) -> Row:
        frames = clip.frames(section.frames, longest=section.side)
        boxes, texts = [], []
        for frame in frames:
            found = reader(np.ascontiguousarray(frame[..., ::-1]))  # it takes BGR
            boxes.append(_relative(found.boxes, *frame.shape[:2]))
            texts += found.txts or ()
        kept = sorted({text.strip()[:_MOST_LETTERS] for text in texts})[:_MOST_TEXTS]
        return {**overlay(boxes, section.iou), "texts": kept}

    return lambda clips: score_each(clips, score)


def overlay(boxes: Sequence[np.ndarray], iou: float) -> Row:
    """Measures the text that is fixed in place, in at least two of a clip's frames; if it is one frame, in that.

    Args:
        boxes: of each frame float [N, 4], left, top, right, bottom in shares of the picture. iou: the least overlap of
            two boxes that are the same text (intersection over union).

    Returns:
        `overlay`, `overlay_bottom`; see `load`.
    """
    fixed = []
    for number, own in enumerate(boxes):
        others = [other for place, other in enumerate(boxes) if place != number]
        stays = [_iou(own, other).max(axis=1, initial=0) >= iou for other in others]
        fixed.append(own[np.any(stays, axis=0)] if others else own)
    areas = sorted(float(np.prod(box[:, 2:] - box[:, :2], axis=1).sum()) for box in fixed)
    every = np.concatenate(fixed)
    top = float(every[:, 1].min(initial=1.0))
    return {"overlay": min(areas[-2:]), "overlay_bottom": 1 - top if top >= _LOWER else None}


def _iou(own_N4: np.ndarray, other_M4: np.ndarray) -> np.ndarray:
    """Returns intersection ÷ union of each pair of boxes, [N, M]."""
    own, other = own_N4[:, None], other_M4[None]
    sides = np.minimum(own[..., 2:], other[..., 2:]) - np.maximum(own[..., :2], other[..., :2])
    both = sides.clip(min=0).prod(axis=-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(axis=-1) for box in (own, other)]
    return both / np.maximum(areas[0] + areas[1] - both, 1e-12)


def _relative(corners: np.ndarray | None, height: int, width: int) -> np.ndarray:
    """Returns the upright boxes around quadrangles [N, 4 corners, (x, y)] in pixels, as `overlay` takes them."""
    if corners is None:
        return np.empty((0, 4))
    shares = (np.asarray(corners, float) / (width, height)).clip(0, 1)
    return np.concatenate([shares.min(axis=1), shares.max(axis=1)], axis=1)


def _model(name: str):
    return folder_of("rapidocr") / "models" / name
