"""Writes all that a round of learning from a reward on random weights and data needs, to measure its phases with.

kernels/bench/reward.py --out DIR, then tools/launch.py --hostfile … mugv_ds/train.py --config DIR/reward.json

Blocks of the 10B's width, the full-size VideoVAE, latents of 720p 5 s; the judge is a command that reads the videos.
"""

import argparse
import json
import runpy
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from mugv_ds.config.model import PRESETS
from mugv_ds.models import DiT
from mugv_ds.models.dit import init_weights
from mugv_ds.models.videovae import VideoVAE

ROOT = Path(__file__).parents[2]
JUDGE = (
    "import json, sys; from mugv_ds.data.video import read_some_frames; videos = json.load(sys.stdin)['videos']; "
    "print(json.dumps({'rewards': {v['id']: {'light': float(read_some_frames(v['video']).mean())} for v in videos}}))"
)


def write_weights(folder: Path, depth: int) -> None:
    """Writes a DiT and a VideoVAE of random weights, in bf16; the DiT's are off their initial zeros."""
    config = replace(PRESETS["mugdit_10b"], depth=depth)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = DiT(config)
    init_weights(model, "", seed=0)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.01)
    state = {name: value.bfloat16().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "dit.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    torch.save({name: value.bfloat16() for name, value in VideoVAE().state_dict().items()}, folder / "vae.pt")


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--depth", type=int, default=8, help="blocks")
    parser.add_argument("--sequence", type=int, default=2, help="ranks that share a sequence")
    parser.add_argument("--shape", type=int, nargs=3, default=[15, 90, 160], metavar=("T", "H", "W"), help="latent")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_weights(args.out, args.depth)
    random_data = runpy.run_path(str(ROOT / "tools/make_random_data.py"))["main"]
    random_data(["--out", str(args.out / "data"), "--samples", "8", "--shape", *map(str, args.shape)])
    config = {
        "extends": str(ROOT / "ds_configs/reward.json"),
        "model": {"depth": args.depth},
        "data": {
            "manifest": str(args.out / "data/train.csv"),
            "val_manifest": None,
            "global_batch_size": 8,
            "num_workers": 2,
        },
        "parallel": {"sequence": args.sequence, "activation_checkpointing": "light"},
        "schedule": {"warmup_steps": 0, "steps": 4},
        "reward": {
            "manifest": str(args.out / "data/train.csv"),
            "dir": str(args.out / "rounds"),
            "codec": str(args.out / "vae.pt"),
            "functions": [{"name": "judge", "weights": {"light": 1.0}, "command": ["python", "-c", JUDGE]}],
            "prompts": 4,
            "rollouts": 4,
            "first_frame": False,
        },
        "ema": {"sigma_rel": []},
        "checkpoint": {
            "dir": str(args.out / "checkpoints"),
            "init_from": str(args.out / "dit.safetensors"),
            "save_every": 0,
        },
        "logging": {"dir": str(args.out / "tensorboard"), "every": 1, "eval_every": 0},
        "preview": {"every": 0},
    }
    (args.out / "reward.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
