"""Compares a run in bf16 and in fp8 on one GPU: same weights, samples, noise and timesteps; both run at once.

kernels/bench/fp8.py --out runs/fp8 --set model.depth=12 --set model.num_heads=12 --set model.hidden_size=864

It needs the demo data (`make demo-data`) for the default config. Of the first step it also compares what every block
makes and every gradient, with `--first-step`, on the 10B's width.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from block import make_inputs
from harness import relative_error, report
from plan_runs import free_port

from mugv_ds.models.attention import BACKENDS
from mugv_ds.models.fp8 import use_fp8
from mugv_ds.plan.records import read_scalars

ROOT = Path(__file__).parents[2]
PRECISIONS = ("bf16", "fp8")
TAGS = ("train/loss", "validation/loss", "speed/seconds_per_step")


def start(args: argparse.Namespace, precision: str) -> subprocess.Popen:
    """Starts a training with one process, which writes its scalars to `out/precision`."""
    folder = args.out / precision
    folder.mkdir(parents=True)
    hostfile = folder / "hostfile"
    hostfile.write_text("localhost slots=1\n")
    settings = {
        "model.precision": precision,
        "parallel.data": 1,
        "parallel.sequence": 1,
        "parallel.pipeline": 1,
        "schedule.steps": args.steps,
        "checkpoint.dir": folder / "checkpoints",
        "checkpoint.save_every": 0,
        "logging.dir": folder / "tensorboard",
        "logging.every": 10,
        "logging.eval_every": args.steps // 10,
        "logging.progress": "false",
        "ema.sigma_rel": "[]",
        "preview.every": 0,
    }
    command = [sys.executable, ROOT / "tools/launch.py", "--hostfile", hostfile, "--master_port", free_port()]
    command += [ROOT / "mugv_ds/train.py", "--config", args.config]
    for setting in [*(f"{key}={value}" for key, value in settings.items()), *args.set]:
        command += ["--set", setting]
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=output, stderr=output)


def compare_runs(args: argparse.Namespace) -> None:
    """Trains in both precisions, and reports their losses and times side by side, in `out/curves.json` too."""
    runs = {precision: start(args, precision) for precision in PRECISIONS}
    for precision, run in runs.items():
        if run.wait():
            sys.exit(f"{precision}: the run ended with status {run.returncode}; see {args.out / precision}/output.txt")
    scalars = {precision: read_scalars(args.out / precision / "tensorboard") for precision in PRECISIONS}
    curves = {tag: {precision: dict(scalars[precision][tag]) for precision in PRECISIONS} for tag in TAGS}
    (args.out / "curves.json").write_text(json.dumps(curves))
    for tag, by_precision in curves.items():
        bf16, fp8 = (by_precision[precision] for precision in PRECISIONS)
        rows = [
            {"step": step, "bf16": bf16[step], "fp8": fp8[step], "difference %": 100 * (fp8[step] / bf16[step] - 1)}
            for step in list(bf16)[:: max(1, len(bf16) // 10)]
        ]
        report(f"{tag} of {args.config}, {args.steps} steps, {' '.join(args.set)}", rows)


def compare_first_step(frames: int) -> None:
    """Reports how far outputs and gradients of four blocks of the 10B in fp8 are from those in bf16."""
    block, x, condition = make_inputs(frames, torch.device("cuda"))
    results = {}
    for precision in PRECISIONS:
        if precision == "fp8":
            use_fp8(block)
        y, outputs = x, []
        for _ in range(4):  # one block's weights, four times
            y = block(y, condition, BACKENDS["flash4"])
            outputs.append(y.detach())
        block.zero_grad()
        gradients = torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y))
        results[precision] = outputs, gradients
    (outputs, gradients), (outputs8, gradients8) = results["bf16"], results["fp8"]
    rows = [
        {"of": f"output {i}", "error": relative_error(*pair)}
        for i, pair in enumerate(zip(outputs8, outputs, strict=True))
    ]
    names = ["x", *(name for name, _ in block.named_parameters())]
    rows += [
        {"of": f"gradient of {name}", "error": relative_error(a, b)}
        for name, a, b in zip(names, gradients8, gradients, strict=True)
    ]
    report(f"fp8 against bf16, four blocks of the 10B's width, {x.shape[1]} tokens", rows)


def main() -> None:
    """Compares what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="ds_configs/debug.json")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a value")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="folder of the runs, which must not be there")
    parser.add_argument("--first-step", type=int, metavar="FRAMES", help="compare blocks on a 720p clip instead")
    args = parser.parse_args()
    if args.first_step:
        compare_first_step(args.first_step)
    elif args.out is None:
        parser.error("give --out, or --first-step")
    else:
        compare_runs(args)


if __name__ == "__main__":
    main()
