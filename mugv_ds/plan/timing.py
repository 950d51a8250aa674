"""How long the pieces of a training step take on a machine that was calibrated: blocks, exchanges, the optimizer."""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import HEAD_DIM
from mugv_ds.plan.calibration import BlockPoint, Calibration, Curve

# Linears of a block as multiples of its width, (in, out): qkv; the projection of o, cross-attention's q and its
# projection; the feed-forward layer's two. Those that "light" runs again are the second kind.
_LINEARS = ((1, 3), (1, 1), (1, 1), (1, 1), (1, 4), (4, 1))
_BETWEEN = ((1, 1), (1, 1), (1, 1))
_SPACED = 80 / HEAD_DIM  # what of q, k and v is sent, for the 72 channels of a head; see `mugv_kernels.qk_norm_rope`
_BF16 = 2
# The level whose repeated work, beside self-attention, is that of another.
_REPEATS = {"off": "off", "light": "light", "selective": "selective", "attention": "selective", "full": "selective"}
NETWORK = 40e9  # bytes a second that a GPU sends to another host, where nothing else is said: 400 Gb/s, of it 80%


class Pass(NamedTuple):
    """Seconds of a forward and of a backward pass."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


@dataclass
class Terms:
    """Seconds of one pass through a block, by what they are spent on."""

    products: float = 0.0
    attention_forward: float = 0.0
    attention_backward: float = 0.0
    kernels: float = 0.0
    exchange: float = 0.0
    host: float = 0.0  # that the device waits for the host to launch all this

    @property
    def total(self) -> float:
        return (
            self.products + self.attention_forward + self.attention_backward + self.kernels + self.exchange + self.host
        )

    def plus(self, other: "Terms", times: float = 1.0) -> "Terms":
        """Returns this and so many times the other."""
        return Terms(*(a + times * b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Cluster:
    """How devices are put together.

    Attributes:
        gpus_per_host: whose links the calibration measured. network: bytes a second that a GPU sends to another host.
            It is assumed, not measured.
    """

    gpus_per_host: int = 8
    network: float = NETWORK


@dataclass(frozen=True)
class Piece:
    """What a block is given on one rank.

    Attributes:
        width: D. heads: of the model. batch: samples. tokens: of a sample, over all ranks. sequence: ranks that share
            it. text_tokens: L.
    """

    width: int
    heads: int
    batch: int
    tokens: int
    sequence: int
    text_tokens: int

    @property
    def rows(self) -> int:
        """Returns the tokens that the rank holds."""
        return self.batch * -(-self.tokens // self.sequence)


@dataclass(eq=False)
class Timing:
    """The times of a calibration between and beyond its points.

    Args:
        calibration: of the machine. cluster: that is made of such.

    Raises:
        InputError: the calibration lacks what every prediction needs.
    """

    calibration: Calibration
    cluster: Cluster = field(default_factory=Cluster)

    def __post_init__(self) -> None:
        needed = ("blocks", "attention", "products", "ends", "optimizer", "copies")
        missing = [name for name in needed if not getattr(self.calibration, name)]
        if missing:
            raise InputError(
                f"calibration {self.calibration.name}: has no {', '.join(missing)}; go on with `make calibrate`"
            )
        points = self.calibration.blocks
        self._rest = {
            (level, width): _curves(
                (p.tokens, p) for p in points if (p.level, p.width, p.batch, p.attention) == (level, width, 1, False)
            )
            for level in ("off", "light", "selective")
            for width in sorted({p.width for p in points if p.level == level and p.batch == 1 and not p.attention})
        }
        self._widths = {
            level: sorted(w for has, w in self._rest if has == level) for level in ("off", "light", "selective")
        }
        if not all(self._widths.values()):
            raise InputError(f"calibration {self.calibration.name}: blocks were not measured at off, light, selective")
        attention = self.calibration.attention
        self._attention = {
            units: _curves((p.tokens**2, p) for p in attention if p.batch * p.heads == units)
            for units in sorted({p.batch * p.heads for p in attention})
        }
        self._longest = {
            units: max(p.tokens for p in attention if p.batch * p.heads == units) for units in self._attention
        }
        linears = self.calibration.products
        self._products = {
            sizes: _curves((p.rows, p) for p in linears if (p.width_in, p.width_out) == sizes)
            for sizes in {(p.width_in, p.width_out) for p in linears}
        }
        ends = self.calibration.ends
        self._ends = {
            width: _curves((p.tokens, p) for p in ends if (p.width, p.batch) == (width, 1))
            for width in sorted({p.width for p in ends if p.batch == 1})
        }
        self._collectives = {
            (kind, ranks): Curve(
                (p.bytes, p.seconds) for p in self.calibration.collectives if (p.kind, p.ranks) == (kind, ranks)
            )
            for kind, ranks in {(p.kind, p.ranks) for p in self.calibration.collectives}
        }
        self._copies = {
            kind: Curve((p.bytes, p.seconds) for p in self.calibration.copies if p.kind == kind)
            for kind in {p.kind for p in self.calibration.copies}
        }
        self._optimizer = {
            name: Curve((p.elements, getattr(p, name)) for p in self.calibration.optimizer)
            for name in ("adamw_s", "norm_s", "cast_s", "average_s")
        }
        self._host = {level: self._launched(level) for level in _REPEATS}
        self._per_sample = {level: self._sample_extra(level) for level in self._widths}
        self._ratios = {
            level: [
                (math.log(p.tokens), p.width, self._measured_ratio(p))
                for p in points
                if p.attention and p.level == level
            ]
            for level in _REPEATS
        }
        # A search asks for the same pieces again and again.
        self.block, self.ends = lru_cache(1 << 16)(self._block), lru_cache(1 << 14)(self._ends_pass)
        self.collective, self.optimizer = lru_cache(1 << 14)(self._collective), lru_cache(1 << 12)(self._update)
        self.slowdown = self._slowdown()

    # What blocks are made of.

    def products(self, rows: int, linears: Iterable[tuple[int, int]], width: int) -> Pass:
        """Returns the seconds of linears, given as multiples of the width, over so many rows."""
        passes = [self._linear(rows, i * width, o * width) for i, o in linears]
        return Pass(sum(p.forward for p in passes), sum(p.backward for p in passes))

    def _linear(self, rows: int, width_in: int, width_out: int) -> Pass:
        """Of a linear of any size: that of the nearest that was measured, in proportion to the FLOPs."""
        size = math.log(width_in * width_out)
        nearest = min(self._products, key=lambda io: (abs(math.log(io[0] * io[1]) - size), io))
        scale = width_in * width_out / (nearest[0] * nearest[1])
        forward, backward = self._products[nearest]
        return Pass(scale * forward(rows), scale * backward(rows))

    def attention(self, tokens: int, heads: int, batch: int) -> Pass:
        """Returns the seconds of self-attention: those of a head of a sample, by how many of them there are."""
        units = batch * heads
        return Pass(*(units * self._of_a_head(tokens, units, which) for which in (0, 1)))

    def _of_a_head(self, tokens: int, units: int, which: int) -> float:
        known = list(self._attention)
        above = next((u for u in known if u >= units), known[-1])
        below = next((u for u in reversed(known) if u <= units), known[0])
        high, low = (self._of_one_head(tokens, u, which) for u in (above, below))
        if above == below:
            return high
        share = math.log(units / below) / math.log(above / below)
        return math.exp((1 - share) * math.log(low) + share * math.log(high))

    def _of_one_head(self, tokens: int, units: int, which: int) -> float:
        """Seconds of a head where so many were measured.

        Beyond its longest sequence time goes on as where there were fewer heads and the rows of all heads together are
        as many: the rows of one head's keys lie between those of the others, and the more memory they are spread over
        the more often they are missing from the second-level cache.
        """
        curve, longest = self._attention[units][which], self._longest[units]
        like = max(self._longest, key=lambda u: (u * self._longest[u], u))
        if tokens <= longest or like * self._longest[like] <= units * longest:
            return curve(tokens**2) / units
        rates = [self._attention[like][which](n**2) / n**2 for n in (tokens * units / like, longest * units / like)]
        return curve(longest**2) / units * (tokens / longest) ** 2 * rates[0] / rates[1]

    def _bare(self, level: str, width: int, rows: int) -> Pass:
        """Of a block without self-attention, given one sample of so many tokens."""
        of = {w: self._rest[level, w] for w in self._widths[level]}
        if width in of:
            return Pass(*(curve(rows) for curve in of[width]))
        return Pass(*(Curve((w * w, curves[which](rows)) for w, curves in of.items())(width**2) for which in (0, 1)))

    def _sample_extra(self, level: str) -> Callable[[int], Pass]:
        """What each sample beyond the first takes of the block: the keys and values of its text, mostly."""
        points = [p for p in self.calibration.blocks if p.level == level and p.batch > 1 and not p.attention]
        extra = []
        for p in points:
            alone = self._bare(level, p.width, p.batch * p.tokens)
            extra.append(
                [
                    max(seconds - single, 0.0) / (p.batch - 1) / p.width**2
                    for seconds, single in zip((p.forward_s, p.backward_s), alone, strict=True)
                ]
            )
        forward, backward = ([sum(of) / len(of) for of in zip(*extra, strict=True)]) if extra else (0.0, 0.0)
        return lambda width: Pass(forward * width**2, backward * width**2)

    def rest(self, level: str, piece: Piece) -> Pass:
        """Returns the seconds of a block without self-attention, at off, light or selective."""
        bare, extra = self._bare(level, piece.width, piece.rows), self._per_sample[level](piece.width)
        times = (piece.batch - 1) * piece.text_tokens / 300  # the calibration's text is 300 tokens long
        return Pass(bare.forward + times * extra.forward, bare.backward + times * extra.backward)

    def _launched(self, level: str) -> Pass:
        """What the host takes to launch a block, whatever its size: the median, with self-attention if measured so."""
        for at in (level, _REPEATS[level]):
            for is_whole in (True, False):
                points = [p for p in self.calibration.blocks if p.level == at and p.attention == is_whole]
                if points:
                    passes = zip(*((p.host_forward_s, p.host_backward_s) for p in points), strict=True)
                    return Pass(*map(statistics.median, passes))
        return Pass(0.0, 0.0)

    def _measured_ratio(self, point: BlockPoint) -> float:
        """How many times longer a whole block took than what it is made of."""
        piece = Piece(point.width, point.width // HEAD_DIM, point.batch, point.tokens, 1, 300)
        forward, backward = self._made_of(piece, point.level)
        return (point.forward_s + point.backward_s) / (forward.total + backward.total)

    def _ratio(self, level: str, width: int, tokens: int) -> float:
        """The ratio at the nearest width, linear in the tokens' logarithm; of what was not measured that of off."""
        points = self._ratios[level] or self._ratios[_REPEATS[level]] or self._ratios["off"]
        if not points:
            return 1.0
        near = min((w for _, w, _ in points), key=lambda w: (abs(math.log(w / width)), w))
        line = sorted((log, ratio) for log, w, ratio in points if w == near)
        log = min(max(math.log(tokens), line[0][0]), line[-1][0])
        for (a, low), (b, high) in pairwise(line):
            if a <= log <= b:
                return low + (high - low) * (log - a) / (b - a)
        return line[0][1]

    def _made_of(self, piece: Piece, level: str) -> tuple[Terms, Terms]:
        """What a block is made of, forward and backward, each measured by itself."""
        base = _REPEATS[level]
        off, again = self.rest("off", piece), self.rest(base, piece).both - self.rest("off", piece).both
        linear = self.products(piece.rows, _LINEARS, piece.width)
        heads = piece.heads // piece.sequence
        attention = self.attention(piece.tokens, heads, piece.batch)
        exchange = self.exchange(piece)
        forward = Terms(min(linear.forward, off.forward), attention.forward, 0.0, 0.0, exchange)
        forward.kernels = max(off.forward - linear.forward, 0.0)
        backward = Terms(min(linear.backward, off.backward), 0.0, attention.backward, 0.0, exchange)
        backward.kernels = max(off.backward - linear.backward, 0.0)
        if level != "off":
            repeated = {"light": _BETWEEN}.get(base, _LINEARS)
            run = max(again, 0.0)
            products = min(self.products(piece.rows, repeated, piece.width).forward, run)
            backward = backward.plus(Terms(products, kernels=run - products))
        if level == "full":
            backward.attention_forward += attention.forward
        if level in ("full", "attention"):
            backward.exchange += exchange
        return forward, backward

    def _block(self, piece: Piece, level: str, is_frozen: bool = False) -> tuple[Terms, Terms]:
        """Returns a block's forward and backward pass.

        Args:
            level: of recomputation. is_frozen: whether its linears' weights have no gradients.
        """
        ratio = self._ratio(level, piece.width, piece.tokens)
        forward, backward = self._made_of(piece, level)
        if is_frozen:  # of a linear's backward pass one product of two
            backward.products -= self.products(piece.rows, _LINEARS, piece.width).backward / 2
        scaled = []
        for terms in (forward, backward):
            whole = Terms().plus(terms, ratio)
            whole.exchange = terms.exchange
            scaled.append(whole)
        for whole, launched in zip(scaled, self._host[level], strict=True):
            whole.host = max(launched - whole.total, 0.0)
        return tuple(scaled)

    def _ends_pass(self, width: int, rows: int, batch: int) -> Pass:
        """Returns the seconds of embedders, final layer and loss, launched by the host if that takes longer."""
        near = min(self._ends, key=lambda w: (abs(math.log(w / width)), w))
        scale = width / near
        base = Pass(*(scale * curve(rows) for curve in self._ends[near]))
        more = [p for p in self.calibration.ends if p.width == near and p.batch > 1]
        extra = [
            sum(
                max(p.forward_s if which == 0 else p.backward_s, 0.0) - self._ends[near][which](p.batch * p.tokens)
                for p in more
            )
            for which in (0, 1)
        ]
        samples = sum(p.batch - 1 for p in more)
        times = (batch - 1) / samples * scale**2 if samples else 0.0
        device = [seconds + times * max(of, 0.0) for seconds, of in zip(base, extra, strict=True)]
        points = [p for p in self.calibration.ends if p.width == near]
        launched = [
            statistics.median(p.host_forward_s for p in points),
            statistics.median(p.host_backward_s for p in points),
        ]
        return Pass(*map(max, device, launched))

    # What goes between devices.

    def exchange(self, piece: Piece) -> float:
        """Returns the seconds of one pass's all-to-alls, of q, k, v and of o, and of the copies around them.

        One puts o in order; where there are several samples, q, k, v and o are also copied between ranks' and samples'.
        """
        if piece.sequence == 1:
            return 0.0
        tensor = _BF16 * piece.rows * piece.width
        packed = 3 * _SPACED * tensor
        sent = self.collective("all_to_all", piece.sequence, packed)
        copied = tensor if piece.batch == 1 else 2 * tensor + packed
        return sent + self.collective("all_to_all", piece.sequence, tensor) + self.copy("on_device", copied)

    def _collective(self, kind: str, ranks: int, count: float) -> float:
        """Returns the seconds of a collective of so many bytes among neighbouring ranks; see `CollectivePoint`.

        Beyond a host, the slower of two: the whole traffic over the links inside, and what leaves a host over its
        network. A ring leaves each host once, over the network of all of its ranks; in an all-to-all each rank sends
        what is for others.

        Raises:
            InputError: none of this kind was measured.
        """
        if ranks == 1 or count <= 0:
            return 0.0
        measured = [r for k, r in self._collectives if k == kind]
        if not measured:
            raise InputError(
                f"calibration {self.calibration.name}: no {kind} was measured; run tools/calibrate.py on several GPUs"
            )
        near = min(measured, key=lambda r: (abs(math.log(r / ranks)), r))
        share = (ranks - 1) / ranks
        inside = self._collectives[kind, near](count * share / ((near - 1) / near) if near != ranks else count)
        local = min(self.cluster.gpus_per_host, ranks)
        if ranks <= local:
            return inside
        if kind == "all_to_all":
            leaving = count * (ranks - local) / ranks
        else:
            leaving = count * share * (2 if kind == "all_reduce" else 1) / local
        return max(inside, leaving / self.cluster.network)

    def send(self, count: float, distance: int) -> float:
        """Returns the seconds in which a rank sends so many bytes to the one that is so many ranks further."""
        if distance >= self.cluster.gpus_per_host:
            return count / self.cluster.network
        return self.collective("send", 2, count)

    def _slowdown(self) -> float:
        """Returns how many seconds computing takes longer for each second of a collective beside it."""
        points = self.calibration.overlap
        if not points:
            return 0.0
        return sum(max(p.both_s - max(p.products_s, p.collective_s), 0.0) / p.collective_s for p in points) / len(
            points
        )

    # The rest of a step.

    def copy(self, kind: str, count: float) -> float:
        """Returns the seconds of a copy; see `CopyPoint`."""
        return self._copies[kind](count) if count > 0 else 0.0

    def _update(self, elements: float, averages: int) -> float:
        """Returns the seconds in which a rank updates a shard of so many elements, without the averages' `averages`."""
        if elements <= 0:
            return 0.0
        seconds = sum(self._optimizer[name](elements) for name in ("adamw_s", "norm_s", "cast_s"))
        return seconds + averages * self._optimizer["average_s"](elements)


def _curves(points: Iterable[tuple[float, object]]) -> tuple[Curve, Curve]:
    """Curves of the forward and of the backward pass over (size, point)."""
    points = list(points)
    return Curve((size, p.forward_s) for size, p in points), Curve((size, p.backward_s) for size, p in points)
