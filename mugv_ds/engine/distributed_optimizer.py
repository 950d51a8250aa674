"""ZeRO-1 with sharded gradients (Rajbhandari et al. 2020), for DeepSpeed's engines; Megatron-LM has it by this name.

DeepSpeed's own optimizers hold the accumulated gradients whole on every rank, and reduce them when the backward pass is
over. Here a rank keeps those of its shard alone: every micro-batch's gradients are reduce-scattered while the backward
pass makes the others. It takes the place of both, in the pipeline's engine too, which calls it as it calls them.

Parameters lie in buckets, whole and one after the other in the order in which the backward pass reaches them. A rank
owns an equal piece of every bucket: fp32 weights, their gradients, and what AdamW keeps for them.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed
from deepspeed import comm
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor, nn

from mugv_ds.engine.muon import Matrix, Muon

_ALIGNMENT = 64  # elements; parameters begin at multiples of 128 bytes at least, as an allocation's would
_IN_FLIGHT = 2  # buckets that are filled or on their way at once
_PARTS = 8  # of the optimizer step: the weights of one are gathered while the next is computed


@dataclass(frozen=True)
class Slot:
    """The place of a parameter in a bucket: elements [start, start + numel)."""

    parameter: nn.Parameter
    start: int

    def of(self, flat: Tensor) -> Tensor:
        """Returns a view of the parameter's elements in a tensor that is laid out as the bucket."""
        return flat.narrow(0, self.start, self.parameter.numel())


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that this rank owns.

    Attributes:
        master: fp32, this rank's piece of the parameter's bucket. offset: of the part in it.
        start: of the part in the flattened parameter. numel: elements of the part.
    """

    master: nn.Parameter
    offset: int
    start: int
    numel: int


class Bucket:
    """Parameters that are reduced and gathered together.

    Args:
        parameters: in the order in which the backward pass reaches them. They become views of one tensor.
        replicas: ranks that share it out. rank: of this one among them.
        gradient_dtype: of the accumulated gradient.

    Attributes:
        weights: all parameters, padded to a multiple of the ranks. own: this rank's piece, a view of it.
        master: fp32, what the piece is rounded from. gradient: accumulated, of the piece.
        missing: parameters whose gradients of the current micro-batch are not there yet.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], replicas: int, rank: int, gradient_dtype: torch.dtype
    ) -> None:
        ends = accumulate((_aligned(parameter.numel(), _ALIGNMENT) for parameter in parameters), initial=0)
        *starts, end = ends
        self.slots = [Slot(parameter, start) for parameter, start in zip(parameters, starts, strict=True)]
        first = parameters[0]
        self.weights = torch.zeros(_aligned(end, replicas * _ALIGNMENT), dtype=first.dtype, device=first.device)
        for slot in self.slots:
            slot.of(self.weights).copy_(slot.parameter.detach().view(-1))
            slot.parameter.data = slot.of(self.weights).view(slot.parameter.shape)
        self.size = len(self.weights) // replicas
        self._begin = rank * self.size
        self.own = self.weights.narrow(0, self._begin, self.size)
        self.master = nn.Parameter(self.own.to(torch.float32, copy=True))
        self.gradient = torch.zeros(self.size, dtype=gradient_dtype, device=first.device)
        self.missing = len(self.slots)
        stops = [*starts[1:], len(self.weights)]
        self._gaps = [(slot.start + slot.parameter.numel(), stop) for slot, stop in zip(self.slots, stops, strict=True)]

    def shards(self) -> Iterator[tuple[nn.Parameter, Shard]]:
        """Yields the parameters of which this rank owns a part, with the part."""
        for slot in self.slots:
            first = max(slot.start, self._begin)
            numel = min(slot.start + slot.parameter.numel(), self._begin + self.size) - first
            if numel > 0:
                yield slot.parameter, Shard(self.master, first - self._begin, first - slot.start, numel)

    def take_gradients(self, buffer: Tensor) -> None:
        """Moves the micro-batch's gradients into a buffer [len(weights)]; those that there are none of are zero."""
        for start, stop in self._gaps:
            buffer[start:stop].zero_()
        for slot in self.slots:
            gradient, slot.parameter.grad = slot.parameter.grad, None
            if gradient is None:
                slot.of(buffer).zero_()
            else:
                slot.of(buffer).copy_(gradient.view(-1))
        self.missing = len(self.slots)


