"""Object stores for tests: SeaweedFS for `s3://`, a small fake for `gs://`, and a proxy that fails before either."""

from __future__ import annotations

import atexit
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import fake_gcs
import fault_proxy
import pytest
import seaweed

from offstep.stores.address import parse_address
from offstep.stores.client import Store
from offstep.stores.path import open_place

BUCKET = fake_gcs.BUCKET
SECRETS = (seaweed.ACCESS_KEY, seaweed.SECRET_KEY, "a-token-for-tests")
_run_numbers = itertools.count()
_GCS_URL = "TENSORSTORE_GCS_HTTP_URL"


@dataclass(frozen=True)
class Server:
    """A running store.

    Attributes:
        kind: `"s3"` or `"gs"`.
        endpoint: Where it listens.
    """

    kind: str
    endpoint: str

    def address(self, path: str) -> str:
        """Returns the address of something in the bucket, with the server where addresses can have it."""
        return f"{self.kind}://{BUCKET}/{path}" + (f"?endpoint={self.endpoint}" if self.kind == "s3" else "")


@pytest.fixture(scope="module", params=["s3", "gs"])
def store(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A store with an empty bucket, the keys for it in the environment."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        if request.param == "s3":
            server = Server("s3", _find_seaweed())
            for name, value in seaweed.ENVIRONMENT.items():
                patch.setenv(name, value)
            # It makes a bucket when something is put there.
            Store(parse_address(server.address("made"))).put("made", b"")
        else:
            server = Server("gs", stack.enter_context(fake_gcs.serve()))
            patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", SECRETS[2])  # else the machine's own are looked for
            patch.setenv(_GCS_URL, server.endpoint)
        yield server


s3_only = pytest.mark.parametrize("store", ["s3"], indirect=True)
gs_only = pytest.mark.parametrize("store", ["gs"], indirect=True)  # the quicker one, where both are alike


@cache
def _find_seaweed() -> str:
    """Returns the endpoint of one server for the whole session."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="seaweed-")))
        try:
            endpoint = stack.enter_context(seaweed.serve(directory))
        except RuntimeError as error:
            pytest.skip(f"NO S3 SERVER, so nothing of S3 is tested: {error}")
        atexit.register(stack.pop_all().close)
    return endpoint


@pytest.fixture
def run(store: Server, request: pytest.FixtureRequest) -> str:
    """The address of a directory of steps that only this test uses."""
    return store.address(f"{request.node.originalname}-{next(_run_numbers)}")


@pytest.fixture
def proxy(store: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[fault_proxy.Proxy]:
    """A proxy in front of the store; `through` gives the address of something by way of it."""
    with fault_proxy.stand_before(store.endpoint) as proxy:
        if store.kind == "gs":
            monkeypatch.setenv(_GCS_URL, proxy.endpoint)
        yield proxy


def through(proxy: fault_proxy.Proxy, store: Server, address: str) -> str:
    """Returns the address with the proxy in the place of the store."""
    return address.replace(store.endpoint, proxy.endpoint)


def below(address: str, name: str) -> str:
    """Returns the address of something in a directory; `name` may be a template."""
    plain, mark, options = address.partition("?")
    return f"{plain}/{name}{mark}{options}"


def list_objects(address: str) -> list[str]:
    """Returns the names of all objects below an address, relative to it."""
    place = parse_address(address)
    return [key[len(place.key) + 1 :] for key in Store(place).list(f"{place.key}/")]


def download(address: str, directory: Path) -> Path:
    """Copies every object below an address, as `aws s3 sync` would."""
    source = open_place(address)
    for path in source.rglob("*"):
        target = directory / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return directory
