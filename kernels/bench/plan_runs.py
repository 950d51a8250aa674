"""Runs short trainings through the ordinary train.py on the GPUs of a host, and writes a record of each, which the
planner's predictions are held to (`tools/plan.py --validate`).

kernels/bench/plan_runs.py --gpus 4 --out tests/plan/runs

Cases of one number of GPUs share their processes. One that fails is named and left out.
"""

import argparse
import gc
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A run: `micro` samples of latent `shape` at once, `accumulation` micro-batches, `depth` blocks."""

    name: str
    layout: tuple[int, int, int]  # data, sequence, pipeline
    shape: tuple[int, int, int]
    depth: int
    level: str
    offload: str = "none"
    micro: int = 1
    accumulation: int = 1
    gradients: str = "fp32"
    averages: int = 0
    steps: int = 6
    is_profiled: bool = True  # one step more
    memory_gib: float | None = None  # that the levels of "auto" fill, by default the device's

    @property
    def gpus(self) -> int:
        data, sequence, pipeline = self.layout
        return data * sequence * pipeline

    def settings(self, work: Path, attention: str) -> list[str]:
        """The config's overrides."""
        data, sequence, pipeline = self.layout
        folder = work / self.name
        steps = self.steps + self.is_profiled
        values = {
            "model.depth": self.depth,
            "model.attention": attention,
            "data.manifest": str(data_folder(work, self.shape) / "train.csv"),
            "data.global_batch_size": self.micro * self.accumulation * data,
            "data.micro_batch_size": self.micro,
            "data.num_workers": 2,
            "data.max_row_share": 1.0,
            "parallel.data": data,
            "parallel.sequence": sequence,
            "parallel.pipeline": pipeline,
            "parallel.activation_checkpointing": self.level,
            "parallel.offload": self.offload,
            "parallel.memory_gib": self.memory_gib,
            "deepspeed.data_types.grad_accum_dtype": self.gradients,
            "ema.sigma_rel": [0.05, 0.1][: self.averages],
            "optimizer.lr": 1e-4,
            "schedule.steps": steps,
            "schedule.warmup_steps": 1,
            "checkpoint.save_every": 0,
            "checkpoint.dir": str(folder / "checkpoints"),
            "logging.dir": str(folder / "tensorboard"),
            "logging.every": 1,
            "logging.progress": False,
            "logging.profile_step": steps if self.is_profiled else 0,
        }
        return [f"{key}={json.dumps(value)}" for key, value in values.items()]


