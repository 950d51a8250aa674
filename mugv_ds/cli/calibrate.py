"""Measures what this machine does in the time that a training step is made of, for the planner (`tools/plan.py`).

tools/calibrate.py                                            one device
torchrun --nproc-per-node 4 tools/calibrate.py                also what devices of a host exchange; they share the rest

Writes OUT/<card>-torch<version>.json. A file of that name is gone on with: what is measured again takes the place of
what was there. Each process writes its own file beside it after each measurement, and the first puts them together in
the end; those of a run that was cut short are taken in by the next, or by --only nothing. DeepSpeed is not needed.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import HEAD_DIM, LATENT_CHANNELS, DiTConfig
from mugv_ds.config.section import Section
from mugv_ds.files.atomic import write_atomically
from mugv_ds.models.attention import (
    BACKENDS,
    MASKED_BACKENDS,
    Attention,
    attend_packed,
    installed_backends,
    installed_masked_backends,
)
from mugv_ds.models.choose_attention import choose_attention, choose_masked_attention
from mugv_ds.models.compile import compile_blocks
from mugv_ds.models.dit import Embedders, init_weights
from mugv_ds.models.kept_attention import KeptAttention, Statistics, statistics_of
from mugv_ds.models.layers import Block, Condition, FinalLayer
from mugv_ds.models.rope import patch_grid
from mugv_ds.plan.calibration import (
    Allocator,
    AttentionPoint,
    BlockPoint,
    Calibration,
    CollectivePoint,
    CopyPoint,
    EndsPoint,
    Machine,
    OptimizerPoint,
    Overlap,
    ProductPoint,
    load_calibration,
    machine_name,
)
from mugv_ds.preflight.measure import Clock, collective_call, copy_call
from mugv_kernels.qk_norm_rope import ROW

TEXT_TOKENS = 300
LEVELS = ("off", "light", "selective", "attention", "full")
# In the order in which they are measured: what takes seconds first.
_PARTS = ("groups", "copies", "optimizer", "ends", "attention", "rest", "blocks", "products")
_MIB = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        widths: of blocks. lengths: tokens of the one sequence that a block is given.
        checked: lengths at which a block of the first width runs at every level. batched: (batch, tokens), as rows of
            `lengths` in several sequences.
        attention: (batch, tokens, heads). once: the same, that take so long that they run once.
        ends: (batch, latent shape). elements: of the optimizer's shard. bytes: of collectives. copied: of copies.
    """

    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    checked: tuple[int, ...]
    batched: tuple[tuple[int, int], ...]
    attention: tuple[tuple[int, int, int], ...]
    once: tuple[tuple[int, int, int], ...]
    ends: tuple[tuple[int, tuple[int, int, int]], ...]
    elements: tuple[int, ...]
    bytes: tuple[int, ...]
    copied: tuple[int, ...]
    caption_channels: int = 4096


FULL = Sizes(
    widths=(3456, 1728),
    lengths=(1024, 4096, 16384, 32768, 65536, 131072),
    checked=(4096, 16384, 65536),
    batched=((4, 4098), (16, 1018), (32, 1018)),
    attention=(
        *((1, tokens, heads) for heads, tokens in product((48, 24, 12, 6), (1024, 2048, 4096, 8192, 16384, 32768))),
        *((16, tokens, 48) for tokens in (512, 1024, 2048)),
        *((4, tokens, 48) for tokens in (1024, 2048, 4096, 8192)),
        *((1, 65536, heads) for heads in (48, 24, 12, 6)),
        *((1, 131072, heads) for heads in (12, 6)),
    ),
    once=((1, 131072, 24), (1, 131072, 48), (1, 262144, 12), (1, 262144, 24), (1, 524288, 12), (1, 524288, 6)),
    ends=((1, (4, 90, 160)), (1, (15, 90, 160)), (16, (1, 45, 80))),
    elements=(50_000_000, 300_000_000),
    bytes=(_MIB, 16 * _MIB, 128 * _MIB, 512 * _MIB),
    copied=(16 * _MIB, 64 * _MIB, 256 * _MIB, 1024 * _MIB),
)
TOY = Sizes(
    widths=(144, 72),
    lengths=(32, 64),
    checked=(64,),
    batched=((2, 32),),
    attention=((1, 32, 2), (1, 64, 2), (1, 64, 1), (2, 32, 2)),
    once=((1, 128, 1),),
    ends=((1, (2, 4, 8)), (2, (1, 4, 8))),
    elements=(1000, 4000),
    bytes=(1 << 12, 1 << 14, 1 << 16, 1 << 18),
    copied=(1 << 12, 1 << 14, 1 << 16, 1 << 18),
    caption_channels=16,
)


