"""The address of something in an object store: `s3://bucket/run/120` or `gs://bucket/run/120`.

    s3://bucket/run?endpoint=http://127.0.0.1:8333&region=eu-central-1

What follows the `?` says which server is meant, and goes with every address made from this one. Credentials are never
part of an address.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qsl

SCHEMES = ("s3", "gs")

_SCHEME = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*)://")
# Both kinds of store: letters, digits, dots, hyphens and (in names of old) underscores.
_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,220}[a-zA-Z0-9]")
_OPTIONS = {"s3": ("endpoint", "region"), "gs": ()}


@dataclass(frozen=True)
class Address:
    """Where something is in a store; the part of `pathlib` that needs no store.

    Attributes:
        scheme: `"s3"` or `"gs"`.
        bucket: Name of the bucket.
        key: Name of the object, or what the names of several begin with; no slash at either end.
        options: Which server, as (name, value).
    """

    scheme: str
    bucket: str
    key: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.plain}{self.query}"

    @property
    def plain(self) -> str:
        """The address without the options."""
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    @property
    def query(self) -> str:
        """The options with their question mark; empty without any."""
        return "?" * bool(self.options) + "&".join(f"{name}={value}" for name, value in self.options)

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        """What the last part is in; of a bucket itself."""
        return replace(self, key=self.key.rpartition("/")[0])

    def __truediv__(self, name: str) -> Address:
        return replace(self, key="/".join(filter(None, (self.key, name.strip("/")))))

    def with_name(self, name: str) -> Address:
        """Returns the address of what is beside it under another name."""
        return self.parent / name

    def is_relative_to(self, other: Address) -> bool:
        """Returns whether it is `other`, or below it."""
        return self == other or self.is_below(other)

    def is_below(self, other: Address) -> bool:
        """Returns whether it is in `other`."""
        is_same = (self.scheme, self.bucket, self.options) == (other.scheme, other.bucket, other.options)
        return is_same and self != other and (not other.key or self.key.startswith(f"{other.key}/"))


Place = Path | Address
"""Where a checkpoint goes: in a file system, or in a store."""


def is_address(text: str | os.PathLike[str]) -> bool:
    """Returns whether a text is the address of a store rather than a path."""
    return _SCHEME.match(os.fspath(text)) is not None


def parse_address(text: str) -> Address:
    """Reads an address.

    Raises:
        ValueError: it is none, or has parts that it must not have.
    """
    match = _SCHEME.match(text)
    if match is None or match["scheme"] not in SCHEMES:
        raise ValueError(f"checkpoints go to directories and to s3:// or gs:// addresses. Received: {text}")
    scheme = match["scheme"]
    place, _, query = text[match.end() :].partition("?")
    bucket, _, key = place.partition("/")
    if "@" in bucket:  # not repeated: it may be a secret
        raise ValueError(f"an address holds no credentials; they are taken from the environment. Received: {scheme}://")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(f"an address begins with {scheme}:// and the name of a bucket. Received: {text}")
    key = key.rstrip("/")
    if "\0" in key or any(part in ("", ".", "..") for part in key.split("/") if key):
        raise ValueError(f"the names in an address must not be empty, '.' or '..'. Received: {text}")
    return Address(scheme, bucket, key, _parse_options(scheme, query, text))


def split_query(text: str) -> tuple[str, str]:
    """Returns a text without the options that an address may have, and these; a path has none."""
    if not is_address(text):
        return text, ""
    plain, mark, options = text.partition("?")
    return plain, mark + options


def to_place(text: str) -> Place:
    """Returns what a text means: the address of a store, or a path."""
    return parse_address(text) if is_address(text) else Path(text)


def _parse_options(scheme: str, query: str, text: str) -> tuple[tuple[str, str], ...]:
    options = tuple(parse_qsl(query, keep_blank_values=True))
    known = _OPTIONS[scheme]
    if query and (not options or any(name not in known or not value for name, value in options)):
        allowed = f"only {' and '.join(known)} may follow" if known else "nothing may follow"
        raise ValueError(f"{allowed} the '?' of a {scheme}:// address. Received: {text}")
    endpoint = dict(options).get("endpoint", "http://")
    if not endpoint.startswith(("http://", "https://")) or "@" in endpoint:
        raise ValueError(f"endpoint must be a http:// or https:// address without credentials. Received: {scheme}://")
    return options