IMAGE, CLIP_2S, CLIP_5S, HD_2S, HD_5S = (1, 45, 80), (6, 45, 80), (15, 45, 80), (8, 90, 160), (15, 90, 160)
CASES = (
    Case("1-360p2s-off", (1, 1, 1), CLIP_2S, 8, "off", micro=3, accumulation=2),
    Case("1-360p5s-light", (1, 1, 1), CLIP_5S, 8, "light", accumulation=2, averages=1),
    Case("1-720p3s-attention", (1, 1, 1), HD_2S, 6, "attention"),
    Case("1-720p5s-selective", (1, 1, 1), HD_5S, 4, "selective", steps=4),
    Case("1-images-selective", (1, 1, 1), IMAGE, 8, "selective", micro=17, gradients="bf16"),
    Case("2-720p5s-sequence", (1, 2, 1), HD_5S, 6, "light"),
    Case("2-360p5s-data", (2, 1, 1), CLIP_5S, 8, "selective", accumulation=2),
    Case("2-360p5s-pipeline", (1, 1, 2), CLIP_5S, 8, "off", accumulation=4),
    # The same work in several ways, of which the planner has to pick the fastest.
    Case("2-choice-data", (2, 1, 1), HD_2S, 6, "light", steps=5, is_profiled=False),
    Case("2-choice-off", (2, 1, 1), HD_2S, 6, "off", steps=5, is_profiled=False),
    Case("2-choice-attention", (2, 1, 1), HD_2S, 6, "attention", steps=5, is_profiled=False),
    Case("2-choice-sequence", (1, 2, 1), HD_2S, 6, "light", accumulation=2, steps=5, is_profiled=False),
    Case("2-choice-pipeline", (1, 1, 2), HD_2S, 6, "light", accumulation=2, steps=5, is_profiled=False),
    Case("2-162k-attention", (1, 2, 1), (45, 90, 160), 4, "attention", steps=4, is_profiled=False),
    Case("2-162k-all", (1, 2, 1), (45, 90, 160), 4, "attention", "all", steps=4, is_profiled=False),
    Case("2-580k-offload", (1, 2, 1), (161, 90, 160), 1, "attention", "all", steps=3, is_profiled=False),
    Case("2-10b-720p5s", (1, 2, 1), HD_5S, 56, "attention", steps=4, is_profiled=False),
    Case("2-162k-offload", (1, 2, 1), (45, 90, 160), 4, "attention", "attention_output", steps=4),
    Case("4-720p5s-sequence", (1, 4, 1), HD_5S, 16, "light"),
    Case("4-720p3s-mixed", (2, 2, 1), HD_2S, 8, "full", accumulation=2),
    Case("4-720p5s-pipeline", (1, 2, 2), HD_5S, 8, "attention", accumulation=4, steps=4),
    Case("4-360p2s-data", (4, 1, 1), CLIP_2S, 8, "selective", micro=3, averages=2),
    Case("4-299k-offload", (1, 4, 1), (83, 90, 160), 4, "attention", "all", steps=3, is_profiled=False),
    Case("4-580k-offload", (1, 4, 1), (161, 90, 160), 2, "attention", "all", steps=3, is_profiled=False),
    Case("4-10b-720p5s", (1, 4, 1), HD_5S, 56, "auto", memory_gib=129.0, steps=5, is_profiled=False),
    Case("4-10b-720p5s-selective", (1, 4, 1), HD_5S, 56, "selective", steps=4, is_profiled=False),
    Case("4-10b-580k", (1, 4, 1), (161, 90, 160), 56, "attention", "all", steps=2, is_profiled=False),
    Case("8-10b-720p5s-data", (2, 4, 1), HD_5S, 56, "auto", steps=5, is_profiled=False),
    Case("8-10b-720p5s-sequence", (1, 8, 1), HD_5S, 56, "auto", accumulation=2, steps=5, is_profiled=False),
    Case("8-10b-720p5s-pipeline", (1, 4, 2), HD_5S, 56, "auto", accumulation=4, steps=5, is_profiled=False),
    Case("8-10b-580k", (1, 8, 1), (161, 90, 160), 56, "attention", "all", steps=2, is_profiled=False),
)
TOY = (
    Case("toy-1", (1, 1, 1), (2, 4, 6), 2, "light", micro=2, accumulation=2, steps=3, is_profiled=True),
    Case("toy-1-again", (1, 1, 1), (1, 4, 4), 2, "auto", steps=3, is_profiled=False, averages=1),
    Case("toy-2", (1, 2, 1), (2, 4, 6), 2, "selective", steps=3, is_profiled=False),
    Case("toy-2-again", (1, 1, 2), (1, 4, 4), 2, "full", accumulation=2, steps=2, is_profiled=False),
)


def data_folder(work: Path, shape: Sequence[int]) -> Path:
    """Where the samples of a shape lie."""
    return work / "data" / "x".join(map(str, shape))


def config_of(case: Case, work: Path, attention: str, is_toy: bool):
    """The run's config."""
    from mugv_ds.config import load_config

    more = ['model.preset="mugdit_debug"', "data.max_text_tokens=40", "model.caption_channels=64"] if is_toy else []
    more += ["model.compile=false"] if is_toy else []
    config = load_config(ROOT / "ds_configs/base.json", [*case.settings(work, attention), *more])
    return config if is_toy or case.level != "auto" else as_planned(config, case)


def as_planned(config, case: Case):
    """Returns the config with the levels that "auto" chooses on the card of the calibration that ships."""
    from mugv_ds.plan.calibration import load_calibration, shipped
    from mugv_ds.plan.levels import with_levels
    from mugv_ds.plan.search import Limits, Planner
    from mugv_ds.plan.steps import given_kinds
    from mugv_ds.plan.timing import Timing

    timing = Timing(load_calibration(shipped()[0]))
    planner = Planner(config, given_kinds(config, [case.shape]), timing, Limits.of(timing))
    return with_levels(config, planner.as_set(case.gpus).setup.levels)


