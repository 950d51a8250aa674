"""What reaches the terminal of a rank, and what its log."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RANK = """
import logging, os, signal, sys
from mugv_ds.config.command import divert
from mugv_ds.config.console import say
from mugv_ds.config.errors import exit_status
from mugv_ds.config import ConfigError
divert(sys.argv[1], 0)
"""


def rank(folder: Path, code: str) -> subprocess.CompletedProcess:
    """What a process printed that diverts its output to a folder and then runs `code`."""
    command = [sys.executable, "-c", RANK + code, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def test_chatter_goes_to_the_log_alone_and_what_is_said_to_both(tmp_path):
    """Also what is written past Python, and what other packages log; warnings of this one reach the terminal."""
    code = """
print("a library")
os.write(1, b"in C\\n")
logging.getLogger("other").warning("of another")
logging.getLogger("mugv_ds.data").warning("rows are left out")
say("a line")
say("warning: ours", error=True)
"""
    done = rank(tmp_path / "logs", code)
    assert done.stdout == "a line\n" and done.stderr == "rows are left out\nwarning: ours\n"
    log = (tmp_path / "logs/rank0.log").read_text()
    for text in ("a library\n", "in C\n", "of another\n", "a line\n", "warning: ours\n"):
        assert log.count(text) == 1, log


def test_errors_come_alone_and_are_in_the_log_too(tmp_path):
    code = """
def fail():
    print("chatter")
    raise ConfigError("data.seed: wrong")
sys.exit(exit_status(fail))
"""
    done = rank(tmp_path, code)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: data.seed: wrong\n")
    assert (tmp_path / "rank0.log").read_text().endswith("error: data.seed: wrong\n")


def test_a_traceback_that_nobody_foresaw_reaches_the_terminal(tmp_path):
    done = rank(tmp_path, "sys.exit(exit_status(lambda: 1 / 0))")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_fatal_signal_says_where_python_was(tmp_path):
    done = rank(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)")
    assert done.returncode == -11 and "Fatal Python error: Segmentation fault" in done.stderr


def test_a_second_start_adds_to_the_log(tmp_path):
    for word in ("first", "second"):
        rank(tmp_path, f"print('{word}')")
    assert (tmp_path / "rank0.log").read_text() == "first\nsecond\n"


def test_a_log_that_cannot_be_written_leaves_all_on_the_terminal(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = rank(tmp_path / "file/logs", "print('a library'); say('a line')")
    assert done.returncode == 0 and done.stdout == "a library\na line\n"
    assert done.stderr.count("\n") == 1 and f"note: {tmp_path}/file/logs/rank0.log: " in done.stderr


def test_a_link_in_the_place_of_the_log_is_not_followed(tmp_path):
    (tmp_path / "rank0.log").symlink_to(tmp_path / "other")
    assert rank(tmp_path, "say('a line')").stdout == "a line\n"
    assert not (tmp_path / "other").exists()


def test_a_log_that_the_disk_does_not_take_fails_nobody(tmp_path):
    """What is said still reaches the terminal, and a library that prints goes on."""
    (tmp_path / "rank.py").write_text("""
import sys
from pathlib import Path
from mugv_ds.config.command import leave
from mugv_ds.config.console import CONSOLE, say
CONSOLE.divert(Path("/dev/full"))
say("begins")
print("a library " * 5000, flush=True)
print("and on stderr", file=sys.stderr)
say("error: ends", error=True)
leave(2)
""")
    command = [sys.executable, tmp_path / "rank.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, "begins\n", "error: ends\n")
