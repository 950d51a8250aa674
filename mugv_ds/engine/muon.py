"""Muon: momentum whose matrices are orthogonalised, each by one rank.

Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al. 2025, "Muon is
Scalable for LLM Training" (Moonlight). Fused matrices are orthogonalised chunk by chunk (CMuon, arXiv 2608.02502): q, k
and v apart, k and v of the text, and the six of adaLN.

Momentum is sharded as the gradients are, in pieces that begin and end anywhere in a matrix. For a step the pieces of a
matrix go to the rank that orthogonalises it, and come back.

PyTorch's own `torch.optim.Muon` is not used: it orthogonalises whole parameters on every rank, and what it does to one
matrix is a private function of it.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from deepspeed import comm
from torch import Tensor

# Coefficients of the quintic iteration and its number of steps (Jordan et al. 2024).
_QUINTIC, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5
_EPS = 1e-7


def orthogonalise(matrix: Tensor) -> Tensor:
    """Returns a matrix [m, n] with singular values of about 1 in the place of its own, by Newton–Schulz.

    X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ, from X / ‖X‖ (Jordan et al. 2024). It is computed in the matrix's dtype.
    """
    a, b, c = _QUINTIC
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + _EPS)
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if is_tall else x


def scale_of(rows: int, columns: int, kind: str) -> float:
    """Returns the factor of an orthogonalised update [rows, columns].

    Args:
        kind: "rms": 0.2·√max(rows, columns), which gives it the root mean square of AdamW's (Moonlight, section 2.2).
            "spectral": √max(1, rows/columns) (Jordan et al. 2024).
    """
    return 0.2 * max(rows, columns) ** 0.5 if kind == "rms" else max(1.0, rows / columns) ** 0.5


def cost_of(rows: int, columns: int) -> float:
    """Returns the FLOPs of `orthogonalise`."""
    small, large = sorted((rows, columns))
    return _ITERATIONS * (4.0 * small**2 * large + 2.0 * small**3)


@dataclass(frozen=True)
class Matrix:
    """A chunk of a parameter. bucket: its number in the part. start: its first element in the bucket's weights."""

    bucket: int
    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns


class Exchange:
    """Some buckets' matrices, and who orthogonalises which: pieces go there and come back in one all-to-all each.

    Args:
        matrices: of the buckets. sizes: elements of a rank's piece of each bucket.
        owners: rank of each matrix. rank: of this process in `group`. replicas: ranks of the group.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        sizes: Sequence[int],
        owners: Sequence[int],
        *,
        rank: int,
        replicas: int,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        self._group, self._sizes = group, sizes
        own = [number for number, owner in enumerate(owners) if owner == rank]
        self._own = [matrices[number] for number in own]
        # What this rank sends, in the order of the receivers: (bucket, from, to) in its pieces.
        self._sent = [
            [self._overlap(m, rank) for m, owner in zip(matrices, owners, strict=True) if owner == other]
            for other in range(replicas)
        ]
        # What it receives, in the order of the senders: parts of its own matrices, which begin where these do.
        self._received = [[self._overlap(m, other) for m in self._own] for other in range(replicas)]
        self._offsets = [
            [max(m.start, other * sizes[m.bucket]) - m.start for m in self._own] for other in range(replicas)
        ]

    def _overlap(self, matrix: Matrix, rank: int) -> tuple[int, int, int]:
        """Returns the bucket, and which elements of a rank's piece of it are the matrix's."""
        begin = rank * self._sizes[matrix.bucket]
        first = min(max(matrix.start - begin, 0), self._sizes[matrix.bucket])
        last = min(max(matrix.stop - begin, 0), self._sizes[matrix.bucket])
        return matrix.bucket, first, last

    def send(self, pieces: Sequence[Tensor]) -> "tuple[Tensor, Any]":
        """Starts to send this rank's pieces, one a bucket, to the matrices' owners; returns what arrives, and when."""
        parts = [pieces[bucket][first:last] for to in self._sent for bucket, first, last in to]
        return self._all_to_all(_joined(parts, pieces[0]), _counts(self._received), _counts(self._sent))

    def matrices(self, arrived: Tensor) -> list[Tensor]:
        """Returns this rank's matrices, [rows, columns] each, of what arrived."""
        whole = [arrived.new_empty(m.rows * m.columns) for m in self._own]
        for flat, part in zip(whole * len(self._received), self._parts(arrived), strict=True):
            offset, values = part
            flat[offset : offset + len(values)] = values
        return [flat.view(m.rows, m.columns) for flat, m in zip(whole, self._own, strict=True)]

    def _parts(self, arrived: Tensor) -> Iterable[tuple[int, Tensor]]:
        """Yields (offset in the matrix, elements) of every sender's part of every own matrix."""
        begin = 0
        for received, offsets in zip(self._received, self._offsets, strict=True):
            for (_, first, last), offset in zip(received, offsets, strict=True):
                yield (offset if last > first else 0), arrived[begin : begin + last - first]
                begin += last - first

    def send_back(self, matrices: Sequence[Tensor], like: Tensor) -> "tuple[Tensor, Any]":
        """Starts to send this rank's matrices back to those whose pieces they are; returns what arrives, and when."""
        parts = [
            matrix.reshape(-1)[offset : offset + last - first]
            for received, offsets in zip(self._received, self._offsets, strict=True)
            for matrix, (_, first, last), offset in zip(matrices, received, offsets, strict=True)
            if last > first
        ]
        return self._all_to_all(_joined(parts, like), _counts(self._sent), _counts(self._received))

    def updates(self, arrived: Tensor) -> list[Tensor]:
        """Returns what came back, one piece a bucket; what is of no matrix is zero."""
        pieces = [arrived.new_zeros(size) for size in self._sizes]
        begin = 0
        for bucket, first, last in (part for to in self._sent for part in to):
            pieces[bucket][first:last] = arrived[begin : begin + last - first]
            begin += last - first
        return pieces

    def _all_to_all(self, sent: Tensor, arriving: list[int], leaving: list[int]) -> tuple[Tensor, Any]:
        if len(arriving) == 1:
            return sent, None
        arrived = sent.new_empty(sum(arriving))
        return arrived, comm.all_to_all_single(arrived, sent, arriving, leaving, group=self._group, async_op=True)


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else like.new_empty(0)


