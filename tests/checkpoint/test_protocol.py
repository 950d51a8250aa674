"""What two ranks do together when a save or a checkpoint goes wrong: the same, and nothing broken is loaded."""

import contextlib
import io
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.fragments import read_counters
from mugv_ds.checkpoint.manifest import digest
from mugv_ds.checkpoint.store import Store
from mugv_ds.config import CheckpointError, PeerError
from mugv_ds.config.text_encoder import TextEncoderInfo
from mugv_ds.engine.build import build_engine
from mugv_ds.engine.process import start_process
from mugv_ds.models.text import HashTextEncoder
from tests.checkpoint.test_store import DATA, settings
from tests.helpers.distributed import run_ranks
from tests.helpers.saved import write_checkpoint
from tests.parallel.test_layouts import SHAPE

LAYOUT = (2, 1, 1)


class Case:
    """What a case works with: one engine for all of them, whose weights are all set to one number."""

    def __init__(self, root: Path) -> None:
        self.folder = root
        self.process = start_process(settings(root, LAYOUT))
        self.engine = build_engine(settings(root, LAYOUT), self.process, SHAPE)
        self.rank = self.process.rank

    @contextlib.contextmanager
    def store(self, data: dict = DATA, text_encoder: TextEncoderInfo | None = None, **checkpoint) -> Iterator[Store]:
        config = settings(self.folder, LAYOUT, **checkpoint)
        store = Store(config, self.process, self.engine, data, text_encoder=text_encoder)
        try:
            yield store
        finally:
            store.close()

    def on_rank_0(self, function: Callable[[], object]) -> None:
        dist.barrier()
        if self.rank == 0:
            function()
        dist.barrier()

    def save(self, store: Store, *steps: int) -> None:
        """Saves these steps, each with its number in all weights."""
        for step in steps:
            fill(store, step)
            self.engine.global_steps = step
            store.save(step)
        store.wait()

    def check(self, store: Store, step: int) -> None:
        """All that the checkpoint of a step holds is there again."""
        assert all(f.tensors["weight"].eq(step).all() for f in store.fragments)
        assert all(p.eq(step).all() for p in self.engine.module.parameters())
        assert self.engine.global_steps == read_counters(self.engine).global_steps == step


def fill(store: Store, value: float) -> None:
    for fragment in store.fragments:
        fragment.tensors["weight"].fill_(value)


@contextlib.contextmanager
def refused(text: str) -> Iterator[None]:
    """Both ranks meet the error; rank 0 says why."""
    expected = CheckpointError if dist.get_rank() == 0 else PeerError
    with pytest.raises(expected) as error:
        yield
    assert text in str(error.value), error.value