@dataclass(frozen=True)
class _Reduction:
    """A bucket on its way: its gradients in `buffer`, of which this rank gets the sum of its piece in `piece`."""

    bucket: Bucket
    buffer: Tensor
    piece: Tensor
    work: Any


class DistributedOptimizer:
    """Reduces, clips and applies gradients, of which each rank keeps its shard.

    DeepSpeed's engine takes it for one of its own: the methods without an underscore that are not described further
    are those that it calls.

    Args:
        optimizer: over the module's parameters, in the order of the model; it steps over the shards in their place. A
            group of parameters with "chunks" (into how many each is cut), "momentum" and "scale" is stepped over by
            `Muon` instead.
        group: the ranks that hold the same parameters.
        bucket_size: elements of a bucket, which is larger where one parameter is.
        gradient_dtype: of the accumulated gradients. communication_dtype: in which they are reduced.
        clipping: largest norm of all gradients; 0: none.

    Attributes:
        shards: of the parameters of which this rank owns a part.
        overflow: whether the last step was left out, because a gradient was not finite.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        group: torch.distributed.ProcessGroup,
        bucket_size: int,
        gradient_dtype: torch.dtype,
        communication_dtype: torch.dtype,
        clipping: float,
    ) -> None:
        self.optimizer, self.dp_process_group, self.clip_grad = optimizer, group, clipping
        self.overflow = False
        self._global_grad_norm = 0.0
        self._replicas, rank = comm.get_world_size(group), comm.get_rank(group)
        self._buckets: list[Bucket] = []
        self._parts: list[Sequence[Bucket]] = []
        self._muon: Muon | None = None
        for of in optimizer.param_groups:
            buckets = [
                Bucket(part, self._replicas, rank, gradient_dtype)
                for part in _in_buckets(reversed(of["params"]), bucket_size)
            ]
            parts = list(_in_parts(buckets, _PARTS))
            if "chunks" in of:
                how = {"momentum": of["momentum"], "scale": of["scale"]}
                matrices = [(_matrices(part, of["chunks"]), [bucket.size for bucket in part]) for part in parts]
                self._muon = Muon(matrices, **how, rank=rank, replicas=self._replicas, group=group)
                self._muon_group, self._muon_parts = of, parts
            else:
                self._parts += parts
            of["params"] = [bucket.master for bucket in buckets]
            self._buckets += buckets
        self.shards = {parameter: shard for bucket in self._buckets for parameter, shard in bucket.shards()}
        self._pre_hooks: list[Callable[[DistributedOptimizer], None]] = []
        self._post_hooks: list[Callable[[DistributedOptimizer], None]] = []
        self._communication_dtype = communication_dtype
        self._buffers: list[Tensor] = []
        self._on_their_way: deque[_Reduction] = deque()
        self._in_backward = False
        self._launched = 0  # buckets of the current micro-batch
        this = weakref.ref(self)  # the parameters' hooks are held where the garbage collector does not look
        for number, bucket in enumerate(self._buckets):
            for slot in bucket.slots:
                slot.parameter.register_post_accumulate_grad_hook(lambda _, number=number: this().arrived(number))

    def register_step_pre_hook(self, hook: "Callable[[DistributedOptimizer], None]") -> None:
        """Has a function called before each part of a step, while the weights of that part have their gradients."""
        self._pre_hooks.append(hook)

    def register_step_post_hook(self, hook: "Callable[[DistributedOptimizer], None]") -> None:
        """Likewise after each part of a step, while its weights, which are new, still have their gradients."""
        self._post_hooks.append(hook)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Does nothing: every micro-batch is reduced as it comes."""

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Does nothing: they are reduced when the last micro-batch's backward pass ends."""

    def arrived(self, number: int) -> None:
        """Notes that a parameter of a bucket has its gradient of the micro-batch, and sends off what is complete.

        Buckets leave in one order, so that all ranks reduce the same ones together, whatever reaches them. One with a
        parameter that takes no part leaves at the end of the backward pass, and with it all after it.
        """
        if not self._in_backward:
            self._in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_micro_batch)
        self._buckets[number].missing -= 1
        while self._launched < len(self._buckets) and not self._buckets[self._launched].missing:
            self._launch()

    def _launch(self) -> None:
        """Starts to reduce the next bucket."""
        bucket = self._buckets[self._launched]
        self._launched += 1
        if len(self._on_their_way) == _IN_FLIGHT:
            self._finish()
        buffer = self._buffer()[: len(bucket.weights)]
        bucket.take_gradients(buffer)
        piece, work = buffer, None
        if self._replicas > 1:
            piece = buffer.new_empty(bucket.size)
            work = comm.reduce_scatter_tensor(piece, buffer, group=self.dp_process_group, async_op=True)
        self._on_their_way.append(_Reduction(bucket, buffer, piece, work))

    def _buffer(self) -> Tensor:
        """Returns a buffer that is not in use."""
        used = {reduction.buffer.data_ptr() for reduction in self._on_their_way}
        free = [buffer for buffer in self._buffers if buffer.data_ptr() not in used]
        if not free:
            largest = max(len(bucket.weights) for bucket in self._buckets)
            free = [self._buckets[0].weights.new_empty(largest, dtype=self._communication_dtype)]
            self._buffers += free
        return free[0]

    def _finish(self) -> None:
        """Adds the bucket that was sent off first to what is accumulated. On a GPU nothing here waits but the GPU."""
        reduction = self._on_their_way.popleft()
        if reduction.work is not None:
            reduction.work.wait()
        reduction.bucket.gradient.add_(reduction.piece, alpha=1 / self._replicas)

    def _end_micro_batch(self) -> None:
        """Reduces what is left of a micro-batch: buckets some of whose parameters took no part in it."""
        while self._launched < len(self._buckets):
            self._launch()
        while self._on_their_way:
            self._finish()
        self._launched, self._in_backward = 0, False

    @torch.no_grad()
    def step(self) -> None:
        """Applies the mean gradients, clipped, and gives all ranks the new weights.

        Where a gradient is not finite, nothing changes on any rank.
        """
        norm = self._norm()
        self.overflow = not norm.isfinite().item()
        self._global_grad_norm = float("inf") if self.overflow else norm.item()
        if self.overflow:
            return
        gradients = [bucket.gradient for bucket in self._buckets]
        if 0 < self.clip_grad < self._global_grad_norm:
            torch._foreach_mul_(gradients, self.clip_grad / (self._global_grad_norm + 1e-6))
        gathers = self._muon_step()
        for part in self._parts:
            with self._gradients(part):
                self.optimizer.step()  # it passes over those without a gradient
            gathers += map(self._gather, part)
        _wait(gathers)

    def _muon_step(self) -> list[Any]:
        """Steps over the matrices that Muon has; returns what to wait for."""
        if self._muon is None:
            return []
        group, gathers = self._muon_group, []
        gradients = ([bucket.gradient.float() for bucket in part] for part in self._muon_parts)
        momenta = ([self.moments(bucket.master)["exp_avg"] for bucket in part] for part in self._muon_parts)
        for part, updates in zip(self._muon_parts, self._muon.updates(gradients, momenta), strict=True):
            with self._gradients(part):
                masters = [bucket.master for bucket in part]
                torch._foreach_mul_(masters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(masters, updates, alpha=-group["lr"])
            for master in masters:
                self.optimizer.state[master]["step"] += 1
            gathers += map(self._gather, part)
        return gathers

    @contextmanager
    def _gradients(self, part: Sequence[Bucket]) -> Iterator[None]:
        """Gives the weights of a part their gradients in the context; calls the hooks at its beginning and end."""
        for bucket in part:
            bucket.master.grad = bucket.gradient.float()
        for hook in self._pre_hooks:
            hook(self)
        yield
        for hook in self._post_hooks:
            hook(self)
        for bucket in part:
            bucket.master.grad = None

    def _norm(self) -> Tensor:
        """Returns the norm of the gradients of all stages, in fp64."""
        norms = torch._foreach_norm([bucket.gradient for bucket in self._buckets], dtype=torch.float32)
        squares = torch.stack(norms).double().square().sum()
        torch.distributed.all_reduce(squares)
        return squares.sqrt()

    def moments(self, master: nn.Parameter) -> dict[str, Tensor]:
        """Returns what the optimizer keeps of a shard, fp32, by kind: AdamW's two moments, or Muon's, "exp_avg".

        Where it has not made them yet, they are made as it makes them.
        """
        group = next(of for of in self.param_groups if any(master is other for other in of["params"]))
        kinds = ("exp_avg",) if "chunks" in group else ("exp_avg", "exp_avg_sq")
        state = self.optimizer.state[master]
        if not state:
            on_device = group["fused"] or group["capturable"]
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if on_device else "cpu")
            state.update({kind: torch.zeros_like(master, requires_grad=False) for kind in kinds})
        return {kind: state[kind] for kind in kinds}

    def update_lp_params(self) -> None:
        """Rounds the fp32 weights to those that the model computes with, on all ranks, which call it together."""
        _wait([self._gather(bucket) for bucket in self._buckets])

    def _gather(self, bucket: Bucket) -> Any:
        """Rounds this rank's piece of a bucket, and starts to gather the others'; returns what to wait for."""
        with torch.no_grad():
            bucket.own.copy_(bucket.master)
        # The parameters are views that autograd does not know of: what is kept of them elsewhere has to see the change.
        torch.autograd.graph.increment_version([slot.parameter for slot in bucket.slots])
        if self._replicas == 1:
            return None
        return comm.all_gather_into_tensor(bucket.weights, bucket.own, group=self.dp_process_group, async_op=True)

    def zero_grad(self) -> None:
        torch._foreach_zero_([bucket.gradient for bucket in self._buckets])


