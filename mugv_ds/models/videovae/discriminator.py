"""The discriminator of the VideoVAE's last training stage: a 3D PatchGAN.

Shape suffixes: B clips, F frames, H and W height and width; f, h, w the size of the map of logits.
"""

import torch
from torch import Tensor, nn

_GROUPS = 8
_SLOPE = 0.2
# Strides in time, height and width, and width of the output relative to the first layer's.
_LAYERS = (((1, 2, 2), 1), ((2, 2, 2), 2), ((2, 2, 2), 4), ((1, 1, 1), 8))


class PatchDiscriminator(nn.Module):
    """Judges patches of a clip: five 3D convolutions (Isola et al. 2017, with time).

    Norms are of groups within a clip, so that what a clip gets depends on no other, on no rank and on no running
    statistics.

    Args:
        width: channels of the first convolution, a multiple of 8. seed: of the initial weights.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for number, (stride, factor) in enumerate(_LAYERS):
            layers.append(nn.Conv3d(channels, factor * width, (3, 4, 4), stride, padding=1, bias=number == 0))
            if number:
                layers.append(nn.GroupNorm(_GROUPS, factor * width))
            layers.append(nn.LeakyReLU(_SLOPE))
            channels = factor * width
        layers.append(nn.Conv3d(channels, 1, (3, 4, 4), padding=1))
        self.layers = nn.Sequential(*layers)
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            if isinstance(layer, nn.Conv3d):  # as in the paper
                nn.init.normal_(layer.weight, std=0.02, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, video_B3FHW: Tensor) -> Tensor:
        """Returns logits [B, 1, f, h, w] of clips of at least 24 × 24 pixels: positive for what looks real."""
        return self.layers(video_B3FHW.to(self.layers[0].weight.dtype)).float()
