"""What must not depend on the environment."""

import os
import subprocess
import sys
import time

from tests.faults.conftest import configure
from tests.launcher import ROOT

CODE = """
import sys
from mugv_ds.config import load_config
from mugv_ds.data.buckets import Order
from mugv_ds.data.manifest import open_index
from mugv_ds.engine.feed import FlowSamples
from mugv_ds.engine.quarantine import Replacing
from tests.faults.runs import digest
config = load_config(sys.argv[1])
index = open_index(config.data.manifest)
order = Order(index.shapes(), config.data.global_batch_size, config.data.seed)
read = Replacing(FlowSamples(index, config.data, config.flow, config.model.dit().caption_channels))
for number in range(8):
    step = order.step(number)
    batch, _ = read(list(zip(step.rows, step.visits)))
    print(step.rows, step.visits, digest(batch))
"""


def test_hash_seed_and_threads_change_no_sample(tmp_path, manifest, report):
    config = configure(tmp_path, manifest)
    printed, begin = set(), time.monotonic()
    for environment in (
        {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
        {"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "2"},
    ):
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(config)],
            cwd=ROOT,
            env=os.environ | environment,
            text=True,
            capture_output=True,
            check=True,
        )
        printed.add("".join(line for line in done.stdout.splitlines(keepends=True) if line.startswith("(")))
    (output,) = printed
    assert len(set(output.splitlines())) == 8
    seconds = time.monotonic() - begin
    report(33, "PYTHONHASHSEED and OMP_NUM_THREADS varied", "the same samples and noise, bitwise", seconds)
