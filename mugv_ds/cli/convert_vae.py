"""Writes a checkpoint of the VideoVAE's training as the published vae.pt is, with the latents' shift and scale.

tools/convert_vae.py --ckpt runs/vae/stage3/checkpoints --out exports/vae

By default shift and scale are mean and standard deviation of the latents of the run's held-out clips. A VideoVAE that
goes on from one whose latents a DiT has learnt must keep the old ones: --shift-scale vae.pt.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mugv_ds.checkpoint.reader import open_checkpoint
from mugv_ds.config import ConfigError, InputError, exit_status
from mugv_ds.config.vae_schema import VaeTrainConfig
from mugv_ds.data.clips import ClipData
from mugv_ds.data.readers import stack
from mugv_ds.models.videovae import VideoVAE
from mugv_ds.models.videovae.statistics import LatentStatistics
from mugv_ds.weights.published import PublishedWeights
from mugv_ds.weights.vae_start import BUFFERS, load_vae_parameters, save_video_vae


def convert(args: argparse.Namespace) -> Path:
    """Writes the weights; returns their path.

    Raises:
        InputError: the checkpoint, its run's held-out clips or the file of shift and scale cannot be used.
    """
    with open_checkpoint(args.ckpt) as saved:
        config, folder = saved.run_config(VaeTrainConfig), saved.folder
    vae = VideoVAE(config.model.videovae())
    load_vae_parameters(folder, vae)
    vae = vae.to(args.device).eval().requires_grad_(False)
    found = measured(vae, config, args.device) if args.shift_scale is None else read(args.shift_scale)
    for name, value in zip(BUFFERS, found, strict=True):
        getattr(vae, name).copy_(value)
    state = {name: value.cpu() for name, value in vae.state_dict().items()}
    return save_video_vae(state, vae.config, args.out, args.format)


def measured(vae: VideoVAE, config: VaeTrainConfig, device: str) -> tuple[Tensor, Tensor]:
    """Shift and scale of the latents of the run's held-out clips."""
    clips = ClipData(config.data).held_out
    if clips is None:
        raise ConfigError("the run has no data.val_manifest to compute shift and scale of; give --shift-scale")
    statistics = LatentStatistics()
    for item in range(len(clips.index)):
        video = stack(clips.read(item, 0)).pixels(torch.device(device))
        statistics.add(*vae.posterior(video, allow_nonnegative=True))
    return statistics.shift_and_scale()


def read(path: Path) -> tuple[Tensor, ...]:
    """Shift and scale of a VideoVAE's file."""
    weights = PublishedWeights(path)
    if missing := [name for name in BUFFERS if name not in weights]:
        raise InputError(f"{path}: has no {', '.join(missing)}; name a vae.pt or vae.safetensors")
    return tuple(weights[name].float() for name in BUFFERS)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where the checkpoint cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="a run's checkpoint folder, or a step-<n> in it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write vae.pt or vae.safetensors to")
    parser.add_argument("--format", choices=["pt", "safetensors"], default="pt")
    parser.add_argument("--shift-scale", type=Path, help="vae.pt whose shift and scale are kept")
    parser.add_argument("--device", default="cpu", help="to encode the held-out clips on (default: %(default)s)")
    args = parser.parse_args(argv)

    def run() -> int:
        print(convert(args))
        return 0

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
