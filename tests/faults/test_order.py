"""What must not depend on the environment."""

import os
import subprocess
import sys
import time

from tests.faults.conftest import configure
from tests.helpers.launcher import ROOT

CODE = """
import sys
from mugv_ds.config import load_config
from mugv_ds.data.quarantine import Replacing
from mugv_ds.data.readers import Sources
from mugv_ds.data.run_data import flow_reader, make_plan, open_manifests
from tests.faults.runs import digest
config = load_config(sys.argv[1])
manifests = open_manifests(config)
sources = Sources((flow_reader(config, manifests.train),))
plan, read = make_plan(config, manifests, sources, 1), Replacing(sources)
for number in range(8):
    picks = plan.step(number).picks
    batch, _ = read(picks)
    print(tuple(map(tuple, picks)), digest(batch))
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