def make_engine(
    module: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, config: dict
) -> DeepSpeedEngine:
    """Makes the engine of a module as `deepspeed.initialize` does, with a `DistributedOptimizer` around `optimizer`.

    Args:
        module: a `PipelineModule` gets a pipeline's engine. schedule: of the optimizer's learning rate.
        config: of DeepSpeed, see `config.deepspeed.engine_config`.
    """
    mpu = module.mpu() if isinstance(module, PipelineModule) else None
    engine_class = ShardedEngine if mpu is None else ShardedPipelineEngine
    engine = engine_class(
        args=None,
        model=module,
        optimizer=optimizer,
        lr_scheduler=schedule,
        mpu=mpu,
        config=config,
        config_class=DeepSpeedConfig(config, mpu),
    )
    engine._configure_python_gc()
    return engine


class _Sharding:
    """Makes a DeepSpeed engine build our optimizer where it would build one of its own, whatever the dtypes."""

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> DistributedOptimizer:
        _, gradient_dtype = self.get_data_types()
        return DistributedOptimizer(
            optimizer,
            group=self.seq_data_parallel_group,
            bucket_size=self.zero_reduce_bucket_size(),
            gradient_dtype=gradient_dtype,
            communication_dtype=self.communication_data_type,
            clipping=self.gradient_clipping(),
        )

    _configure_bf16_optimizer = _configure_zero_optimizer


