"""The spatial half of the VideoVAE: frames to features and back, each frame by itself.

It is the encoder and the decoder of Stable Diffusion's image VAE without the layers between them; source: [C] of the
specification, §1.1.

Shape suffixes: N frames, H and W video height and width, D feature channels, h = H/8 and w = W/8.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mugv_ds.config.videovae import VideoVAEConfig

# The features' scale. It is the one of Stable Diffusion 1, though the weights came from SDXL's VAE, which has 0.13025.
FEATURE_SCALE = 0.18215
_IMAGE_LATENT_CHANNELS = 4  # of the image VAE, whose last and first layer are in the state dict and never run


class SpatialVAE(nn.Module):
    """Wraps diffusers' encoder and decoder, whose parameter names and blocks are those of the published weights.

    Their norms have eps 1e-6. Building one imports diffusers, which takes seconds and reaches no hub.

    Attributes:
        recompute: whether only the inputs of the blocks are saved for the backward pass, which computes the rest again.
    """

    recompute = False

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        from diffusers.models.autoencoders.vae import Decoder, Encoder

        levels, sizes = len(config.block_out_channels), {
            "block_out_channels": config.block_out_channels,
            "layers_per_block": config.layers_per_block,
            "norm_num_groups": config.norm_num_groups,
        }  # fmt: skip
        self.module = nn.ModuleDict(
            {
                "encoder": Encoder(3, _IMAGE_LATENT_CHANNELS, ("DownEncoderBlock2D",) * levels, **sizes),
                "decoder": Decoder(_IMAGE_LATENT_CHANNELS, 3, ("UpDecoderBlock2D",) * levels, **sizes),
            }
        )

    def encode(self, frame_N3HW: Tensor) -> Tensor:
        """Returns the features [N, D, h, w] of frames; a side that is no multiple of 8 is floored."""
        encoder = self.module["encoder"]
        x = encoder.conv_in(frame_N3HW)
        for block in (*encoder.down_blocks, encoder.mid_block):
            x = self._run(block, x)
        return x * FEATURE_SCALE

    def decode(self, feature_NDhw: Tensor) -> Tensor:
        """Returns the frames [N, 3, 8h, 8w] of features, not clamped."""
        decoder = self.module["decoder"]
        x = (feature_NDhw / FEATURE_SCALE).contiguous()
        for block in (decoder.mid_block, *decoder.up_blocks):
            x = self._run(block, x)
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x)))

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # nothing in it is drawn
        return block(x)