class StandIn:
    """Takes the place of self-attention and costs next to nothing: o is v, and q, k and v get the gradient of o."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v.contiguous()

    def packed(self, qkv: Tensor, tokens: int) -> Tensor:
        return _Values.apply(qkv)


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor) -> Tensor:
        ctx.shape = qkv.shape
        return qkv[:, :, 2].clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, do: Tensor) -> Tensor:
        return do.new_empty(*ctx.shape[:-1], ROW)[..., :HEAD_DIM].copy_(do.unsqueeze(2))


class Work(NamedTuple):
    """One measurement. section: of the calibration. share: which of the processes makes it; None: all, together."""

    section: str
    title: str
    measure: Callable[[], Section]
    share: int | None


class Bench:
    """What is measured on one device, each as points for a `Calibration`.

    Args:
        sizes: of what is measured. clock: on the device. name: of the backend of self-attention. cross: of
            cross-attention.
        levels: of recomputation that whole blocks are measured at.
    """

    def __init__(self, sizes: Sizes, clock: Clock, name: str, cross: str, levels: Sequence[str]) -> None:
        self.sizes, self.clock, self.name, self.levels = sizes, clock, name, levels
        self.attention = BACKENDS[name]
        self.cross = MASKED_BACKENDS[cross]
        self.device = clock.device
        self._blocks: dict[int, Block] = {}

    def normal(self, *shape: int) -> Tensor:
        """Draws a bf16 tensor that requires a gradient."""
        return torch.randn(shape, device=self.device).bfloat16().requires_grad_()

    def work(self, part: str) -> Iterator[Work]:
        """Yields what there is to measure of a part."""
        sizes = self.sizes
        if part == "copies":
            for kind, count in product(("to_host", "to_device", "on_device"), sizes.copied):
                yield Work(part, f"{kind} {count}", partial(self.copy, kind, count), None)
        if part == "optimizer":
            for share, elements in enumerate(sizes.elements):
                yield Work(part, f"{elements}", partial(self.optimizer, elements), share)
        if part == "ends":
            for share, (width, (batch, shape)) in enumerate(product(sizes.widths, sizes.ends)):
                yield Work(part, f"{width} {batch} {shape}", partial(self.ends, width, batch, shape), share)
        if part == "attention":
            for share, shape in enumerate((*sizes.attention, *sizes.once)):
                measure = partial(self.attend, *shape, warm=shape not in sizes.once)
                yield Work(part, f"{shape}", measure, share)
        if part in ("rest", "blocks"):
            attention = StandIn() if part == "rest" else None
            for share, (width, batch, tokens, level) in self._blocks_of(part):
                title = f"{width} {batch} {tokens} {level}"
                yield Work("blocks", title, partial(self.block, width, batch, tokens, level, attention), share)
        if part == "products":
            widths = product(sizes.widths, ((1, 1), (1, 3), (1, 4), (4, 1)))
            for share, ((width, (i, o)), rows) in enumerate(product(widths, sizes.lengths)):
                yield Work(
                    part, f"{rows} {width * i} {width * o}", partial(self.linear, rows, width * i, width * o), share
                )

    def _blocks_of(self, part: str) -> Iterator[tuple[int, tuple[int, int, int, str]]]:
        """Yields (share, (width, batch, tokens, level)): the same process for one shape, which is compiled once."""
        sizes, (first, *_) = self.sizes, self.sizes.widths
        shapes = [(width, 1, tokens) for width, tokens in product(sizes.widths, sizes.lengths)]
        shapes += [(first, *shape) for shape in sizes.batched if part == "rest"]
        for share, shape in enumerate(shapes):
            levels = ("off", "light", "selective")
            if part == "blocks":
                levels = self.levels if shape in [(first, 1, tokens) for tokens in sizes.checked] else ("off",)
            for level in levels:
                yield share, (*shape, level)

    def attend(self, batch: int, tokens: int, heads: int, warm: bool = True) -> AttentionPoint:
        """Measures self-attention alone, in the form in which it trains. warm: see `Clock`."""
        if not warm:
            self.attend(batch, tokens // 3, heads)  # compiles
        qkv = torch.randn(batch, tokens, 3, heads, ROW, device=self.device).bfloat16()[..., :HEAD_DIM].requires_grad_()
        do = torch.randn(batch, tokens, heads, HEAD_DIM, device=self.device).bfloat16()
        o: list[Tensor] = []

        def forward() -> None:
            o[:] = [attend_packed(self.attention, qkv, tokens)]

        seconds = self.clock(forward, lambda: torch.autograd.grad(o.pop(), qkv, do), warm=warm)
        return AttentionPoint(batch=batch, tokens=tokens, heads=heads, forward_s=seconds[0], backward_s=seconds[1])

    def linear(self, rows: int, width_in: int, width_out: int) -> ProductPoint:
        """Measures a linear."""
        x, weight = self.normal(rows, width_in), self.normal(width_out, width_in)
        dy, y = torch.randn(rows, width_out, device=self.device).bfloat16(), []

        def forward() -> None:
            y[:] = [nn.functional.linear(x, weight)]

        seconds = self.clock(forward, lambda: torch.autograd.grad(y.pop(), (x, weight), dy))
        sizes = {"rows": rows, "width_in": width_in, "width_out": width_out}
        return ProductPoint(**sizes, forward_s=seconds[0], backward_s=seconds[1])

    def block(self, width: int, batch: int, tokens: int, level: str, attention: Attention | None = None) -> BlockPoint:
        """Measures a block, forward and backward. attention: what takes the place of self-attention, or None."""
        block = self._block(width)
        if attention is None:
            attention = self.attention if level != "attention" else KeptAttention(self._statistics())
        is_whole = not isinstance(attention, StandIn)
        x, modulation, time_ = (self.normal(batch, n, w) for n, w in ((tokens, width), (2, 6 * width), (2, width)))
        text = self.normal(batch, TEXT_TOKENS, width)
        text_mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.bool, device=self.device)
        clean = torch.arange(tokens, device=self.device).expand(batch, -1) < tokens // 8
        angle = torch.rand(batch, tokens, HEAD_DIM // 2, device=self.device)
        condition = Condition(modulation, time_, text, text_mask, clean, angle.cos(), angle.sin())
        leaves, dy, y = (x, modulation, text, *block.parameters()), torch.randn_like(x), []

        def forward() -> None:
            for leaf in leaves:
                leaf.grad = None
            y[:] = [block(x, condition, attention, level)]

        def backward() -> None:
            y.pop().backward(dy)

        forward()  # compiles
        backward()
        for leaf in leaves:
            leaf.grad = None
        kept, peak = self._memory(forward, backward)
        seconds, host = self.clock.both(forward, backward)
        sizes = {"width": width, "batch": batch, "tokens": tokens, "level": level, "attention": is_whole}
        return BlockPoint(**sizes, **_passes(seconds, host), kept_bytes=kept, peak_bytes=peak)

    def _statistics(self) -> Statistics:
        """The backend with its forward and backward pass apart.

        Raises:
            NotImplementedError: they are not to be had.
        """
        known = statistics_of(self.device)
        if self.name not in known:
            raise NotImplementedError(f"{self.name} gives no log-sum-exp")
        return known[self.name]

    def _block(self, width: int) -> Block:
        """A block of this width, compiled where the device is a GPU."""
        if width not in self._blocks:
            with self.device:
                block = Block(DiTConfig(width, width // HEAD_DIM, 1)).bfloat16()
            init_weights(block, "blocks.0.", seed=0)
            nn.init.normal_(block.cross_attn.proj.weight, std=0.02)  # which is zero at first, and zeros take less power
            block.cross_attn.attend = self.cross
            if self.device.type == "cuda":
                compile_blocks([block], len(self.sizes.lengths) + len(self.sizes.batched))
            self._blocks[width] = block
        return self._blocks[width]

    def _memory(self, forward: Callable[[], None], backward: Callable[[], None]) -> tuple[int, int]:
        """Bytes that the forward pass leaves, and that both passes take at most."""
        if self.device.type != "cuda":
            forward()
            backward()
            return 0, 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward()
        kept = torch.cuda.memory_allocated() - before
        backward()
        self.clock.wait()
        return max(kept, 0), max(torch.cuda.max_memory_allocated() - before, 0)

    def ends(self, width: int, batch: int, shape: tuple[int, int, int]) -> EndsPoint:
        """Measures embedders, final layer and loss."""
        config = DiTConfig(width, width // HEAD_DIM, 1, caption_channels=self.sizes.caption_channels)
        with self.device:
            embedders, final = Embedders(config).bfloat16(), FinalLayer(config).bfloat16()
            grid = patch_grid(*shape)
            x = torch.randn(batch, LATENT_CHANNELS, *shape)
            text = torch.randn(batch, TEXT_TOKENS, config.caption_channels).bfloat16()
            masks = (torch.ones(batch, length, dtype=torch.bool) for length in (TEXT_TOKENS, grid.frames))
            given = (x, torch.full((batch,), 500.0), text, *masks, torch.full((batch,), 24.0))
            where = torch.arange(grid.frames + 2).expand(batch, -1), torch.arange(grid.tokens)
            target = torch.randn(batch, grid.tokens, 4, LATENT_CHANNELS)
        parameters, loss = [*embedders.parameters(), *final.parameters()], []

        def forward() -> None:
            for parameter in parameters:
                parameter.grad = None
            velocity = final(*embedders.embed(*given, *where)).unflatten(-1, (4, 2 * LATENT_CHANNELS))
            loss[:] = [(velocity[..., :LATENT_CHANNELS] - target).square().mean()]

        seconds, host = self.clock.both(forward, lambda: loss.pop().backward())
        return EndsPoint(width=width, batch=batch, tokens=grid.tokens, **_passes(seconds, host))

    def optimizer(self, elements: int) -> OptimizerPoint:
        """Measures what a rank does with its shard of the optimizer."""
        weight = torch.randn(elements, device=self.device).requires_grad_()
        weight.grad = torch.randn_like(weight)
        low, average = weight.detach().bfloat16(), weight.detach().clone()
        adamw = torch.optim.AdamW([weight], fused=self.device.type == "cuda")

        def norm() -> None:
            torch.linalg.vector_norm(weight.grad)
            weight.grad.mul_(0.999)

        seconds = self.clock(
            adamw.step, norm, lambda: low.copy_(weight.detach()), lambda: average.lerp_(weight.detach(), 0.01)
        )
        names = ("adamw_s", "norm_s", "cast_s", "average_s")
        return OptimizerPoint(elements=elements, **dict(zip(names, seconds, strict=True)))

    def copy(self, kind: str, count: int) -> CopyPoint:
        """Measures a copy between the device and pinned host memory, or on the device."""
        call = copy_call(kind, count, self.device)
        meet()
        (seconds,) = self.clock(call)
        return CopyPoint(kind=kind, bytes=count, seconds=slowest(seconds))  # the devices of a host share its memory

    def launch(self) -> float:
        """Measures how long the host takes to launch a kernel."""
        x = torch.zeros(1, device=self.device)

        def launches() -> None:
            for _ in range(1000):
                x.add_(1)

        return self.clock(launches)[0] / 1000

    def allocator(self) -> tuple[Allocator, int]:
        """Measures what PyTorch reserves for a block, and bytes of the GPU that are taken beside."""
        self._blocks.clear()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.block(self.sizes.widths[0], 1, self.sizes.checked[-1], "light")
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        free, total = torch.cuda.mem_get_info()
        beside = max(total - free - torch.cuda.memory_reserved(), 0)
        return Allocator(allocated_bytes=allocated, reserved_bytes=reserved), beside


def _passes(device: list[float], host: list[float]) -> dict[str, float]:
    """The fields of a forward and a backward pass."""
    names = ("forward_s", "backward_s", "host_forward_s", "host_backward_s")
    return dict(zip(names, (*device, *host), strict=True))


class Groups:
    """What the devices of a host exchange. All ranks call every method together, in the same order."""

    def __init__(self, sizes: Sizes, clock: Clock) -> None:
        self.sizes, self.clock = sizes, clock
        world = dist.get_world_size()
        self._groups = {}
        for size in (size for size in (2, 4, 8) if world % size == 0):
            made = [dist.new_group(list(range(start, start + size))) for start in range(0, world, size)]
            self._groups[size] = made[dist.get_rank() // size]

    def work(self) -> Iterator[Work]:
        """Yields what there is to measure."""
        kinds = ("all_to_all", "reduce_scatter", "all_gather", "all_reduce")
        for ranks, kind, count in product(sorted(self._groups, reverse=True), kinds, self.sizes.bytes):
            yield Work("collectives", f"{kind} {ranks} {count}", partial(self.collective, kind, ranks, count), None)
        for count in self.sizes.bytes:
            yield Work("collectives", f"send {count}", partial(self.send, count), None)
        ranks = max(self._groups)
        yield Work("overlap", f"{ranks}", partial(self.overlap, ranks), None)

    def _call(self, kind: str, ranks: int, count: int) -> Callable[..., object]:
        """What runs a collective of so many bytes, asynchronously on request."""
        return collective_call(kind, count, self._groups[ranks], self.clock.device)

    def collective(self, kind: str, ranks: int, count: int) -> CollectivePoint:
        """Measures a collective; of the ranks' times the longest is taken."""
        meet()
        (seconds,) = self.clock.fixed(self._call(kind, ranks, count))
        return CollectivePoint(kind=kind, ranks=ranks, bytes=count, seconds=slowest(seconds))

    def send(self, count: int) -> CollectivePoint:
        """Measures sending to the next rank and back, of which half is taken."""
        rank, there = dist.get_rank(), dist.get_rank() ^ 1
        tensor = torch.ones(count, dtype=torch.uint8, device=self.clock.device)
        order = (dist.send, dist.recv) if rank % 2 == 0 else (dist.recv, dist.send)

        def there_and_back() -> None:
            if there < dist.get_world_size():
                for function in order:
                    function(tensor, there)

        meet()
        (seconds,) = self.clock.fixed(there_and_back)
        return CollectivePoint(kind="send", ranks=2, bytes=count, seconds=slowest(seconds / 2))

    def overlap(self, ranks: int) -> Overlap:
        """Measures matrix products and reduce-scatters, alone and together."""
        width, rows = self.sizes.widths[0], self.sizes.lengths[len(self.sizes.lengths) // 2 - 1]
        x, weight = (torch.randn(n, width, device=self.clock.device).bfloat16() for n in (rows, 4 * width))
        reduce = self._call("reduce_scatter", ranks, self.sizes.bytes[-2])

        def products() -> None:
            for _ in range(16):
                torch.mm(x, weight.T)

        def both() -> None:
            running = [reduce(async_op=True) for _ in range(reductions)]
            products()
            for work in running:
                work.wait()

        meet()
        times = [slowest(seconds) for seconds in self.clock.fixed(products, reduce)]
        reductions = max(int(times[0] / max(times[1], 1e-9)), 1)  # about as long as the products take
        (together,) = self.clock.fixed(both)
        return Overlap(
            ranks=ranks,
            products_s=times[0],
            collective_s=times[1] * reductions,
            both_s=slowest(together),
        )


HOST: dist.ProcessGroup | None = None  # all ranks, on gloo: those that wait leave their devices alone


def meet() -> None:
    """Waits for all ranks."""
    if HOST is not None:
        dist.barrier(HOST)


def slowest(seconds: float) -> float:
    """Returns the longest of all ranks' times."""
    if HOST is None:
        return seconds
    worst = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=HOST)
    return worst.item()


