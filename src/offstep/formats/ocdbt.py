"""Encodes an OCDBT database: the container in which TensorStore and Orbax keep arrays.

The byte layout is TensorStore's, published with its sources as `tensorstore/kvstore/ocdbt/index.rst`. Written here are
the `single` manifest kind, no compression, one version (generation 1) and one or more data files. The own file begins
with the values that the entries refer to, whoever put them there; the B+tree nodes follow at `node_offset`. The others
hold nothing but values as far as this database knows, and other databases may refer to them as well: a base, or the
data files that several processes have written.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

MAX_NODE_BYTES = 100_000_000
"""Largest decoded node, as Orbax configures it."""

DATA_FILE_BYTES = 34
"""Length of a data file's name in its own database: `d/` and 32 hex digits."""

OWN_FILE, BASE_FILE = 0, 1
"""Indices into the table of data files; where there is no base, others begin at the second."""

_MANIFEST_MAGIC = 0x0CDB3A2A
_NODE_MAGIC = 0x0CDB20DE
_HEAD_BYTES = 14
_CRC_BYTES = 4
_MAX_INLINE_VALUE_BYTES = 1024
_VERSION_TREE_ARITY_LOG2 = 4
_GENERATION = 1
_INLINE, _OUT_OF_LINE = 0, 1
# Upper bound of what an entry costs beside its key and value: at most nine varints of a 63-bit number.
_ENTRY_OVERHEAD_BYTES = 81

Crc32c = Callable[[bytes, int], int]
"""CRC-32C of some bytes, continued from an earlier result (0 to start)."""


@dataclass(frozen=True)
class SlotRange:
    """A value that lies in a data file: the own one, or another."""

    offset: int
    size: int
    file: int = OWN_FILE


Entry = tuple[bytes, bytes | SlotRange]
"""Key and value; the value is either stored in the node or referred to."""


@dataclass(frozen=True)
class _Node:
    """One B+tree node, complete but for the names of the data files and the checksum.

    `key_count`, `tree_bytes` and `value_bytes` (referred to, not inline) cover the whole subtree.
    """

    height: int
    first_key: bytes
    columns: bytes
    offset: int
    size: int
    key_count: int
    tree_bytes: int
    value_bytes: int


@dataclass(frozen=True)
class PreparedDatabase:
    """A database with all that stays the same from one save to the next, made by `prepare_database`."""

    nodes: tuple[_Node, ...]  # in file order: children first, the root last
    file_bytes: tuple[int, ...] = (DATA_FILE_BYTES,)  # the lengths of the data files' names, the own one's first

    def encode(
        self, *, data_file: str, other_files: Sequence[str] = (), uuid: bytes, commit_time_ns: int, crc32c: Crc32c
    ) -> tuple[tuple[bytes, ...], bytes]:
        """Returns the bytes that follow the values in the own data file, in parts to be joined, and the manifest.

        Costs one pass of `crc32c` over the nodes; nothing of their size is copied.

        Raises:
            ValueError: a file's name has not the length that was prepared, or there is one too many or too few.
        """
        names = [data_file, *other_files]
        if len(names) != len(self.file_bytes):
            raise ValueError(f"the database refers to {len(self.file_bytes)} data files, got {names}")
        for name, size in zip(names, self.file_bytes, strict=True):
            if len(name) != size:
                raise ValueError(f"data file name {name!r} has {len(name)} characters, expected {size}")
        table = _encode_file_table(names)
        parts = tuple(part for node in self.nodes for part in _encode_node(node, table, crc32c))
        return parts, _encode_manifest(self.nodes[-1], table, uuid, commit_time_ns, crc32c)


def encode_database(
    entries: Sequence[Entry],
    *,
    data_file: str,
    node_offset: int,
    uuid: bytes,
    commit_time_ns: int,
    crc32c: Crc32c,
    max_node_bytes: int = MAX_NODE_BYTES,
) -> tuple[bytes, bytes]:
    """Returns (nodes, manifest) for entries in ascending order of their keys.

    The nodes belong at `node_offset` of `data_file`, the manifest into `manifest.ocdbt`.
    """
    database = prepare_database(entries, node_offset=node_offset, max_node_bytes=max_node_bytes)
    parts, manifest = database.encode(data_file=data_file, uuid=uuid, commit_time_ns=commit_time_ns, crc32c=crc32c)
    return b"".join(parts), manifest


