"""Captions: of a CSV, of sidecars, of an endpoint; and which of them cannot be used."""

import os
import tracemalloc

import pytest

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.data.manifest import ManifestError
from mugv_ds.data.paths import PathError
from mugv_ds.prepare import caption
from mugv_ds.prepare.caption import fault
from mugv_ds.prepare.given import CaptionFile
from tests.helpers.chat import chat_server, completion
from tests.helpers.clip_views import broken_clip, clip_view

ID = f"{0:032x}"


def captions(config, work, clips):
    return [(row.get("caption"), row.get("source"), row["error"]) for row in caption.load(config, work)(clips)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A brown dog runs over wet sand while the camera follows.", None),
        ("Un chien brun court sur la plage.", None),
        ("一只棕色的狗在沙滩上奔跑。", None),
        ("समुद्र तट पर एक कुत्ता दौड़ रहा है।", None),
        ("Thirsty deer drink; here a fawn waits. The clip-on lamp of the camper glows.", None),
        ("", "caption_empty"),
        (" \n", "caption_empty"),
        ("...", "caption_not_language"),
        ("I'm sorry, I can't help with that.", "caption_refused"),
        ("I’m sorry, but I cannot describe people.", "caption_refused"),
        ("I am unable to see the frames.", "caption_refused"),
        ("Sorry, no.", "caption_refused"),
        ("As an AI language model, I …", "caption_refused"),
        ("The video shows a dog.", "caption_meta"),
        ("This short clip begins with a dog.", "caption_meta"),
        ("In the footage, a dog runs.", "caption_meta"),
        ("Sure! A dog runs.", "caption_meta"),
        ("Here is a caption: a dog runs.", "caption_meta"),
        ("**Caption:** a dog runs.", "caption_meta"),
        ("The camera follows a dog.", None),
        ("1234 5678 91011 a", "caption_not_language"),
        ("a dog \ufffd\ufffd runs", "caption_not_language"),
        ("A dog " + "aGVsbG8gd29ybGQ" * 5, "caption_not_language"),
        ("The dog runs and then the dog turns and then again. " * 3, "caption_repeats"),
        ("The dog runs and then the dog turns and then again. " * 2, None),
        ("go " * 12, "caption_repeats"),
    ],
)
def test_captions_that_cannot_be_used_are_told_by_reason(text, reason):
    assert fault(text) == reason


def test_how_the_answer_ended_counts():
    assert fault("A dog runs over", "length") == "caption_truncated"
    assert fault("", "length") == "caption_empty"
    assert fault("A dog", "content_filter") == "caption_refused"
    assert fault("A dog", refused=True) == "caption_refused"


# --- a CSV


def written(tmp_path, text):
    path = tmp_path / "captions.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_clips_own_caption_comes_before_its_videos(tmp_path):
    file = written(tmp_path, f'path,id,caption\n,{ID},"own, and quoted"\n0.mp4,,video\n1.mp4,,"two\nlines"\n')
    given = PrepareConfig(caption={"file": str(file), "sidecar": False})
    assert caption.why_skipped(given) is None
    rows = caption.load(given, tmp_path)([clip_view(0), clip_view(1), clip_view(2), broken_clip(0)])
    own = "own, and quoted"
    assert [row.get("caption") for row in rows] == [own, "two\nlines", None, own]
    assert rows[0] == {"clip": ID, "error": None, "caption": "own, and quoted", "reason": None, "source": "file"}
    assert rows[2]["reason"] == "caption_missing" and rows[2]["error"] is None
    caption.check_given(given, tmp_path, [(ID, "0.mp4"), ("", "1.mp4")])
    before = caption.weights(given)
    written(tmp_path, f"id,caption\n{ID},another\n")
    assert caption.weights(given) != before
    assert captions(given, tmp_path, [clip_view(0)]) == [("another", "file", None)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"id,path,caption\n{ID},0.mp4,both\n", r":2: must have an id or a path, and not both"),
        ("id,path,caption\n,,neither\n", r":2: must have an id or a path"),
        (f'id,caption\n"{ID}",ok\n\nb, \n', r":4: blank caption"),
        (f"id,caption\n{ID},a\nb,b\n{ID},c\n", r":4: duplicate id, first used in line 2"),
        ("path,caption\na.mp4,a\na.mp4,b\n", r":3: duplicate path, first used in line 2"),
        ("path,caption\n../a.mp4,a\n", r":2: path '\.\./a\.mp4': leads out"),
        ("path,caption\n/a.mp4,a\n", r":2: .*absolute"),
        (b"path,caption\na.mp4,a\nb.mp4,\xff\n", r":3: not UTF-8"),
        ("path,text\na.mp4,a\n", r":1: missing column 'caption'"),
        ("path,caption\na.mp4\n", r":2: 1 values, the header has 2"),
        ("", r":1: empty"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, text, words):
    with pytest.raises((ManifestError, PathError), match=rf"captions\.csv{words}"):
        CaptionFile(written(tmp_path, text), tmp_path)
    assert not list((tmp_path / "given").glob("*"))