class Watch:
    """Follows the memory of this process. Attributes: resident, pinned, reserved: most bytes since `reset`."""

    def __init__(self) -> None:
        import psutil
        import torch

        self._process, self._torch = psutil.Process(), torch
        self.reset()

    def reset(self) -> None:
        self.resident = self.pinned = self.reserved = 0

    def look(self) -> None:
        self.resident = max(self.resident, self._process.memory_info().rss)
        if self._torch.cuda.is_available() and self._torch.cuda.is_initialized():
            self.pinned = max(self.pinned, self._torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))
            self.reserved = max(self.reserved, self._torch.cuda.max_memory_reserved())

    @contextmanager
    def watching(self):
        """Looks twice a second while what is inside runs."""
        self.reset()
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                self.look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.look()


def run_case(case: Case, config, watch: Watch) -> tuple[float, ...]:
    """Trains as one rank of a launch.

    Returns:
        GiB of host memory, of it pinned, reserved on the device, and on the device before.
    """
    import torch
    import torch.distributed as dist
    from deepspeed.utils import groups

    from mugv_ds.train import train

    left = 0
    if torch.cuda.is_available():
        left = torch.cuda.memory_allocated()  # of earlier cases, which DeepSpeed's hooks keep alive
        torch.cuda.reset_peak_memory_stats()
        if hasattr(torch.cuda, "reset_peak_host_memory_stats"):
            torch.cuda.reset_peak_host_memory_stats()
    try:
        with watch.watching():
            train(config)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        groups._release_process_group_references(group=None)  # DeepSpeed's, which `train` leaves behind
        gc.collect()
        torch._dynamo.reset()  # else the cases together meet more shapes than each of them is compiled for
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return tuple(count / GIB for count in (watch.resident, watch.pinned, watch.reserved - left, left))


def make_record(case: Case, config, memory: Sequence[float], is_first: bool):
    """Makes the record of a run of what it logged.

    Args:
        memory: see `run_case`. is_first: whether nothing ran in the process before, whose host memory counts too.
    """
    import deepspeed
    import torch

    from mugv_ds.plan.records import Measured, RunMachine, RunRecord, kernel_seconds, later, read_scalars, steady

    scalars = {tag: [value for _, value in points] for tag, points in read_scalars(Path(config.logging.dir)).items()}
    steps = scalars["speed/seconds_per_step"]
    counted = steps[:-1] if case.is_profiled else steps
    profiles = sorted(Path(config.logging.dir).glob("profile_step_*.json.gz"))
    try:
        import triton
    except ImportError:
        triton = None
    is_gpu = torch.cuda.is_available()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return RunRecord(
        name=case.name,
        config=config.model_dump(mode="json", exclude_unset=True),
        world_size=case.gpus,
        shape=case.shape,
        machine=RunMachine(
            device=torch.cuda.get_device_name() if is_gpu else "CPU",
            devices=case.gpus,
            torch=str(torch.__version__),
            cuda=torch.version.cuda,
            triton=None if triton is None else triton.__version__,
            deepspeed=deepspeed.__version__,
            commit=commit.strip() or None,
        ),
        measured=Measured(
            step_seconds=steady(counted),
            steps=tuple(steps),
            peak_gib=max(later(scalars["memory/peak_gib"][: len(counted)])) - memory[3] if is_gpu else None,
            host_gib=memory[0] if is_first else None,
            pinned_gib=memory[1],
            reserved_gib=memory[2],
            data_wait_seconds=max(later(scalars["speed/data_wait_seconds"])),
            losses=tuple(scalars["train/loss"]),
            kernels=kernel_seconds(profiles[-1]) if profiles and is_gpu else {},
        ),
    )