def first_says(value: int) -> int:
    """Returns what rank 0 has."""
    if HOST is None:
        return value
    said = torch.tensor([value])
    dist.broadcast(said, 0, group=HOST)
    return int(said)


class Sheet:
    """The files that are written: each rank's own, and the one of all.

    Args:
        folder: of the files. machine: that is measured. rank: of this process.
    """

    def __init__(self, folder: Path, machine: Machine, rank: int) -> None:
        name = machine_name(machine.device, machine.torch)
        self.path, self._own = folder / f"{name}.json", folder / f"{name}.rank{rank}.json"
        self.machine, self.done = machine, Calibration(machine=machine)

    def note(self, section: str, point: Section) -> None:
        """Writes down what was measured."""
        self.done = self.done.plus(section, point)
        _write(self._own, self.done)

    def note_overheads(self, **overheads: float) -> None:
        """Likewise the numbers that are not of a section."""
        self.done = self.done.model_copy(update=overheads)
        _write(self._own, self.done)

    def put_together(self) -> None:
        """Takes what all ranks' files have into the one of all, and removes them. Rank 0 calls it."""
        parts = sorted(self.path.parent.glob(f"{self.path.stem}.rank*.json"))
        done = load_calibration(self.path) if self.path.exists() else Calibration(machine=self.machine)
        for part in map(load_calibration, parts):
            for section in (name for name, value in part if isinstance(value, tuple)):
                for point in getattr(part, section):
                    done = done.plus(section, point)
            overheads = {name: value for name, value in part if name in ("launch_s", "context_bytes") and value}
            devices = max(done.machine.devices, part.machine.devices)
            machine = part.machine.model_copy(update={"devices": devices})
            done = done.model_copy(update={**overheads, "machine": machine})
        if parts:
            _write(self.path, done)
        for part in parts:
            part.unlink()


