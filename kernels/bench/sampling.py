"""Samples 720p × 105 frames with the published sizes and random weights: seconds, share and peak of each stage.

python kernels/bench/sampling.py --weights /tmp/random                       # writes the weights, once: 21 GB
CUDA_VISIBLE_DEVICES=0,1 python kernels/bench/sampling.py --weights /tmp/random --gpus 2
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from mugv_ds.config import PRESETS
from mugv_ds.models import DiT
from mugv_ds.models.videovae import VideoVAE

# Guidance's branches on two GPUs exchange one velocity a step; more GPUs share the tokens of each branch.
LAYOUTS = {1: [], 2: ["--guidance-parallel"], 4: ["--guidance-parallel", "--sequence", "2"]}


@torch.no_grad()
def write_weights(folder: Path) -> None:
    """Writes random weights as dit.pt and vae.pt, in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = PRESETS["mugdit_10b"]
    with torch.device("meta"):
        model = DiT(config)
    generator = torch.Generator("cuda").manual_seed(0)
    state = {
        name: (0.02 * torch.randn(like.shape, generator=generator, device="cuda")).bfloat16().cpu()
        for name, like in model.state_dict().items()
    }
    for name, weight in state.items():
        if name.endswith("norm.weight"):
            weight.fill_(1)
    torch.save(state, folder / "dit.pt")
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    torch.manual_seed(0)
    torch.save({name: value.bfloat16() for name, value in VideoVAE().state_dict().items()}, folder / "vae.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder; made if it is not there")
    parser.add_argument("--gpus", type=int, choices=LAYOUTS)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--port", type=int, default=29500, help="of the launch, for runs side by side")
    args, options = parser.parse_known_args()
    if not (args.weights / "vae.pt").exists():
        write_weights(args.weights)
    if args.gpus is None:
        return
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(args.gpus), "--master-port", str(args.port)]
    command = [sys.executable, *(launch if args.gpus > 1 else []), "tools/sample.py", *LAYOUTS[args.gpus], *options]
    models = ["--weights", str(args.weights), "--codec", str(args.weights / "vae.pt"), "--text-encoder", "hash"]
    what = ["--size", "9:16", "--prompt", "a red circle moving left", "--steps", str(args.steps), "--overwrite"]
    begin = time.perf_counter()
    subprocess.run([*command, *models, *what, "--out", f"{args.weights}/samples-{args.gpus}"], check=True)
    print(f"{args.gpus} × {torch.cuda.get_device_name()}: {time.perf_counter() - begin:.1f} s in all", flush=True)


if __name__ == "__main__":
    main()
