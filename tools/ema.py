"""Averages the weights of a run's checkpoints and writes the result in the published format (safetensors).

tools/ema.py reconstruct --sigma-rel 0.08 --checkpoints runs/base/checkpoints --out exports/ema_0.08
tools/ema.py ensemble --gamma 0.9 --out exports/ensemble runs/base/checkpoints/global_step*
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mugv_ds.checkpoint.average import ensemble, reconstruct
from mugv_ds.checkpoint.save import save_weights
from mugv_ds.checkpoint.trained import TrainedCheckpoint, checkpoints_of
from mugv_ds.checkpoint.weights import check_weights
from mugv_ds.config import InputError
from mugv_ds.engine.build import DTYPES

TOLERANCE = 0.05  # error of the profile's fit from which on it is reported as a bad one


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    power = commands.add_parser("reconstruct", help="a power-function average of any width, from the stored ones")
    power.add_argument("--sigma-rel", type=float, required=True, help="relative width, above 0 and below 0.2887")
    power.add_argument("--checkpoints", type=Path, required=True, help="a run's checkpoint folder")
    decay = commands.add_parser("ensemble", help="an exponentially decaying average of the checkpoints' weights")
    decay.add_argument("--gamma", type=float, required=True, help="weight of a checkpoint in terms of the next one's")
    decay.add_argument("checkpoints", type=Path, nargs="+", help="checkpoints, in any order")
    for command in (power, decay):
        command.add_argument("--out", type=Path, required=True, help="folder to make")
    args = parser.parse_args(argv)
    try:
        print(average(args))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def average(args: argparse.Namespace) -> Path:
    """Does what the command line says; returns the folder that it wrote."""
    if args.command == "ensemble":
        checkpoints = [TrainedCheckpoint(path) for path in args.checkpoints]
    else:
        checkpoints = checkpoints_of(args.checkpoints)
    model = max(checkpoints, key=lambda checkpoint: checkpoint.step).model
    if args.command == "ensemble":
        weights = ensemble(checkpoints, args.gamma, DTYPES[model.precision])
        facts = {"gamma": str(args.gamma)}
    else:
        weights, fit = reconstruct(checkpoints, args.sigma_rel, DTYPES[model.precision])
        facts = {"sigma_rel": str(args.sigma_rel), "fit_error": f"{fit.error:.3g}"}
        print(f"fit of the profile: relative error {fit.error:.3g}")
        if fit.error > TOLERANCE:
            print(
                f"warning: the averages in {args.checkpoints} do not represent σ_rel = {args.sigma_rel} well; choose a "
                "width nearer to theirs, or keep more checkpoints",
                file=sys.stderr,
            )
    check_weights(weights, model.dit())
    return save_weights(weights, model.dit(), args.out, "safetensors", metadata=facts | {"average": weights.recipe()})


if __name__ == "__main__":
    sys.exit(main())
