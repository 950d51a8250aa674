"""Whole runs of the VideoVAE's training in real processes: stages, a kill and what is exported in the end."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mugv_ds.checkpoint.reader import open_checkpoint
from mugv_ds.cli.convert_vae import main as convert
from mugv_ds.config import load_config
from mugv_ds.config.vae_schema import VaeTrainConfig
from mugv_ds.data.clips import ClipData
from mugv_ds.models.videovae import UNUSED_PARAMETERS
from mugv_ds.weights.videovae import load_video_vae
from tests.helpers.saved import write_checkpoint
from tests.helpers.vae import TINY, VaeRun, train_vae, without_onednn, write_vae_config, write_videos

GAN = {"warmup_steps": 2, "ramp_steps": 2, "width": 8}
UNUSED = set(UNUSED_PARAMETERS) - {"logvar"}
# Their gradients are zero but for rounding: a key's bias shifts all scores alike, and at the logits' bias those of the
# two hinges cancel while all logits are within the margins.
NEUTRAL = {f"spatial_vae.module.{half}.mid_block.attentions.0.to_k.bias" for half in ("encoder", "decoder")}
NEUTRAL |= {"discriminator.layers.11.bias"}


def state_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: fp32 masters and moments."""
    with open_checkpoint(folder / f"checkpoints/step-{step:08d}") as saved:
        return {f"{name}/{kind}": saved.read(name, kind) for name in saved.names() for kind in saved.manifest.kinds}


def weights_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return {key.removesuffix("/weight"): v for key, v in state_of(folder, step).items() if key.endswith("/weight")}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights that differ in any bit."""
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("videos")
    return write_videos(root), write_videos(root, "val", count=3, image=False)


def configure(folder: Path, videos: tuple[Path, Path], **sections: dict) -> Path:
    sections["data"] = {"val_manifest": str(videos[1]), "val_frames": 17, "val_window": 1} | sections.get("data", {})
    return write_vae_config(folder, videos[0], **sections)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, videos) -> Path:
    """The folder of a run with a GAN on two ranks that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    preview = {"every": 6, "count": 2, "dir": str(folder / "previews")}
    train_vae(configure(folder, videos, gan=GAN, loss={"perceptual": 0.0, "adaptive_after": 3}, preview=preview), 2)
    return folder


def test_the_discriminator_learns_first_and_what_takes_no_part_never_moves(straight):
    start, warm, end = (weights_of(straight, step) for step in (0, 2, 6))
    critics = {name for name in start if name.startswith("discriminator.")}
    balanced = {"discriminator.layers.11.bias"}  # the hinges' gradients cancel while all logits are within the margins
    assert critics - balanced <= moved(start, warm) <= critics, (
        "the VideoVAE is frozen while the discriminator warms up"
    )
    assert start.keys() - moved(warm, end) - balanced == UNUSED, "six parameters have no place in the computation"
    moments = state_of(straight, 6)
    assert not any(moments[f"{name}/{kind}"].any() for name in UNUSED for kind in ("exp_avg", "exp_avg_sq"))


def test_a_run_writes_its_scalars(straight):
    found = scalars(straight)
    assert list(found["train/loss"]) == list(found["train/rec"]) == list(found["train/discriminator"]) == [*range(1, 7)]
    assert all(0 < rec < 3 for rec in found["train/rec"].values())
    assert list(found["train/gan"]) == [4, 5, 6], "γ is 0 until a step after the warm-up"
    assert "train/perceptual" not in found and "validation/lpips" not in found
    for name in ("psnr", "ssim"):
        assert list(found[f"validation/{name}"]) == [0, 6]
        whole, edges, elsewhere = (found[f"validation/{name}{group}"][6] for group in ("", "_at_edges", "_elsewhere"))
        # Latents of 17 frames are 3, so of the frames 0 | 1–8 | 9–16 four are next to another window.
        assert whole == pytest.approx((4 * edges + 13 * elsewhere) / 17, rel=1e-5)
    assert {tag for tag in found if tag.startswith("rec/")} <= {"rec/1_frames", "rec/9_frames", "rec/16_frames"}
    assert found["speed/frames_per_second"][6] > 0 and found["train/grad_norm"][6] > 0


