"""Judges the demo's rollouts: answers a request of learning from a reward with 1 for each video that moves right.

It reads the request as JSON from stdin and writes the answer to stdout; docs/reward.md describes both. It is the
command of ds_configs/debug/reward.json, and shows what a command of one's own has to do.
"""

import json
import sys

from mugv_ds.data.video import read_mp4
from mugv_ds.prepare.demo.judge import judge


def moves_right(path: str) -> float:
    """Returns 1 where what a video shows moves right, judged from its pixels, else 0."""
    frames, _ = read_mp4(path)
    return float(judge(frames).direction == "right")


def main() -> None:
    """Answers one request."""
    videos = json.load(sys.stdin)["videos"]
    json.dump({"rewards": {video["id"]: {"right": moves_right(video["video"])} for video in videos}}, sys.stdout)


if __name__ == "__main__":
    main()
