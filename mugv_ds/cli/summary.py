"""Sums up a finished run: the held-out loss at its start and end, where the weights and the sampled videos are."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and prints the summary; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run's TensorBoard events")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the converted weights")
    parser.add_argument("--samples", type=Path, required=True, help="folder of the sampled videos")
    args = parser.parse_args(argv)
    events = EventAccumulator(str(args.run))
    events.Reload()
    first, *_, last = events.Scalars("validation/loss")
    print(
        f"held-out loss at fixed noise: {first.value:.4f} at step {first.step}, {last.value:.4f} at step {last.step} "
        f"({100 * (1 - last.value / first.value):.0f}% lower)"
    )
    for kind, files in (
        ("weights", sorted(args.weights.glob("*.pt")) + sorted(args.weights.glob("*.safetensors"))),
        ("video", sorted(args.samples.glob("*.mp4"))),
        ("contact sheet", sorted(args.samples.glob("*.png"))),
    ):
        for file in files:
            print(f"{kind}: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
