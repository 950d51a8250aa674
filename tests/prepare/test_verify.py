"""A right set passes every check; each defect that is planted fails the check that names it."""

import csv
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.config.videovae import VideoVAEConfig
from mugv_ds.data.shards import read_header, read_tensor, write_shard
from mugv_ds.data.storage import open_file
from mugv_ds.models.text import HashTextEncoder
from mugv_ds.models.videovae import VideoVAE
from mugv_ds.models.videovae.statistics import LatentStatistics
from mugv_ds.prepare.compare import write_sheet
from mugv_ds.prepare.encode import encode_frames, facts_of
from mugv_ds.prepare.manifest import COLUMNS, read_rows
from mugv_ds.prepare.verify import Verification
from tests.helpers.dataset import write_dataset
from tests.helpers.film import draw_film
from tests.helpers.prepared import CONFIG, PreparedSet
from tests.helpers.vae import TINY

main = runpy.run_path(str(Path(__file__).parents[2] / "tools/verify_dataset.py"))["main"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> PreparedSet:
    prepared = PreparedSet(tmp_path_factory.mktemp("set"), count=6, fps=30.0, lengths=(34, 34, 14))
    prepared.run()
    return prepared


@pytest.fixture
def out(made, tmp_path) -> Path:
    shutil.copytree(made.out, tmp_path / "out")
    return tmp_path / "out"


def verified(made, out, name="train", **options):
    given = {"codec": made.codec, "encoder": made.encoder, "videos": made.videos} | options
    return Verification(out / f"{name}.csv", **given).run()


def outcome(made, out, **options) -> dict:
    """Checks by name; without the source, whose decoding takes the most time, unless it is asked for."""
    return {check.name: check for check in verified(made, out, **({"videos": None} | options)).checks}


def failed(checks) -> set[str]:
    return {name for name, check in checks.items() if check.status == "fail"}


def change(out, change_tensor, folder="latents") -> None:
    """Rewrites the shards of a folder with other tensors, and MANIFEST.json to suit."""
    manifest = json.loads((out / "MANIFEST.json").read_text())
    for path in (out / folder).rglob("*.safetensors"):
        with open_file(path) as blob:
            tensors = {key: read_tensor(blob, key, entry) for key, entry in read_header(blob).items()}
        changed = {key: change_tensor(key, tensor) for key, tensor in tensors.items()}
        write_shard(path, {key: tensor.to(torch.bfloat16) for key, tensor in changed.items()})
        manifest["shards"][str(path.relative_to(out))] |= facts_of(path)
    (out / "MANIFEST.json").write_text(json.dumps(manifest))


def rewrite(out, name, rows) -> None:
    """Rewrites a CSV, and MANIFEST.json to suit."""
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    manifest = json.loads((out / "MANIFEST.json").read_text())
    manifest["files"][f"{name}.csv"] = facts_of(out / f"{name}.csv")
    (out / "MANIFEST.json").write_text(json.dumps(manifest))


def encode_otherwise(made, out, pick) -> None:
    """Encodes other frames: `pick` makes them of a film as it is, uint8 [F, H, W, 3], and the number that is wanted."""
    films = {clip["clip"]: film for clip, film in zip(made.clips, made.films, strict=True)}
    change(
        out,
        lambda key, latent: encode_frames(
            made.codec, torch.from_numpy(np.ascontiguousarray(pick(films[key], 8 * latent.shape[1])))
        ),
    )


def at_24(film, count, late=0) -> np.ndarray:
    picked = [min(range(len(film)), key=lambda i: (round(abs(i / 30 - j / 24), 6), i)) for j in range(count)]
    return film[np.array(picked) + late]


def test_a_right_set_passes_every_check(made, tmp_path):
    for name in ("train", "val"):
        found = verified(made, made.out, name)
        assert found.passed
        statuses = {check.name: check.status for check in found.checks}
        assert {name for name, status in statuses.items() if status != "pass"} == {"alike clips"}  # without hashes
        assert len(found.compared) == len(list(read_rows(made.out / f"{name}.csv")))
    write_sheet(tmp_path / "sheet.png", found.compared)
    assert (tmp_path / "sheet.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["missing", "double"])
def test_wrong_normalisation_is_named(made, out, kind):
    scale = made.codec.scale[:, None, None, None]
    change(out, lambda _, latent: latent * scale if kind == "missing" else latent / scale)
    check = outcome(made, out)["normalisation"]
    assert check.status == "fail" and f"looks like {kind} normalisation" in check.message and check.value < 0


def test_the_codecs_own_statistics_decide_whatever_they_are(made, tmp_path):
    """A VideoVAE whose shift and scale are those of its latents of these films."""
    torch.manual_seed(0)
    vae = VideoVAE(VideoVAEConfig(**{name: value for name, value in TINY.items() if name != "precision"})).eval()
    statistics = LatentStatistics()
    for film in made.films[:2]:
        pixels = torch.from_numpy(film[:16]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            mean, logvar = vae.posterior(pixels, allow_nonnegative=True)
        statistics.add(mean, logvar.fill_(-30))  # encoding takes the mean
    vae.shift, vae.scale = statistics.shift_and_scale()
    other = PreparedSet(tmp_path, count=2, lengths=(16,), codec=vae)
    other.run()
    checks = outcome(other, other.out, encoder=None)
    assert checks["normalisation"].status == "pass", checks["normalisation"]
    shift, scale = (value[0] for value in (vae.shift, vae.scale))
    change(other.out, lambda _, latent: latent * scale + shift)
    assert "looks like missing" in outcome(other, other.out, encoder=None)["normalisation"].message
    change(other.out, lambda _, latent: ((latent - shift) / scale - shift) / scale)
    assert "looks like double" in outcome(other, other.out, encoder=None)["normalisation"].message


def test_generated_latents_that_are_labelled_real_are_normalised_twice(made, out):
    rewrite(out, "train", [row | {"source": "real"} for row in read_rows(out / "train.csv")])
    # The loader takes the published statistics, so the hypotheses are those.
    check = outcome(made, out, codec=None, encoder=None, videos=None)["normalisation"]
    assert check.status == "fail" and "looks like double normalisation" in check.message


@pytest.mark.parametrize(
    ("named", "pick"),
    [
        ("pixels in [0, 1]", lambda film, count: (at_24(film, count).astype(int) + 255) // 2),
        ("BGR", lambda film, count: at_24(film, count)[..., ::-1]),
        ("mirrored", lambda film, count: at_24(film, count)[:, :, ::-1]),
    ],
)
def test_other_pixels_are_named(made, out, named, pick):
    encode_otherwise(made, out, lambda film, count: pick(film, count).astype(np.uint8))
    checks = outcome(made, out, videos=made.videos, encoder=None)
    assert checks["pixels"].status == "fail" and named in checks["pixels"].message
    if named == "pixels in [0, 1]":
        assert {"luma", "PSNR"} <= failed(checks)


@pytest.mark.parametrize(
    ("named", "pick"),
    [
        ("1 frame late", lambda film, count: at_24(film, count, late=1)),
        ("30 frames a second", lambda film, count: film[:count]),
        ("15 frames a second", lambda film, count: film[::2][:count] if 2 * count <= len(film) else film[:0]),
    ],
)
def test_other_times_are_named(made, out, named, pick):
    def chosen(film, count):
        frames = pick(film, count)
        return frames if len(frames) == count else at_24(film, count)

    encode_otherwise(made, out, chosen)
    check = outcome(made, out, videos=made.videos, encoder=None)["times"]
    assert check.status == "fail" and f"looks like {named}" in check.message, check


def test_a_flipped_byte_is_found_by_its_checksum(made, out):
    path = next((out / "latents").rglob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    checks = outcome(made, out)
    assert {"files", "samples"} <= failed(checks)
    assert path.name in checks["files"].message and "SHA-256" in checks["files"].message
    assert "CRC-32" in checks["samples"].message


def test_missing_and_truncated_and_stray_files_are_named(made, out):
    shards = sorted(path.relative_to(out) for path in (out / "latents").rglob("*.safetensors"))
    (out / shards[0]).write_bytes((out / shards[0]).read_bytes()[:-10])
    (out / "text_features/stray.safetensors").write_bytes(b"x")
    checks = outcome(made, out)
    assert {"files", "index"} <= failed(checks)
    assert str(shards[0]) in checks["files"].message
    assert checks["stray files"].status == "warn" and "stray.safetensors" in checks["stray files"].message
    for shard in shards:
        (out / shard).unlink()
    checks = outcome(made, out)
    assert checks["index"].status == "fail" and "no row has a readable latent" in checks["index"].message


@pytest.mark.parametrize("name", ["provenance.parquet", "text_encoder.json", "MANIFEST.json"])
def test_a_damaged_file_beside_the_csv_is_named(made, out, name):
    (out / name).write_bytes(b"{ no")
    checks = outcome(made, out)
    assert checks["files"].status == "fail" and name in checks["files"].message
    assert name == "MANIFEST.json" or checks[name].status == "fail"
    assert checks["loader"].status == "pass"


def test_a_path_that_leads_out_is_named(made, out):
    rows = list(read_rows(out / "train.csv"))
    rows[0]["latent_path"] = f"../{rows[0]['latent_path']}"
    rewrite(out, "train", rows)
    check = outcome(made, out)["index"]
    assert check.status == "fail" and "leads out of the CSV's folder" in check.message


def test_another_text_encoder_and_a_missing_end_token_are_named(made, out):
    checks = outcome(made, out, encoder=HashTextEncoder(32, 40))
    assert {"text encoder", "text features"} <= failed(checks)
    change(out, lambda _, features: features[:-1], "text_features")
    check = outcome(made, out)["text tokens"]
    assert check.status == "fail" and "the end token is missing" in check.message


def test_features_of_other_captions_are_named(made, out):
    rows = list(read_rows(out / "train.csv"))
    captions = [row["caption"] for row in rows]
    rewrite(
        out, "train", [row | {"caption": text} for row, text in zip(rows, captions[1:] + captions[:1], strict=True)]
    )
    check = outcome(made, out)["text features"]
    assert check.status == "fail" and "another caption" in check.message and check.value > check.high


def test_a_leak_between_train_and_val_is_named(made, out):
    leaked = next(read_rows(out / "val.csv"))
    rewrite(out, "train", [*read_rows(out / "train.csv"), leaked])
    check = outcome(made, out)["split"]
    assert check.status == "fail" and leaked["sample_id"] in check.message


def test_a_video_on_both_sides_is_named(made, tmp_path):
    """Two clips of one film, split by clip and not by video."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.copytree(made.out, out := tmp_path / "out")
    table = pq.read_table(out / "provenance.parquet")
    rows = table.to_pylist()
    sides = {side: next(row for row in rows if row["set"] == side) for side in ("train", "val")}
    for row in rows:
        if row["sample"] == sides["train"]["sample"]:
            row["video"] = sides["val"]["video"]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), out / "provenance.parquet")
    check = outcome(made, out)["split"]
    assert check.status == "fail" and sides["val"]["video"] in check.message


def test_equal_latents_and_captions_are_told(made, out):
    rows = list(read_rows(out / "train.csv"))
    twin = {"sample_id": "twin", "caption": rows[0]["caption"]}
    rewrite(out, "train", [*rows, rows[0] | twin, rows[1] | {"sample_id": "silent", "caption": ""}])
    checks = outcome(made, out, encoder=None)
    assert checks["equal latents"].status == "fail" and rows[0]["sample_id"] in checks["equal latents"].message
    assert checks["equal captions"].status == checks["empty captions"].status == "warn"


def test_a_set_of_others_is_verified_as_far_as_it_goes(tmp_path):
    manifest = write_dataset(tmp_path, [(2, 4, 6)] * 5 + [(1, 4, 4)] * 3)
    found = Verification(manifest).run()
    statuses = {check.name: check.status for check in found.checks}
    assert found.passed and statuses["normalisation"] == statuses["loader"] == statuses["samples"] == "pass"
    unchecked = {name for name, status in statuses.items() if status == "not checked"}
    assert unchecked == {"files", "text features", "captions", "equal latents", "alike clips", "split", "source"}


def test_the_command_gives_its_outcome_as_status_and_json(made, out, tmp_path, capsys):
    options = ["--codec", str(made.codec_path), "--videos", str(made.videos), "--text-encoder", "hash"]
    options += ["--text-channels", "16", "--json", str(tmp_path / "x.json"), "--sheet", str(tmp_path / "x.png")]
    assert main([str(out / "train.csv"), *options, "--all"]) == 0
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["passed"] and {check["status"] for check in report["checks"]} == {"pass", "not checked"}
    assert (tmp_path / "x.png").exists() and "pass" in capsys.readouterr().out
    change(out, lambda _, latent: -latent)
    assert main([str(out / "train.csv"), *options]) == 1
    assert main([str(out / "nothing.csv")]) == 2


def test_a_film_that_was_replaced_is_told(made, tmp_path):
    shutil.copytree(made.videos, videos := tmp_path / "videos")
    from tests.helpers.film import write_film

    for path in videos.iterdir():
        write_film(path, draw_film("another", 40, (32, 48)), np.arange(40) / 30)
    assert {"PSNR", "luma"} & failed(outcome(made, made.out, videos=videos))


def test_stills_are_compared_as_pictures(tmp_path):
    buckets = [{"height": 32, "width": 48, "frames": frames, "fps": 24} for frames in (16, 1)]
    config = PrepareConfig.model_validate_json(json.dumps(CONFIG | {"encode": {"buckets": buckets, "device": "cpu"}}))
    stills = PreparedSet(tmp_path, count=6, lengths=(20, 9), config=config)
    stills.run()
    kinds = [row["kind"] for name in ("train", "val") for row in read_rows(stills.out / f"{name}.csv")]
    assert sorted(kinds) == ["image"] * 3 + ["video"] * 3
    found = verified(stills, stills.out, "train")
    assert found.passed and {len(one.times) > 0 for one in found.compared} == {True, False}
    encode_otherwise(stills, stills.out, lambda film, count: np.repeat(film[:1, ..., ::-1], count, axis=0))
    assert "BGR" in outcome(stills, stills.out, videos=stills.videos)["pixels"].message
