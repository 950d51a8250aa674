"""One S3 server for all tests, a bucket and a proxy for each."""

from collections.abc import Iterator
from itertools import count

import pytest

from mugv_ds.files import objects
from tests.helpers import store
from tests.helpers.store import Proxy

_numbers = count()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with store.s3_server() as url:
        yield url


@pytest.fixture
def bucket(server) -> str:
    """The URL of a new bucket."""
    name = f"bucket-{next(_numbers)}"
    store.put(server, name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def one_proxy(server) -> Iterator[Proxy]:
    with store.proxy(server) as made:
        yield made


@pytest.fixture
def proxy(one_proxy, monkeypatch) -> Iterator[Proxy]:
    """A proxy before the server, without faults as yet, to which this process is led; one, as clients are dear."""
    import s3fs

    for name, value in store.environment(one_proxy.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(objects, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    yield one_proxy
    one_proxy.reset()
