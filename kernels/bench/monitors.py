"""What the monitors cost: a run that watches every second step, whose steps are compared with those between them.

python kernels/bench/monitors.py --config ds_configs/stage1.json --nproc 8 --set data.manifest=data/set/train.csv

The default config needs the demo data (`make demo-data`), and runs on CPUs too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import report

_LEFT_OUT = 4  # steps at the start, which compile and warm up


def step_seconds(folder: Path) -> dict[str, dict[bool, list[float]]]:
    """Returns the seconds of a run's steps by kind, and by whether they were monitored."""
    found: dict[str, dict[bool, list[float]]] = {}
    for line in map(json.loads, (folder / "goodput.jsonl").read_text().splitlines()):
        if line["event"] == "step" and line["step"] > _LEFT_OUT:
            of = found.setdefault(line["kind"], {True: [], False: []})
            of[line["step"] % 2 == 0].append(line["seconds"]["step"])
    return found


def main() -> None:
    """Trains, and reports the medians of both and what the monitors add at their default interval."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="ds_configs/debug.json")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            *args.set,
            "monitor.every=2",
            f"schedule.steps={args.steps}",
            f"checkpoint.dir={folder}/checkpoints",
            "checkpoint.save_every=0",
            f"logging.dir={folder}",
            "logging.eval_every=0",
            f"logging.every={args.steps}",  # records, which take part in no step that is compared
        ]
        command = [sys.executable, "tools/launch.py", "--nproc", str(args.nproc), "mugv_ds/train.py"]
        command += ["--config", args.config, *(word for value in settings for word in ("--set", value))]
        subprocess.run(command, check=True)
        rows = []
        for kind, of in step_seconds(Path(folder)).items():
            if all(len(seconds) > 1 for seconds in of.values()):
                watched, other = (1000 * statistics.median(of[is_watched]) for is_watched in (True, False))
                rows.append(
                    {
                        "steps": kind,
                        "watched ms": watched,
                        "others ms": other,
                        "more %": 100 * (watched / other - 1),
                        "more %, one in 100": watched / other - 1,
                    }
                )
        report(f"monitors, {args.config}, {args.nproc} processes", rows)


if __name__ == "__main__":
    main()
