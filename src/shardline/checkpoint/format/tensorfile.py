"""One safetensors file: written in one pass with its checksum, read by ranges of elements.

The format is safetensors' own (eight bytes of length, a JSON header, raw little-endian elements); the library reads
what is written here. It is written here because the checksum must be of the very bytes that went out, without reading
them again, and read here because a range then goes straight to where it belongs. A memory map would end the process
with SIGBUS where a file is truncated or a network disk fails; a read raises an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import UnsupportedOperation
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from shardline.checkpoint.format.checksum import crc32
from shardline.checkpoint.format.files import open_regular
from shardline.errors import CheckpointError, shown

__all__ = ["CODES", "TensorFile", "Written", "header_of", "memory_of", "write"]

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""safetensors' names of dtypes."""

_DTYPES = {code: dtype for dtype, code in CODES.items()}
_CHUNK = 1 << 20  # bytes that are summed and then written while they are still in the cache
_BATCH = 1 << 22  # bytes after which the disk is asked to begin
_PIECE = 1 << 22  # bytes that are on their way to another dtype or device at a time
_LARGEST_HEADER = 100_000_000  # safetensors' own limit

if sys.byteorder != "little":
    raise ImportError("safetensors files are little-endian, and this machine is not.")


@dataclass(frozen=True)
class Written:
    """Size in bytes and CRC-32 of a whole file."""

    bytes: int
    crc32: int


def header_of(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The length and header of a file with these tensors; elements follow in the order of ``shapes``."""
    offset = 0
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for key, (dtype, shape) in shapes.items():
        size = dtype.itemsize
        for length in shape:
            size *= length
        entries[key] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], middle: Callable[[], None]
) -> Written:
    """Write ``tensors`` (dense, any device) to the empty ``file``; one at a time is on the host.

    ``middle`` is called when half of them are written.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # all are aligned
    start = header_of({key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in ordered.items()}, metadata)
    _reserve(file, len(start) + sum(tensor.numel() * tensor.element_size() for tensor in ordered.values()))
    out = _Out(file)
    out.put(start)
    for number, tensor in enumerate(ordered.values()):
        if number == len(ordered) // 2:
            middle()
        host = tensor.detach().cpu().contiguous()
        data = memory_of(host)
        for low in range(0, len(data), _CHUNK):
            out.put(data[low : low + _CHUNK])
    return Written(out.size, out.crc)


def _reserve(file: BinaryIO, size: int) -> None:
    """Ask for the room at once, which halves the time to the disk, and finds a full one before anything is written."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, UnsupportedOperation):  # a system that has no such call, or no real file
        pass
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # the file system has not
            raise


class _Out:
    """A new file: sums what goes out, and has the disk begin with it, so that a flush at the end finds little to do."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._told = file, 0
        self.size = self.crc = 0

    def put(self, data: bytes | memoryview) -> None:
        self.crc = crc32(data, self.crc)
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
        self.size += len(data)
        if self.size - self._told >= _BATCH:
            self._tell_the_disk()

    def _tell_the_disk(self) -> None:
        # Linux starts to write what it is advised not to keep; what is on its way to the disk stays in the cache.
        with contextlib.suppress(AttributeError, OSError):  # elsewhere, or for no real file: there is no such advice
            os.posix_fadvise(self._file.fileno(), self._told, self.size - self._told, os.POSIX_FADV_DONTNEED)
        self._told = self.size


def memory_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which the caller keeps alive."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(b"")
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


class TensorFile:
    """A file to read from. Every error names it.

    Attributes:
        metadata: the header's own strings.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
        try:
            self._read_header()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self.close()
            raise CheckpointError(f"{path} is not a safetensors file, or is damaged: {shown(error)}.") from None

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        entries = json.loads(self._file.read(length))
        self.metadata: dict[str, str] = entries.pop("__metadata__", {})
        self._start = 8 + length
        self._rows: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        places = []
        for key, entry in entries.items():
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            low, high = entry["data_offsets"]
            if any(type(each) is not int or each < 0 for each in (*shape, low, high)):
                raise ValueError(f"{key!r} has an invalid shape or place")
            numel = 1
            for each in shape:
                numel *= each
            if numel * dtype.itemsize != high - low or not 0 <= low <= high <= size - self._start:
                raise ValueError(f"the place of {key!r} does not fit its shape or the file")
            self._rows[key] = (dtype, shape, low)
            places.append((low, high))
        done = 0
        for low, high in sorted(places):  # else a short file could hold any number of large tensors
            if low < done:
                raise ValueError("two tensors overlap")
            done = high

    def close(self) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        return list(self._rows)

    def dtype(self, key: str) -> torch.dtype:
        return self._header(key)[0]

    def shape(self, key: str) -> tuple[int, ...]:
        return self._header(key)[1]

    def _header(self, key: str) -> tuple[torch.dtype, tuple[int, ...], int]:
        try:
            return self._rows[key]
        except KeyError:
            raise CheckpointError(f"{self.path} holds no tensor {key!r}, which the manifest says it does.") from None

    def tensor(self, key: str) -> Tensor:
        """A whole tensor, on CPU."""
        dtype, shape, _ = self._header(key)
        out = torch.empty(shape, dtype=dtype)
        self.fill(out.view(-1), key)
        return out

    def fill(self, out: Tensor, key: str, start: int = 0) -> None:
        """Read elements ``start`` to ``start + len(out)`` into ``out`` (1-D, contiguous, any dtype and device)."""
        dtype, shape, low = self._header(key)
        numel = 1
        for length in shape:
            numel *= length
        if start + out.numel() > numel:
            raise CheckpointError(f"{self.path} holds {numel} elements of {key!r}, fewer than the manifest says.")
        if out.dtype == dtype and out.device.type == "cpu":
            self._read(out, low + start * dtype.itemsize)
            return
        step = max(1, _PIECE // dtype.itemsize)
        scratch = torch.empty(min(step, out.numel()), dtype=dtype)
        for first in range(0, out.numel(), step):
            piece = scratch[: min(step, out.numel() - first)]
            self._read(piece, low + (start + first) * dtype.itemsize)
            out[first : first + piece.numel()].copy_(piece)

    def _read(self, out: Tensor, offset: int) -> None:
        data, position = memory_of(out), self._start + offset
        while data:
            try:
                count = os.preadv(self._file.fileno(), [data], position)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}.") from None
            if not count:
                raise CheckpointError(f"{self.path} ends too early: it was truncated.")
            data, position = data[count:], position + count
