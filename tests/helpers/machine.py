"""A calibration of a machine that obeys formulas, so that what is predicted of it can be worked out by hand."""

from itertools import product

from mugv_ds.plan.calibration import (
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
)

GIB = 2**30
FLOPS = 5e14  # of products a second
ATTENTION = 4e14  # of attention
KERNELS = 3e-11  # seconds of a token of a block's other kernels, forward, for each channel; backward twice
ENDS = 1e-7  # seconds of a token, forward and backward each
LINK = 1e11  # bytes a second
HOST = 5e10
MEMORY = 2e12  # bytes a second that are copied
UPDATE = {"adamw_s": 7e-12, "norm_s": 2e-12, "cast_s": 1e-12, "average_s": 3e-12}  # seconds of an element
WIDTHS, LENGTHS = (288, 3456), (256, 4096, 65536)


def products(width: int, rows: int, in_widths: float = 14) -> float:
    """Seconds of linears over so many rows, forward; 14 D² are those of a block."""
    return 2 * in_widths * width**2 * rows / FLOPS


def attention(tokens: int, heads: int, batch: int = 1) -> float:
    """Seconds of self-attention, forward; the backward pass takes 2.5 times as long."""
    return 4 * tokens**2 * 72 * heads * batch / ATTENTION


def block(width: int, rows: int, level: str = "off") -> tuple[float, float]:
    """Seconds of a block without self-attention, forward and backward."""
    forward = products(width, rows) + KERNELS * width * rows
    again = {"off": 0.0, "light": products(width, rows, 3), "selective": forward}[level]
    return forward, 2 * forward + again


def ideal_machine(devices: int = 4, memory_gib: float = 140.0, **changes) -> Calibration:
    """The calibration. changes: of its fields."""
    blocks = [
        BlockPoint(
            width=width,
            batch=1,
            tokens=tokens,
            level=level,
            attention=False,
            forward_s=block(width, tokens, level)[0],
            backward_s=block(width, tokens, level)[1],
            kept_bytes=0,
            peak_bytes=0,
        )
        for width, tokens, level in product(WIDTHS, LENGTHS, ("off", "light", "selective"))
    ]
    linears = [
        ProductPoint(
            rows=rows,
            width_in=width * i,
            width_out=width * o,
            forward_s=products(width, rows, i * o),
            backward_s=2 * products(width, rows, i * o),
        )
        for width, rows, (i, o) in product(WIDTHS, LENGTHS, ((1, 1), (1, 3), (1, 4), (4, 1)))
    ]
    attended = [
        AttentionPoint(
            batch=1,
            tokens=tokens,
            heads=heads,
            forward_s=attention(tokens, heads),
            backward_s=2.5 * attention(tokens, heads),
        )
        for tokens, heads in product(LENGTHS, (1, 4))
    ]
    given = {
        "machine": Machine(
            device="Ideal H200",
            devices=devices,
            memory_bytes=int(memory_gib * GIB),
            host_memory_bytes=devices * 64 * GIB,
            torch="2.11.0",
            cuda="13.0",
            triton=None,
            attention="flash4",
        ),
        "blocks": tuple(blocks),
        "products": tuple(linears),
        "attention": tuple(attended),
        "ends": tuple(
            EndsPoint(width=width, batch=1, tokens=tokens, forward_s=ENDS * tokens, backward_s=ENDS * tokens)
            for width, tokens in product(WIDTHS, LENGTHS)
        ),
        "collectives": tuple(
            CollectivePoint(kind=kind, ranks=ranks, bytes=count, seconds=count * (ranks - 1) / ranks * times / LINK)
            for (kind, times), ranks, count in product(
                (("all_to_all", 1), ("reduce_scatter", 1), ("all_gather", 1), ("all_reduce", 2)),
                (2, 4),
                (1 << 12, 1 << 30),
            )
        )
        + tuple(CollectivePoint(kind="send", ranks=2, bytes=n, seconds=n / LINK) for n in (1 << 12, 1 << 30)),
        "copies": tuple(
            CopyPoint(kind=kind, bytes=count, seconds=count / (MEMORY if kind == "on_device" else HOST))
            for kind, count in product(("to_host", "to_device", "on_device"), (1 << 12, 1 << 30))
        ),
        "optimizer": tuple(
            OptimizerPoint(elements=n, **{name: seconds * n for name, seconds in UPDATE.items()}) for n in (1000, 10**9)
        ),
        "overlap": (Overlap(ranks=4, products_s=1.0, collective_s=1.0, both_s=1.25),),
    }
    return Calibration(**(given | changes))
