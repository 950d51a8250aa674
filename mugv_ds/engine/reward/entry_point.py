"""Answers one request with a Python function, in a process of its own: `python -m … package.module:function`."""

import json
import os
import sys

from mugv_ds.engine.reward.judges import load_entry_point


def main(name: str) -> None:
    """Reads the request from stdin and writes the answer to stdout, where nothing else may print."""
    answer = os.dup(1)
    os.dup2(2, 1)  # what the function prints, libraries included, goes where errors go
    rewards = load_entry_point(name)(json.load(sys.stdin)["videos"])
    with os.fdopen(answer, "w") as stream:
        json.dump({"rewards": rewards}, stream)


if __name__ == "__main__":
    main(sys.argv[1])
