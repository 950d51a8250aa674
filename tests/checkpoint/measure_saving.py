"""Measures what saving in the background costs the training loop: the debug run with a save every 20 steps.

python -m tests.checkpoint.measure_saving

It needs the demo data (`make demo-data`) and an idle machine. In one run every second window of 20 steps begins with a
save, whose writing goes on within it; the others have none.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from mugv_ds.config import load_config
from tests.helpers.distributed import run_ranks

WINDOW = 20


def timed_run(config: str, folder: Path, steps: int) -> None:
    """Trains, and writes the ends of the steps and the seconds of the calls of `save` to `times.json`."""
    from mugv_ds.checkpoint.store import Store
    from mugv_ds.engine.loop import Trainer
    from mugv_ds.train import train

    ends: list[float] = []
    calls: list[float] = []
    train_step, save = Trainer._train_step, Store.save

    def timed_step(*args):
        taken = train_step(*args)
        ends.append(time.perf_counter())
        return taken

    def timed_save(*args):
        begin = time.perf_counter()
        save(*args)
        calls.append(time.perf_counter() - begin)

    Trainer._train_step, Store.save = timed_step, timed_save
    settings = {
        "schedule.steps": steps,
        "checkpoint.dir": folder / "checkpoints",
        "checkpoint.save_every": 2 * WINDOW,
        "logging.dir": folder / "tensorboard",
        "logging.eval_every": 0,
        "logging.progress": "false",
    }
    train(load_config(config, [f"{key}={value}" for key, value in settings.items()]))
    (folder / "times.json").write_text(json.dumps([ends, calls]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="ds_configs/debug.json", help="a config of two processes")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(2, timed_run, args.config, Path(folder), args.steps)
        ends, calls = json.loads((Path(folder) / "times.json").read_text())
    windows = [ends[i + WINDOW] - ends[i] for i in range(WINDOW - 1, args.steps - WINDOW, WINDOW)]
    quiet, saving = windows[0::2], windows[1::2]  # the first begins after step 20, the second after step 40
    step = statistics.median(quiet) / WINDOW
    cost = (statistics.median(saving) - statistics.median(quiet)) / statistics.median(quiet)
    print(f"{len(quiet)} windows of {WINDOW} steps without a save: {1000 * step:.1f} ms a step (median)")
    print(f"{len(saving)} with one: {1000 * statistics.median(saving) / WINDOW:.1f} ms a step, {cost:+.1%}")
    print(f"the loop waited {1000 * statistics.median(calls):.1f} ms for a save (median)")


if __name__ == "__main__":
    main()
