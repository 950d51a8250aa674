"""What is watched in the model as it trains: activations and attention block by block, gradients and updates by kind.

The blocks are told nothing: hooks at their borders look at what goes in and comes out, at monitored steps alone and at
the first micro-batch alone. They lie outside of what torch.compile compiles and of what is computed again in the
backward pass. What they see is summed up over the ranks that share a sequence, and the largest of all replicas counts.

Shape suffixes: B batch, n tokens held by this rank, s sampled tokens, D hidden size, H heads, d = 72 head dimension.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mugv_ds.config.model import HEAD_DIM
from mugv_ds.config.schema import TrainConfig
from mugv_ds.engine.distributed_optimizer import DistributedOptimizer
from mugv_ds.engine.process import Process
from mugv_ds.models.layers import Block, Condition
from mugv_ds.models.matrices import KINDS, kind_of
from mugv_ds.parallel.pipeline import DiTPipeline
from mugv_ds.parallel.ulysses import Ulysses

# Of the blocks, in the order of a row of `BlockWatch.rows`.
OF_BLOCKS = ("activation", "channel_share", "mean_share", "logit")


@dataclass(frozen=True)
class _Seen:
    """Of a block, this rank's tokens. largest: of |x|. sum_BD: over tokens. square_D: over samples and tokens."""

    largest: Tensor
    sum_BD: Tensor
    square_D: Tensor
    logit: Tensor  # of all ranks' sampled tokens


