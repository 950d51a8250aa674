"""The VideoVAE against what the published code computed, and against itself in other groupings."""

import json
import subprocess
import sys

import pytest
import torch

from mugv_ds.config.errors import InputError
from mugv_ds.models.videovae import UNUSED_PARAMETERS, VideoVAE, VideoVAEConfig, chunk_units, window_units
from tests.helpers.records import GOLDEN, load_vae_record, relative

LENGTHS = [1, 8, 9, 16, 17, 48, 49, 104]


@pytest.fixture(scope="module")
def lengths():
    """The record of lengths; only for tests that change nothing."""
    vae, r, metadata = load_vae_record("vae_lengths")
    assert json.loads(metadata["frames"]) == LENGTHS
    return vae.requires_grad_(False), r


def assert_matches(vae: VideoVAE, video: torch.Tensor, expected: dict[str, torch.Tensor], **options) -> None:
    """Compares both moments, the latent and the reconstruction of the record's latent."""
    with torch.no_grad():
        mean, logvar = vae.posterior(video, **options)
        found = {
            "mean": mean,
            "logvar": logvar,
            "latent": vae.encode(video, **options),
            "reconstruction": vae.decode(expected["latent"]),
        }
    for name, value in found.items():
        assert value.shape == expected[name].shape
        assert relative(value, expected[name]) <= 2e-5, name


@pytest.mark.parametrize("frames", LENGTHS)
def test_lengths_match_the_published_code(lengths, frames):
    vae, r = lengths
    prefix = f"case.{frames}."
    expected = {key.removeprefix(prefix): value for key, value in r.items() if key.startswith(prefix)}
    assert_matches(vae, r["in.video"][:, :, :frames], expected)


def test_any_size_matches_the_published_code_and_is_refused_by_default():
    vae, r, metadata = load_vae_record("vae_sizes")
    for size in json.loads(metadata["sizes"]):
        expected = {key.rpartition(".")[2]: value for key, value in r.items() if key.startswith(f"case.{size}.")}
        video = expected.pop("video")
        assert_matches(vae, video, expected, any_size=True)
        with pytest.raises(InputError, match="multiples of 8; crop"):
            vae.encode(video)


def test_tiny_variances_and_clamped_logarithms_match_the_published_code():
    vae, r, _ = load_vae_record("vae_eps")
    assert_matches(vae, r["in.video"], {key[4:]: value for key, value in r.items() if key.startswith("out.")})
    assert {float(r["out.logvar"].min()), float(r["out.logvar"].max())} == {-30, 20}
    frames = r["in.video"].transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        assert relative(vae.spatial_vae.encode(frames), r["out.spatial"].transpose(1, 2).flatten(0, 1)) <= 2e-5


def test_loss_and_every_gradient_match_the_published_code():
    """Gradients of most parameters are within 2e-5; of a few, the record itself is 5e-5 from fp64."""
    vae, r, metadata = load_vae_record("vae_grad")
    video = r["in.video"].clone().requires_grad_(True)
    mean, logvar = vae.posterior(video)
    reconstruction = vae.decode((mean - vae.shift) / vae.scale)
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = (reconstruction - video).square().mean() + 0.01 * divergence
    assert relative(loss, r["out.loss"].squeeze()) <= 2e-5
    loss.backward()
    assert relative(video.grad, r["grad.video"]) <= 2e-5
    without = {name for name, parameter in vae.named_parameters() if parameter.grad is None}
    assert without == set(UNUSED_PARAMETERS) == set(json.loads(metadata["unused"]))
    gradients = {name: parameter.grad for name, parameter in vae.named_parameters() if name not in without}
    assert {f"grad.{name}" for name in gradients} == {key for key in r if key.startswith("grad.")} - {"grad.video"}
    total = torch.cat([gradient.flatten() for gradient in gradients.values()])
    assert relative(total, torch.cat([r[f"grad.{name}"].flatten() for name in gradients])) <= 2e-5
    # Attention does not change when the same vector is added to all keys: both gradients are rounding.
    zero = [name for name in gradients if name.endswith("to_k.bias")]
    assert all(gradients.pop(name).abs().max() <= 1e-6 * total.abs().max() for name in zero) and len(zero) == 2
    errors = sorted(relative(gradient, r[f"grad.{name}"]) for name, gradient in gradients.items())
    assert errors[-1] <= 1e-4 and errors[int(0.9 * len(errors))] <= 2e-5


