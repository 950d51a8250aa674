"""The VideoVAE's bench runs on machines that have neither DeepSpeed nor what reads data."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = ("deepspeed", "datasets", "pyarrow", "av", "tensorboard", "torchmetrics", "transformers")


def test_the_bench_imports_little():
    absent = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}, None))"
    code = f"{absent}; sys.path.insert(0, 'kernels/bench'); import videovae"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
