"""The demo of tools/prepare.py: draws raw videos and small weights, and compares what came of them with what must.

python tools/prepare_demo.py draw data/prepare_demo
python tools/prepare.py run --config ds_configs/prepare_demo.json --videos data/prepare_demo/videos …
python tools/prepare_demo.py check data/prepare_demo
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from mugv_ds.config.errors import Status, exit_status
from mugv_ds.config.load import load_config
from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.chain import Folders
from mugv_ds.prepare.demo.check import outcomes
from mugv_ds.prepare.demo.footage import SOURCES, draw_sources, expectations
from mugv_ds.prepare.demo.weights import write_codec, write_t5
from mugv_ds.prepare.executors import Local, Stop
from mugv_ds.prepare.run import Loaders, Preparation
from mugv_ds.weights.codec import codec_fingerprint, load_codec

_VERSION = 1  # of what is drawn; a change must raise it, so that an older demo is made anew


def draw(root: Path) -> None:
    """Draws videos, captions beside them, and weights into a folder; what an earlier version drew is made anew."""
    marker = root / "demo.json"
    made = {"version": _VERSION, "sources": list(SOURCES)}
    if marker.exists() and json.loads(marker.read_text()) == made:
        return
    for name in ("videos", "models", "work", "set"):
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("videos", "models"):
        (root / name).mkdir(parents=True)
    draw_sources(root / "videos")
    for name in SOURCES:
        caption = f"a drawn scene called {Path(name).stem}: colours drift over it"
        (root / "videos" / name).with_suffix(".txt").write_text(caption)
    write_codec(root / "models" / "codec.safetensors")
    write_t5(root / "models" / "t5")
    marker.write_text(json.dumps(made))


def check(root: Path, config: str) -> int:
    """Prints what came of each source; returns the exit status."""
    folders = Folders(root / "videos", root / "work", root / "set")
    with Local(1, Stop()) as executor:
        preparation = Preparation(
            load_config(config, (), PrepareConfig), folders, executor, Loaders(load_codec, codec_fingerprint), print
        )
        found = list(outcomes(preparation, expectations()))
    for one in found:
        print(f"{'wrong' if one.wrong else 'right':6} {one.path:16} {one.found}")
        for words in one.wrong:
            print(f"       {'':16} {words}")
    wrong = sum(bool(one.wrong) for one in found)
    print(f"{len(found) - wrong} of {len(found)} sources came out as they must")
    return Status.FAILED if wrong else Status.DONE


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["draw", "check"])
    parser.add_argument("root", type=Path, help="folder of the demo")
    parser.add_argument("--config", default="ds_configs/prepare_demo.json", help="default: %(default)s")
    args = parser.parse_args()

    def run() -> int:
        if args.do == "check":
            return check(args.root, args.config)
        draw(args.root)
        return Status.DONE

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