class BlockWatch:
    """Looks at the blocks of this rank's stage.

    Args:
        blocks: by their number in the model. depth: of the model. ulysses: this rank's part of the sequence.
        tokens: whose queries and keys are compared. logits: whether they are.
    """

    def __init__(
        self, blocks: Mapping[int, Block], depth: int, ulysses: Ulysses, *, tokens: int, logits: bool = True
    ) -> None:
        self._blocks, self._depth, self._ulysses, self._tokens, self._logits = blocks, depth, ulysses, tokens, logits
        self._seen: dict[int, _Seen] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Looks at the first forward pass of each block within the context."""
        self._seen = {}
        self._sample()
        handles = [
            block.register_forward_hook(lambda block, given, x, number=number: self._look(number, block, given, x))
            for number, block in self._blocks.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _sample(self) -> None:
        """Chooses the sampled tokens, which of them this rank holds and where; on the host, so that no device waits."""
        total = self._ulysses.tokens
        self._count = min(self._tokens, total)
        local = self._ulysses.local_tokens()
        place = torch.arange(self._count) * total // self._count - local[0]
        own = ((place >= 0) & (place < len(local))).nonzero().flatten()
        device = next(self._blocks[min(self._blocks)].parameters()).device
        self._own, self._places = own.to(device), place[own].to(device)

    @torch.no_grad()
    def _look(self, number: int, block: Block, given: tuple[Any, ...], x_BnD: Tensor) -> None:
        if number in self._seen:
            return
        # Padding lies at the end of the sequence.
        held = x_BnD[:, : max(self._ulysses.tokens - self._ulysses.rank * x_BnD.shape[1], 0)]
        # No copy of x in fp32 is made: the reductions convert as they read.
        largest = torch.stack(torch.aminmax(held)).abs().max() if held.numel() else held.new_zeros(())
        self._seen[number] = _Seen(
            largest.float(),
            held.sum(dim=1, dtype=torch.float32),
            torch.linalg.vector_norm(held, dim=(0, 1), dtype=torch.float32).square(),
            self._largest_logit(block, *given[:2]) if self._logits else held.new_full((), -torch.inf).float(),
        )

    def _largest_logit(self, block: Block, x_BnD: Tensor, condition: Condition) -> Tensor:
        """The largest q·k/√72 among sampled tokens of the first sample, over heads: of what a block is given."""
        both = x_BnD.new_zeros(2, self._count, x_BnD.shape[-1], dtype=torch.float32)  # of each token one rank has it
        if len(self._own):
            given = condition._replace(
                modulation_BKD=condition.modulation_BKD[:1],
                clean_BN=condition.clean_BN[:1, self._places],
                cos=condition.cos[:1, self._places],
                sin=condition.sin[:1, self._places],
            )
            q_and_k = block.queries_keys(x_BnD[:1, self._places], given)
            both[:, self._own] = torch.stack(q_and_k).float().flatten(-2).squeeze(1)
        q_sHd, k_sHd = self._ulysses.total(both).unflatten(-1, (-1, HEAD_DIM))
        return torch.einsum("qhd,khd->hqk", q_sHd, k_sHd).max() * HEAD_DIM**-0.5

    def rows(self) -> Tensor:
        """Returns `OF_BLOCKS` of every block of the model, [depth, 4] on the host; −inf where another rank has it.

        All ranks of a sequence call it together.
        """
        rows = torch.full((self._depth, len(OF_BLOCKS)), -torch.inf, dtype=torch.float64)
        numbers, seen = list(self._seen), list(self._seen.values())
        if not seen:
            return rows
        samples, width = seen[0].sum_BD.shape
        sums = torch.stack([torch.cat([of.sum_BD.flatten(), of.square_D]) for of in seen])
        sums = self._ulysses.total(sums).double().unflatten(-1, (samples + 1, width))
        largest = torch.stack([of.largest for of in seen])
        if self._ulysses.size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._ulysses.group)
        square = sums[:, -1]
        energy = square.sum(dim=-1)
        mean_energy = sums[:, :-1].square().sum(dim=(1, 2)) / self._ulysses.tokens
        logits = torch.stack([of.logit for of in seen])
        found = [largest.double(), square.amax(dim=-1) / energy, mean_energy / energy, logits.double()]
        rows[numbers] = torch.stack(found, dim=-1).cpu()
        return rows


class KindNorms:
    """Norms of gradients, as the optimizer is given them, and of the updates that it makes, by kind of parameter.

    Of one part of the optimizer step at a time, an eighth of this rank's weights at most, a copy in fp32 is held.

    Args:
        optimizer: whose shards are looked at. kinds: of the parameters, of `models.matrices.KINDS`.
    """

    def __init__(self, optimizer: DistributedOptimizer, kinds: Mapping[nn.Parameter, str]) -> None:
        self.armed = False
        self._shards: dict[nn.Parameter, list[tuple[int, slice]]] = {}
        for parameter, shard in optimizer.shards.items():
            place = slice(shard.offset, shard.offset + shard.numel)
            self._shards.setdefault(shard.master, []).append((KINDS.index(kinds[parameter]), place))
        self._squares: Tensor | None = None
        self._before: dict[nn.Parameter, Tensor] = {}
        optimizer.register_step_pre_hook(self._enter)
        optimizer.register_step_post_hook(self._leave)

    def _enter(self, optimizer: DistributedOptimizer) -> None:
        if self.armed:
            masters = [part for group in optimizer.param_groups for part in group["params"] if part.grad is not None]
            self._before = {master: master.detach().clone() for master in masters}
            self._add(0, {master: master.grad for master in masters})

    def _leave(self, optimizer: DistributedOptimizer) -> None:
        if self.armed:
            self._add(1, {master: before.sub_(master.detach()) for master, before in self._before.items()})
            self._before = {}

    def _add(self, which: int, tensors: Mapping[nn.Parameter, Tensor]) -> None:
        """Adds to the sums of squares of gradients (0) or updates (1)."""
        places = [(tensor, *of) for master, tensor in tensors.items() for of in self._shards.get(master, ())]
        if not places:
            return
        norms = torch.stack(torch._foreach_norm([tensor[place] for tensor, _, place in places])).double()
        if self._squares is None:
            self._squares = norms.new_zeros(2, len(KINDS))
        kinds = torch.tensor([kind for _, kind, _ in places], device=norms.device)
        self._squares[which].index_add_(0, kinds, norms.square())

    def read(self, device: torch.device) -> dict[str, float]:
        """Returns the norms at the last step while it was armed, by tag. All ranks call it together.

        Nothing where no rank made an update, because the gradient was not finite.
        """
        squares, self._squares = self._squares, None
        if squares is None:
            squares = torch.zeros(2, len(KINDS), dtype=torch.float64, device=device)
        dist.all_reduce(squares)
        gradients, updates = squares.sqrt().tolist()
        named = {"gradient_norm": gradients, "update_norm": updates}
        return {f"{what}/{kind}": n for what, of in named.items() for kind, n in zip(KINDS, of, strict=True) if n}


@dataclass(frozen=True)
class Readings:
    """Of a monitored step. of_blocks: what of `OF_BLOCKS` is known, a number a block. norms: see `KindNorms.read`."""

    of_blocks: Mapping[str, list[float]]
    norms: Mapping[str, float]

    def scalars(self) -> dict[str, float]:
        """Returns what trackers get, by tag."""
        blocks = {f"{name}/block_{i:02}": n for name, of in self.of_blocks.items() for i, n in enumerate(of)}
        return {f"monitor/{name}": value for name, value in {**blocks, **self.norms}.items()}


class Monitor:
    """Watches every `monitor.every`-th step of a run. All ranks make it, and call its methods, together.

    Args:
        config: the run. process: this process. module: this rank's stage. optimizer: of its weights.
    """

    def __init__(
        self, config: TrainConfig, process: Process, module: DiTPipeline, optimizer: DistributedOptimizer
    ) -> None:
        section = config.monitor
        self._every, self._process = section.every, process
        blocks = dict(enumerate(module.blocks, start=module.first_block))
        # Transformer Engine's linears take numbers of tokens that not every rank has of the sampled ones.
        logits = config.model.precision != "fp8" or config.model.fp8_backend == "native"
        self._blocks = BlockWatch(blocks, module.config.depth, module.ulysses, tokens=section.tokens, logits=logits)
        layers = module.named_layers()
        named = ((prefix + name, of) for prefix, layer in layers for name, of in layer.named_parameters())
        self._norms = KindNorms(optimizer, {parameter: kind_of(name) for name, parameter in named})

    def due(self, step: int) -> bool:
        """Whether the step after `step` steps is monitored."""
        return self._every > 0 and (step + 1) % self._every == 0

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Looks at the step after `step` steps, which is taken within the context, if it is monitored."""
        if not self.due(step):
            yield
            return
        self._norms.armed = True
        with self._blocks.on():
            yield
        self._norms.armed = False

    def read(self) -> Readings:
        """Returns what was seen of the monitored step that was just taken; the same on all ranks."""
        rows = self._blocks.rows()
        largest = self._process.host.rows(rows.flatten()).amax(dim=0).view_as(rows)
        found = dict(zip(OF_BLOCKS, largest.T.tolist(), strict=True))
        of_blocks = {name: of for name, of in found.items() if any(value != -torch.inf for value in of)}
        return Readings(of_blocks, self._norms.read(self._process.device))
