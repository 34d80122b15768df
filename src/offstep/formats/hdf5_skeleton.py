"""The metadata of an HDF5 file whose arrays lie elsewhere: groups, datasets and attributes, but no data.

h5py makes the metadata, once, in memory. Each dataset's address is then put where the caller wants its array to be, so
that a file is these constant bytes followed by the arrays. Layouts are from the HDF5 File Format Specification 3.0
(https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html), sections II.A (superblock), IV.A.1.a (version 1
object header) and IV.A.2.i (data layout message).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

_UNDEFINED = 2**64 - 1
_END_OF_FILE = struct.Struct("<Q")
_END_OF_FILE_AT = 40  # in a superblock of version 0
_HEADER = struct.Struct("<BxHII4x")  # version, number of messages, reference count, bytes of the first block
_MESSAGE = struct.Struct("<HHB3x")  # type, bytes of its data, flags
_LAYOUT = struct.Struct("<BBQQ")  # version, class, address, size
_CONTINUATION = struct.Struct("<QQ")  # address, bytes
_LAYOUT_TYPE, _CONTINUATION_TYPE = 0x08, 0x10
_LAYOUT_VERSION, _CONTIGUOUS = 3, 1


@dataclass(frozen=True)
class Dataset:
    """One array.

    Attributes:
        path: Its name from the root, parts separated by `/`.
        dtype: NumPy or ml_dtypes name.
        offset: Where it starts, counted from the end of the metadata.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    offset: int


@dataclass(frozen=True)
class Skeleton:
    """Metadata without addresses.

    Attributes:
        image: The bytes, which end up at the start of the file.
        layouts: For each dataset that has data: where in `image` its address is, and the dataset's offset.
    """

    image: bytes
    layouts: tuple[tuple[int, int], ...]

    def encode(self, *, data_at: int, data_bytes: int) -> bytes:
        """Returns the first `data_at` bytes of a file in which `data_bytes` of arrays follow."""
        if data_at < len(self.image):
            raise ValueError(f"the metadata take {len(self.image)} bytes, there are {data_at}")
        head = bytearray(self.image)
        for position, offset in self.layouts:
            _END_OF_FILE.pack_into(head, position, data_at + offset)
        _END_OF_FILE.pack_into(head, _END_OF_FILE_AT, data_at + data_bytes)
        return bytes(head) + bytes(data_at - len(head))


def make_skeleton(datasets: Sequence[Dataset], groups: Mapping[str, Mapping[str, str]]) -> Skeleton:
    """Makes the metadata of a file; about 0.2 ms for each dataset.

    Args:
        datasets: All arrays.
        groups: Groups that have attributes, or no array: path → attributes.

    Raises:
        RuntimeError: this version of HDF5 writes something else than what is documented.
    """
    # The oldest version of the format, whatever becomes the default: its object headers carry no checksums.
    image, headers = render(datasets, groups, ("earliest", "v110"), _create)
    check(image[8] == 0, f"superblock version {image[8]}")
    positions = [_find_address(image, header, dataset) for header, dataset in zip(headers, datasets, strict=True)]
    layouts = zip(positions, (dataset.offset for dataset in datasets), strict=True)
    return Skeleton(image, tuple((position, offset) for position, offset in layouts if position is not None))


def render(
    datasets: Sequence[Dataset],
    groups: Mapping[str, Mapping[str, str]],
    libver: tuple[str, str],
    create: Callable[[Any, Dataset, np.dtype[Any]], Any],  # of h5py: a file, and a dataset
) -> tuple[bytes, list[int]]:
    """Returns what h5py makes of datasets without data and of groups, and where each dataset's object header is."""
    import h5py  # the trainer and other formats do without

    with h5py.File("skeleton", "w", driver="core", backing_store=False, libver=libver) as file:
        for path, attributes in groups.items():
            group = file.require_group(path)
            for name, value in attributes.items():
                group.attrs[name] = value
        added = [create(file, dataset, find_dtype(dataset)) for dataset in datasets]
        for dataset, made in zip(datasets, added, strict=True):
            if dataset.dtype == "bfloat16":
                made.attrs["dtype"] = "bfloat16"  # HDF5 knows no such type; Keras looks for this
        headers = [h5py.h5o.get_info(made.id).addr for made in added]
        file.flush()
        image: bytes = file.id.get_file_image()
    return image, headers


def find_dtype(dataset: Dataset) -> np.dtype[Any]:
    """Returns the NumPy type of a dataset's elements."""
    return np.dtype(getattr(ml_dtypes, dataset.dtype, dataset.dtype))


def count_bytes(dataset: Dataset) -> int:
    """Returns how many bytes the values of a dataset take."""
    return math.prod(dataset.shape) * find_dtype(dataset).itemsize


def _create(file: Any, dataset: Dataset, dtype: np.dtype[Any]) -> Any:  # of h5py
    return file.create_dataset(dataset.path, dataset.shape, dtype)


def _find_address(image: bytes, header: int, dataset: Dataset) -> int | None:
    """Returns where in the image the dataset's address is; `None` for one without elements."""
    found = [at for kind, at in _messages(image, header) if kind == _LAYOUT_TYPE]
    check(len(found) == 1, f"{dataset.path} has {len(found)} layouts")
    version, kind, address, size = _LAYOUT.unpack_from(image, found[0])
    check((version, kind) == (_LAYOUT_VERSION, _CONTIGUOUS), f"{dataset.path} has layout {version}, {kind}")
    check(address == _UNDEFINED, f"{dataset.path} has data")
    check(size == count_bytes(dataset), f"{dataset.path} has {size} bytes")
    return found[0] + 2 if size else None


def _messages(image: bytes, header: int) -> Iterator[tuple[int, int]]:
    """Yields type and place of the data of each message of an object header."""
    version, _, _, size = _HEADER.unpack_from(image, header)
    check(version == 1, f"object header version {version}")
    blocks = [(header + _HEADER.size, size)]
    for start, length in blocks:  # grows on the way
        at = start
        while at + _MESSAGE.size <= start + length:
            kind, bytes_, _ = _MESSAGE.unpack_from(image, at)
            at += _MESSAGE.size
            if kind == _CONTINUATION_TYPE:
                blocks.append(_CONTINUATION.unpack_from(image, at))
            yield kind, at
            at += bytes_


def check(is_so: bool, found: str) -> None:
    """Raises a `RuntimeError` where HDF5 has written something else than what is documented."""
    if not is_so:
        raise RuntimeError(f"this version of HDF5 writes what offstep does not know: {found}")