def _counts(parts: Sequence[Sequence[tuple[int, int, int]]]) -> list[int]:
    return [sum(last - first for _, first, last in of) for of in parts]


def assign(costs: Sequence[float], loads: list[float]) -> list[int]:
    """Gives each piece of work to the rank that has least, the longest first; `loads` of the ranks is added to.

    Returns:
        The rank of each piece of work.
    """
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    ranks = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        load, rank = heapq.heappop(heap)
        ranks[number] = rank
        loads[rank] = load + costs[number]
        heapq.heappush(heap, (loads[rank], rank))
    return ranks


class Muon:
    """Turns the gradients of some buckets into updates, part by part.

    Args:
        parts: for each, its buckets' matrices and the elements of a rank's piece of each bucket.
        momentum: decay of the momentum, which is Nesterov's. scale: see `scale_of`.
        rank, replicas, group: see `Exchange`.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Sequence[Matrix], Sequence[int]]],
        *,
        momentum: float,
        scale: str,
        rank: int,
        replicas: int,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        self._momentum, self._scale = momentum, scale
        loads = [0.0] * replicas
        self._exchanges = [
            Exchange(
                matrices,
                sizes,
                assign([cost_of(m.rows, m.columns) for m in matrices], loads),
                rank=rank,
                replicas=replicas,
                group=group,
            )
            for matrices, sizes in parts
        ]

    def updates(
        self, gradients: Iterable[Sequence[Tensor]], momenta: Iterable[Sequence[Tensor]]
    ) -> Iterator[list[Tensor]]:
        """Yields, for each part, what is to be taken off its weights times the learning rate, a piece a bucket.

        The next part's pieces are on their way while this rank works on those of the last.

        Args:
            gradients: of each part, fp32, a piece a bucket. momenta: likewise, which are updated.
        """
        waiting: list[tuple[Exchange, Tensor, Any]] = []
        sent = (self._send(*of) for of in zip(self._exchanges, gradients, momenta, strict=True))
        ahead = next(sent, None)
        while ahead is not None:
            exchange, (arrived, work) = ahead
            ahead = next(sent, None)
            _wait(work)
            done = [
                scale_of(*matrix.shape, self._scale) * orthogonalise(matrix) for matrix in exchange.matrices(arrived)
            ]
            waiting.append((exchange, *exchange.send_back(done, arrived)))
            if len(waiting) > 1:
                yield self._returned(*waiting.pop(0))
        for returned in waiting:
            yield self._returned(*returned)

    def _send(self, exchange: Exchange, gradients: Sequence[Tensor], momenta: Sequence[Tensor]):
        """Updates the momentum of a part, and starts to send what is orthogonalised: Nesterov's look ahead."""
        torch._foreach_lerp_(list(momenta), list(gradients), 1 - self._momentum)
        ahead = torch._foreach_lerp(list(gradients), list(momenta), self._momentum)
        if ahead[0].is_cuda:
            ahead = [piece.bfloat16() for piece in ahead]
        return exchange, exchange.send(ahead)

    def _returned(self, exchange: Exchange, arrived: Tensor, work: Any) -> list[Tensor]:
        _wait(work)
        return [piece.float() for piece in exchange.updates(arrived)]


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()
