"""Videos that several ranks encode and decode together, in real processes."""

import pytest
import torch
import torch.distributed as dist

from mugv_ds.config.errors import InputError, PeerError, Status
from mugv_ds.models.videovae import VideoVAE
from mugv_ds.parallel.codec import decode_parallel, decode_windows_parallel, encode_parallel
from tests.helpers.distributed import run_ranks
from tests.helpers.records import load_vae_record


def start() -> tuple[VideoVAE, torch.Tensor, torch.Tensor]:
    """The VideoVAE, two clips of 17 frames and their latents; the ranks are connected."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    vae, r, _ = load_vae_record("vae_eps")
    video = torch.cat([r["in.video"], r["in.video"][:, :, :1]], dim=2)
    return vae.requires_grad_(False), video, vae.encode(video).detach()


def check_bits(vae: VideoVAE, video: torch.Tensor, latent: torch.Tensor) -> None:
    for clips, frames, options in ((2, 17, {}), (1, 17, {"frames_at_once": 3}), (1, 1, {})):
        given = video[:clips, :, :frames]
        assert torch.equal(encode_parallel(vae, given, **options), vae.encode(given, **options))
    drawn = encode_parallel(vae, video, sample=True, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn, vae.encode(video, True, torch.Generator().manual_seed(1)))
    for clips, latents, options in ((2, 3, {"window": 2}), (1, 3, {"window": 1, "frames_at_once": 3}), (1, 1, {})):
        given = latent[:clips, :, :latents]
        assert torch.equal(decode_parallel(vae, given, **options), vae.decode(given, **options))
    windows = list(decode_windows_parallel(vae, latent, window=1))
    assert [torch.equal(*pair) for pair in zip(windows, vae.decode_windows(latent, window=1), strict=True)] == [
        True
    ] * 3
    vae.bfloat16()
    assert torch.equal(encode_parallel(vae, video), vae.encode(video))
    assert torch.equal(decode_parallel(vae, latent), vae.decode(latent))


def check_a_group_beside_another(vae: VideoVAE, video: torch.Tensor, latent: torch.Tensor) -> None:
    """Ranks 0 and 2 code one video, rank 1 nothing."""
    group = dist.new_group([0, 2])
    if dist.get_rank() != 1:
        assert torch.equal(encode_parallel(vae, video, group), vae.encode(video))
        assert torch.equal(decode_parallel(vae, latent, group), vae.decode(latent))


def check_failures(vae: VideoVAE, video: torch.Tensor, latent: torch.Tensor) -> None:
    with pytest.raises(InputError, match="needs a generator"):
        encode_parallel(vae, video, sample=True)
    with pytest.raises(InputError, match="must be 8n or"):
        encode_parallel(vae, video[:, :, :10])
    if dist.get_rank() == 1:
        vae.temporal_vae.decode = None
        with pytest.raises(TypeError, match="not callable"):
            decode_parallel(vae, latent, window=1)
    else:
        with pytest.raises(PeerError, match="rank 1 of the group failed") as caught:
            decode_parallel(vae, latent, window=1)
        assert caught.value.status == Status.FAILED


def on_two() -> None:
    given = start()
    check_bits(*given)
    check_failures(*given)


def on_three() -> None:
    given = start()
    check_a_group_beside_another(*given)
    check_bits(*given)


def test_two_ranks_give_the_bits_of_one_and_one_that_fails_stops_the_other():
    run_ranks(2, on_two)


def test_three_ranks_and_a_group_of_two_of_them_give_the_bits_of_one():
    run_ranks(3, on_three)