def test_a_caption_of_what_is_not_there_is_named_by_line(tmp_path):
    file = CaptionFile(written(tmp_path, f"id,path,caption\n{ID},,a\n,b.mp4,b\nunknown,,c\n"), tmp_path)
    file.check_known([(ID, "a.mp4"), ("unknown", "b.mp4")])
    with pytest.raises(ManifestError, match=r"captions\.csv:3: no video has this path: 'b\.mp4' \(2 such rows\)"):
        file.check_known([(ID, "a.mp4")])
    with pytest.raises(ManifestError, match=r"captions\.csv:4: no clip has this id: 'unknown' \(1 such rows\)"):
        file.check_known([(ID, "b.mp4")])


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "captions.csv")
    with pytest.raises(ManifestError, match=r"captions\.csv: a folder, FIFO or device"):
        CaptionFile(tmp_path / "captions.csv", tmp_path)
    with pytest.raises(ManifestError, match=r"none\.csv: no such file"):
        CaptionFile(tmp_path / "none.csv", tmp_path)


def test_many_captions_cost_no_memory(tmp_path):
    rows = 20_000
    lines = "".join(f"{number}.mp4,{'word ' * 40}{number}\n" for number in range(rows))  # 4 MB
    path = written(tmp_path, "path,caption\n" + lines)
    del lines
    tracemalloc.start()
    file = CaptionFile(path, tmp_path)
    assert file.find(clip_view(rows - 1)).endswith(f" {rows - 1}")
    file.check_known(("", f"{number}.mp4") for number in range(rows))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2 << 20


# --- sidecars


