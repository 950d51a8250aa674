"""RAFT optical flow (Teed and Deng 2020), as published for motion scores; torchvision's model with local weights."""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import open_regular
from mugv_ds.data.pictures import Flow

_MULTIPLE = 8  # of a side that RAFT takes
_LEAST_SIDE = 128


def raft_flow(weights: str) -> Flow:
    """Returns RAFT as `data.pictures.dis_flow` is: the mean length of the flow between two frames, in pixels.

    Frames are enlarged to sides of a multiple of 8, and at least 128.

    Args:
        weights: file of the tensors of torchvision's raft_large.

    Raises:
        InputError: torchvision is not installed, or the file cannot be used.
    """
    try:
        from torchvision.models.optical_flow import raft_large
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another version of torch
        raise InputError(f"probe.motion_method = raft needs torchvision ({error})") from None
    model = raft_large(weights=None, progress=False).eval()
    try:
        with open_regular(Path(weights)) as file:
            model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # what torch raises depends on how the file is damaged
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"{weights}: no weights of torchvision's raft_large ({reason})") from None

    def flow(before: np.ndarray, after: np.ndarray) -> float:
        height, width = before.shape[:2]
        sides = [max(-(-side // _MULTIPLE) * _MULTIPLE, _LEAST_SIDE) for side in (height, width)]
        with torch.inference_mode():
            moved = model(_tensor(before, sides), _tensor(after, sides))[-1][0]
        scale = torch.tensor([width / sides[1], height / sides[0]])[:, None, None]
        return float((moved * scale).norm(dim=0).mean())

    return flow


def _tensor(frame: np.ndarray, sides: list[int]) -> Tensor:
    """Returns a frame in [−1, 1], [1, 3, height, width]."""
    enlarged = cv2.resize(frame, sides[::-1], interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(enlarged).permute(2, 0, 1)[None].float() / 127.5 - 1
