"""What is written is a safetensors file to the library, and what the library writes can be read by ranges."""

from __future__ import annotations

import errno
import io
import json
import os
import zlib

import pytest
import safetensors.torch
import torch

from shardline.checkpoint.format.tensorfile import CODES, TensorFile, write
from shardline.errors import CheckpointError


def some():
    torch.manual_seed(0)
    return {
        f"t/{code}": (torch.rand(5, 7) * 100).to(dtype)
        for dtype, code in CODES.items()
        if not dtype.is_complex and dtype not in (torch.uint16, torch.uint32, torch.uint64)
    } | {"none": torch.empty(0), "number": torch.tensor(3.5), "turned": torch.rand(4, 6).t()}  # fmt: skip


def refuse(descriptor, offset, size):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


class Short(io.RawIOBase):
    """A file that takes a few bytes at a time, as an unbuffered one may."""

    def __init__(self, path):
        self.path = path

    def write(self, data):
        with self.path.open("ab") as file:
            return file.write(data[:1000])


@pytest.mark.parametrize("kind", ["unbuffered", "buffered", "cannot reserve", "short writes"])
def test_the_library_reads_what_is_written(tmp_path, monkeypatch, kind):
    tensors, path = some(), tmp_path / "x.safetensors"
    if kind == "cannot reserve":
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    with Short(path) if kind == "short writes" else path.open("wb", buffering=-1 if kind == "buffered" else 0) as file:
        written = write(file, tensors, {"id": "7"}, lambda: None)
    data = path.read_bytes()
    assert (written.bytes, written.crc32) == (len(data), zlib.crc32(data))
    again = safetensors.torch.load_file(path)
    assert again.keys() == tensors.keys()
    for key, value in tensors.items():
        assert torch.equal(again[key].double(), value.double()) and again[key].dtype == value.dtype
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"id": "7"}


def test_ranges_of_what_the_library_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    value = torch.arange(3_000_000, dtype=torch.float32)
    safetensors.torch.save_file({"a": value, "b": torch.ones(3)}, path)
    file = TensorFile(path)
    for start, stop in [(0, 1), (5, 2_999_999), (2_999_999, 3_000_000), (7, 7)]:
        for dtype in (torch.float32, torch.float64):
            out = torch.empty(stop - start, dtype=dtype)
            file.fill(out, "a", start)
            assert torch.equal(out, value[start:stop].to(dtype))
    with pytest.raises(CheckpointError, match=r"x.safetensors holds 3 elements of 'b'"):
        file.fill(torch.empty(2), "b", 2)
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        file.tensor("c")
    file.close()


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -8])
def test_a_truncated_file_is_an_error_and_no_crash(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"x.safetensors"):
        TensorFile(path)


def test_tensors_share_no_bytes(tmp_path):
    """A file of one large tensor under many names would fill memory. Empty ones take no place."""
    path = tmp_path / "x.safetensors"
    for low, second in ((0, 8), (4, 8), (8, 12)):
        rows = {
            "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
            "none": {"dtype": "U8", "shape": [0], "data_offsets": [8, 8]},
            "b": {"dtype": "U8", "shape": [second - low], "data_offsets": [low, second]},
        }
        head = json.dumps(rows).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(12))
        if low < 8:
            with pytest.raises(CheckpointError, match=r"x.safetensors is not a safetensors file.*two tensors overlap"):
                TensorFile(path)
        else:
            TensorFile(path).close()


def test_the_disk_is_told_to_begin_early(tmp_path, monkeypatch):
    """Ranges follow each other from the start, each when it is written, and little is left for the flush."""
    told = []
    path = tmp_path / "a.safetensors"

    def advise(descriptor, start, length, advice):
        assert start + length == path.stat().st_size
        told.append((start, start + length))

    monkeypatch.setattr(os, "posix_fallocate", refuse)  # else the file has its size from the start
    monkeypatch.setattr(os, "posix_fadvise", advise)
    with path.open("wb", buffering=0) as file:
        written = write(file, {"a": torch.zeros(5 << 20)}, {}, lambda: None)
    starts, stops = zip(*told, strict=True)
    assert starts == (0, *stops[:-1])
    assert len(told) > 3 and written.bytes - stops[-1] < stops[0]