def test_a_run_begins_with_what_it_will_do(straight):
    (log,) = straight.glob("output-*")
    said = [line for line in log.read_text().splitlines() if not line.startswith(("note:", "warning:"))]
    names = ["model", "device", "data", "steps", "learning rate", "checkpoints", "curves", "previews", "logs"]
    assert [line[:15].rstrip() for line in said[: len(names)]] == names
    model, device, data = (line[15:] for line in said[:3])
    sizes = {n: v.numel() for n, v in weights_of(straight, 6).items() if not n.startswith("discriminator.")}
    trained = sum(size for name, size in sizes.items() if name not in UNUSED)
    number = f"{sum(sizes.values()):,} parameters, {trained:,} of them trained"
    assert model == f"VideoVAE, {number}, fp32, with a discriminator"
    assert device == "2 × CPU" and data.endswith("train.csv: 7 rows, clips of 1, 9, 16 frames; 3 held out")
    assert said[len(names)] == "starting fresh, from initial weights"


def test_a_run_shows_reconstructions(straight):
    folder = straight / "previews/step-000006"
    assert sorted(path.name for path in folder.iterdir()) == ["00-val-0.mp4", "01-val-1.mp4", "sheet.png"]


@pytest.mark.long
def test_a_killed_run_goes_on_bitwise(tmp_path, videos, straight):
    """kill -9 of a rank after step 4: the restart reaches the same bits, of the discriminator and its moments too."""
    config = configure(tmp_path, videos, gan=GAN, loss={"perceptual": 0.0, "adaptive_after": 3}, schedule={"steps": 40})
    run = VaeRun(config, 2)
    latest = tmp_path / "checkpoints/latest"
    run.wait_for(lambda: latest.exists() and latest.read_text().strip() == "step-00000004")
    run.ranks[1].kill()
    statuses, _ = run.finish()
    assert 0 not in statuses
    for later in (tmp_path / "checkpoints").glob("step-*"):
        if later.name > "step-00000004":
            shutil.rmtree(later)
    output = train_vae(config, 2, "schedule.steps=6")
    assert "going on after step 4" in output
    resumed, expected = state_of(tmp_path, 6), state_of(straight, 6)
    assert resumed.keys() == expected.keys()
    assert not [key for key, value in expected.items() if not torch.equal(resumed[key], value)]


def test_one_rank_trains_as_two_do(tmp_path, videos):
    """Accumulating two micro-batches against two ranks: the same clips, crops, noise and windows."""
    curves = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        train_vae(configure(folder, videos, schedule={"steps": 3}), ranks)
        curves.append(scalars(folder))
    for tag in ("train/loss", "train/rec", "train/kl", "train/grad_norm", "train/param_norm", "validation/psnr"):
        assert curves[0][tag] == pytest.approx(curves[1][tag], rel=2e-4), tag


