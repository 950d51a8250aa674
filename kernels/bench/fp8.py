"""Compares a run in bf16 and in fp8 on one GPU: same weights, samples, noise and timesteps; both run at once.

kernels/bench/fp8.py --out runs/fp8 --set model.depth=12 --set model.num_heads=12 --set model.hidden_size=864

With `--control` a third runs beside them, in bf16 with half the samples a micro-batch. It differs from the first by the
rounding of sums alone: what that comes to over the steps is no fault of fp8.

It needs the demo data (`make demo-data`) for the default config. With `--first-step 6 45 80` it compares instead what
every block of the 10B makes, and every gradient, in the first step on a random latent.
"""

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from block import TEXT_TOKENS
from harness import relative_error, report
from plan_runs import free_port
from torch import Tensor

from mugv_ds.config import PRESETS, load_config
from mugv_ds.models.attention import BACKENDS
from mugv_ds.models.dit import DiT, init_weights
from mugv_ds.models.fp8 import use_fp8
from mugv_ds.plan.records import read_scalars

ROOT = Path(__file__).parents[2]
PRECISIONS = ("bf16", "fp8")
CONTROL = "bf16_again"
COLOURS = {"bf16": "#1f5fa8", "fp8": "#c2410c", CONTROL: "#6b8e23"}
TAGS = ("train/loss", "validation/loss", "speed/seconds_per_step")


def start(args: argparse.Namespace, name: str) -> subprocess.Popen:
    """Starts a training with one process, which writes its scalars to `out/name`."""
    folder, own = args.out / name, []
    folder.mkdir(parents=True)
    if name == CONTROL:
        own = [f"data.micro_batch_size={load_config(args.config, args.set).data.micro_batch_size // 2}"]
    hostfile = folder / "hostfile"
    hostfile.write_text("localhost slots=1\n")
    settings = {
        "model.precision": "fp8" if name == "fp8" else "bf16",
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
    for setting in [*(f"{key}={value}" for key, value in settings.items()), *args.set, *own]:
        command += ["--set", setting]
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=output, stderr=output)


def compare_runs(args: argparse.Namespace) -> None:
    """Trains in both precisions, and reports their losses and times side by side."""
    names = [*PRECISIONS, CONTROL] if args.control else PRECISIONS
    runs = {name: start(args, name) for name in names}
    for name, run in runs.items():
        if run.wait():
            sys.exit(f"{name}: the run ended with status {run.returncode}; see {args.out / name}/output.txt")
    report_runs(args.out)