@contextlib.contextmanager
def said(text: str) -> Iterator[None]:
    """Rank 0 prints it in one line, the other nothing."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        yield
    lines = [line for line in out.getvalue().splitlines() if text in line]
    assert len(lines) == (dist.get_rank() == 0), out.getvalue()


def shard(folder: Path, step: int) -> Path:
    return files.step_folder(folder, step) / "rank-1.weight.safetensors"


def damage(path: Path, how: str) -> None:
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)


def falls_back(case: Case) -> None:
    with case.store() as store:
        case.save(store, 1, 2, 3, 4)  # the three last are kept
        case.on_rank_0(lambda: damage(shard(case.folder, 4), "truncated"))
        with said("step-00000004/rank-1.weight.safetensors: "):
            assert store.restore() == 3
        case.check(store, 3)
        case.on_rank_0(lambda: damage(shard(case.folder, 3), "one bit"))
        begin = time.monotonic()
        with said("step-00000003/rank-1.weight.safetensors: its SHA-256 differs"):
            assert store.restore() == 2
        assert time.monotonic() - begin < 10
        case.check(store, 2)
        case.save(store, 4)  # takes the place of the broken one
        assert store.restore() == 4
        case.check(store, 4)
        for step in (2, 4):
            case.on_rank_0(lambda step=step: damage(shard(case.folder, step), "deleted"))
        with refused("none of its checkpoints is sound"):
            store.restore()


def finds_a_step_newer_than_latest(case: Case) -> None:
    def unpublished(run: Path, step: int) -> None:
        raise OSError("killed before latest")

    with case.store(background=False) as store:
        case.save(store, 1)
        original, files.point_latest = files.point_latest, unpublished
        with refused("killed before latest"):
            case.save(store, 2)
        files.point_latest = original
    assert (case.folder / "latest").read_text().strip() == "step-00000001"
    with case.store() as store:
        assert store.restore() == 2
        case.check(store, 2)


def refuses_a_latest_that_leads_out(case: Case) -> None:
    with case.store() as store:
        case.save(store, 1)
        case.on_rank_0(lambda: (case.folder / "latest").write_text("../step-00000001"))
        with refused("names '../step-00000001', which is not a checkpoint"):
            store.restore()
        case.on_rank_0(lambda: (case.folder / "latest").write_text(""))
        with said("latest: empty; the folder is scanned"):
            assert store.restore() == 1


def keeps_the_last_and_every_fourth(case: Case) -> None:
    with case.store(keep_last=2, keep_every=4) as store:
        case.save(store, *range(1, 8))
    assert files.saved_steps(case.folder) == [7, 6, 4]
    assert {path.name for path in case.folder.iterdir()} == {
        "latest", "lock", "step-00000004", "step-00000006", "step-00000007",
    }  # fmt: skip


def commits_nothing_if_a_rank_cannot_write(case: Case) -> None:
    with case.store() as store:
        case.save(store, 1)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if case.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        fill(store, 2)
        store.save(2)
        deadline = time.monotonic() + 30
        with refused("rank 1: [Errno 27] File too large"):
            while time.monotonic() < deadline:
                store.poll()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [path.name for path in case.folder.glob("step-*")] == ["step-00000001"]
        assert (case.folder / "latest").read_text().strip() == "step-00000001"
        case.save(store, 2)  # the same step again
        assert store.restore() == 2


def refuses_what_is_not_finite(case: Case) -> None:
    with case.store(background=False) as store:
        case.save(store, 1)
        last = store.fragments[-1]
        if case.rank == 1:
            last.tensors["exp_avg_sq"][-1] = float("inf")
        with refused("rank 1: blocks.0.mlp.fc1.weight/exp_avg_sq holds a NaN or an infinity"):
            store.save(2)
        assert files.saved_steps(case.folder) == [1]
        last.tensors["exp_avg_sq"].zero_()


def saves_what_was_when_it_was_asked(case: Case) -> None:
    """Written slowly: steps go on, the next save waits, the copy does not change."""
    original = files.write_tensors

    def slow(path: Path, tensors: dict) -> object:
        time.sleep(1.0)
        return original(path, tensors)

    files.write_tensors = slow
    with case.store() as store:
        fill(store, 1)
        state = {"list": [1]}
        begin = time.monotonic()
        store.save(1, state)
        fill(store, 99)
        state["list"].append(2)
        store.poll()
        assert time.monotonic() - begin < 0.9
        assert not files.saved_steps(case.folder)
        store.save(2)
        assert files.saved_steps(case.folder) == [1]
        store.wait()
        assert files.saved_steps(case.folder) == [2, 1]
        dist.barrier()
        case.on_rank_0(lambda: files.remove(case.folder, 2))
        assert store.restore() == 1 and store.state == {"list": [1]}
        assert all(f.tensors["weight"].eq(1).all() for f in store.fragments)
    files.write_tensors = original


def goes_back_inside_a_run(case: Case) -> None:
    with case.store() as store:
        case.save(store, 2, 4, 6)
        with said("step-00000006: given up"):
            assert store.restore(before=6) == 4
        case.check(store, 4)
        assert files.saved_steps(case.folder) == [4, 2]
        assert (case.folder / "latest").read_text().strip() == "step-00000004"
        case.save(store, 6)
        assert files.saved_steps(case.folder) == [6, 4, 2]
        with refused("no checkpoint, and one before step 2 is wanted"):
            store.restore(before=2)


def does_as_resume_says(case: Case) -> None:
    with case.store() as store:
        assert store.restore() == 0
    with case.store(resume="must") as store:
        with refused("no checkpoint, and checkpoint.resume is 'must'"):
            store.restore()
        case.save(store, 1)
    with case.store(resume="never") as store, refused("holds step 1, and checkpoint.resume is 'never'"):
        store.restore()


def sweeps_and_locks(case: Case) -> None:
    case.on_rank_0(lambda: (case.folder / "step-00000003.tmp").mkdir(parents=True))
    with case.store() as store:
        assert not (case.folder / "step-00000003.tmp").exists()
        with refused("another run uses this folder"):
            Store(settings(case.folder, LAYOUT), case.process, case.engine, DATA)
        case.save(store, 1)
    with case.store() as store:
        assert store.restore() == 1


def refuses_other_data_and_models(case: Case) -> None:
    with case.store() as store:
        case.save(store, 1)
    other = {"the sample ids": "1" * 64}
    with case.store(data=other) as store, refused("what differs: the sample ids (000"):
        store.restore()
    with case.store(data=DATA | {"data.seed": "1"}) as store, refused("what differs: data.seed (None, now 1)"):
        store.restore()
    with case.store(data=other, accept_changed_data=True) as store:
        assert store.restore() == 1
        case.on_rank_0(lambda: write_checkpoint(case.folder, 2, [("start_token", torch.ones(2))]))
        with refused("is of another model: start_token is [2] there and [144] here"):
            store.restore()

    def newer() -> None:
        path = files.step_folder(case.folder, 1) / files.MANIFEST_NAME
        body = json.loads(path.read_text()) | {"format": 3}
        body.pop("sha256")
        path.write_text(json.dumps(body | {"sha256": digest(body)}))
        files.remove(case.folder, 2)

    case.on_rank_0(newer)
    with case.store() as store, refused("format 3, this version of mugv_ds reads 2"):
        store.restore()


def refuses_features_of_another_text_encoder(case: Case) -> None:
    first, other = HashTextEncoder(16, 6).info, HashTextEncoder(16, 7).info
    with case.store() as store:  # data that do not say, as all older checkpoints
        case.save(store, 1)
    with case.store(text_encoder=first) as store:
        assert store.restore() == 1
        case.save(store, 2)
    with case.store(text_encoder=first) as store:
        assert store.restore() == 2
    with case.store(text_encoder=other) as store, refused(f"features of {first}; the data now: of {other}; use the"):
        store.restore()
    with case.store(text_encoder=other, accept_changed_data=True) as store:
        assert store.restore() == 2
    with case.store() as store:
        assert store.restore() == 2


def saves_kinds_that_are_registered(case: Case) -> None:
    with case.store() as store:
        case.save(store, 1)
        average = [torch.full((f.numel,), 7.0) for f in store.fragments]
        store.extra_kinds["average"] = average
        with said("step-00000001: holds no average; taken from the weights, as later"):
            assert store.restore() == 1
        assert all(t.eq(1).all() for t in average)
        for t in average:
            t.fill_(3)
        case.save(store, 2)
        for t in average:
            t.zero_()
        assert store.restore() == 2 and all(t.eq(3).all() for t in average)
    with case.store() as store, said("step-00000002: holds average, which this run does not keep; left out"):
        assert store.restore() == 2


def says_when_space_runs_out(case: Case) -> None:
    original = files.free_bytes
    with case.store() as store:
        case.save(store, 1)
        files.free_bytes = lambda run: 10_000_000
        with said("are free, less than two checkpoints of"):
            store.restore()
        with refused("a checkpoint takes 0.01 GiB and 0.01 GiB are free; free some"):
            case.save(store, 2)
        assert files.saved_steps(case.folder) == [1]
    files.free_bytes = original


CASES = [
    falls_back,
    finds_a_step_newer_than_latest,
    refuses_a_latest_that_leads_out,
    keeps_the_last_and_every_fourth,
    commits_nothing_if_a_rank_cannot_write,
    refuses_what_is_not_finite,
    saves_what_was_when_it_was_asked,
    goes_back_inside_a_run,
    does_as_resume_says,
    sweeps_and_locks,
    refuses_features_of_another_text_encoder,
    refuses_other_data_and_models,
    saves_kinds_that_are_registered,
    says_when_space_runs_out,
]


def run_all(root: Path) -> None:
    case = Case(root)
    for function in CASES:
        case.folder = root / function.__name__
        try:
            function(case)
        except BaseException as error:
            error.add_note(f"in {function.__name__}")
            raise
        (root / f"{function.__name__}-{case.rank}").touch()


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, str]:
    """The folder in which each rank notes each case that has passed; what went wrong in the first that has not."""
    root = tmp_path_factory.mktemp("protocol")
    try:
        run_ranks(2, run_all, root)
    except Exception as error:
        return root, str(error)
    return root, ""


@pytest.mark.parametrize("case", [function.__name__ for function in CASES])
def test_two_ranks(launched, case):
    root, failure = launched
    assert all((root / f"{case}-{rank}").exists() for rank in range(2)), failure
