"""Shows whether activations keep their size as the model gets wider: the coordinate check of µP.

tools/coordinate_check.py --out runs/coordinate_check --widths 216 432 864 1728 --reference 216

Trains models of some widths for a few steps on the same random samples, with and without the rule for the width, and
takes the mean absolute value of each block's output (Yang et al. 2022, "Tensor Programs V", appendix D.1). Writes
OUT.json, a table, and OUT.png: under the rule the lines are flat.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mugv_ds.config.model import HEAD_DIM, DiTConfig
from mugv_ds.engine.muon import orthogonalise, scale_of
from mugv_ds.files.atomic import write_atomically
from mugv_ds.models.dit import DiT, init_weights
from mugv_ds.models.matrices import chunks_of, kind_of, rate_factor
from mugv_ds.objectives.flow import flow_loss

SHAPE, SAMPLES, TEXT_TOKENS, CHANNELS = (2, 8, 8), 4, 8, 64


def samples(step: int) -> dict[str, Tensor]:
    """The step's samples, the same at every width."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 24, *SHAPE, generator=generator)
    return {
        "x": x,
        "target": torch.randn(x.shape, generator=generator),
        "timestep": 1000 * torch.rand(SAMPLES, generator=generator),
        "text": torch.randn(SAMPLES, TEXT_TOKENS, CHANNELS, generator=generator),
    }


class Optimizer:
    """AdamW or Muon with the rates of `models.matrices`, on one device.

    Args:
        model: that is trained. rate: at the reference width. ratio: reference ÷ width; 1 leaves the rule out.
        kind: "adamw" or "muon".
    """

    def __init__(self, model: DiT, rate: float, ratio: float, kind: str) -> None:
        named = dict(model.named_parameters())
        self._matrices = {name: p for name, p in named.items() if kind == "muon" and chunks_of(name)}
        groups = [
            {"params": [p], "lr": rate * rate_factor(kind_of(name), ratio)}
            for name, p in named.items()
            if name not in self._matrices
        ]
        self._adamw = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-10, weight_decay=0.0)
        self._rate = rate * rate_factor("hidden", ratio, "rms")
        self._momenta = {name: torch.zeros_like(p) for name, p in self._matrices.items()}

    @torch.no_grad()
    def step(self) -> None:
        self._adamw.step()
        for name, p in self._matrices.items():
            momentum = self._momenta[name].lerp_(p.grad, 0.05)
            for part, ahead in zip(
                p.chunk(chunks_of(name)), p.grad.lerp(momentum, 0.95).chunk(chunks_of(name)), strict=True
            ):
                part.sub_(self._rate * scale_of(*part.shape, "rms") * orthogonalise(ahead))


def train(
    width: int, reference: int | None, *, depth: int, rate: float, steps: int, kind: str
) -> tuple[list[list[float]], list[float]]:
    """Returns mean |output| of each block at each step, [steps][depth], and the losses.

    Args:
        width: of the model. reference: that of the rule; None leaves it out.
    """
    model = DiT(DiTConfig(width, width // HEAD_DIM, depth, caption_channels=CHANNELS))
    init_weights(model, "", 0, None if reference is None else (width, reference))
    optimizer = Optimizer(model, rate, 1.0 if reference is None else reference / width, kind)
    sizes: list[float] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: sizes.append(float(output.detach().abs().mean())))
    found, losses = [], []
    for step in range(steps):
        sizes.clear()
        batch = samples(step)
        loss = flow_loss(
            model(batch["x"], batch["timestep"], batch["text"]),
            batch["target"],
            torch.ones(SAMPLES, SHAPE[0], dtype=torch.bool),
        ).mean()
        model.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(list(sizes))
        losses.append(loss.item())
    return found, losses


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Returns the slope of log(values) against log(widths)."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def draw(path: Path, widths: Sequence[int], results: dict[str, list[list[float]]]) -> None:
    """Draws, for each case, a block's mean |output| after the last step against the width, both in logarithms."""
    panel, margin = 300, 46
    image = Image.new("RGB", (panel * len(results) + margin, panel + margin), "white")
    pen = ImageDraw.Draw(image)
    values = np.log([value for of in results.values() for row in of for value in row])
    low, high = float(values.min()) - 0.2, float(values.max()) + 0.2
    across = np.log(widths)
    for number, (name, of) in enumerate(results.items()):
        left = number * panel + margin
        pen.rectangle((left, 24, left + panel - margin, panel), outline="#888")
        pen.text((left, 6), name, fill="black")
        for block, row in enumerate(zip(*of, strict=True)):
            points = [
                (
                    left + 8 + (x - across[0]) / (across[-1] - across[0]) * (panel - margin - 16),
                    panel - 8 - (np.log(y) - low) / (high - low) * (panel - 40),
                )
                for x, y in zip(across, row, strict=True)
            ]
            shade = int(40 + 160 * block / max(len(of[0]) - 1, 1))
            pen.line(points, fill=(shade, 60, 220 - shade), width=2)
        for x, width in zip(across, widths, strict=True):
            pen.text(
                (left + (x - across[0]) / (across[-1] - across[0]) * (panel - margin - 30), panel + 6),
                f"{width}",
                fill="black",
            )
    pen.text((4, 28), f"{np.exp(high):.3g}", fill="black")
    pen.text((4, panel - 12), f"{np.exp(low):.3g}", fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        image.save(file, format="PNG")


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, trains, and prints the table; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[216, 432, 864, 1728], help="multiples of 72")
    parser.add_argument("--reference", type=int, default=216, help="width that the rate was tuned at")
    parser.add_argument("--depth", type=int, default=4, help="blocks")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate at the reference width")
    parser.add_argument("--kinds", nargs="+", choices=["adamw", "muon"], default=["adamw", "muon"], help="optimizers")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.png are written")
    args = parser.parse_args(argv)
    results: dict[str, list[list[float]]] = {}
    losses: dict[str, list[list[float]]] = {}
    for kind in args.kinds:
        for rule in (True, False):
            name = f"{kind}, {'rule' if rule else 'no rule'}"
            how = {"depth": args.depth, "rate": args.rate, "steps": args.steps, "kind": kind}
            trained = [train(width, args.reference if rule else None, **how) for width in args.widths]
            results[name], losses[name] = [sizes[-1] for sizes, _ in trained], [of for _, of in trained]
    print(f"{'':18}{'block':>6}" + "".join(f"{width:>10}" for width in args.widths) + f"{'slope':>9}")
    table = {}
    for name, of in results.items():
        slopes = []
        for block, row in enumerate(zip(*of, strict=True)):
            slopes.append(slope(args.widths, row))
            print(f"{name:18}{block:>6}" + "".join(f"{value:>10.4f}" for value in row) + f"{slopes[-1]:>9.3f}")
        table[name] = {"outputs": of, "slopes": slopes, "losses": losses[name]}
    with write_atomically(args.out.with_suffix(".json")) as file:
        file.write(json.dumps({"widths": args.widths, "reference": args.reference, "cases": table}, indent=1).encode())
    draw(args.out.with_suffix(".png"), args.widths, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
