"""LPIPS: how different two frames look, by the features of VGG16 (Zhang et al. 2018, version 0.1).

Shape suffixes: N frames, H and W height and width, c channels and h, w size of a feature map.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mugv_ds.config.errors import ConfigError

# Convolutions of VGG16 by stage; features are taken after the last of each stage, which a max pooling precedes.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet, for pixels in [−1, 1]
_EPS = 1e-10


class Lpips(nn.Module):
    """LPIPS with VGG16, frozen. Its weights come from `load`; those of a new one are not trained.

    Args:
        stages: channels of the convolutions by stage; others than the published ones are for tests.
    """

    def __init__(self, stages: tuple[tuple[int, ...], ...] = STAGES) -> None:
        super().__init__()
        width, blocks = 3, []
        for channels in stages:
            convolutions = []
            for out in channels:
                convolutions.append(nn.Conv2d(width, out, 3, padding=1))
                width = out
            blocks.append(nn.ModuleList(convolutions))
        self.stages = nn.ModuleList(blocks)
        self.heads = nn.ParameterList(nn.Parameter(torch.ones(channels[-1])) for channels in stages)
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(_STD)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: str | Path) -> "Lpips":
        """Reads the weights that `weights.lpips.convert_lpips` wrote.

        Raises:
            ConfigError: they cannot be read, or are others.
        """
        with torch.device("meta"):
            model = cls()
        try:
            model.load_state_dict(load_file(path), strict=True, assign=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise ConfigError(f"{path}: not LPIPS's weights: {why}; `make lpips` writes them") from error
        model.mean, model.std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
        return model.requires_grad_(False)

    def features(self, frame_N3HW: Tensor) -> list[Tensor]:
        """Returns the feature maps [N, c, h, w] of frames in [−1, 1], each position of length 1."""
        x, maps = (frame_N3HW - self.mean) / self.std, []
        for number, stage in enumerate(self.stages):
            if number:
                x = F.max_pool2d(x, 2)
            for convolution in stage:
                x = F.relu(convolution(x))
            maps.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + _EPS))
        return maps

    def forward(self, frame_N3HW: Tensor, target_N3HW: Tensor) -> Tensor:
        """Returns the distance of each frame to its target, [N]; both fp32 in [−1, 1], of at least 16 × 16 pixels."""
        with torch.no_grad():
            wanted = self.features(target_N3HW)
        return sum(
            torch.einsum("nchw,c->nhw", (found - want).square(), head).mean(dim=(1, 2))
            for found, want, head in zip(self.features(frame_N3HW), wanted, self.heads, strict=True)
        )
