"""The sampler against the published code's records of image-to-video."""

import pytest
import torch

from mugv_ds.models import DiT
from mugv_ds.objectives.flow import resolution_shift, sampling_times, shift_time
from mugv_ds.sampling.sampler import sample_latents
from tests.helpers.published import dit_config, part, read_i2v
from tests.helpers.records import relative

RECORDS = ("i2v", "i2v_long")


def given(name: str, **changes) -> dict:
    """The arguments of `sample_latents` that made a record."""
    r, metadata = read_i2v(name)
    model = DiT(dit_config(metadata))
    model.load_state_dict(part(r, "dit."), strict=True)
    text, mask = r["in.text"][:, 0], r["in.text_mask"]
    reference = torch.zeros_like(r["in.noise"])
    reference[:, :, :1] = r["out.reference_latent"]
    return {
        "model": model,
        "noise": r["in.noise"],
        "reference": reference,
        "frame_mask": r["in.frame_mask"].bool(),
        "text": text[:1],
        "text_mask": mask[:1],
        "negative_text": text[1:],
        "negative_mask": mask[1:],
        "fps": r["in.fps"],
        "height": metadata["frame_size"][0],
        "width": metadata["frame_size"][1],
        "steps": metadata["steps"],
        "guidance": metadata["cfg"],
    } | changes


def sample(name: str = "i2v", **changes) -> torch.Tensor:
    return sample_latents(**given(name, **changes))


@pytest.mark.parametrize("name", RECORDS)
def test_latents_match_the_published_code(name):
    record, _ = read_i2v(name)
    assert relative(sample(name), record["out.latent"]) <= 2e-5


@pytest.mark.parametrize("name", RECORDS)
def test_timesteps_match_the_published_code(name):
    record, metadata = read_i2v(name)
    shift = resolution_shift(*metadata["frame_size"], frames=record["in.noise"].shape[2])
    torch.testing.assert_close(sampling_times(metadata["steps"], shift), record["out.timesteps"], rtol=1e-6, atol=0)


def test_no_timestep_is_beyond_pure_noise():
    """In fp32 this shift rounds the first to 1000.0001, at which the published sampler loses a step."""
    shift = next(r for r in torch.linspace(0.1, 0.9, 1000).tolist() if 1000 * shift_time(torch.ones(1), r) > 1000)
    assert sampling_times(4, shift).max() == 1000


def test_the_reference_frame_stays_and_is_attended_to():
    record, _ = read_i2v("i2v")
    out = sample()
    assert torch.equal(out[0, :, :1], record["out.reference_latent"])
    other = given("i2v")["reference"] + 1
    assert relative(sample(reference=other)[:, :, 1:], out[:, :, 1:]) > 1e-4


def test_captions_of_unequal_length_are_padded_without_effect():
    arguments = given("i2v")
    tokens = int(arguments["negative_mask"].sum())
    short = {
        "negative_text": arguments["negative_text"][:, :tokens],
        "negative_mask": arguments["negative_mask"][:, :tokens],
    }
    assert tokens < arguments["text"].shape[1]
    assert relative(sample(**short), sample()) <= 1e-6


def test_guidance_one_is_the_prompt_alone():
    other = torch.ones_like(given("i2v")["negative_text"])
    assert relative(sample(guidance=1.0, negative_text=other), sample(guidance=1.0)) <= 1e-6


def test_outside_its_interval_guidance_is_the_prompt_alone():
    """The record's four timesteps are 1000 and three smaller ones."""
    times = read_i2v("i2v")[0]["out.timesteps"].tolist()
    assert torch.equal(sample(interval=(0, 1000)), sample())
    assert relative(sample(interval=(1e-3, 1e-2)), sample(guidance=1.0)) <= 1e-6
    some = sample(interval=(times[2] - 1, times[1] + 1))
    assert relative(some, sample()) > 1e-4 and relative(some, sample(guidance=1.0)) > 1e-4


