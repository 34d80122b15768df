"""One bucket of an object store, asked through TensorStore: small requests with an end to every wait."""

from __future__ import annotations

import errno
import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from offstep.parallel import run_all
from offstep.stores.address import Address
from offstep.stores.faults import Fault, describe_fault

PATIENCE_SECONDS = 30.0
"""How long a store may fail or be silent before that is an error, unless somebody says otherwise."""

CONCURRENCY = 4
"""Requests in flight for one checkpoint."""

SMALL_CONCURRENCY = 32
"""The same for objects of some kB, of which each process may have one, and for deletes: all they take is an answer."""

_THREADS = "offstep-store"
_LEAST_PATIENCE_SECONDS = 1.0
_SLOWEST_BYTES_PER_SECOND = 64 << 10  # of one request; silence is noticed much earlier
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0
# Read by TensorStore's HTTP client when it is first used. Without the last two it waits for a silent server for ever.
_HTTP_SETTINGS = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "5",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}

_SILENCE = Fault(errno.ETIMEDOUT, "the store does not answer", may_pass=True)

Future = Any  # tensorstore.Future, which carries no types


class Patience:
    """How long a store may go on without any success.

    Args:
        seconds: Between two successful answers.
        clock: Seconds that pass.
    """

    def __init__(self, seconds: float = PATIENCE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = max(seconds, _LEAST_PATIENCE_SECONDS)
        self._clock = clock
        self._since = clock()

    @property
    def remaining_seconds(self) -> float:
        """What is left of it; 0 when it is over."""
        return max(0.0, self._since + self._seconds - self._clock())

    def renew(self) -> None:
        """Begins anew, because the store has answered. Any thread."""
        self._since = self._clock()

    @property
    def seconds(self) -> float:
        """All of it."""
        return self._seconds


class Unanswered(OSError):
    """Requests went without an answer until the patience was over: what was asked for may still happen."""


class TooShort(OSError):
    """A range was asked for that an object does not have."""


class Store:
    """The objects of one bucket. Any thread.

    Everything raises `OSError` naming the object: at once for what cannot pass (no access, no bucket), after the
    patience is over for what might have (no answer, overload, broken connections).

    Args:
        address: Of anything in the bucket.
        patience: Shared by all requests, so that slow but steady work does not run out of it.
    """

    def __init__(self, address: Address, patience: Patience | None = None) -> None:
        self._bucket = Address(address.scheme, address.bucket, "", address.options)
        self._patience = patience or Patience()
        self._kvstore = _open(self._bucket)

    def get(self, key: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        """Returns an object, or the bytes from `start` to `stop` of it; `None` where there is none."""
        part = {} if start is None else {"byte_range": slice(start, stop)}
        found = self._ask(key, "read", lambda: self._kvstore.read(key, **part), (stop or 0) - (start or 0))
        return None if found.state == "missing" else bytes(found.value)

    def put(self, key: str, value: bytes) -> None:
        """Writes an object, in place of an older one."""
        self._ask(key, "written", lambda: self._kvstore.write(key, value), len(value))

    def create(self, key: str, value: bytes) -> bool:
        """Writes an object if there is none of that name; returns whether the one that is there has this value.

        An acknowledgement that was lost is made up for by reading: the value must be nobody else's.
        """
        absent = _absence()
        try:
            written = self._ask(key, "written", lambda: self._kvstore.write(key, value, if_equal=absent), len(value))
        except Unanswered:
            if self._is_there(key, value):
                return True
            raise
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return self._create_unconditionally(key, value)
        found = value if written.generation else self.get(key)
        if found is None:  # a bucket that is gone looks like that too
            text = "it cannot be written: the store has not taken it, though there is none; is the bucket there?"
            raise OSError(errno.ENOENT, text, str(self._bucket / key))
        return found == value

    def _create_unconditionally(self, key: str, value: bytes) -> bool:
        """Does what `create` does on a server without conditional writes, as far as that goes: two may believe it."""
        if self.get(key) is None:
            self.put(key, value)
        return self.get(key) == value

    def _is_there(self, key: str, value: bytes) -> bool:
        """Asks a last time, after the patience is over."""
        try:
            return Store(self._bucket, Patience(_LEAST_PATIENCE_SECONDS)).get(key) == value
        except OSError:
            return False

    def delete(self, key: str) -> None:
        """Deletes an object; that there is none is no error."""
        self._ask(key, "deleted", lambda: self._kvstore.write(key, None))

    def list(self, prefix: str) -> list[str]:
        """Returns the names of the objects that begin with `prefix`, sorted."""
        import tensorstore as ts

        keys = ts.KvStore.KeyRange(prefix, _end_of(prefix))
        found = self._ask(prefix, "listed", lambda: self._kvstore.list(keys))
        if not found and self._bucket.scheme == "gs":
            self.get(f"{prefix}-")  # TensorStore takes a refusal to list for an empty list, but none to read
        return sorted(bytes(key).decode() for key in found)

    def put_all(self, objects: Mapping[str, Callable[[], bytes]], concurrency: int = CONCURRENCY) -> None:
        """Writes several objects at a time; each value is made when its turn has come, and forgotten after that."""
        run_all(lambda item: self.put(item[0], item[1]()), list(objects.items()), concurrency, _THREADS)

    def delete_all(self, keys: Iterable[str]) -> None:
        """Deletes several objects at a time."""
        run_all(self.delete, list(keys), SMALL_CONCURRENCY, _THREADS)

    def _ask(self, key: str, verb: str, begin: Callable[[], Future], size_bytes: int = 0) -> Any:  # of TensorStore
        pause, fault = _FIRST_PAUSE_SECONDS, _SILENCE
        while True:
            answer = self._wait(begin(), size_bytes)
            if not isinstance(answer, Fault):
                self._patience.renew()
                return answer
            fault = fault if answer is _SILENCE else answer  # after a pause there may be no time for an answer
            remaining = self._patience.remaining_seconds
            where = str(self._bucket / key)
            if not fault.may_pass:
                kind = TooShort if fault.is_range else OSError
                raise kind(fault.errno, f"it cannot be {verb}: {fault.text}", where)
            if remaining <= 0:
                text = f"it cannot be {verb}: {fault.text}, for {self._patience.seconds:g} s"
                raise Unanswered(fault.errno, text, where)
            time.sleep(min(pause, remaining))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _wait(self, future: Future, size_bytes: int) -> Any:  # what the future gives, or a fault
        # A request that is lost in silence is given up early enough for a second one.
        remaining = self._patience.remaining_seconds
        limit = min(remaining, max(remaining / 2, _LEAST_PATIENCE_SECONDS)) + size_bytes / _SLOWEST_BYTES_PER_SECOND
        try:
            return future.result(timeout=limit)
        except TimeoutError:
            future.cancel()
            return _SILENCE
        except (ValueError, RuntimeError, IndexError, NotImplementedError) as error:
            return describe_fault(error)


@functools.cache
def _absence() -> bytes:
    """Returns what TensorStore calls the generation of an object that is not there."""
    import tensorstore as ts

    generation = ts.KvStore.open({"driver": "memory"}).result().read("nothing").result().stamp.generation
    return bytes(generation)


def _end_of(prefix: str) -> str:
    """Returns the first name after all those that begin with `prefix`; empty where there is none."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""


def _open(bucket: Address) -> Any:  # tensorstore.KvStore
    for name, value in _HTTP_SETTINGS.items():
        os.environ.setdefault(name, value)
    emulator = _find("STORAGE_EMULATOR_HOST")
    if emulator is not None:  # what Google's own libraries look for
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator if "://" in emulator else f"http://{emulator}")
    import tensorstore as ts  # a third of a second, and only stores need it

    try:
        return ts.KvStore.open(describe_kvstore(bucket), context=ts.Context()).result()
    except ValueError as error:
        raise OSError(
            errno.EINVAL, f"the store cannot be addressed: {describe_fault(error).text}", str(bucket)
        ) from None


def describe_kvstore(address: Address) -> dict[str, Any]:  # JSON
    """Returns TensorStore's description of what begins with the key of an address, which is a directory."""
    path = f"{address.key}/" if address.key else ""
    if address.scheme == "gs":
        retries = {"max_retries": 1, "initial_delay": "100ms", "max_delay": "100ms"}
        return {"driver": "gcs", "bucket": address.bucket, "path": path, "gcs_request_retries": retries}
    options = dict(address.options)
    endpoint = options.get("endpoint") or _find("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    region = options.get("region") or _find("AWS_REGION", "AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None)
    known = {"endpoint": endpoint, "aws_region": region}
    return {
        "driver": "s3",
        "bucket": address.bucket,
        "path": path,
        "use_conditional_write": True,
        "aws_credentials": {"type": "environment" if _find("AWS_ACCESS_KEY_ID") else "default"},
        "s3_request_retries": {"max_retries": 1, "initial_delay": "100ms", "max_delay": "100ms"},
        **{name: value for name, value in known.items() if value},
    }


def _find(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)
