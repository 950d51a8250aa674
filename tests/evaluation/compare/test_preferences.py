"""The votes as training sets: what DPO and KTO read of them."""

import csv
import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from mugv_ds.data.manifest import open_index
from mugv_ds.data.pairs import labels, pairs
from mugv_ds.evaluation.results import latent_path
from tests.evaluation.compare.conftest import PROMPTS
from tests.helpers.evaluated import write_evaluation
from tests.helpers.voting import ballot, build, cast, prefer

TOOL = runpy.run_path(str(Path(__file__).parents[3] / "tools/compare.py"))


def report(folder, *more):
    return TOOL["main"](["report", str(folder), *more])


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_dpo_reads_the_better_side_first_and_kto_the_labels(compared, results, capsys):
    folder, comparison = compared
    items = comparison.items
    said = {item.id: prefer("dpo")(item) for item in items[:4]} | {items[4].id: prefer("sft")(items[4])}
    said |= {items[5].id: "both_good", items[6].id: "both_bad", items[7].id: "skip"}
    cast(folder, ballot(comparison, "Ana", lambda item: said[item.id]))
    assert report(folder) == 0
    made = folder / "preferences"
    index = open_index(made / "pairs.csv")
    found = pairs(index)
    assert len(found) == 5
    winners = dict.fromkeys((item.id for item in items[:4]), "dpo") | {items[4].id: "sft"}
    for better, worse in found:
        row, other = index.row(int(better)), index.row(int(worse))
        job = next(item.job for item in items if item.id == row.pair_id)
        winner = winners[row.pair_id]
        loser = {"dpo": "sft", "sft": "dpo"}[winner]
        assert row.latent_path == f"latents/{winner}/{job}.pt" and other.latent_path == f"latents/{loser}/{job}.pt"
        for weights, one in ((winner, row), (loser, other)):
            assert (made / one.latent_path).read_bytes() == latent_path(results, weights, job).read_bytes()
        assert row.text_feat_path == other.text_feat_path and row.source == "generated"
    index = open_index(made / "labels.csv")
    kept = {row["latent_path"]: row["label"] for row in rows(made / "labels.csv")}
    assert kept == {
        f"latents/{weights}/{item.job}.pt": label
        for item, label in ((items[5], "good"), (items[6], "bad"))
        for weights in ("sft", "dpo")
    }
    assert sorted(labels(index).tolist()) == [False, False, True, True]
    assert {row["fps"] for row in rows(made / "pairs.csv")} == {"8.0"}
    assert {row["caption"] for row in rows(made / "pairs.csv")} <= set(PROMPTS)
    assert "pairs.csv: 10 rows" in capsys.readouterr().out

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".index" not in path.parts}
    assert report(folder) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_of_several_annotators_the_majority_counts_and_ties_are_told(compared, capsys):
    folder, comparison = compared
    first, second = comparison.items[:2]
    for name, choices in {"Ana": ("left", "left"), "Ben": ("left", "right"), "Cem": ("right", "skip")}.items():
        said = dict(zip((first.id, second.id), choices, strict=True))
        cast(folder, ballot(comparison, name, lambda item, said=said: said.get(item.id)))
    assert report(folder) == 0
    (better, worse) = rows(folder / "preferences/pairs.csv")
    assert better["pair_id"] == worse["pair_id"] == first.id and (better["rank"], worse["rank"]) == ("1", "2")
    assert better["latent_path"] == f"latents/{first.left.weights}/{first.job}.pt"
    out = capsys.readouterr().out
    assert f"left out, annotators are divided: item {second.id}" in out and "no labels.csv" in out
    assert not (folder / "preferences/labels.csv").exists()


def test_a_video_of_several_items_gets_the_label_of_most(three, capsys):
    folder, comparison = three
    job = comparison.items[0].job
    met = [item for item in comparison.items if item.job == job]

    def choice(item):
        if item not in met:
            return None
        return "both_good" if {item.left.weights, item.right.weights} == {"sft", "dpo"} else "both_bad"

    cast(folder, ballot(comparison, "Ana", choice))
    assert report(folder) == 0
    kept = {Path(row["latent_path"]).parts[1]: row["label"] for row in rows(folder / "preferences/labels.csv")}
    assert kept == {"kto": "bad"}  # sft and dpo are good once and bad once
    assert capsys.readouterr().out.count("1 items say good, as many bad") == 2


def test_a_video_may_be_in_several_pairs(three):
    folder, comparison = three
    cast(folder, ballot(comparison, "Ana", lambda item: prefer("kto")(item) or prefer("dpo")(item)))
    assert report(folder) == 0
    assert len(pairs(open_index(folder / "preferences/pairs.csv"))) == len(comparison.items) == 3 * len(PROMPTS)


