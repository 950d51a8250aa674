"""What `--dry-run` says of previews."""

import json
import re
from dataclasses import asdict

import pytest
import torch

from mugv_ds.config import CheckpointError, load_config
from mugv_ds.config.videovae import VideoVAEConfig
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.lora import adapter_shapes
from mugv_ds.plan import describe as described
from mugv_ds.plan.cost import layer_parameters
from mugv_ds.plan.describe import describe
from mugv_ds.plan.memory import GIB, predict_decoding, predict_sampling
from mugv_ds.weights.codec import read_codec_sizes
from tests.helpers.dataset import write_config, write_dataset
from tests.helpers.records import load_vae_record

LARGEST = (9, 40, 60)  # of those previewed; 45 · 60 · 20 / 10 + 2 = 5402 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("describe")
    write_dataset(folder, [(1, 4, 4)] * 4)
    write_dataset(folder, [(1, 4, 4), LARGEST, (2, 4, 4), (9, 60, 60)], "preview")
    vae, *_ = load_vae_record("vae_lengths")
    torch.save(vae.state_dict(), folder / "vae.pt")
    (folder / "vae.json").write_text(json.dumps(asdict(vae.config)))
    LinearCodec().save(folder / "codec.safetensors")
    return folder


def lines(folder, codec=None, precision="bf16", **sections) -> list[str]:
    """The lines about the stage and about previews."""
    preview = {"every": 1, "count": 3, "manifest": str(folder / "preview.csv"), "dir": "previews"}
    preview |= {} if codec is None else {"codec": str(folder / codec)}
    config = write_config(
        folder / "run", folder / "train.csv", model={"precision": precision}, preview=preview, **sections
    )
    text = describe(load_config(config), None, read_codec_sizes)
    return [line for line in text.splitlines() if line.startswith(("  stage", "  previews"))]


def test_memory_of_previews_is_what_is_resident_and_what_they_take(folder, monkeypatch):
    monkeypatch.setattr(described, "GIB", 1)  # bytes, of which the line shows tenths
    stage, line = lines(folder, "vae.pt")
    dit = load_config(folder / "run/config.json").model.dit()
    parameters = int(re.search(r"([\d,]+) parameters", stage)[1].replace(",", ""))
    vae, *_ = load_vae_record("vae_lengths")
    # One rank holds bf16 weights, fp32 gradients that add up, all of the optimizer, and two averages.
    resident = parameters * (2 + 4 + 12 + 8)
    size = sum(parameter.numel() for parameter in vae.parameters())
    sampling = resident + predict_sampling(dit, tokens_held=5402)
    decoding = resident + predict_decoding(vae.config, parameters=size, latent=LARGEST, window=6)
    assert line.startswith("  previews, latent 9×40×60 at most: 5,402 tokens, about ")
    assert [float(number) for number in re.findall(r"[\d.]+(?= GiB| while)", line)] == pytest.approx(
        [sampling, decoding], abs=0.1
    )
    monkeypatch.undo()
    assert f"about {sampling / GIB:.1f} GiB a device while they" in lines(folder, "vae.pt")[1]


def test_a_base_under_adapters_is_its_weights_alone(folder, monkeypatch):
    monkeypatch.setattr(described, "GIB", 1)
    whole, adapted = (lines(folder, **sections)[1] for sections in ({}, {"lora": {"rank": 2}}))
    whole, adapted = (float(re.search(r"about ([\d.]+) GiB", line)[1]) for line in (whole, adapted))
    config = load_config(folder / "run/config.json")
    adapters = sum(rows * columns for rows, columns in adapter_shapes(config.model.dit(), config.lora).values())
    parameters = sum(layer_parameters(config.model.dit()))
    # Of the base there remain 2 bytes of 26; the adapters, of which there is all, have their own.
    assert whole - adapted == pytest.approx(24 * parameters - 26 * adapters, abs=0.2)
    text = describe(config, None, read_codec_sizes)
    assert f"parameters: {parameters:,} (mugdit_debug, bf16), and {adapters:,} of the adapters" in text


def test_sequence_ranks_share_the_tokens_and_other_codecs_take_nothing(folder, monkeypatch):
    monkeypatch.setattr(described, "GIB", 1)
    shared, alone = (lines(folder, "codec.safetensors", parallel={"sequence": n})[1] for n in (2, 1))
    assert "VideoVAE" not in alone
    shared, alone = (float(re.search(r"about ([\d.]+) GiB", line)[1]) for line in (shared, alone))
    dit = load_config(folder / "run/config.json").model.dit()
    assert 0.4 * predict_sampling(dit, tokens_held=5402) < alone - shared < alone


def test_nothing_is_predicted_of_fp32_and_a_bad_codec_is_refused(folder):
    _, line = lines(folder, "vae.pt", precision="fp32")
    assert line == "  previews, latent 9×40×60 at most: 5,402 tokens; memory not predicted in fp32"
    with pytest.raises(CheckpointError, match="nowhere: holds no weights"):
        lines(folder, "nowhere")


def test_without_previews_there_is_no_line(folder):
    config = load_config(write_config(folder / "none", folder / "train.csv"))
    assert "previews, latent" not in describe(config, None, read_codec_sizes)


def test_the_published_video_vae_decodes_720p_in_a_few_gib():
    """Whatever the length, from a window on; 411,752,900 parameters."""
    by_length = [
        predict_decoding(VideoVAEConfig(), parameters=411_752_900, latent=(frames, 90, 160), window=6)
        for frames in (6, 14, 60)
    ]
    assert len(set(by_length)) == 1 and by_length[0] / GIB == pytest.approx(0.77 + 0.66 + 0.49 + 1.98, abs=0.01)
