"""VBench-I2V: the formula, the suite's file, the names of videos, and results that are not what they must be."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from mugv_ds.config.errors import InputError
from mugv_ds.evaluation.vbench import (
    CROPS,
    DIMENSIONS,
    PUBLISHED,
    missing_weights,
    nearest_crop,
    read_result,
    read_suite,
    scores,
    table,
)
from mugv_ds.sampling.jobs import read_jobs
from tests.helpers.vbench import suite_info, write_crops

BY_SHORT = {dimension.short: dimension for dimension in DIMENSIONS}


@pytest.mark.parametrize("row", PUBLISHED.values(), ids=PUBLISHED)
def test_the_formula_gives_the_published_sums(row):
    results = {dimension.name: value / 100 for dimension, value in zip(DIMENSIONS, row, strict=False)}
    assert [100 * value for value in scores(results)] == pytest.approx(row[-3:], abs=0.015)


def test_results_are_normalised_between_the_published_limits():
    limits = {"VISC": (0.1462, 1), "SC": (0.1462, 1), "VIBC": (0.2615, 1), "BC": (0.2615, 1), "MS": (0.7060, 0.9975)}
    for short, dimension in BY_SHORT.items():
        low, high = limits.get(short, (0, 1))
        assert dimension.normalised(low) == 0 and dimension.normalised(high) == 1
        assert dimension.normalised((low + high) / 2) == pytest.approx(0.5)
    assert scores({one.name: one.low for one in DIMENSIONS}) == (0, 0, 0)
    assert scores({one.name: one.high for one in DIMENSIONS}) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize(
    ("height", "width", "crop"), [(720, 1280, "16-9"), (960, 960, "1-1"), (480, 720, "8-5"), (1280, 720, "1-1")]
)
def test_the_crop_is_the_nearest(height, width, crop):
    assert nearest_crop(height, width) == crop
    assert [nearest_crop(1000, round(1000 * ratio)) for ratio in CROPS.values()] == list(CROPS)


def write_info(path: Path, change: Callable[[list[dict]], object] = lambda _: None) -> Path:
    info = suite_info()
    change(info)
    path.write_text(json.dumps(info))
    return path


def test_the_suite_becomes_a_list_of_videos_with_seeds_of_their_own(tmp_path):
    suite = read_suite(write_info(tmp_path / "info.json"))
    assert len(suite.pairs) == 1118 and {len(pair.videos) for pair in suite.pairs} == {5}
    suite.write_list(tmp_path / "list.csv", tmp_path, seed=7)
    jobs = read_jobs(tmp_path / "list.csv", seed=0)
    assert [job.seed for job in jobs] == list(range(7, 7 + 5590))
    assert [job.prompt for job in jobs[::5]] == [pair.prompt for pair in suite.pairs]
    assert all(job.image == tmp_path.resolve() / suite.pairs[job.number // 5].image for job in jobs)
    again = read_suite(tmp_path / "info.json", suite.digest.upper())
    assert again == suite
    trial = suite.first(2)
    assert [len(trial.of(dimension)) for dimension in DIMENSIONS] == [2, 2, 2, 2, 2, 2, 2, 4, 4]


WRONG = {
    "one pair is gone": (lambda info: info.pop(), "1117 pairs and not 1118"),
    "another image": (lambda info: info[0].update(image_name="other.jpg"), "356 images and not 355"),
    "a dimension is gone": (
        lambda info: info[-1]["dimension"].remove("dynamic_degree"),
        "245 pairs of dynamic_degree and not 246",
    ),
    "an older version": (lambda info: info[1].pop("image_name"), "pair 1: must have prompt_en, image_name"),
    "a slash": (lambda info: info[0].update(prompt_en="../../etc/x"), "cannot be the name of a file"),
    "a line break": (lambda info: info[0].update(prompt_en="a\nb"), "cannot be the name of a file"),
    "too long": (lambda info: info[0].update(prompt_en="é" * 125), "makes a name of 256 bytes"),
    "blank": (lambda info: info[0].update(prompt_en="  "), "prompt_en must be text"),
    "no text": (lambda info: info[0].update(prompt_en=[1]), "prompt_en must be text"),
    "an image elsewhere": (lambda info: info[0].update(image_name="/etc/passwd"), "cannot be the name of a file"),
    "the folder above": (lambda info: info[0].update(image_name=".."), "image_name '..' cannot be used"),
    "no camera": (
        lambda info: next(one for one in info if one["dimension"] == ["camera_motion"]).update(prompt_en="a cat"),
        "does not say how the camera moves",
    ),
    "two images of one prompt": (
        lambda info: info[-1].update(prompt_en=info[-2]["prompt_en"]),
        "stands for two images",
    ),
    "dimensions": (lambda info: info[0].update(dimension="i2v_subject"), "must be a list of names"),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_suite_is_refused_by_what_is_wrong(case, tmp_path):
    change, words = WRONG[case]
    with pytest.raises(InputError, match=words):
        read_suite(write_info(tmp_path / "info.json", change))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "must be a list of pairs, and is a dict"),
        ("[1]", "must have prompt_en"),
        (" " * (1 << 24) + "[]", "larger than"),
    ],
    ids=["cut", "deep", "no list", "no pair", "large"],
)
def test_what_is_no_suite_is_refused(content, words, tmp_path):
    (tmp_path / "info.json").write_text(content)
    with pytest.raises(InputError, match=words):
        read_suite(tmp_path / "info.json")


def test_a_suite_of_another_digest_or_none_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"is [0-9a-f]{{64}}, not {'0' * 64}"):
        read_suite(write_info(tmp_path / "info.json"), "0" * 64)
    with pytest.raises(InputError, match=r"vbench2_i2v_full_info\.json of github\.com/Vchitect/VBench"):
        read_suite(tmp_path / "missing.json")


def test_a_missing_image_is_named(tmp_path):
    suite = read_suite(write_info(tmp_path / "info.json"))
    write_crops(suite, tmp_path)
    suite.check_images(tmp_path / "16-9")
    (tmp_path / "16-9" / suite.pairs[-1].image).unlink()
    with pytest.raises(InputError, match=f"{suite.pairs[-1].image}: No such file.*crop.zip"):
        suite.check_images(tmp_path / "16-9")


def test_videos_are_linked_under_their_names_and_strangers_are_refused(tmp_path):
    suite = read_suite(write_info(tmp_path / "info.json")).first(1)
    suite.write_list(tmp_path / "list.csv", tmp_path, seed=0)
    jobs = read_jobs(tmp_path / "list.csv", seed=0)
    (tmp_path / "samples").mkdir()
    for job in jobs:
        (tmp_path / f"samples/{job.name}.mp4").write_text(job.prompt)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / suite.pairs[0].videos[0]).symlink_to("elsewhere")
    for _ in range(2):
        suite.link(jobs, tmp_path / "samples", tmp_path / "videos")
        found = {path.name: path.read_text() for path in (tmp_path / "videos").iterdir()}
        assert found == {name: pair.prompt for pair in suite.pairs for name in pair.videos}
    assert len({path.readlink() for path in (tmp_path / "videos").iterdir()}) == 15
    (tmp_path / "videos/notes.txt").touch()
    with pytest.raises(InputError, match=r"notes.txt: is no video of the suite"):
        suite.link(jobs, tmp_path / "samples", tmp_path / "videos")


JUDGED = [{"video_path": f"/out/videos/a cat-{number}.mp4", "video_results": 1.0} for number in range(5)]
LIES = {
    "above one": {"i2v_subject": [1.5, JUDGED]},
    "not a number": {"i2v_subject": [math.nan, JUDGED]},
    "a truth value": {"i2v_subject": [True, JUDGED]},
    "text": {"i2v_subject": ["0.9", JUDGED]},
    "another dimension": {"camera_motion": [0.9, JUDGED]},
    "two dimensions": {"i2v_subject": [0.9, JUDGED], "camera_motion": [0.9, JUDGED]},
    "a video short": {"i2v_subject": [0.9, JUDGED[1:]]},
    "one video twice": {"i2v_subject": [0.9, [*JUDGED[1:], JUDGED[1]]]},
    "no videos": {"i2v_subject": [0.9]},
    "videos of no kind": {"i2v_subject": [0.9, [None] * 5]},
    "a list": [0.9, JUDGED],
}


@pytest.mark.parametrize("lie", LIES)
def test_results_that_cannot_be_are_refused(lie, tmp_path):
    videos = [f"a cat-{number}.mp4" for number in range(5)]
    (tmp_path / "result.json").write_text(json.dumps({"i2v_subject": [0.9, JUDGED]}))
    assert read_result(tmp_path / "result.json", BY_SHORT["VISC"], videos) == 0.9
    (tmp_path / "result.json").write_text(json.dumps(LIES[lie]))
    with pytest.raises(InputError, match=r"result\.json: "):
        read_result(tmp_path / "result.json", BY_SHORT["VISC"], videos)


def test_the_table_has_the_published_rows_below_ours():
    row = PUBLISHED["MAGI-1"]
    lines = list(table("ours", {one.name: value / 100 for one, value in zip(DIMENSIONS, row, strict=False)}))
    assert lines[0].split() == ["VTCM", "VISC", "VIBC", "SC", "BC", "MS", "DD", "AQ", "IQ", "I2V", "Quality", "Total"]
    assert lines[1].split()[0] == "ours" and len(lines) == 10
    assert [float(value) for value in lines[1].split()[1:]] == pytest.approx(row, abs=0.015)


def test_weights_that_are_missing_are_named(tmp_path):
    (tmp_path / "amt_model").mkdir()
    (tmp_path / "amt_model/amt-s.pth").touch()
    missing = missing_weights(tmp_path)
    assert "raft_model/models/raft-things.pth" in missing and "amt_model/amt-s.pth" not in missing
    assert len(missing) == len(set(missing))


def test_the_list_is_a_csv_whatever_the_prompts_hold(tmp_path):
    info = suite_info()
    info[0]["prompt_en"] = 'a "cat", and=SUM(1) \u2028 é'
    (tmp_path / "info.json").write_text(json.dumps(info))
    read_suite(tmp_path / "info.json").write_list(tmp_path / "list.csv", tmp_path, seed=0)
    assert read_jobs(tmp_path / "list.csv", seed=0)[0].prompt == info[0]["prompt_en"]
