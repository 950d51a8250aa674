"""Weights at URLs: the newest sound checkpoint of a run, published ones, adapters; and a run that starts from them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.manifest import MANIFEST_NAME
from mugv_ds.checkpoint.reader import CheckpointReader
from mugv_ds.cli.sample import main as sample
from mugv_ds.config.errors import CheckpointError
from mugv_ds.files.copies import cache_folder
from mugv_ds.files.objects import ObjectFolder
from mugv_ds.models import DiTConfig
from mugv_ds.models.codec import LinearCodec
from mugv_ds.weights import located as module
from mugv_ds.weights.located import located, resolved
from mugv_ds.weights.published import PublishedWeights
from mugv_ds.weights.start import find_start
from tests.helpers.published import toy_dit, write_dit
from tests.helpers.saved import write_checkpoint
from tests.helpers.store import flips

TENSORS = {"a.weight": torch.arange(35.0).view(5, 7)}
FILE = "rank-1.weight.safetensors"


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch, proxy) -> Path:
    monkeypatch.setenv("MUGV_DS_CACHE", str(tmp_path / "copies"))
    module._copy.cache_clear()
    yield tmp_path / "copies"
    module._copy.cache_clear()


@pytest.fixture
def run(tmp_path, bucket) -> ObjectFolder:
    """A run's checkpoints of the steps 3 and 5, with an average, which is larger than the weights are."""
    objects = ObjectFolder(f"{bucket}/runs/a", "")
    for step in (3, 5):
        folder = write_checkpoint(tmp_path / "run", step, TENSORS.items(), averages={"ema_0.100": 2.0})
        for file in folder.iterdir():
            objects.write(f"{folder.name}/{file.name}", file.read_bytes())
    objects.write("latest", b"step-00000005\n")
    return objects


def held(folder: Path) -> bool:
    with CheckpointReader(folder, files.read_manifest(folder)) as saved:
        return torch.equal(saved.read("a.weight"), TENSORS["a.weight"])


def test_of_a_run_the_newest_sound_checkpoint_is_copied_once(run, proxy, capfd):
    """Its weights alone; a broken one is named and passed over."""
    newest = f"{run}/step-00000005"
    assert find_start(str(run)) == resolved(str(run)) == newest and held(located(run))
    assert {path.name for path in located(newest).iterdir()} == {MANIFEST_NAME, "rank-0.weight.safetensors", FILE}
    asked = len(proxy.seen)
    assert located(newest) == located(str(run)) and len(proxy.seen) == asked
    module._copy.cache_clear()  # another process of the host
    assert held(located(newest))
    fetched = [path.partition("?")[0] for method, path in proxy.seen if method == "GET" and ".safetensors" in path]
    assert [path.rpartition("/")[2] for path in fetched] == ["rank-0.weight.safetensors", FILE]

    content = run.read(f"step-00000005/{FILE}", 1 << 20)
    proxy.fault(lambda request: request.method == "PUT", flips)
    run.write(f"step-00000005/{FILE}", content)
    module._copy.cache_clear()
    assert find_start(str(run)) == f"{run}/step-00000003"
    assert f"passed over: {newest}/{FILE}: " in "".join(capfd.readouterr())
    run.remove([f"step-00000003/{FILE}"])
    module._copy.cache_clear()
    with pytest.raises(CheckpointError, match=rf"{run}: holds no sound checkpoint"):
        located(str(run))


def test_published_weights_are_copied_with_what_is_beside_them(bucket, tmp_path):
    objects = ObjectFolder(f"{bucket}/exports", "")
    save_file(TENSORS, tmp_path / "dit.safetensors")
    content = (tmp_path / "dit.safetensors").read_bytes()
    for name in ("one/dit.safetensors", "hub/transformer/diffusion_pytorch_model.safetensors", "other/x.safetensors"):
        objects.write(name, content)
    for name in ("one/config.json", "hub/model_index.json", "hub/transformer/config.json", "other/adapter_config.json"):
        objects.write(name, b"{}")
    objects.write("one/README.md", b"text")
    folder = located(f"{objects}/one")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "dit.safetensors"]
    hub = located(f"{objects}/hub/")
    assert sorted(path.name for path in hub.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    file = located(f"{objects}/other/x.safetensors")
    assert torch.equal(PublishedWeights(file)["a.weight"], TENSORS["a.weight"])
    assert (file.parent / "adapter_config.json").read_bytes() == b"{}"
    assert all(path.is_relative_to(cache_folder()) for path in (folder, hub, file))
    assert located(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match=rf"{objects}/nothing: no weights are there"):
        located(f"{objects}/nothing")


def test_a_copy_that_is_removed_is_made_again(run, copies):
    folder = located(run)
    shutil.rmtree(copies)
    module._copy.cache_clear()
    assert located(run) == folder and held(folder)


def test_videos_are_sampled_from_a_url(bucket, tmp_path):
    """The same as from the files."""
    toy, objects = tmp_path / "toy", ObjectFolder(f"{bucket}/exports/toy", "")
    toy.mkdir()
    config = DiTConfig(144, 2, 2, caption_channels=16)
    write_dit(toy, toy_dit(config).state_dict(), config)
    clips = 2 * torch.rand(20, 3, 16, 16, 24, generator=torch.Generator().manual_seed(0)) - 1
    LinearCodec.fit(clips).save(tmp_path / "codec.safetensors")
    for path in toy.iterdir():
        objects.write(path.name, path.read_bytes())
    codec = ObjectFolder(f"{bucket}/codecs", "")
    codec.write("codec.safetensors", (tmp_path / "codec.safetensors").read_bytes())
    made = {}
    for name, weights, of in (
        ("files", str(toy), str(tmp_path / "codec.safetensors")),
        ("urls", str(objects), f"{codec}/codec.safetensors"),
    ):
        models = ["--weights", weights, "--codec", of, "--text-encoder", "hash", "--max-text-tokens", "40"]
        sizes = ["--frames", "16", "--height", "16", "--width", "24", "--steps", "2", "--fps", "12"]
        assert sample(["--prompt", "clouds", "--out", str(tmp_path / name), *models, *sizes]) == 0
        (made[name],) = (tmp_path / name).glob("*.mp4")
    assert made["files"].read_bytes() == made["urls"].read_bytes()
