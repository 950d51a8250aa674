"""Encodes and decodes videos with all ranks of a group, which share out the VideoVAE's units.

The units are independent and always computed in the same shapes, so that the result has the bits of one rank alone,
without a halo or a seam.

Shape suffixes: B clips, F video frames, T latent frames, H and W video height and width, h = H/8 and w = W/8.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from mugv_ds.config.errors import InputError, PeerError, status_of
from mugv_ds.models.videovae import VideoVAE

_DTYPES = (torch.float32, torch.bfloat16)
_MAX_DIMENSIONS = 4
_FAILED = -1  # in the place of a dtype


@torch.no_grad()
def encode_parallel(
    vae: VideoVAE,
    video: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    sample: bool = False,
    generator: torch.Generator | None = None,
    **options,
) -> Tensor:
    """Encodes a video as `VideoVAE.encode` does; its chunks are spread over the ranks.

    All ranks of the group call it, with the same weights and arguments, and all get the latents [B, 24, T, h, w].

    Args:
        vae: on the device that the group communicates with.
        video: [B, 3, F, H, W]; only the chunks that the rank computes go to the device.
        group: by default all ranks.
        sample, generator: see `VideoVAE.encode`; a generator is needed, seeded alike on all ranks.
        options: those of `VideoVAE.posterior`.

    Raises:
        InputError: see `VideoVAE.encode`, or there is no generator. PeerError: another rank failed.
    """
    if sample and generator is None:
        raise InputError("sampling on several ranks needs a generator, seeded alike on all of them")
    return vae.encode(video, sample, generator, run=_sharing(vae, group), **options)


@torch.no_grad()
def decode_windows_parallel(
    vae: VideoVAE,
    latent: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    windows_at_once: int | None = None,
    **options,
) -> Iterator[Tensor]:
    """Yields a video as `VideoVAE.decode_windows` does, on all ranks: windows are spread over them, then frames.

    All ranks of the group take all windows, with the same weights and arguments.

    Args:
        vae, group: see `encode_parallel`.
        latent: [B, 24, T, h, w].
        windows_at_once: windows whose features and frames every rank holds at once; by default as many as there are
            ranks. With 1 a window's features, a sixth of the work at the published size, are made by one rank.
        options: `window` and `frames_at_once` of `VideoVAE.decode_windows`.

    Raises:
        InputError: see `VideoVAE.decode`. PeerError: another rank failed.
    """
    at_once = dist.get_world_size(group) if windows_at_once is None else windows_at_once
    yield from vae.decode_windows(latent, windows_at_once=at_once, run=_sharing(vae, group), **options)


def decode_parallel(vae: VideoVAE, latent: Tensor, group: dist.ProcessGroup | None = None, **options) -> Tensor:
    """Decodes latents as `VideoVAE.decode` does, to [B, 3, 8T, 8h, 8w] on all ranks; see `decode_windows_parallel`."""
    return torch.cat(list(decode_windows_parallel(vae, latent, group, **options)), dim=2)


def _sharing(vae: VideoVAE, group: dist.ProcessGroup | None) -> Callable[[list[Callable[[], Tensor]]], list[Tensor]]:
    return partial(_run_shared, group=group, device=vae.logvar.device)


def _run_shared(
    tasks: list[Callable[[], Tensor]], *, group: dist.ProcessGroup | None, device: torch.device
) -> list[Tensor]:
    """Returns the results of all tasks on all ranks, of which each computes some that follow one another.

    A rank that has nothing to do, or failed, takes part all the same: the others would wait for it.

    Raises:
        PeerError: another rank failed. Whatever this one's task raised.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    starts = [len(tasks) * r // ranks for r in range(ranks + 1)]
    results, failure = [], None
    try:
        results = [task().contiguous() for task in tasks[starts[rank] : starts[rank + 1]]]
    except Exception as error:
        failure = error
    described = _gather(_describe(results, failure, -(-len(tasks) // ranks)).to(device), group)
    if failure is not None:
        raise failure
    for other, rows in enumerate(described):
        if rows[0, 0] == _FAILED:
            raise PeerError(f"rank {other} of the group failed to encode or decode", int(rows[0, 1]))
    layouts = [
        [(_DTYPES[dtype], sizes[:dimensions]) for dtype, dimensions, *sizes in rows[:count].tolist()]
        for rows, count in zip(described, (stop - start for start, stop in pairwise(starts)), strict=True)
    ]
    shared = []
    for other, layout in enumerate(layouts):
        own = iter(results) if other == rank else None
        for dtype, shape in layout:
            result = torch.empty(*shape, dtype=dtype, device=device) if own is None else next(own)
            # One by one and as they are: a gather would have every rank hold as much for each rank as any has made.
            dist.broadcast(result.view(-1).view(torch.uint8), group=group, group_src=other)
            shared.append(result)
    return shared


def _describe(results: list[Tensor], failure: Exception | None, rows: int) -> Tensor:
    """Returns int64 [rows, 6]: of each result its dtype's index, number of dimensions and sizes; or of the failure."""
    described = torch.zeros(rows, 2 + _MAX_DIMENSIONS, dtype=torch.int64)
    for row, result in zip(described, results, strict=False):
        row[: 2 + result.ndim] = torch.tensor([_DTYPES.index(result.dtype), result.ndim, *result.shape])
    if failure is not None:
        described[0, :2] = torch.tensor([_FAILED, status_of(failure)])
    return described


def _gather(mine: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Returns the tensors of all ranks, which have the same shape."""
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return parts
