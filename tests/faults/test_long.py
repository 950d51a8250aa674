"""What only shows over thousands of steps. Slow: `make test-long`."""

from functools import partial

import numpy as np
import pytest

from tests.faults.conftest import configure
from tests.faults.inject import measure_resources
from tests.faults.runs import Run

STEPS = 2000


@pytest.mark.long
def test_memory_and_open_files_stay_flat(tmp_path, manifest, report):
    config = configure(
        tmp_path,
        manifest,
        schedule={"steps": STEPS},
        checkpoint={"save_every": 500},
        logging={"every": 50},
        data={"num_workers": 1},
    )
    done = Run(config, 2, faults={0: partial(measure_resources, every=20)}).finish(patience=900)
    assert done.codes == [0, 0], done.output
    taken, resident, files = np.loadtxt(tmp_path / "resources").T
    later = taken > STEPS / 4  # buffers have grown to their size by then
    # Huge pages come and go, ten of 2 MiB and more; a leak raises the floor.
    windows = [np.array_split(of[later], 6) for of in (taken, resident)]
    slope = np.polyfit([of.mean() for of in windows[0]], [of.min() for of in windows[1]], 1)[0]
    assert slope < 2048, f"{slope:.0f} bytes a step"
    assert files[later].max() <= files[later].min() + 2
    report(30, f"{STEPS:,} steps", f"memory grows by {slope:.0f} bytes a step, open files flat", done.seconds)
