"""The aesthetic score, with a random CLIP of two layers."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare import aesthetic
from mugv_ds.prepare.aesthetic import load_head
from mugv_ds.prepare.views import WeightsError
from tests.helpers.clip_views import broken_clip, clip_view

WIDTH = 16


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=WIDTH)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture
def head(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "linear.safetensors"
    save_file({"weight": torch.randn(1, WIDTH), "bias": torch.tensor([5.0])}, path)
    return path


def config(folder, head, **more):
    return PrepareConfig(aesthetic={"clip": str(folder), "head": str(head), "device": "cpu", **more})


def noise(number):
    frames = np.random.default_rng(number).integers(0, 255, (9, 70, 100, 3), dtype=np.uint8)
    return clip_view(number, frames)


def test_the_score_is_the_heads_of_the_mean_frame(clip_folder, head):
    first, broken, second = aesthetic.load(config(clip_folder, head, batch=4))([noise(0), broken_clip(1), noise(2)])
    assert broken["error"] and "aesthetic" not in broken
    assert first["aesthetic"] != second["aesthetic"]
    embedding = torch.from_numpy(second["embedding"]).float()
    assert second["embedding"].dtype == np.float16 and embedding.norm().item() == pytest.approx(1, abs=1e-3)

    # By hand: the head of each of the three frames' embeddings of length 1, and their mean.
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    frames = noise(2).frames(3, shortest=64)
    model = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        found = model(**processor(list(frames), return_tensors="pt")).image_embeds
    found = found / found.norm(dim=1, keepdim=True)
    torch.manual_seed(1)
    wanted = (found @ torch.randn(1, WIDTH).T + 5).mean().item()
    assert second["aesthetic"] == pytest.approx(wanted, abs=1e-5)
    assert torch.allclose(embedding, nn.functional.normalize(found.mean(dim=0), dim=0), atol=1e-3)


def test_the_same_clips_give_the_same_bits_and_none_give_no_rows(clip_folder, head):
    score = aesthetic.load(config(clip_folder, head, batch=2))
    once, again = score([noise(0), noise(1)]), score([noise(0), noise(1)])
    assert [row["aesthetic"] for row in once] == [row["aesthetic"] for row in again]
    assert all((a["embedding"] == b["embedding"]).all() for a, b in zip(once, again, strict=True))
    assert score([]) == [] and score([broken_clip(1)])[0]["error"]


def test_heads_of_several_layers_are_read_as_they_were_published(tmp_path):
    """The later predictor is Linear, Dropout, Linear, …; saved by torch.save with the numbers of its layers."""
    chain = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.2), nn.Linear(8, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    path = tmp_path / "mlp.pth"
    torch.save({f"layers.{name}": tensor for name, tensor in chain.state_dict().items()}, path)
    embedding = torch.randn(5, WIDTH)
    assert torch.equal(load_head(path, WIDTH)(embedding), chain.eval()(embedding))
    assert torch.equal(load_head(aesthetic._head_file(str(tmp_path)), WIDTH)(embedding), chain(embedding))


class Evil:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"weight": torch.zeros(1, 9), "bias": torch.zeros(1)}, "expected a linear layer of 16 inputs"),
        ({"weight": torch.zeros(2, WIDTH), "bias": torch.zeros(2)}, "ends in 2 values"),
        ({"weight": torch.zeros(1, WIDTH)}, "expected a linear layer"),
        ({"running_mean": torch.zeros(1)}, "layers with weight and bias only"),
        ({"weight": torch.zeros(1, WIDTH, dtype=torch.int64), "bias": torch.zeros(1)}, "layers with weight and bias"),
        ([1, 2], "ends in 16 values"),
        ({"weight": Evil()}, "nothing was executed"),
    ],
)
def test_heads_that_are_none_are_refused(tmp_path, capsys, state, words):
    path = tmp_path / "head.pth"
    torch.save(state, path)
    with pytest.raises(WeightsError, match=words) as error:
        load_head(path, WIDTH)
    assert str(path) in str(error.value) and "ran" not in capsys.readouterr().out


def test_missing_and_damaged_files_are_named(tmp_path, clip_folder, head):
    with pytest.raises(WeightsError, match=r"none\.pth: No such file"):
        load_head(tmp_path / "none.pth", WIDTH)
    (tmp_path / "cut.safetensors").write_bytes(head.read_bytes()[:-3])
    with pytest.raises(WeightsError, match=r"cut\.safetensors: not weights of a head"):
        load_head(tmp_path / "cut.safetensors", WIDTH)
    with pytest.raises(WeightsError, match="has 2 files of weights"):
        aesthetic._head_file(str(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    for asked in (aesthetic.weights, aesthetic.load):
        with pytest.raises(WeightsError, match=str(empty)):
            asked(config(empty, head))


def test_a_clip_model_without_its_projection_is_refused(tmp_path, clip_folder, head):
    from safetensors.torch import load_file

    state = load_file(clip_folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
    with pytest.raises(WeightsError, match=r"has no visual_projection\.weight"):
        aesthetic.load(config(tmp_path, head))


def test_other_weights_have_another_hash(tmp_path, clip_folder, head):
    first = aesthetic.weights(config(clip_folder, head))
    save_file({"weight": torch.zeros(1, WIDTH), "bias": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert aesthetic.weights(config(clip_folder, tmp_path / "other.safetensors")) != first
    assert aesthetic.why_skipped(PrepareConfig()) == "aesthetic.clip and aesthetic.head not given"
    assert aesthetic.why_skipped(config(clip_folder, head)) is None