def work_as_rank(args: argparse.Namespace, cases: Sequence[Case]) -> None:
    """Runs the cases as one of the processes; rank 0 writes the records."""
    from mugv_ds.files.atomic import write_atomically

    rank, first_port, watch, begin = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"]), Watch(), time.monotonic()
    for number, case in enumerate(cases):
        os.environ["MASTER_PORT"] = str(first_port + number)
        config = config_of(case, args.work, args.attention, args.toy)
        before = time.monotonic()
        memory = run_case(case, config, watch)
        if rank != 0:
            continue
        record = make_record(case, config, memory, is_first=number == 0)
        with write_atomically(args.out / f"{case.name}.json") as file:
            file.write(record.to_json().encode())
        m = record.measured
        print(
            f"{time.monotonic() - begin:6.1f} s  {case.name}: {m.step_seconds:.4f} s a step, {m.peak_gib or 0:.2f} GiB "
            f"({m.reserved_gib:.2f} reserved), host {memory[0]:.1f} GiB ({m.pinned_gib:.1f} pinned), losses "
            f"{m.losses[0]:.4f} … {m.losses[-1]:.4f}; the case took {time.monotonic() - before:.0f} s",
            flush=True,
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return min(probe.getsockname()[1], 60_000)


def start_ranks(args: argparse.Namespace, gpus: int, names: Sequence[str], seconds: float) -> bool:
    """Starts the processes of some cases and waits for them; returns whether all ended well."""
    port = free_port()
    options = ["--work", args.work, "--out", args.out, "--attention", args.attention, *(["--toy"] if args.toy else [])]
    ranks = []
    for rank in range(gpus):
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": gpus, "LOCAL_SIZE": gpus, "MASTER_PORT": port}
        as_train = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # see `mugv_ds.config.command`
        environment = {
            **as_train,
            **os.environ,
            **{key: str(value) for key, value in given.items()},
            "MASTER_ADDR": "127.0.0.1",
        }
        ranks.append(
            subprocess.Popen([sys.executable, __file__, *map(str, options), "--only", *names], env=environment)
        )
    end = time.monotonic() + seconds
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if any(rank.poll() for rank in ranks):
                break
            time.sleep(0.2)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return all(rank.returncode == 0 for rank in ranks)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes data and starts the cases' processes; returns the exit status, 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8], help="cases on so many GPUs")
    parser.add_argument("--only", nargs="+", help="names of cases")
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--work", type=Path, default=Path("/tmp/plan_runs"), help="folder of data and logs")
    parser.add_argument("--attention", default="flash4", help="backend of self-attention")
    parser.add_argument("--seconds", type=float, default=570.0, help="after which the cases that run are ended")
    parser.add_argument("--toy", action="store_true", help="sizes of a test, on the CPU")
    args = parser.parse_args(argv)
    cases = [case for case in (TOY if args.toy else CASES) if args.only is None or case.name in args.only]
    if "RANK" in os.environ:
        try:
            work_as_rank(args, cases)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # without waiting for ranks that wait for this one
        return 0
    end = time.monotonic() + args.seconds
    cases = [case for case in cases if case.gpus in args.gpus]
    write_data = runpy.run_path(str(ROOT / "tools/make_random_data.py"))["main"]
    args.out.mkdir(parents=True, exist_ok=True)
    for shape in dict.fromkeys(case.shape for case in cases):
        most = max(case.micro * case.accumulation * case.layout[0] for case in cases if case.shape == shape)
        text = ["--caption-channels", "64", "--text-tokens", "40"] if args.toy else []
        folder = data_folder(args.work, shape)
        write_data(["--out", str(folder), "--samples", str(most), "--shape", *map(str, shape), *text])
    for case in cases:
        shutil.rmtree(args.work / case.name, ignore_errors=True)  # what an earlier run logged
    failed = []
    for gpus in sorted({case.gpus for case in cases}):
        waiting = [case.name for case in cases if case.gpus == gpus]
        while waiting and time.monotonic() < end:
            if start_ranks(args, gpus, waiting, end - time.monotonic()):
                break
            # The first that has no record is the one that failed; the others go on without it.
            missing = [name for name in waiting if not _is_new(args.out / f"{name}.json", begin=end - args.seconds)]
            failed += missing[:1]
            waiting = missing[1:]
    for name in failed:
        print(f"{name}: failed", flush=True)
    return bool(failed)


def _is_new(path: Path, begin: float) -> bool:
    """Whether a file was written since a time of the monotonic clock."""
    return path.exists() and path.stat().st_mtime >= time.time() - (time.monotonic() - begin)


if __name__ == "__main__":
    sys.exit(main())
