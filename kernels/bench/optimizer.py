"""A training step with our sharded optimizer, as AdamW and as Muon, and with DeepSpeed's own AdamW.

torchrun --nproc-per-node 2 kernels/bench/optimizer.py --depth 8 --data 2 --shape 6 45 80

Blocks of the 10B's width on random samples, through the engine and feed of a run. All are measured in one launch, for
gradients that are accumulated in fp32 and in bf16: milliseconds of a step and, of further steps, of the optimizer's
part of it (with a synchronization before and after it), and a device's peak memory.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable

import deepspeed
import torch
import torch.distributed as dist

from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.readers import Batch
from mugv_ds.engine import build
from mugv_ds.engine.distributed_optimizer import make_engine
from mugv_ds.engine.feed import Feed
from mugv_ds.engine.process import start_process

CHANNELS, TEXT = 4096, 300


def deepspeeds_own(module, optimizer, schedule, config: dict):
    """Makes the engine with the optimizer that DeepSpeed would take."""
    return deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]


def config(args: argparse.Namespace, gradients: str, kind: str) -> TrainConfig:
    """The run that is measured."""
    world = int(os.environ["WORLD_SIZE"])
    sequence = world // args.data
    return TrainConfig.model_validate(
        {
            "model": {"preset": "mugdit_10b", "depth": args.depth, "attention": args.attention, "compile": True},
            "data": {
                "manifest": "unused", "num_workers": 0, "max_text_tokens": TEXT,
                "global_batch_size": args.micro * args.accumulation * args.data, "micro_batch_size": args.micro,
            },
            "flow": {"caption_drop": 0.0},
            "parallel": {"data": args.data, "sequence": sequence, "activation_checkpointing": args.level},
            "optimizer": {"kind": kind, "lr": 1e-5},
            "schedule": {"steps": 100, "warmup_steps": 1},
            "checkpoint": {"dir": "unused"},
            "logging": {"dir": "unused"},
            "deepspeed": {"data_types": {"grad_accum_dtype": gradients}},
        }
    )  # fmt: skip


def samples(micro: int, shape: tuple[int, int, int]) -> Batch:
    """Random samples of a micro-batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(micro, 24, *shape, generator=generator)
    return Batch(
        x=x,
        target=torch.randn(x.shape, generator=generator),
        timestep=torch.full((micro,), 500.0),
        text=torch.randn(micro, TEXT, CHANNELS, generator=generator),
        text_mask=torch.ones(micro, TEXT, dtype=torch.bool),
        x_mask=torch.ones(micro, shape[0], dtype=torch.bool),
        fps=torch.full((micro,), 30.0),
        weight=torch.ones(micro),
        role=torch.zeros(micro, dtype=torch.int8),
        reference=torch.zeros(micro),
        optimality=torch.zeros(micro),
        row=torch.arange(micro),
        visit=torch.zeros(micro, dtype=torch.int64),
        content=torch.zeros(micro, dtype=torch.int64),
    )


def timed(step: Callable, times: list[float]) -> Callable:
    """Makes a function that does what `step` does and appends the seconds that the device took for it."""

    def call(*args, **kwargs):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        result = step(*args, **kwargs)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        return result

    return call


def measure(args: argparse.Namespace, make, gradients: str, kind: str) -> tuple[float, float, float, float]:
    """Returns the median seconds of a step and of the optimizer in it, the peak GiB of a device, and the last loss."""
    build.make_engine = make
    left = torch.cuda.memory_allocated()  # of earlier cases, which DeepSpeed's hooks keep alive
    settings, shape = config(args, gradients, kind), tuple(args.shape)
    process = start_process(settings)
    engine = build.build_engine(settings, process, shape)
    feed = Feed(engine.module, process, settings.data, CHANNELS)
    engine.module.set_shape(shape, args.micro, process.device)
    parts, times, of_optimizer, loss = [samples(args.micro, shape)] * args.accumulation, [], [], None
    for step in range(2 * args.steps):
        if step == 2:
            torch.cuda.reset_peak_memory_stats()
        if step == args.steps:
            engine.optimizer.step = timed(engine.optimizer.step, of_optimizer)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        loss = engine.train_batch(feed.stage(parts, shape, args.micro, args.accumulation))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    peak = (torch.cuda.max_memory_allocated() - left) / 2**30
    del engine, feed
    gc.collect()
    torch.cuda.empty_cache()
    return statistics.median(times[2 : args.steps]), statistics.median(of_optimizer), peak, loss.item()


def main() -> None:
    """Parses the command line, measures, and prints a table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8, help="blocks")
    parser.add_argument("--data", type=int, default=2, help="replicas; the other ranks share a sequence")
    parser.add_argument("--shape", type=int, nargs=3, default=[6, 45, 80], help="latent (T, H, W)")
    parser.add_argument("--micro", type=int, default=3, help="samples of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--level", default="light", help="of recomputation")
    parser.add_argument("--attention", default="auto", help="backend of self-attention")
    parser.add_argument("--steps", type=int, default=10, help="of which two warm up")
    args = parser.parse_args()
    os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])  # as DeepSpeed's launcher calls it
    lines = []
    for gradients in ("fp32", "bf16"):
        for name, kind, make in (
            ("AdamW", "adamw", make_engine),
            ("Muon", "muon", make_engine),
            ("DeepSpeed's", "adamw", deepspeeds_own),
        ):
            seconds, of_optimizer, peak, loss = measure(args, make, gradients, kind)
            lines.append(
                f"{gradients:9} {name:12} {1000 * seconds:8.1f} ms a step  {1000 * of_optimizer:7.1f} ms optimizer  "
                f"{peak:6.2f} GiB  loss {loss:.5f}"
            )
    if dist.get_rank() == 0:
        print(f"{torch.cuda.get_device_name()}, {dist.get_world_size()} devices, {vars(args)}")
        print("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
