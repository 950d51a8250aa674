"""Shows whether activations keep their size as the model gets wider: the coordinate check of µP.

tools/coordinate_check.py --widths 216 432 864 1728 --out runs/coordinate_check

Trains models of some widths for a few steps on the same samples, with `optimizer.width_reference` and without, and
takes the mean absolute value of each block's output (Yang et al. 2022, "Tensor Programs V", appendix D.1). Prints a
table and writes it to OUT.json; OUT.png shows it. With the rule the lines are flat.

It runs eagerly in this process. Muon takes 9.6 TFLOPs a step to orthogonalise the matrices of a depth of 4 at 1728;
so it is left out by default, and `--kinds muon --widths 216 432 864` suits a CPU.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor

from mugv_ds.config.model import HEAD_DIM, LATENT_CHANNELS, DiTConfig
from mugv_ds.config.schema import OptimizerSection
from mugv_ds.engine.build import make_optimizer
from mugv_ds.engine.distributed_optimizer import DistributedOptimizer
from mugv_ds.engine.process import alone
from mugv_ds.files.atomic import write_atomically
from mugv_ds.models.dit import DiT, init_weights

SHAPE, SAMPLES, TEXT_TOKENS, CHANNELS = (2, 6, 6), 4, 8, 64  # 20 tokens a sample
CAUSES = 8  # numbers that a sample's latent and its caption are made of


def samples(step: int, device: torch.device) -> dict[str, Tensor]:
    """Returns the samples of a step, the same at every width: latents that follow from their captions, and noise."""
    to_latent, to_text = (
        torch.randn(CAUSES, *shape, generator=torch.Generator().manual_seed(number))
        for number, shape in enumerate([(LATENT_CHANNELS, *SHAPE), (TEXT_TOKENS, CHANNELS)])
    )
    generator = torch.Generator().manual_seed(100 + step)
    causes = torch.randn(SAMPLES, CAUSES, generator=generator) / CAUSES**0.5
    clean = torch.tensordot(causes, to_latent, dims=1)
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.rand(SAMPLES, generator=generator)
    share = t.view(-1, 1, 1, 1, 1)
    made = {
        "x": (1 - share) * clean + share * noise,
        "target": clean - noise,
        "timestep": 1000 * t,
        "text": torch.tensordot(causes, to_text, dims=1),
    }
    return {name: value.to(device) for name, value in made.items()}


def block_outputs(
    width: int,
    depth: int,
    steps: int,
    optimizer: OptimizerSection,
    *,
    device: torch.device,
    group: dist.ProcessGroup,
) -> list[float]:
    """Trains a model of this width; returns mean |output| of each of its blocks after the last step.

    Args:
        group: of this process alone.
    """
    widths = None if optimizer.width_reference is None else (width, optimizer.width_reference)
    with torch.device(device):
        model = DiT(DiTConfig(width, width // HEAD_DIM, depth, caption_channels=CHANNELS))
    init_weights(model, "", 0, widths)
    stepper = DistributedOptimizer(
        make_optimizer([("", model)], optimizer, widths, device),
        group=group,
        bucket_size=10**8,
        gradient_dtype=torch.float32,
        communication_dtype=torch.float32,
        clipping=optimizer.gradient_clipping,
    )
    for step in range(steps):
        batch = samples(step, device)
        velocity = model(batch["x"], batch["timestep"], batch["text"])[:, :LATENT_CHANNELS]
        (velocity - batch["target"]).square().mean().backward()  # the flow loss, as no frame is given clean
        stepper.step()
        stepper.zero_grad()
    sizes: list[float] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: sizes.append(output.abs().mean().item()))
    batch = samples(steps, device)
    with torch.no_grad():
        model(batch["x"], batch["timestep"], batch["text"])
    return sizes


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Returns the slope of log(values) against log(widths)."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def draw(path: Path, widths: Sequence[int], cases: dict[str, list[list[float]]]) -> None:
    """Draws a panel for each case: a line for each block, mean |output| against the width, both in logarithms.

    Args:
        cases: of each, mean |output| by width and block.
    """
    side, margin, scale = 220, 40, 2
    image = Image.new("RGB", (scale * (len(cases) * (side + margin) + margin), scale * (side + 2 * margin)), "white")
    pen = ImageDraw.Draw(image)
    logs = {name: np.log10(values) for name, values in cases.items()}
    low = min(float(values.min()) for values in logs.values()) - 0.1
    high = max(float(values.max()) for values in logs.values()) + 0.1
    across = (np.log(widths) - np.log(widths[0])) / np.log(widths[-1] / widths[0])

    def text(x: float, y: float, shown: str, anchor: str) -> None:
        pen.text((scale * x, scale * y), shown, fill="black", anchor=anchor, font_size=scale * 10)

    for number, (name, values) in enumerate(logs.items()):
        left, top = margin + number * (side + margin), margin
        pen.rectangle([scale * at for at in (left, top, left + side, top + side)], outline="gray", width=scale)
        text(left + side / 2, top - 8, name, "mb")
        for share, width in zip(across, widths, strict=True):
            text(left + share * side, top + side + 6, f"{width}", "mt")
        for power in range(int(np.ceil(low)), int(np.floor(high)) + 1):
            y = top + side - (power - low) / (high - low) * side
            pen.line([scale * at for at in (left, y, left + side, y)], fill="lightgray")
            text(left - 4, y, f"{10.0**power:g}", "rm")
        blocks = values.shape[1]
        for block in range(blocks):
            heights = top + side - (values[:, block] - low) / (high - low) * side
            points = [(scale * (left + x * side), scale * y) for x, y in zip(across, heights, strict=True)]
            shade = int(200 * block / max(blocks - 1, 1))
            pen.line(points, fill=(shade, 60, 200 - shade), width=2 * scale)
    with write_atomically(path) as file:
        image.save(file, format="PNG")


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, trains, and prints the table; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[216, 432, 864, 1728], help="multiples of 72")
    parser.add_argument("--reference", type=int, default=216, help="width that the rate was tuned at (default: 216)")
    parser.add_argument("--depth", type=int, default=4, help="blocks (default: 4)")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: 10)")
    parser.add_argument("--lr", type=float, default=2.0**-8, help="rate at the reference (default: 2^-8)")
    parser.add_argument("--kinds", nargs="+", choices=["adamw", "muon"], default=["adamw"], help="optimizers")
    parser.add_argument("--device", default="cpu", help="that it runs on (default: cpu)")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.png are written")
    args = parser.parse_args(argv)
    cases: dict[str, list[list[float]]] = {}
    slopes: dict[str, list[float]] = {}
    print(f"{'':16} block" + "".join(f"{width:>10}" for width in args.widths) + "     slope")
    with alone() as group:
        where = {"device": torch.device(args.device), "group": group}
        for kind, reference in product(args.kinds, (args.reference, None)):
            optimizer = OptimizerSection(kind=kind, lr=args.lr, width_reference=reference)
            name = f"{kind}, {'no rule' if reference is None else 'rule'}"
            cases[name] = [block_outputs(width, args.depth, args.steps, optimizer, **where) for width in args.widths]
            by_block = list(zip(*cases[name], strict=True))
            slopes[name] = [slope(args.widths, values) for values in by_block]
            for block, values in enumerate(by_block):
                shown = "".join(f"{value:>10.3f}" for value in values)
                print(f"{name:16} {block:>5}{shown}{slopes[name][block]:>10.3f}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(args.out.with_suffix(".json")) as file:
        file.write(json.dumps({"widths": args.widths, "outputs": cases, "slopes": slopes}, indent=1).encode())
    draw(args.out.with_suffix(".png"), args.widths, cases)
    return 0


if __name__ == "__main__":
    sys.exit(main())