def test_votes_on_another_question_train_only_when_asked(compared):
    folder, comparison = compared
    content = ballot(comparison, "Ana", prefer("dpo"))
    for vote in content["votes"]:
        vote["question"] = "motion"
    cast(folder, content)
    assert report(folder) == 0 and not (folder / "preferences/pairs.csv").exists()
    assert report(folder, "--question", "motion") == 0
    assert len(rows(folder / "preferences/pairs.csv")) == 2 * len(comparison.items)


def test_latents_that_were_not_kept_are_one_error_that_says_what_to_do_and_the_report_is_there(tmp_path, capsys):
    results = write_evaluation(tmp_path / "eval", ["sft", "dpo"], PROMPTS[:2], frames=2, keep=False)
    comparison = build(results, tmp_path / "out", "sft", "dpo")
    cast(tmp_path / "out", ballot(comparison, "Ana", prefer("dpo")))
    assert report(tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert re.search("latents or text features of 4 videos were not kept.*--keep-latents", error)
    assert error.count("\n") == 1 and not (tmp_path / "out/preferences").exists()
    assert "dpo" in json.loads((tmp_path / "out/report/report.json").read_text())["weights"]
    assert report(tmp_path / "out", "--no-preferences") == 0


@pytest.mark.parametrize("how", ["another", "gone"])
def test_votes_are_not_taken_for_those_on_other_videos(tmp_path, capsys, how):
    results = write_evaluation(tmp_path / "eval", ["sft", "dpo"], PROMPTS[:2], frames=2)
    comparison = build(results, tmp_path / "out", "sft", "dpo")
    cast(tmp_path / "out", ballot(comparison, "Ana", prefer("dpo")))
    video = results / f"dpo/{comparison.items[0].job}.mp4"
    if how == "another":
        video.write_bytes(video.read_bytes() + b"\0")
    else:
        video.unlink()
    assert report(tmp_path / "out") == 2
    assert f"the video {comparison.items[0].job} of dpo is not the one" in capsys.readouterr().err


def test_a_latent_that_is_no_file_is_refused(tmp_path, capsys):
    results = write_evaluation(tmp_path / "eval", ["sft", "dpo"], PROMPTS[:1], frames=2)
    comparison = build(results, tmp_path / "out", "sft", "dpo")
    cast(tmp_path / "out", ballot(comparison, "Ana", prefer("dpo")))
    path = latent_path(results, "dpo", comparison.items[0].job)
    path.unlink()
    path.mkdir()
    assert report(tmp_path / "out") == 2 and "--keep-latents" in capsys.readouterr().err


def test_an_evaluation_that_moved_is_named(compared, results, tmp_path, capsys):
    folder, comparison = compared
    moved = json.loads((folder / "comparison.json").read_text()) | {"results": str(tmp_path / "elsewhere")}
    (folder / "comparison.json").write_text(json.dumps(moved))
    cast(folder, ballot(comparison, "Ana", prefer("dpo")))
    assert report(folder) == 2 and "elsewhere" in capsys.readouterr().err
    assert report(folder, "--results", str(results)) == 0


@pytest.mark.parametrize("names", [("sft", "dpo"), ("eval/sft", "eval/nobody"), ("eval/sft", "other/dpo")])
def test_weights_of_no_one_evaluation_are_refused(results, tmp_path, monkeypatch, capsys, names):
    (tmp_path / "eval").symlink_to(results)
    (tmp_path / "other/dpo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert TOOL["main"](["build", *names, "--out", "out"]) == 2
    assert "--results" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert TOOL["main"](["build", "sft", "dpo", "--results", "eval", "--out", "out", "--items", "3"]) == 0


def test_votes_are_not_lost_to_another_draw_in_the_same_folder(compared, results, capsys):
    folder, comparison = compared
    cast(folder, ballot(comparison, "Ana", prefer("dpo")))
    command = ["build", str(results / "sft"), str(results / "dpo"), "--out", str(folder)]
    assert TOOL["main"](command) == 0  # the same draw: the page again
    assert TOOL["main"]([*command, "--seed", "1"]) == 2 and "name another --out" in capsys.readouterr().err


def test_features_say_what_made_them(tmp_path):
    results = write_evaluation(tmp_path / "eval", ["sft", "dpo"], PROMPTS[:1], frames=2)
    info = {"kind": "hash", "name": "hash", "dtype": "float32", "max_tokens": 6, "fingerprint": "0" * 64}
    (results / "text_encoder.json").write_text(json.dumps(info))
    comparison = build(results, tmp_path / "out", "sft", "dpo")
    cast(tmp_path / "out", ballot(comparison, "Ana", prefer("dpo")))
    assert report(tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/preferences/text_encoder.json").read_text())["fingerprint"] == "0" * 64
    assert torch.load(next((tmp_path / "out/preferences/latents/dpo").iterdir()), weights_only=True).shape[0] == 24
