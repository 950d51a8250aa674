"""The sampler against the published code's record.

The first timestep of the record is 1000.0001: in fp32 the published shift rounds above 1000. The published sampler then
takes no step at all at that time, and at the second time mixes noise that it draws afresh, ambiently, into its starting
point: z = (1 − t/1000)·noise + (t/1000)·fresh. So the record starts there. `fresh` is not in it, but is the second draw
after `in.noise` of the generator (seed 2) that also drew the record's text, reference and noise, in this order.
"""

import pytest
import torch
from safetensors.torch import load_file

from mugv_ds.objectives.flow import interpolate, resolution_shift, sampling_times
from mugv_ds.sampling.sampler import euler, guided_velocity, sample_latents
from tests.helpers.records import GOLDEN, load_record, relative

GUIDANCE = 4.0


@pytest.fixture(scope="module")
def record() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "rflow_sample.safetensors")


def conditions(r: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    text, mask = r["in.text"][:, 0], r["in.text_mask"]
    return {
        "frame_mask": r["in.frame_mask"].bool(),
        "text": text[:1],
        "text_mask": mask[:1],
        "negative_text": text[1:],
        "negative_mask": mask[1:],
        "fps": r["in.fps"],
        "guidance": GUIDANCE,
    }


def record_start(r: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where the record's second step starts."""
    generator, shape = torch.Generator().manual_seed(2), r["in.noise"].shape
    text, reference, noise, _, fresh = (
        torch.randn(size, generator=generator) for size in (r["in.text"].shape, *[shape] * 4)
    )
    for name, drawn in (("in.text", text), ("in.reference_latent", reference), ("in.noise", noise)):
        assert torch.equal(r[name], drawn), name
    mixed = interpolate(noise, fresh, r["out.timesteps"][1:2])
    return torch.where(r["in.frame_mask"].bool()[:, None, :, None, None], mixed, reference)


def sample(r: dict[str, torch.Tensor], **changes) -> torch.Tensor:
    model, _ = load_record("dit_t2v")
    arguments = conditions(r) | {
        "noise": r["in.noise"],
        "reference": r["in.reference_latent"],
        "height": r["in.height"].item(),
        "width": r["in.width"].item(),
        "steps": 5,
    }
    return sample_latents(model, **(arguments | changes))


def test_timesteps_match_the_published_code(record):
    shift = resolution_shift(record["in.height"].item(), record["in.width"].item(), frames=4)
    torch.testing.assert_close(sampling_times(5, shift), record["out.timesteps"], rtol=1e-6, atol=0)


@torch.no_grad()
def test_steps_match_the_published_code(record):
    model, _ = load_record("dit_t2v")
    times = torch.cat([record["out.timesteps"][1:], torch.zeros(1)])
    out = euler(guided_velocity(model, **conditions(record)), record_start(record), times)
    assert relative(out, record["out.sample"]) <= 2e-5


@torch.no_grad()
def test_a_sample_takes_every_step_from_the_noise_given(record):
    """`sample_latents` is the record's integrator, from the record's noise, over all five steps."""
    model, _ = load_record("dit_t2v")
    noised = record["in.frame_mask"].bool()[:, None, :, None, None]
    start = torch.where(noised, record["in.noise"], record["in.reference_latent"])
    times = torch.cat([record["out.timesteps"], torch.zeros(1)])
    expected = euler(guided_velocity(model, **conditions(record)), start, times)
    assert relative(sample(record), expected) <= 1e-6


def test_the_reference_frame_stays_and_is_attended_to(record):
    out = sample(record)
    assert torch.equal(out[:, :, 0], record["in.reference_latent"][:, :, 0])
    other = sample(record, reference=record["in.reference_latent"] + 1)
    assert relative(other[:, :, 1:], out[:, :, 1:]) > 1e-4


def test_captions_of_unequal_length_are_padded_without_effect(record):
    """The negative prompt has three real tokens; cutting its padding off changes nothing."""
    short = {"negative_text": record["in.text"][1:, 0, :3], "negative_mask": record["in.text_mask"][1:, :3]}
    assert relative(sample(record, **short), sample(record)) <= 1e-6


def test_guidance_one_is_the_prompt_alone(record):
    other = {"negative_text": torch.ones_like(record["in.text"][1:, 0])}
    assert relative(sample(record, guidance=1.0, **other), sample(record, guidance=1.0)) <= 1e-6


@pytest.mark.parametrize("guidance", [1.0, 4.0])
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