def prepare_database(
    entries: Sequence[Entry],
    *,
    node_offset: int,
    max_node_bytes: int = MAX_NODE_BYTES,
    other_file_bytes: Sequence[int] | None = None,
) -> PreparedDatabase:
    """Lays out the B+tree of `entries`, which must be in strictly ascending order of their keys.

    `other_file_bytes` are the lengths of the other data files' names; by default that of a base, if one is used.

    Raises:
        ValueError: there are no entries, or they are not in order.
    """
    _check_order([key for key, _ in entries])
    file_count = 1 + max((value.file for _, value in entries if isinstance(value, SlotRange)), default=OWN_FILE)
    others = [DATA_FILE_BYTES] * (file_count - 1) if other_file_bytes is None else other_file_bytes
    file_bytes = (DATA_FILE_BYTES, *others)
    nodes: list[_Node] = []
    offset = node_offset
    for group in _split(entries, _entry_bytes, max_node_bytes, at_least=1):
        nodes.append(_make_leaf_node(group, offset, file_bytes))
        offset += nodes[-1].size
    level = list(nodes)
    while len(level) > 1:
        parents = []
        for children in _split(level, _child_bytes, max_node_bytes, at_least=2):
            parents.append(_make_interior_node(children, offset, file_bytes))
            offset += parents[-1].size
        nodes += parents
        level = parents
    return PreparedDatabase(tuple(nodes), file_bytes)


def _check_order(keys: Sequence[bytes]) -> None:
    if not keys:
        raise ValueError("an OCDBT database needs at least one entry")
    for before, after in pairwise(keys):
        if before >= after:
            raise ValueError(f"OCDBT keys must ascend: {before!r} stands before {after!r}")


_Item = TypeVar("_Item")


def _split(
    items: Sequence[_Item], size_of: Callable[[_Item], int], limit: int, *, at_least: int
) -> Iterator[Sequence[_Item]]:
    """Cuts `items` into runs that stay below `limit` bytes, but hold `at_least` items (the last one may hold fewer)."""
    start = 0
    total = 0
    for i, item in enumerate(items):
        size = size_of(item)
        if i - start >= at_least and total + size > limit:
            yield items[start:i]
            start, total = i, 0
        total += size
    yield items[start:]


def _entry_bytes(entry: Entry) -> int:
    key, value = entry
    inline = len(value) if isinstance(value, bytes) else 0
    return len(key) + inline + _ENTRY_OVERHEAD_BYTES


def _child_bytes(child: _Node) -> int:
    return len(child.first_key) + _ENTRY_OVERHEAD_BYTES


def _make_leaf_node(entries: Sequence[Entry], offset: int, file_bytes: Sequence[int]) -> _Node:
    values = [value for _, value in entries]
    inline = [value for value in values if isinstance(value, bytes)]
    ranges = [value for value in values if isinstance(value, SlotRange)]
    prefixes, suffix_lengths, suffixes = _encode_keys([key for key, _ in entries])
    columns = (
        _varint(len(entries)),
        prefixes,
        suffix_lengths,
        suffixes,
        _varints(len(value) if isinstance(value, bytes) else value.size for value in values),
        bytes(_INLINE if isinstance(value, bytes) else _OUT_OF_LINE for value in values),
        _varints(value.file for value in ranges),
        _varints(value.offset for value in ranges),
        *inline,
    )
    statistics = (len(entries), 0, sum(value.size for value in ranges))
    return _make_node(0, entries[0][0], columns, offset, statistics, file_bytes)