def test_it_has_the_published_keys_shapes_and_size():
    with torch.device("meta"):
        vae = VideoVAE()
    ours = {name: list(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert ours == json.loads((GOLDEN / "videovae_keys.json").read_text()) and len(ours) == 522
    assert sum(parameter.numel() for parameter in vae.parameters()) == 411_752_900


def test_importing_the_models_imports_neither_diffusers_nor_transformers():
    code = (
        "import sys, mugv_ds.models.text, mugv_ds.models.videovae;print({'diffusers', 'transformers'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "set()\n"


def test_the_first_latent_of_8n_plus_1_frames_is_the_stills(lengths):
    vae, r = lengths
    still, clip = vae.encode(r["in.video"][:, :, :1]), vae.encode(r["in.video"][:, :, :17])
    assert torch.equal(clip[:, :, :1], still)
    assert torch.equal(clip[:, :, 1:], vae.encode(r["in.video"][:, :, 1:17]))
    assert relative(still, vae.encode(r["in.video"][:, :, :1].expand(-1, -1, 8, -1, -1))) <= 2e-5


def test_a_chunk_and_a_window_reach_their_own_alone(lengths):
    vae, r = lengths
    video = r["in.video"][:, :, :24].clone()
    latent = vae.encode(video)
    video[:, :, 8:16] *= -1
    assert (vae.encode(video) != latent).any(dim=(0, 1, 3, 4)).tolist() == [False, True, False]
    changed = latent.clone()
    changed[:, :, 1] += 1
    frames = (vae.decode(changed, window=2) != vae.decode(latent, window=2)).any(dim=(0, 1, 3, 4)).tolist()
    assert frames == [True] * 16 + [False] * 8


def test_a_batch_equals_the_clips_alone():
    vae, r, _ = load_vae_record("vae_eps")
    video, latent = r["in.video"], r["out.latent"]
    with torch.no_grad():
        assert torch.equal(vae.encode(video), torch.cat([vae.encode(clip[None]) for clip in video]))
        assert torch.equal(vae.decode(latent), torch.cat([vae.decode(clip[None]) for clip in latent]))


@pytest.mark.parametrize(("frames", "sample"), [(17, False), (16, True), (17, True)])
def test_a_stream_gives_the_same_bits(frames, sample):
    vae, r, _ = load_vae_record("vae_eps")
    vae.requires_grad_(False)
    video = torch.cat([r["in.video"], r["in.video"][:, :, :1]], dim=2)[:, :, :frames]
    whole = vae.encode(video, sample, torch.Generator().manual_seed(1))
    stream = vae.encode_chunks(
        iter(video.unbind(2)),
        still_first=frames % 8 == 1,
        sample=sample,
        generator=torch.Generator().manual_seed(1),
    )
    assert torch.equal(torch.cat(list(stream), dim=2), whole)
    assert torch.equal(whole, vae.encode(video)) != sample
    windows = list(vae.decode_windows(whole, window=2))
    assert [len(window[0, 0]) for window in windows] == [16, 8][: whole.shape[2] // 2 + frames % 8]
    assert torch.equal(torch.cat(windows, dim=2), vae.decode(whole, window=2))


def test_a_stream_takes_no_more_frames_than_a_chunk_has(lengths):
    vae, r = lengths
    taken = []
    stream = vae.encode_chunks(taken.append(i) or r["in.video"][:, :, i] for i in range(24))
    next(stream)
    assert len(taken) == 8
    next(stream)
    assert len(taken) == 16


def test_windows_are_decoded_when_they_are_asked_for(lengths, monkeypatch):
    vae, r = lengths
    decoded, decode = [], vae.decode_unit
    monkeypatch.setattr(vae, "decode_unit", lambda latent, unit: decoded.append(unit) or decode(latent, unit))
    windows = vae.decode_windows(r["case.104.latent"])
    for number in range(1, 3):
        next(windows)
        assert len(decoded) == number
    assert decoded == [(0, 0, 6), (0, 6, 12)]


def test_samples_have_the_posteriors_variance(lengths):
    vae, r = lengths
    video = r["in.video"][:, :, :8]
    mean, logvar = vae.posterior(video)
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack(
        [(vae.encode(video, True, generator) * vae.scale + vae.shift - mean) / (logvar / 2).exp() for _ in range(40)]
    )
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_frames_at_once_changes_rounding_alone(lengths, at_once):
    vae, r = lengths
    video = r["in.video"][:, :, :16]
    assert relative(vae.encode(video, frames_at_once=at_once), r["case.16.latent"]) <= 2e-5
    assert relative(vae.decode(r["case.16.latent"], frames_at_once=at_once), r["case.16.reconstruction"]) <= 2e-5


def test_bf16_is_within_its_rounding_and_normalises_in_fp32(lengths):
    _, r = lengths
    vae = load_vae_record("vae_lengths")[0].bfloat16().requires_grad_(False)
    latent, video = vae.encode(r["in.video"][:, :, :16]), vae.decode(r["case.16.latent"])
    assert latent.dtype == video.dtype == torch.float32
    assert 1e-4 < relative(latent, r["case.16.latent"]) < 0.05
    assert 1e-4 < relative(video, r["case.16.reconstruction"]) < 0.1


def test_units():
    assert chunk_units(1, 1) == [(0, 0, 1)]
    assert chunk_units(2, 9) == [(0, 0, 1), (0, 1, 9), (1, 0, 1), (1, 1, 9)]
    assert chunk_units(1, 16) == [(0, 0, 8), (0, 8, 16)]
    assert window_units(2, 8) == [(0, 0, 6), (1, 0, 6), (0, 6, 8), (1, 6, 8)]


CLIP = torch.linspace(-1, 1, 3 * 8 * 16 * 24).reshape(1, 3, 8, 16, 24)
BRIGHT = (CLIP + 1) / 2
HOLED = CLIP.clone()
HOLED[0, 1, 3, 5, 7] = torch.inf


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (CLIP.repeat(1, 1, 2, 1, 1)[:, :, :10], r"10 frames: must be 8n or 8n \+ 1; cut it to 9 .* or 8$"),
        (CLIP[:, :, :7], "7 frames: .* cut it to 1 .whose first frame gets a latent of its own.$"),
        (CLIP[..., :20], "16×20 pixels: .* multiples of 8; crop or resize it, to 16×16"),
        (CLIP.half(), "float16: must be float32 or bfloat16"),
        ((127 * BRIGHT).byte(), "uint8: must be"),
        (HOLED, "not finite"),
        (HOLED.nan_to_num(posinf=torch.nan), "not finite"),
        (BRIGHT, r"clip 0 has no pixel below 0 \(0 to 1\): it looks like \[0, 1\]"),
        (torch.cat([CLIP, BRIGHT]), "clip 1 has no pixel below 0"),
        (255 * BRIGHT, "from 0 to 255: must be in"),
        (CLIP[:, :1], "3 channels"),
        (CLIP[0], "3 channels"),
        (CLIP[:0], "none empty"),
    ],
)
def test_videos_that_cannot_be_encoded(lengths, video, message):
    with pytest.raises(InputError, match=message):
        lengths[0].encode(video)


def test_bright_and_constant_clips(lengths):
    vae, _ = lengths
    for video in (BRIGHT, torch.zeros(1, 3, 8, 16, 24)):
        assert vae.encode(video, allow_nonnegative=video is BRIGHT).isfinite().all()


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        (list(CLIP.unbind(2)) * 2, {"still_first": True}, "16 frames: .* the last 7 were not encoded"),
        (list(CLIP.unbind(2))[:7], {}, "7 frames"),
        ([], {}, "0 frames"),
        (list(BRIGHT.unbind(2)), {}, "no pixel below 0"),
        (list(HOLED.unbind(2)), {}, "not finite"),
        ([*CLIP.unbind(2)[:7], CLIP[0, :, 0]], {}, r"frames 0 to 7 must be \[B, 3, H, W\] of one size"),
        ([*CLIP.unbind(2), *CLIP.repeat(2, 1, 1, 1, 1).unbind(2)], {}, "keeps its batch size"),
        (list(CLIP.unbind(2)), {"frames_at_once": 0}, "frames_at_once = 0"),
    ],
)
def test_streams_that_cannot_be_encoded(lengths, frames, options, message):
    with pytest.raises(InputError, match=message):
        list(lengths[0].encode_chunks(frames, **options))