@pytest.mark.long
def test_the_stages_follow_one_another(tmp_path, videos):
    """From an image VAE with its half frozen, on features and in bf16; then all of it on pixels, from that run."""
    from diffusers import AutoencoderKL

    sizes = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**sizes, **blocks).save_pretrained(tmp_path / "image_vae", safe_serialization=True)
    one = configure(
        tmp_path / "one",
        videos,
        model=TINY | {"image_vae": str(tmp_path / "image_vae"), "train": "temporal", "precision": "bf16"},
        loss={"target": "features", "identity": 1.0, "windows": [1, 2]},
        schedule={"steps": 4},
    )
    assert f"starting fresh, from {tmp_path / 'image_vae'}" in train_vae(one, 2, before=without_onednn)
    start, end = weights_of(tmp_path / "one", 0), weights_of(tmp_path / "one", 4)
    assert start.keys() - moved(start, end) == {name for name in start if name.startswith("spatial_vae.")}
    image_vae = load_file(tmp_path / "image_vae/diffusion_pytorch_model.safetensors")
    for name, value in image_vae.items():
        if name.startswith(("encoder.", "decoder.")):  # quant_conv has no place
            assert torch.equal(start[f"spatial_vae.module.{name}"], value.bfloat16().float()), name
    assert scalars(tmp_path / "one")["train/identity"]
    shutil.rmtree(tmp_path / "image_vae")
    train_vae(one, 2, "schedule.steps=5", before=without_onednn)  # goes on without it

    three = configure(
        tmp_path / "three", videos, checkpoint={"init_from": str(tmp_path / "one/checkpoints")}, schedule={"steps": 2}
    )
    train_vae(three, 2)
    begin, trained = weights_of(tmp_path / "three", 0), weights_of(tmp_path / "three", 2)
    assert not moved(begin, weights_of(tmp_path / "one", 5))
    assert begin.keys() - moved(begin, trained) - NEUTRAL == UNUSED


def test_a_video_that_cannot_be_read_is_replaced(tmp_path):
    manifest = write_videos(tmp_path / "videos", count=3, image=False)
    (tmp_path / "videos/train-1.mp4").write_bytes(b"not a video")
    output = train_vae(write_vae_config(tmp_path / "run", manifest, schedule={"steps": 4}), 2)
    assert "sample train-1 is set aside, train-" in output and "train-1.mp4: not a readable video" in output


def test_bf16_is_refused_on_a_cpu(tmp_path, videos):
    config = configure(tmp_path, videos, model=TINY | {"precision": "bf16"})
    statuses, output = VaeRun(config, 1).finish()
    assert statuses == [2] and output.count("error: model.precision = bf16: on a CPU") == 1


def test_an_export_is_a_vae_pt_whose_latents_are_normalised(tmp_path, straight, videos):
    assert convert(["--ckpt", str(straight / "checkpoints"), "--out", str(tmp_path)]) == 0
    vae, trained = load_video_vae(tmp_path / "vae.pt"), weights_of(straight, 6)
    for name, value in vae.named_parameters():
        assert torch.equal(value.flatten(), trained[name].flatten()), name
    config = load_config(straight / "config.json", schema=VaeTrainConfig)
    held_out = ClipData(config.data).held_out
    clips = torch.stack([held_out.read(item, 0)[0].frames for item in range(3)])
    video = clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    drawn = torch.cat([vae.encode(video, sample=True) for _ in range(10)]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(drawn.mean(dim=1), torch.zeros(24), atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.std(dim=1), torch.ones(24), atol=0.1, rtol=0)


def test_a_checkpoint_of_the_dit_is_no_videovae(tmp_path, capsys):
    write_checkpoint(tmp_path / "dit", 1, [("start_token", torch.zeros(4))])
    assert convert(["--ckpt", str(tmp_path / "dit"), "--out", str(tmp_path / "out")]) == 2
    assert "it is of another kind of run" in capsys.readouterr().err


def test_an_export_can_keep_the_shift_and_scale_of_another(tmp_path, straight):
    ckpt = str(straight / "checkpoints/step-00000004")
    assert convert(["--ckpt", ckpt, "--out", str(tmp_path / "a")]) == 0
    kept = str(tmp_path / "a/vae.pt")
    arguments = ["--out", str(tmp_path / "b"), "--format", "safetensors", "--shift-scale", kept]
    assert convert(["--ckpt", str(straight / "checkpoints"), *arguments]) == 0
    a, b = load_video_vae(kept), load_video_vae(tmp_path / "b/vae.safetensors")
    assert torch.equal(a.shift, b.shift) and torch.equal(a.scale, b.scale) and a.scale.std() > 0
    assert not torch.equal(a.logvar, b.logvar)