def _make_interior_node(children: Sequence[_Node], offset: int, file_bytes: Sequence[int]) -> _Node:
    prefixes, suffix_lengths, suffixes = _encode_keys([child.first_key for child in children])
    columns = (
        _varint(len(children)),
        prefixes,
        suffix_lengths,
        # No prefix is taken away from the keys of the subtrees, so that a node does not depend on its siblings.
        _varints(0 for _ in children),
        suffixes,
        _varints(OWN_FILE for _ in children),
        _varints(child.offset for child in children),
        _varints(child.size for child in children),
        _varints(child.key_count for child in children),
        _varints(child.tree_bytes for child in children),
        _varints(child.value_bytes for child in children),
    )
    key_count = sum(child.key_count for child in children)
    tree_bytes = sum(child.tree_bytes for child in children)
    value_bytes = sum(child.value_bytes for child in children)
    height = children[0].height + 1
    statistics = (key_count, tree_bytes, value_bytes)
    return _make_node(height, children[0].first_key, columns, offset, statistics, file_bytes)


def _make_node(
    height: int,
    first_key: bytes,
    columns: Sequence[bytes],
    offset: int,
    statistics: tuple[int, int, int],
    file_bytes: Sequence[int],
) -> _Node:
    """`statistics`: keys, node bytes below this node, value bytes."""
    joined = b"".join(columns)
    table_bytes = len(_encode_file_table(["-" * size for size in file_bytes]))
    size = _HEAD_BYTES + 1 + table_bytes + len(joined) + _CRC_BYTES
    key_count, bytes_below, value_bytes = statistics
    return _Node(height, first_key, joined, offset, size, key_count, size + bytes_below, value_bytes)


def _encode_keys(keys: Sequence[bytes]) -> tuple[bytes, bytes, bytes]:
    """Returns the columns of prefix lengths, suffix lengths and suffixes."""
    shared = [_shared_bytes(*pair) for pair in pairwise(keys)]
    suffixes = [key[start:] for key, start in zip(keys, [0, *shared], strict=True)]
    return _varints(shared), _varints(len(suffix) for suffix in suffixes), b"".join(suffixes)


def _shared_bytes(before: bytes, after: bytes) -> int:
    """Length of the common prefix."""
    same = (a == b for a, b in zip(before, after, strict=False))
    return next((i for i, equal in enumerate(same) if not equal), min(len(before), len(after)))


def _encode_node(node: _Node, table: bytes, crc32c: Crc32c) -> tuple[bytes, bytes, bytes]:
    head = _encode_head(_NODE_MAGIC, node.size) + bytes([node.height]) + table
    crc = crc32c(node.columns, crc32c(head, 0))
    return head, node.columns, struct.pack("<I", crc)


def _encode_manifest(root: _Node, table: bytes, uuid: bytes, commit_time_ns: int, crc32c: Crc32c) -> bytes:
    config = (
        uuid,
        _varint(0),  # manifest kind: single
        _varint(_MAX_INLINE_VALUE_BYTES),
        _varint(MAX_NODE_BYTES),
        bytes([_VERSION_TREE_ARITY_LOG2]),
        _varint(0),  # compression: none
    )
    numbers = (OWN_FILE, root.offset, root.size, root.key_count, root.tree_bytes, root.value_bytes)
    versions = (
        _varint(1),  # number of versions
        _varint(_GENERATION),
        bytes([root.height]),
        _varints(numbers),
        struct.pack("<Q", commit_time_ns),
        _varint(0),  # number of version tree nodes
    )
    body = b"".join((*config, table, *versions))
    head = _encode_head(_MANIFEST_MAGIC, _HEAD_BYTES + len(body) + _CRC_BYTES)
    return head + body + struct.pack("<I", crc32c(head + body, 0))


def _encode_head(magic: int, size: int) -> bytes:
    """Magic, length of the whole, format version 0, compression 0."""
    return struct.pack(">I", magic) + struct.pack("<Q", size) + b"\0\0"


def _encode_file_table(names: Sequence[str]) -> bytes:
    """A table of files, none of which shares a prefix with the one before or hands a part of its path down."""
    paths = [name.encode("ascii") for name in names]
    prefixes, base_lengths = _varints([0] * (len(paths) - 1)), _varints([0] * len(paths))
    return _varint(len(paths)) + prefixes + _varints(map(len, paths)) + base_lengths + b"".join(paths)


def _varint(value: int) -> bytes:
    """Unsigned LEB128."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varints(values: Iterable[int]) -> bytes:
    return b"".join(map(_varint, values))