def test_a_bright_chunk_in_a_stream_is_no_suspicion(lengths):
    assert len(list(lengths[0].encode_chunks([*BRIGHT.unbind(2), *CLIP.unbind(2)]))) == 2


@pytest.mark.parametrize(
    ("latent", "options", "message"),
    [
        (torch.zeros(1, 23, 1, 2, 3), {}, r"must be floating, \[B, 24, T, h, w\]"),
        (torch.zeros(24, 1, 2, 3), {}, "must be floating"),
        (torch.zeros(1, 24, 0, 2, 3), {}, "not empty"),
        (torch.zeros(1, 24, 1, 2, 3, dtype=torch.int64), {}, "must be floating"),
        (torch.full((1, 24, 1, 2, 3), torch.nan), {}, "not finite"),
        (torch.zeros(1, 24, 1, 2, 3), {"window": 0}, "window = 0"),
        (torch.zeros(1, 24, 1, 2, 3), {"windows_at_once": 0}, "windows_at_once = 0"),
    ],
)
def test_latents_that_cannot_be_decoded(lengths, latent, options, message):
    with pytest.raises(InputError, match=message):
        lengths[0].decode(latent, **options)


def test_fp16_is_refused():
    vae = load_vae_record("vae_lengths")[0].half()
    with pytest.raises(InputError, match=r"float16: must be float32 or bfloat16"):
        vae.encode(CLIP)
    with pytest.raises(InputError, match=r"float16: must be float32 or bfloat16"):
        vae.decode(torch.zeros(1, 24, 1, 2, 3))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"block_out_channels": (8, 8, 16)}, "four widths"),
        ({"layers_per_block": 0}, "layers_per_block = 0"),
        ({"block_out_channels": (0, 32, 32, 32)}, "at least 1"),
        ({"norm_num_groups": 48}, "norm_num_groups = 48"),
        ({"temporal_filters": 100}, "temporal_norm_groups = 32"),
    ],
)
def test_sizes_that_make_no_model(sizes, message):
    with pytest.raises(InputError, match=message):
        VideoVAEConfig(**sizes)
