"""The spatial half of the VideoVAE: frames to features and back, each frame by itself.

It is the encoder and the decoder of Stable Diffusion's image VAE without the layers between them; source: [C] of the
specification, §1.1.

Shape suffixes: N frames, H and W video height and width, D feature channels, h = H/8 and w = W/8.
"""

from torch import Tensor, nn

from mugv_ds.config.videovae import VideoVAEConfig

# The features' scale. It is the one of Stable Diffusion 1, though the weights came from SDXL's VAE, which has 0.13025.
FEATURE_SCALE = 0.18215
_IMAGE_LATENT_CHANNELS = 4  # of the image VAE, whose last and first layer are in the state dict and never run


class SpatialVAE(nn.Module):
    """Wraps diffusers' encoder and decoder, whose parameter names and blocks are those of the published weights.

    Their norms have eps 1e-6. Building one imports diffusers, which takes seconds and reaches no hub.
    """

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
        for block in encoder.down_blocks:
            x = block(x)
        return encoder.mid_block(x) * FEATURE_SCALE

    def decode(self, feature_NDhw: Tensor) -> Tensor:
        """Returns the frames [N, 3, 8h, 8w] of features, not clamped."""
        decoder = self.module["decoder"]
        x = decoder.mid_block(feature_NDhw / FEATURE_SCALE)
        for block in decoder.up_blocks:
            x = block(x)
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x)))
