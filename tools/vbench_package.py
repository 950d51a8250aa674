"""Judges one dimension of VBench-I2V. Runs in the vbench package's environment, and imports nothing of ours.

The package's own command judges its text suite alone; the image suite is judged by its class.
"""

import argparse
import sys
import types
from pathlib import Path

# Draws the tracks of camera_motion where somebody asks for it. The wheel leaves it out, and imports it all the same.
_DRAWING = "vbench2_beta_i2v.third_party.cotracker.utils.visualizer"


def main() -> None:
    """Runs the command line; leaves `DIMENSION_eval_results.json` in the folder --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dimension")
    parser.add_argument("--info", required=True, help="the suite's pairs")
    parser.add_argument("--videos", required=True, help="folder of the videos")
    parser.add_argument("--crop", required=True, help="of the images in ./vbench2_beta_i2v/data/crop")
    parser.add_argument("--download", action="store_true", help="let the package fetch the weights that it misses")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    import vbench2_beta_i2v

    if not (Path(vbench2_beta_i2v.__file__).parent / "third_party").exists():
        sys.modules[_DRAWING] = types.ModuleType(_DRAWING)
        sys.modules[_DRAWING].Visualizer = None
    vbench2_beta_i2v.VBenchI2V("cuda", args.info, args.out).evaluate(
        videos_path=args.videos,
        name=args.dimension,
        dimension_list=[args.dimension],
        local=not args.download,
        resolution=args.crop,
        imaging_quality_preprocessing_mode="longer",
    )


if __name__ == "__main__":
    main()
