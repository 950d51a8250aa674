"""DPO and KTO in the engine: the objective's own gradient under every layout, and references however they come."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mugv_ds.config import load_config
from mugv_ds.config.errors import TrainingError
from mugv_ds.data.readers import Batch, stack
from mugv_ds.data.reference import KeyMismatch, read_reference
from mugv_ds.data.run_data import RunData
from mugv_ds.engine.evaluate.evaluate import _about
from mugv_ds.engine.evaluate.reference import reference_key
from mugv_ds.engine.feed import Feed
from mugv_ds.engine.loop import Trainer
from mugv_ds.engine.metrics import preference_means
from mugv_ds.engine.objective import Objective
from mugv_ds.models import DiT, DiTConfig
from mugv_ds.models.dit import init_weights, patch_pixels
from mugv_ds.models.flops import SampleCost
from mugv_ds.models.rope import patch_grid, positions
from mugv_ds.objectives.flow import flow_loss
from mugv_ds.objectives.preference import PREFERENCE_TERMS, dpo_loss, kl_reference_point, kto_loss
from mugv_ds.parallel.layout import RankCoordinates
from mugv_ds.parallel.pipeline import Labels
from mugv_ds.weights.start import start_digest
from tests.helpers import trainer
from tests.helpers.dataset import CHANNELS, write_config, write_dataset
from tests.helpers.distributed import run_ranks
from tests.helpers.launcher import finish, launch
from tests.parallel.test_layouts import perturb

SHAPES = [(2, 4, 6), (1, 4, 4)]
LAYOUTS = {"one": (1, 1, 1), "dp2": (2, 1, 1), "sp2-pp2": (1, 2, 2)}
BETA, SFT_WEIGHT, BETA1 = 20.0, 0.3, 0.9


def annotate(manifest: Path, objective: str) -> Path:
    """The manifest's rows as pairs (each with the next row of its shape) or with labels."""
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        if objective == "dpo":
            pair, place = divmod(i, 2 * len(SHAPES))
            row |= {"pair_id": f"pair-{pair}-{place % len(SHAPES)}", "rank": 1 + place // len(SHAPES)}
        else:
            row["label"] = "good" if i % 3 else "bad"
    out = manifest.with_name(f"{objective}.csv")
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return out


def configure(folder: Path, root: Path, objective: str, layout: tuple[int, int, int], **source) -> Path:
    parallel = dict(zip(("data", "sequence", "pipeline"), layout, strict=True))
    return write_config(
        folder,
        root / "train.csv",
        data={"global_batch_size": 8, "micro_batch_size": 2},
        flow={"caption_drop": 0.2},
        parallel=parallel,
        checkpoint={"init_from": str(root / "policy.safetensors")},
        optimizer={"betas": [BETA1, 0.999], "gradient_clipping": 0.0, "eps": 1e-6},
        preference={
            "objective": objective,
            "beta": BETA,
            "sft_weight": SFT_WEIGHT,
            "sft_ratio": 0.5,
            **({"bad_weight": 1.5} if objective == "kto" else {}),
            "sources": [{"name": "a", "manifest": str(root / f"{objective}.csv"), **source}],
        },
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("preference")
    manifest = write_dataset(root, SHAPES * 12)
    for objective in ("dpo", "kto"):
        annotate(manifest, objective)
    save_file(policy().state_dict(), root / "policy.safetensors")
    return root


def policy() -> DiT:
    """What every run starts from; its weights are off their initial zeros."""
    model = DiT(DiTConfig(144, 2, 2, caption_channels=CHANNELS))
    init_weights(model, "", seed=0)
    perturb([("", model)])
    return model


def expected(path: Path) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """Loss and gradients of step 0 by the formulas, and the reference's losses: plain model, whole batch at once.

    A policy that differs from the reference is what the objective is for: its loss counts 1% more here and there.
    """
    config = load_config(path)
    data = RunData(config, SampleCost.of(config), 1)
    sources, step = data.readers, data.plan.step(0)
    model = policy()

    def losses(refs) -> torch.Tensor:
        batch = sources(refs)
        out = model(batch.x, batch.timestep, batch.text, batch.text_mask, batch.x_mask, batch.fps)
        return flow_loss(out, batch.target, batch.x_mask)

    now = losses(step.refs)
    then = now.detach() * offsets(sources(step.refs).row)
    if config.preference.objective == "dpo":
        loss = dpo_loss(now[0::2], now[1::2], then[0::2], then[1::2], BETA).mean()
    else:
        good = sources(step.refs).role > 0
        weights = {"good_weight": 1.0, "bad_weight": 1.5}
        loss = kto_loss(now, then, good, beta=BETA, kl_reference_point=kl_reference_point(then - now), **weights).mean()
        assert kl_reference_point(then - now) > 0
    loss = loss + SFT_WEIGHT * losses(step.companions).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, then


def offsets(rows: torch.Tensor) -> torch.Tensor:
    """By how much the reference's loss is made to differ from the policy's."""
    return 1.02 + 0.05 * torch.sin(rows.double()).float()


def train_with_another_reference(paths: list[Path]) -> None:
    """One step of each config, with references that differ from the policy by `offsets`."""
    for path in paths:
        made = trainer.ReferenceModel.complete

        def complete(self, first, stop, made=made):
            scaled = [cells.copy() for cells in made(self, first, stop)]
            for cells in scaled:
                cells["loss"] *= offsets(torch.arange(len(cells))).numpy()[:, None]
            return scaled

        trainer.ReferenceModel.complete = complete
        try:
            trainer.run(path, path.parent / "out", 1)
        finally:
            trainer.ReferenceModel.complete = made


@pytest.fixture(scope="module")
def results(root) -> dict[tuple[str, str], list[dict]]:
    paths = {
        (objective, name): configure(root / f"{objective}-{name}", root, objective, layout)
        for objective in ("dpo", "kto")
        for name, layout in LAYOUTS.items()
    }
    for name, (data, sequence, pipeline) in LAYOUTS.items():
        these = [path for (_, layout), path in paths.items() if layout == name]
        run_ranks(data * sequence * pipeline, train_with_another_reference, these)
    return {
        case: [torch.load(file, weights_only=True) for file in sorted((path.parent / "out").iterdir())]
        for case, path in paths.items()
    }


@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_the_formula(root, results, objective, layout):
    loss, gradients, _ = expected(root / f"{objective}-one/config.json")
    ranks = results[objective, layout]
    for rank in ranks:
        assert rank["losses"] == pytest.approx([loss], rel=1e-5)
    found = {name: gradient for rank in ranks for name, gradient in rank["gradients"].items()}
    assert found.keys() == gradients.keys()
    errors = {name: float((found[name] - g).norm() / g.norm()) for name, g in gradients.items()}
    assert max(errors.values()) <= 1e-5, max(errors.items(), key=lambda item: item[1])


@pytest.mark.long
def test_a_cached_reference_equals_one_of_the_run(root, results, tmp_path):
    """Written by the command on two data ranks, and measured in the runs of every layout, at every visit."""
    cache = tmp_path / "reference.parquet"
    path = configure(tmp_path, root, "dpo", (2, 1, 1), reference=str(cache))
    status, output = finish(launch(path, 2, script="tools/reference.py"))
    assert status == 0, output
    assert f"{cache}: 96 losses of 4 visits" in output
    run_ranks(2, train_with_another_reference, [path])
    (cached,) = torch.load(tmp_path / "out/rank0.pt", weights_only=True)["references"]
    assert cached.shape == (24, 4) and cached.isfinite().all()
    for name in LAYOUTS:
        for rank in results["dpo", name]:
            torch.testing.assert_close(rank["references"][0], cached, rtol=1e-6, atol=0)
    refused = load_config(path, ["data.seed=1"])
    index = RunData(refused, SampleCost.of(refused), 1).sources[0]
    weights = start_digest(root / "policy.safetensors", refused)
    with pytest.raises(KeyMismatch, match="noise"):
        read_reference(cache, reference_key(refused, index, weights), ["unused"])


def test_both_sides_of_a_pair_share_timestep_and_noise_held_out_too(root, tmp_path):
    config = load_config(configure(tmp_path, root, "dpo", (1, 1, 1), val_manifest=str(root / "dpo.csv")))
    data = RunData(config, SampleCost.of(config), 1)
    for reader in (data.readers.readers[1], data.held_out_annotations(0)):
        for item in range(len(reader.rows)):
            better, worse = reader.read(item, 0)
            assert better.timestep == worse.timestep == pytest.approx(reader.time(item, 0))
            noise = [side.x - (1 - side.timestep / 1000) * side.target for side in (better, worse)]  # ε, where noised
            noised = better.x_mask[None, :, None, None] & worse.x_mask[None, :, None, None]
            torch.testing.assert_close(noise[0] * noised, noise[1] * noised, rtol=0, atol=1e-5)
            assert (better.role, worse.role) == (1, -1) and not torch.equal(better.target, worse.target)
            assert torch.equal(better.x_mask, worse.x_mask)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_given_first_frames_take_no_part_in_either_side_s_error(root, tmp_path, objective, reduction):
    """From the files to the loss: what is predicted of them changes neither errors, nor the reference's, nor the loss.

    The sum is over the elements of the noised frames alone.
    """
    (frames, height, width), rows = SHAPES[0], 4
    elements = 24 * (frames - 1) * height * width
    beta = 1.0 if reduction == "mean" else 1.0 / elements
    changes = ["flow.first_frame_share=1.0", f"preference.reduction={reduction}", f"preference.beta={beta}"]
    config = load_config(configure(tmp_path, root, objective, (1, 1, 1)), changes)
    reader = RunData(config, SampleCost.of(config), 1).readers.readers[1]
    items = [item for item in range(len(reader.rows)) if tuple(reader.shapes[item]) == SHAPES[0]]
    batch = stack(sample for item in items for sample in reader.read(item, 0))
    batch = Batch(*(tensor[:rows] for tensor in batch))
    batch = batch._replace(reference=torch.tensor([1.5, 1.2, 1.4, 1.3]))
    assert not batch.x_mask[:, 0].any() and batch.x_mask[:, 1:].all() and set(batch.role.tolist()) == {1, -1}
    patches = torch.arange(frames * height // 2 * width // 2 + 2)
    module = SimpleNamespace(is_first=True, is_last=True, token_n=patches)
    process = SimpleNamespace(coordinates=RankCoordinates(0, 0, 0), device=torch.device("cpu"), group=None)
    feed = Feed(module, process, config.data, CHANNELS)
    ((_, given),) = feed.stage([batch], SHAPES[0], rows, 1, preferred=1)
    given = Labels(*given)

    def errors(first: float, second: float) -> tuple[torch.Tensor, float]:
        """Errors as the reference's are measured, and the loss; the frames are predicted off by so much."""
        off = torch.tensor([first, second])[None, None, :, None, None].expand_as(batch.target)
        velocity = patch_pixels(batch.target + off)[:, positions(patches, patch_grid(*SHAPES[0])).patch_N]
        minimised = Objective(config.preference, None, None, 1)
        with torch.no_grad():
            minimised(velocity, given)
        return minimised.recorded[0], minimised(velocity.requires_grad_(), given)[0].item()

    error, loss = errors(0.0, 1.1)
    torch.testing.assert_close(error, torch.full((rows,), 1.21))
    for off in (7.0, -1e6):
        changed, changed_loss = errors(off, 1.1)
        assert torch.equal(changed, error) and changed_loss == loss
    assert errors(0.0, 1.2)[0].min() > error.max()
    assert given.elements.tolist() == _about(batch)[4].tolist() == [elements] * rows


def test_a_run_ends_where_a_side_s_error_leaves_the_reference_s(root, tmp_path):
    """The message names step, stream, side and what to do; a class that no sample was of bounds nothing."""
    config = load_config(configure(tmp_path, root, "kto", (1, 1, 1)))

    def end(message: str) -> None:
        raise TrainingError(message)

    run = SimpleNamespace(config=config, guard=SimpleNamespace(fail=end))
    sums = dict.fromkeys(PREFERENCE_TERMS, 1.0) | {"better_count": 4.0, "worse_count": 2.0, "count": 6.0}
    sums |= {"better_loss": 8.0, "better_reference": 4.0, "worse_loss": 10.0, "worse_reference": 2.0}

    def record(**changes: float) -> dict[str, float]:
        means = preference_means({name: torch.tensor(value) for name, value in (sums | changes).items()})
        Trainer._bound(run, 40, {"physics": means})
        return means

    means = record()  # both are at their bounds
    assert (means["better_ratio"], means["worse_ratio"]) == (2.0, 5.0) and means["better_share"] == pytest.approx(2 / 3)
    with pytest.raises(
        TrainingError, match=r"step 40: physics: the better side's error is 2.25, .*_better_ratio = 2 ×"
    ):
        record(better_loss=9.0)
    with pytest.raises(
        TrainingError, match=r"worse side's error is 5.5, .*max_worse_ratio = 5 × the reference's 1; go"
    ):
        record(worse_loss=11.0)
    empty = record(worse_loss=0.0, worse_reference=0.0, worse_count=0.0)
    assert math.isnan(empty["worse_ratio"]) and empty["better_share"] == 1


def scalars(folder: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


@pytest.mark.long
def test_a_run_resumes_with_the_reference_it_began_with_and_its_alarm_ends_it(root, tmp_path):
    """The weights of a checkpoint are not those of the reference, which is measured before they are loaded."""
    runs = {"schedule": {"kind": "constant", "steps": 4, "warmup_steps": 0}, "logging": {"every": 1, "progress": False}}
    runs |= {"optimizer": {"lr": 1e-3}, "checkpoint": {"save_every": 2}, "preference": {"max_better_ratio": 100.0}}
    for name in ("straight", "resumed"):
        path = configure(tmp_path / name, root, "kto", (2, 1, 1), val_manifest=str(root / "kto.csv"))
        merged = json.loads(path.read_text())
        for section, values in runs.items():
            merged[section] |= values
        path.write_text(json.dumps(merged))
        for steps in (4,) if name == "straight" else (2, 4):
            status, output = finish(launch(path, 2, "--set", f"schedule.steps={steps}"))
            assert status == 0, output
    assert "going on after step 2" in output
    for tag in ("train/loss", "preference/a/better_reference", "preference/a/worse_loss", "preference/a/point"):
        straight, resumed = (scalars(tmp_path / name, tag) for name in ("straight", "resumed"))
        assert set(straight) == {1, 2, 3, 4} and resumed == pytest.approx(straight, rel=1e-6), tag
    held_out = scalars(tmp_path / "resumed", "validation/preference/a/better_reference")
    assert len(set(held_out.values())) == 1 and 0 in held_out and 4 in held_out
    assert scalars(tmp_path / "resumed", "validation/preference/a/accuracy")[4] >= 0

    status, output = finish(
        launch(path, 2, "--set", "preference.max_better_ratio=1.0001", "--set", "schedule.steps=30")
    )
    assert status == 1 and "more than preference.max_better_ratio = 1.0001" in output
    status, output = finish(launch(path, 2, "--set", "preference.max_worse_ratio=1.0001", "--set", "schedule.steps=30"))
    assert status == 1 and "more than preference.max_worse_ratio = 1.0001" in output