@pytest.mark.parametrize("branch", [0, 1])
def test_a_rank_of_a_pair_gets_its_own_text_alone_at_all_times(branch):
    """What is kept of a text from step to step would otherwise be taken for the other text, outside the interval."""
    arguments = given("i2v")
    texts = (arguments["text"], arguments["negative_text"])
    masks = (arguments["text_mask"].bool(), arguments["negative_mask"].bool())
    model, seen = arguments["model"], []

    class Pair:
        """Computes what the other rank would."""

        def __init__(self):
            self.branch = branch

        def exchange(self, own):
            x, t, _, _, *rest = seen[-1]
            other = model(x, t, texts[1 - branch], masks[1 - branch], *rest)[:, :24]
            return (own, other) if branch == 0 else (other, own)

    def recorded(*call):
        seen.append(call)
        return model(*call)

    times = read_i2v("i2v")[0]["out.timesteps"].tolist()
    interval = (times[2] - 1, times[1] + 1)  # the first and the last of four steps are outside
    out = sample(model=recorded, pair=Pair(), interval=interval)
    assert len(seen) == 4 and all(torch.equal(call[2], texts[branch]) for call in seen)
    assert relative(out, sample(interval=interval)) <= 1e-6


def test_guidance_of_1_asks_for_the_prompts_alone():
    """It is what the prompt's branch says, for half of the work."""
    seen = []

    def model(x, timestep, text, *_):
        seen.append(text)
        return torch.zeros(len(x), 48, *x.shape[2:])

    noise, text, mask = torch.zeros(2, 24, 1, 4, 4), torch.ones(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    given = {"noise": noise, "reference": noise, "frame_mask": torch.ones(2, 1), "fps": torch.full((2,), 24.0)}
    given |= {"text": text, "text_mask": mask, "negative_text": -text, "negative_mask": mask}
    sample_latents(model, **given, height=32, width=32, steps=2, guidance=1.0, shift=1.0)
    assert len(seen) == 2 and all(torch.equal(one, text) for one in seen)


@pytest.mark.parametrize("guidance", [0.0, 4.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_each_step_asks_the_model_once_for_both_branches(guidance, steps):
    """A batch of two samples becomes four: both with their prompts, then both with the negative prompts."""
    calls = []

    def model(x, timestep, text, text_mask, x_mask, fps):
        calls.append((x, timestep, text, text_mask, x_mask, fps))
        return torch.zeros(len(x), 48, *x.shape[2:])

    noise = torch.randn(2, 24, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    text, negative = torch.full((2, 5, 8), 1.0), torch.full((2, 3, 8), -1.0)
    out = sample_latents(
        model,
        noise=noise,
        reference=torch.zeros_like(noise),
        frame_mask=torch.tensor([[True, True], [False, True]]),
        text=text,
        text_mask=torch.ones(2, 5, dtype=torch.bool),
        negative_text=negative,
        negative_mask=torch.ones(2, 3, dtype=torch.bool),
        fps=torch.tensor([8.0, 24.0]),
        height=32,
        width=32,
        steps=steps,
        guidance=guidance,
        shift=1.0,
    )
    assert len(calls) == steps
    assert [call[1].tolist() for call in calls] == [[1000 * (1 - i / steps)] * 4 for i in range(steps)]
    for x, _, texts, masks, x_mask, fps in calls:
        assert x.shape == (4, 24, 2, 4, 4) and torch.equal(x[:2], x[2:]) and torch.equal(x[:2], out)
        assert texts[:, :3, 0].tolist() == [[1.0] * 3] * 2 + [[-1.0] * 3] * 2 and not texts[2:, 3:].any()
        assert masks.sum(dim=1).tolist() == [5, 5, 3, 3]
        assert x_mask.tolist() == [[True, True], [False, True]] * 2 and fps.tolist() == [8.0, 24.0] * 2