def _write(path: Path, calibration: Calibration) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(calibration.to_json().encode())


def describe_machine(device: torch.device, world: int, attention: str) -> Machine:
    """What is being measured."""
    memory = psutil.virtual_memory().total
    is_gpu = device.type == "cuda"
    try:
        import triton
    except ImportError:
        triton = None
    return Machine(
        device=torch.cuda.get_device_name(device) if is_gpu else "CPU",
        devices=world,
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if is_gpu else memory,
        host_memory_bytes=memory,
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        triton=None if triton is None else triton.__version__,
        attention=attention,
    )


def choose(name: str, sizes: Sizes, device: torch.device) -> tuple[str, str]:
    """Names the backends of self-attention and of cross-attention; "auto" has them tried.

    Raises:
        InputError: the backend cannot run here.
    """
    tokens, heads = max(n for n in sizes.lengths if n <= 16384), sizes.widths[0] // HEAD_DIM
    shape = {"tokens": tokens, "heads": heads, "dtype": torch.bfloat16, "device": device}
    own, masked = installed_backends(device), installed_masked_backends(device)
    if name == "auto":
        name, trials = choose_attention(own, **shape)
        print("\n".join(map(str, trials)), flush=True)
        return name, choose_masked_attention(masked, **shape, text_tokens=TEXT_TOKENS)[0]
    if name not in own:
        raise InputError(f"--attention {name}: cannot run here; one of {', '.join(own)}, or auto")
    return name, "flash4" if name == "flash4" else "sdpa"


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and measures; returns the exit status, 2 where something given cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"), help="folder of the file")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which nothing more is begun")
    parser.add_argument(
        "--only", nargs="+", choices=(*_PARTS, "nothing"), default=_PARTS, help="parts that are measured"
    )
    parser.add_argument("--attention", default="auto", help="backend of self-attention; auto tries all")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=LEVELS, help="of recomputation")
    parser.add_argument("--toy", action="store_true", help="sizes of a test")
    args = parser.parse_args(argv)
    try:
        calibrate(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def calibrate(args: argparse.Namespace) -> None:
    """Measures what the command line asks for."""
    global HOST
    begin, world = time.monotonic(), int(os.environ.get("WORLD_SIZE", 1))
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if is_gpu else torch.device("cpu")
    if is_gpu:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if is_gpu else "gloo", timeout=timedelta(hours=1))
        HOST = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
    rank = dist.get_rank() if world > 1 else 0
    sizes, clock = TOY if args.toy else FULL, Clock(device, 0.01 if args.toy else 0.4)
    names = list(BACKENDS)
    chosen = choose(args.attention, sizes, device) if rank == 0 else ("sdpa", "sdpa")
    name, cross = (names[first_says(names.index(name))] for name in chosen)
    sheet = Sheet(args.out, describe_machine(device, world, name), rank)
    if rank == 0:
        sheet.put_together()
    bench = Bench(sizes, clock, name, cross, args.levels)

    def say(line: str) -> None:
        print(f"{time.monotonic() - begin:6.1f} s  {f'rank {rank}: ' * (world > 1)}{line}", flush=True)

    def run(work: Work) -> None:
        is_late = time.monotonic() - begin > args.seconds
        if first_says(is_late) if work.share is None else is_late:
            say(f"{work.section} {work.title}: left out, time is up")
            return
        try:
            point = work.measure()
        except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:  # what a library cannot run
            why = str(error).splitlines() or [type(error).__name__]
            say(f"{work.section} {work.title}: not measured: {why[0][:200]}")
            return
        shown = {key: f"{value:.3g}" for key, value in point.model_dump().items() if isinstance(value, float)}
        if rank == (work.share or 0) % world:
            sheet.note(work.section, point)
            say(f"{work.section} {work.title}: {shown}")

    for part in (part for part in _PARTS if part in args.only):
        if part == "groups":
            works = Groups(sizes, clock).work() if world > 1 else ()
        else:
            works = bench.work(part)
        for work in works:
            if work.share is None or work.share % world == rank:
                run(work)
        gc.collect()
    if rank == 0 and "blocks" in args.only:
        overheads = {"launch_s": bench.launch()}
        if is_gpu:
            allocator, overheads["context_bytes"] = bench.allocator()
            sheet.note("allocator", allocator)
        sheet.note_overheads(**overheads)
    meet()
    if rank == 0:
        sheet.put_together()
        say(f"written: {sheet.path}")
    meet()


if __name__ == "__main__":
    sys.exit(main())
