"""Measures on a GPU what sampling and decoding a preview take beside what is always there, against `plan.memory`.

python -m tests.plan.measure_previews --shape 15 90 160

The weights are random: the 10B's sizes with a few blocks, as no block's activations outlive it, and the VideoVAE's.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

from mugv_ds.config import PRESETS
from mugv_ds.models import DiT
from mugv_ds.models.rope import patch_grid
from mugv_ds.models.videovae import VideoVAE
from mugv_ds.models.videovae.vae import WINDOW
from mugv_ds.plan.memory import GIB, predict_decoding, predict_sampling

DEVICE = torch.device("cuda")


def build(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Makes a module in bf16 on the device."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:
            return make().eval()
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def peak_of(run: Callable[[], object]) -> int:
    """The bytes that a second call holds at most beyond what was held before."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_sampling(shape: tuple[int, int, int], depth: int) -> tuple[int, float]:
    """Measured and predicted bytes of one evaluation of a video, with and without its caption."""
    config = replace(PRESETS["mugdit_10b"], depth=depth)
    model = build(lambda: DiT(config))
    given = {
        "x": torch.randn(2, 24, *shape),
        "timestep": torch.full((2,), 900.0),
        "text": torch.randn(2, 300, config.caption_channels),
        "text_mask": torch.ones(2, 300, dtype=torch.bool),
        "x_mask": torch.ones(2, shape[0], dtype=torch.bool),
        "fps": torch.full((2,), 24.0),
    }
    given = {name: value.to(DEVICE) for name, value in given.items()}
    return peak_of(lambda: model(**given)), predict_sampling(config, tokens_held=patch_grid(*shape).tokens)


def measure_decoding(shape: tuple[int, int, int]) -> tuple[int, float]:
    """Measured and predicted bytes of decoding, without the weights."""
    vae, latent = build(VideoVAE), torch.randn(1, 24, *shape)

    def decode() -> None:
        for window in vae.decode_windows(latent, frames_at_once=1):
            del window

    return peak_of(decode), predict_decoding(vae.config, parameters=0, latent=shape, window=WINDOW)


def main() -> None:
    """Prints a line for each of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(15, 90, 160), help="latent T, H, W")
    parser.add_argument("--depth", type=int, default=2, help="blocks of the DiT")
    args = parser.parse_args()
    shape = tuple(args.shape)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, latent {shape}")
    for what, (peak, predicted) in {
        "sampling": measure_sampling(shape, args.depth),
        "decoding": measure_decoding(shape),
    }.items():
        print(f"{what}: {peak / GIB:.2f} GiB, predicted {predicted / GIB:.2f}")


if __name__ == "__main__":
    main()
