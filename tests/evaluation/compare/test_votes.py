"""Votes come from outside: whatever a file holds, it is taken whole or refused in one line."""

import json
import os

import pytest

from mugv_ds.config import InputError
from mugv_ds.evaluation.compare.votes import MAX_BYTES, Box, Conflict, import_votes, parse_votes
from tests.helpers.voting import ballot, cast, prefer


def votes_of(drawn, **changed) -> bytes:
    return json.dumps(ballot(drawn, "Ana", prefer("dpo")) | changed).encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"comparison": "0" * 64}, "of another comparison"),
        ({"voter": "../../etc/passwd"}, "voter: "),
        ({"annotator": " "}, "annotator: .*printed"),
        ({"annotator": "a\nb"}, "annotator: .*printed"),
        ({"annotator": "x" * 81}, "annotator: "),
        ({"revision": -1}, "revision: "),
        ({"revision": "3"}, "revision: "),
        ({"more": 1}, "more: "),
        ({"votes": [{"item": "0" * 16, "question": "overall", "choice": "left"}]}, "no item 0000"),
        ({"votes": [{"item": "../../x", "question": "overall", "choice": "left"}]}, "votes.0.item: "),
        ({"votes": [{"item": "0" * 16, "question": "beauty", "choice": "left"}]}, "votes.0.question: "),
        ({"votes": [{"item": "0" * 16, "question": "overall", "choice": "sft"}]}, "votes.0.choice: "),
        ({"votes": 7}, "votes: "),
    ],
)
def test_votes_of_another_form_are_refused(compared, change, message):
    _, comparison = compared
    assert len(parse_votes(votes_of(comparison), comparison, "file").votes) == len(comparison.items)
    with pytest.raises(InputError, match=f"^file: .*{message}") as error:
        parse_votes(votes_of(comparison, **change), comparison, "file")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_answer_given_twice_is_refused(compared):
    _, comparison = compared
    content = ballot(comparison, "Ana", prefer("dpo"))
    content["votes"].append(content["votes"][0] | {"choice": "skip"})
    with pytest.raises(InputError, match="twice"):
        parse_votes(json.dumps(content).encode(), comparison, "file")


@pytest.mark.parametrize("damage", ["cut", "empty", "binary", "deep", "huge", "folder", "fifo", "missing"])
def test_a_file_that_holds_no_votes_is_one_error_and_stores_nothing(compared, tmp_path, damage):
    folder, comparison = compared
    whole, path = votes_of(comparison), tmp_path / "votes.json"
    contents = {"cut": whole[:-40], "empty": b"", "binary": os.urandom(2000), "deep": b"[" * 1_000_000}
    contents["huge"] = whole[:-1] + b" " * MAX_BYTES + b"}"
    if damage in contents:
        path.write_bytes(contents[damage])
    elif damage == "folder":
        path.mkdir()
    elif damage == "fifo":
        os.mkfifo(path)
    box = Box(folder / "votes", comparison)
    with pytest.raises(InputError, match=r"votes\.json") as error:
        import_votes(box, [path])
    assert "\n" not in str(error.value) and not box.read()


def test_a_damaged_file_among_the_stored_is_named(compared):
    folder, comparison = compared
    cast(folder, ballot(comparison, "Ana", prefer("dpo")))
    (path,) = (folder / "votes").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=str(path)):
        Box(folder / "votes", comparison).read()


def test_two_voters_of_one_name_are_told_apart(compared, tmp_path):
    folder, comparison = compared
    box = Box(folder / "votes", comparison)
    box.store(parse_votes(votes_of(comparison), comparison, "first"))
    other = votes_of(comparison, annotator="  ANA ", voter="f" * 32)
    with pytest.raises(Conflict) as error:
        box.store(parse_votes(other, comparison, "second"))
    assert error.value.reason == "name" and error.value.stored.annotator == "Ana"
    path = tmp_path / "export.json"
    path.write_bytes(other)
    with pytest.raises(InputError, match=f"{path}: .*--as"):
        import_votes(box, [path])
    import_votes(box, [path], "Ana Maria")
    assert [votes.annotator for votes in box.read()] == ["Ana", "Ana Maria"]


def test_later_votes_stay_and_equal_ones_may_come_again(compared):
    folder, comparison = compared
    box = Box(folder / "votes", comparison)
    now = parse_votes(votes_of(comparison, revision=5), comparison, "now")
    box.store(now)
    box.store(now)
    for change in ({"revision": 4}, {"revision": 5, "votes": []}):
        with pytest.raises(Conflict) as error:
            box.store(parse_votes(votes_of(comparison, **change), comparison, "older"))
        assert error.value.reason == "stale" and error.value.stored == now
    box.store(parse_votes(votes_of(comparison, revision=6, votes=[]), comparison, "undone"))
    assert box.read()[0].votes == ()
