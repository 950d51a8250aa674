"""Averages the weights of a run's checkpoints and writes the result in the published format (safetensors).

Of a run with adapters (LoRA) their factors are averaged, and then merged into its base.

tools/ema.py reconstruct --sigma-rel 0.08 --checkpoints runs/base/checkpoints --out exports/ema_0.08
tools/ema.py ensemble --gamma 0.9 --out exports/ensemble runs/base/checkpoints/step-*
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mugv_ds.checkpoint.reader import CheckpointReader, open_checkpoint, open_run
from mugv_ds.config import CheckpointError, InputError
from mugv_ds.config.power_profile import kind_sigma_rel
from mugv_ds.weights.average import Average, ensemble, reconstruct
from mugv_ds.weights.base import check_weights
from mugv_ds.weights.card import model_card
from mugv_ds.weights.convert import DTYPES
from mugv_ds.weights.lora import check_base, whole_weights
from mugv_ds.weights.save import save_weights

TOLERANCE = 0.05  # error of the profile's fit from which on it is reported as a bad one


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where the checkpoints or the width cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    power = commands.add_parser("reconstruct", help="a power-function average of any width, from the stored ones")
    power.add_argument("--sigma-rel", type=float, required=True, help="relative width, above 0 and below 0.2887")
    power.add_argument("--checkpoints", type=Path, required=True, help="a run's checkpoint folder")
    power.set_defaults(run=write_reconstruction)
    decay = commands.add_parser("ensemble", help="an exponentially decaying average of the checkpoints' weights")
    decay.add_argument("--gamma", type=float, required=True, help="weight of a checkpoint in terms of the next one's")
    decay.add_argument("checkpoints", type=Path, nargs="+", help="checkpoints, in any order")
    decay.set_defaults(run=write_ensemble)
    for command in (power, decay):
        command.add_argument("--out", type=Path, required=True, help="folder to make")
    args = parser.parse_args(argv)
    try:
        print(args.run(args))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_reconstruction(args: argparse.Namespace) -> Path:
    """Writes a power-function average of the width that was asked for, and warns if the stored ones fit it badly."""
    checkpoints = open_run(args.checkpoints, lambda kind: kind_sigma_rel(kind) is not None)
    last = newest(checkpoints)
    average, fit = reconstruct(checkpoints, args.sigma_rel, DTYPES[last.run_config().model.dtype])
    print(f"fit of the profile: relative error {fit.error:.3g}")
    if fit.error > TOLERANCE:
        print(
            f"warning: the averages in {args.checkpoints} do not represent σ_rel = {args.sigma_rel} well; choose a "
            "width nearer to theirs, or keep more checkpoints",
            file=sys.stderr,
        )
    late = late_averages(checkpoints)
    if late:
        print(
            f"warning: {late}: they take the weights of that moment for those of all steps before, so the profile is "
            "not the one that was asked for",
            file=sys.stderr,
        )
    facts = {"sigma_rel": str(args.sigma_rel), "fit_error": f"{fit.error:.3g}", **({"began": late} if late else {})}
    return write(average, last, args.out, **facts)


def late_averages(checkpoints: Sequence[CheckpointReader]) -> str:
    """Names the averages that were switched on in the middle of the run, and when; empty if there are none."""
    began = {kind: step for checkpoint in checkpoints for kind, step in checkpoint.manifest.began.items()}
    return ", ".join(f"{kind} was switched on after step {step}" for kind, step in sorted(began.items()))


def write_ensemble(args: argparse.Namespace) -> Path:
    """Writes an exponentially decaying average of the checkpoints that were named."""
    whole = [path for path in args.checkpoints if path.suffix != ".tmp"]
    for path in sorted(set(args.checkpoints) - set(whole)):
        print(f"passed over: {path}: was not saved to its end", file=sys.stderr)
    if not whole:
        raise CheckpointError("no whole checkpoint among those that were named")
    checkpoints = [open_checkpoint(path) for path in whole]
    last = newest(checkpoints)
    for checkpoint in checkpoints:
        if last.run_config().lora and checkpoint.manifest.start != last.manifest.start:
            raise CheckpointError(f"{checkpoint.folder}: its adapters have another base than those of {last.folder}")
    average = ensemble(checkpoints, args.gamma, DTYPES[last.run_config().model.dtype])
    return write(average, last, args.out, gamma=str(args.gamma))


def newest(checkpoints: Sequence[CheckpointReader]) -> CheckpointReader:
    """Returns the checkpoint of the latest step."""
    return max(checkpoints, key=lambda checkpoint: checkpoint.manifest.step)


def write(average: Average, last: CheckpointReader, out: Path, **facts: str) -> Path:
    """Writes the average, with what it was made from and the `facts` as metadata; returns the folder.

    Args:
        last: the newest of its checkpoints, for the sizes and for the base of adapters.
    """
    sizes = last.run_config().model.dit()
    check_base(last.manifest)
    weights = whole_weights(last, average)
    check_weights(weights, sizes)
    metadata = {"average": average.recipe(), **facts}
    card = model_card(last, "safetensors", average=metadata)
    return save_weights(weights, sizes, out, "safetensors", metadata=metadata, card=card)


if __name__ == "__main__":
    sys.exit(main())