class ShardedEngine(_Sharding, DeepSpeedEngine):
    """DeepSpeed's engine with our optimizer."""


class ShardedPipelineEngine(_Sharding, PipelineEngine):
    """DeepSpeed's pipeline engine with our optimizer."""


def _wait(works: Iterable[Any]) -> None:
    for work in works:
        if work is not None:
            work.wait()


def _aligned(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _in_buckets(parameters: Iterable[nn.Parameter], size: int) -> Iterator[list[nn.Parameter]]:
    """Cuts a list of parameters where the next would make a bucket exceed this many elements."""
    bucket, elements = [], 0
    for parameter in parameters:
        if bucket and elements + parameter.numel() > size:
            yield bucket
            bucket, elements = [], 0
        bucket.append(parameter)
        elements += parameter.numel()
    yield bucket


def _matrices(part: Sequence[Bucket], chunks: Mapping[nn.Parameter, int]) -> list[Matrix]:
    """Returns the matrices of some buckets. chunks: into how many each parameter is cut, by rows."""
    return [
        Matrix(number, slot.start + chunk * rows * columns, rows, columns)
        for number, bucket in enumerate(part)
        for slot in bucket.slots
        for rows, columns in [(slot.parameter.shape[0] // chunks[slot.parameter], slot.parameter.shape[1])]
        for chunk in range(chunks[slot.parameter])
    ]


def _in_parts(buckets: Sequence[Bucket], count: int) -> Iterator[Sequence[Bucket]]:
    """Cuts a list of buckets into `count` parts at most, of about the same size."""
    ends = list(accumulate(bucket.size for bucket in buckets))
    for part in range(count):
        cut = [b for b, end in zip(buckets, ends, strict=True) if part < -(-end * count // ends[-1]) <= part + 1]
        if cut:
            yield cut
