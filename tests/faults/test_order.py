"""What must not depend on the environment."""

import os
import subprocess
import sys
import time

import pytest

from tests.faults.conftest import configure
from tests.helpers.launcher import ROOT

CODE = """
import sys
from mugv_ds.config import load_config
from mugv_ds.data.quarantine import Replacing
from mugv_ds.data.run_data import RunData
from mugv_ds.models.flops import SampleCost
from tests.faults.runs import digest
config = load_config(sys.argv[1])
data = RunData(config, SampleCost.of(config), 1)
plan, read = data.plan, Replacing(data.readers)
for number in range(8):
    refs = plan.step(number).refs
    batch, _ = read(refs)
    print(tuple(map(tuple, refs)), digest(batch))
"""


@pytest.mark.long
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