def report_runs(out: Path) -> None:
    """Reports the losses and times of the runs, which may be at work still; writes `out/curves.json` and `.svg`."""
    scalars = {name: read_scalars(out / name / "tensorboard") for name in COLOURS if (out / name).exists()}
    curves = {tag: {name: dict(values[tag]) for name, values in scalars.items()} for tag in TAGS}
    (out / "curves.json").write_text(json.dumps(curves))
    (out / "curves.svg").write_text(drawn(curves))
    for tag, runs in curves.items():
        (_, exact), *others = runs.items()
        steps = [step for step in exact if all(step in run for _, run in others)]
        rows = [
            {"step": step}
            | {name: run[step] for name, run in runs.items()}
            | {f"{name}, difference %": 100 * (run[step] / exact[step] - 1) for name, run in others}
            for step in steps[:: max(1, len(steps) // 10)]
        ]
        report(tag, rows)


def drawn(curves: dict[str, dict[str, dict[int, float]]]) -> str:
    """Returns the losses as an SVG: of training as thin lines, held out as dots, in logarithms against the step."""
    width, height, left, low = 720, 360, 48, 40
    training, held_out = (curves[tag] for tag in TAGS[:2])
    points = [(step, loss) for of in (training, held_out) for run in of.values() for step, loss in run.items()]
    most = max(step for step, _ in points)
    floor, top = min(math.log(loss) for _, loss in points), max(math.log(loss) for _, loss in points)

    def place(step: int, loss: float) -> tuple[float, float]:
        share = (math.log(loss) - floor) / (top - floor)
        return left + step / most * (width - left - 8), height - low - share * (height - low - 8)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-family="sans-serif" '
        f'font-size="12"><title>Losses in bf16 and fp8 against the step</title>'
        f'<rect width="{width}" height="{height}" fill="white"/>'
    ]
    for loss in (2.0, 1.0, 0.5, 0.2, 0.1, 0.05):
        if floor <= math.log(loss) <= top:
            _, y = place(0, loss)
            parts.append(
                f'<path d="M{left} {y:.1f}H{width - 8}" stroke="#ddd"/><text x="6" y="{y + 4:.1f}">{loss}</text>'
            )
    for step in range(0, most + 1, max(1, most // 4)):
        x, _ = place(step, math.exp(floor))
        parts.append(f'<text x="{x:.1f}" y="{height - low + 18}" text-anchor="middle">{step}</text>')
    for number, name in enumerate(training):
        colour = COLOURS[name]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*of) for of in training[name].items()))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>')
        for x, y in (place(*of) for of in held_out[name].items()):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{width - 72}" y="{30 + 18 * number}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def compare_first_step(shape: Sequence[int], depth: int) -> None:
    """Reports how far each block's output and gradients of the 10B's first step in fp8 are from those in bf16.

    Args:
        shape: latent (T, H, W) of the sample. depth: blocks.
    """
    device = torch.device("cuda")
    config = dataclasses.replace(PRESETS["mugdit_10b"], depth=depth)
    torch.manual_seed(0)
    with device:
        model = DiT(config).bfloat16()
        latent, text = torch.randn(1, config.in_channels, *shape), torch.randn(1, TEXT_TOKENS, config.caption_channels)
        noise, timestep = torch.randn_like(latent), torch.tensor([500.0])
    init_weights(model, "", seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith(("cross_attn.proj.weight", "final_layer.linear.weight")):
            torch.nn.init.normal_(parameter, std=0.02)  # from zero no gradient would reach a block
    outputs: dict[str, list[Tensor]] = {precision: [] for precision in PRECISIONS}
    gradients: dict[str, list[dict[str, Tensor]]] = {}
    for precision in PRECISIONS:
        if precision == "fp8":
            for block in model.blocks:
                use_fp8(block)
        made = [
            block.register_forward_hook(lambda _, __, y, kept=outputs[precision]: kept.append(y.detach()))
            for block in model.blocks
        ]
        velocity = model((latent + noise) / 2, timestep, text, attention=BACKENDS["flash4"])[:, : config.in_channels]
        for hook in made:
            hook.remove()
        (velocity - (latent - noise)).square().mean().backward()
        gradients[precision] = [{name: p.grad for name, p in block.named_parameters()} for block in model.blocks]
        model.zero_grad(set_to_none=True)
    rows = []
    for number, (y, y8) in enumerate(zip(*outputs.values(), strict=True)):
        exact, rounded = (gradients[precision][number] for precision in PRECISIONS)
        errors = {name: relative_error(rounded[name], exact[name]) for name in exact}
        worst = max(errors, key=errors.get)
        matrices = [error for name, error in errors.items() if exact[name].dim() == 2]
        rows.append(
            {
                "block": number,
                "output": relative_error(y8, y),
                "gradients of matrices, median": statistics.median(matrices),
                "largest of all gradients": errors[worst],
                "of": worst,
            }
        )
    report(f"first step in fp8 against bf16, {depth} blocks of the 10B, {'x'.join(map(str, shape))}: errors", rows)


def main() -> None:
    """Compares what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="ds_configs/debug.json")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a value")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="folder of the runs, which must not be there")
    parser.add_argument("--control", action="store_true", help="also train in bf16 with smaller micro-batches")
    parser.add_argument("--report", action="store_true", help="report the runs that --out has, and start none")
    parser.add_argument("--first-step", type=int, nargs=3, metavar="N", help="compare a step of such a latent instead")
    parser.add_argument("--depth", type=int, default=56, help="blocks of it")
    args = parser.parse_args()
    if args.first_step:
        compare_first_step(args.first_step, args.depth)
    elif args.out is None:
        parser.error("give --out, or --first-step")
    elif args.report:
        report_runs(args.out)
    else:
        compare_runs(args)


if __name__ == "__main__":
    main()