def test_sidecars_are_read_beside_the_video(tmp_path):
    (tmp_path / "0.txt").write_text(" A dog.\n")
    (tmp_path / "0.json").write_text('{"caption": "not this one"}')
    (tmp_path / "1.json").write_text('{"caption": "A cat.", "more": 1}')
    (tmp_path / "2.txt").write_text("  ")
    given = PrepareConfig()
    assert captions(given, tmp_path, [clip_view(number, root=tmp_path) for number in range(4)]) == [
        ("A dog.", "sidecar", None),
        ("A cat.", "sidecar", None),
        ("", "sidecar", None),
        (None, None, None),
    ]
    off = PrepareConfig(caption={"sidecar": False})
    assert captions(off, tmp_path, [clip_view(0, root=tmp_path)]) == [(None, None, None)]


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("0.txt", lambda path: os.mkfifo(path), "0.txt: leads out of the folder of videos, or is no regular file"),
        ("0.txt", lambda path: path.mkdir(), "0.txt: leads out of the folder of videos, or is no regular file"),
        ("0.json", lambda path: path.symlink_to("/etc/passwd"), "0.json: leads out of the folder of videos, or is no "),
        ("0.txt", lambda path: path.symlink_to(path), "0.txt: leads out of the folder of videos, or is no regular "),
        ("0.txt", lambda path: path.write_bytes(b"a" * 10_000_000), "0.txt: larger than 65,536 bytes"),
        ("0.txt", lambda path: path.write_bytes(b"\xff\xfe"), "0.txt: not UTF-8 text"),
        ("0.json", lambda path: path.write_text("{"), "0.json: not JSON"),
        ("0.json", lambda path: path.write_text("[" * 60_000), "0.json: not JSON"),
        ("0.json", lambda path: path.write_text('{"caption": 3}'), '0.json: must be {"caption": "…"}'),
    ],
)
def test_bad_sidecars_cost_only_their_clip(tmp_path, name, make, words):
    make(tmp_path / name)
    (tmp_path / "1.txt").write_text("A cat.")
    (bad, good) = captions(PrepareConfig(), tmp_path, [clip_view(0, root=tmp_path), clip_view(1, root=tmp_path)])
    assert bad[:2] == (None, None) and bad[2].startswith(words) and str(tmp_path) not in bad[2]
    assert good == ("A cat.", "sidecar", None)


# --- an endpoint


def test_only_clips_without_a_caption_are_asked_about(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "1.txt").write_text("A cat.")
    replies = {0: (200, completion("A dog runs")), 2: (200, completion("A dog runs over", "length"))}
    refused = (200, completion(None, refusal="I will not."))
    with chat_server(lambda body: replies.get(len(chat.asked) * 2 - 2, refused)) as chat:
        config = PrepareConfig(caption={"url": chat.url, "model": "m", "concurrency": 1, "words": 50})
        clips = [clip_view(number, root=tmp_path) for number in range(4)] + [broken_clip(4, tmp_path)]
        rows = caption.load(config, tmp_path / "work")(clips)
        assert caption.load(config, tmp_path / "work")(clips) == rows
    assert len(chat.asked) == 3 and "at most 50 words" in chat.asked[0]["messages"][0]["content"][-1]["text"]
    found = [(row.get("caption"), row.get("reason"), row.get("source")) for row in rows]
    assert found == [
        ("A dog runs", None, "m"),
        ("A cat.", None, "sidecar"),
        ("A dog runs over", "caption_truncated", "m"),
        ("I will not.", "caption_refused", "m"),
        (None, None, None),
    ]
    assert len(rows[0]["prompt"]) == 12 and "prompt" not in rows[1]
    assert rows[4]["error"] == "decode_error: 4.mp4: Invalid data"


def test_ones_own_prompt_is_asked_and_counts_in_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with chat_server(lambda body: "A dog.") as chat:
        config = PrepareConfig(caption={"url": chat.url, "model": "m", "prompt": "What?"})
        caption.load(config, tmp_path)([clip_view(0, root=tmp_path)])
        assert chat.asked[0]["messages"][0]["content"][-1]["text"] == "What?"
        other = PrepareConfig(caption={"url": "http://other/v1", "model": "m", "prompt": "What?"})
        assert caption.weights(config) == caption.weights(other)
        assert caption.weights(config) != caption.weights(PrepareConfig(caption={"url": chat.url, "model": "m"}))


def test_the_step_says_why_it_is_skipped(monkeypatch):
    assert caption.why_skipped(PrepareConfig()) is None
    nothing = PrepareConfig(caption={"sidecar": False})
    assert caption.why_skipped(nothing) == (
        "caption.file not given, caption.sidecar is false, and caption.url not given"
    )
    monkeypatch.setattr("mugv_ds.prepare.packages.importlib.util.find_spec", lambda name: None)
    asked = PrepareConfig(caption={"url": "http://a/v1", "model": "m"})
    assert caption.why_skipped(asked) == "openai not installed; the extra prepare-vlm has it"
