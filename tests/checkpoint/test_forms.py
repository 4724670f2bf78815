"""What is in a checkpoint's place is looked at before it is believed: forms, ranges, special files, names."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardline.checkpoint.format import files, manifest
from shardline.checkpoint.format.commit import commit
from shardline.checkpoint.format.directory import Directory, check_files
from shardline.checkpoint.format.manifest import Manifest, read_manifest
from shardline.checkpoint.format.reader import CheckpointReader
from shardline.checkpoint.format.tensorfile import CODES
from shardline.checkpoint.format.values import name_of
from shardline.cli import main
from shardline.errors import CheckpointError, ShardlineError, UsageError
from shardline.events import Notice
from tests.checkpoint import cases, disk

ALONE = disk.Ring(0, [])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A directory with two small checkpoints, of which "two" is the newer."""
    path = tmp_path_factory.mktemp("two")
    for step, tag in ((1, "one"), (2, "two")):
        disk.save(ALONE, path, tag, step)
    return path


@pytest.fixture
def saved(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    return tmp_path / "run"


def sign(checkpoint, data):
    """Write a manifest with a checksum that is right."""
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    (checkpoint / "manifest.json").write_bytes(data)
    (checkpoint / "manifest.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")


def content(checkpoint):
    return json.loads((checkpoint / "manifest.json").read_text())


@contextlib.contextmanager
def bounded(megabytes=300, seconds=20):
    """No more memory than so much above what there is, and no waiting: a FIFO would hang, a device never end."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages + megabytes * 1_000_000, before[1]))
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def the_one_before_is_found(path):
    """The damaged one is named, everywhere alike, and does not keep the other from being found."""
    directory = Directory(path)
    assert "one" in directory.order()
    found = {each.tag: each.problem for each in directory.checkpoints()}
    assert found["one"] is None
    said = None
    try:
        where = directory.locate("two")
        seen = read_manifest(where) if where is not None else None
    except CheckpointError as error:
        said = str(error)
    else:
        assert seen is None or check_files(where, seen, range(len(seen.files)))
    assert directory.prune(1) == []
    return said or found.get("two")


# -- forms ------------------------------------------------------------------------------------------------------------

WRONG = {
    "a list": [],
    "no object": 5,
    "empty": {},
    "not JSON": b"{",
    "no UTF-8": b"\xff\xfe",
    "a number that JSON lacks": b'{"format":"shardline","version":1,"seed":NaN}',
    "nested 100,000 deep": b"[" * 100_000,
    "a number of 5,000 digits": b'{"format":"shardline","version":' + b"1" * 5000 + b"}",
}
FIELDS = {
    "counters": [None, {}, {"global_steps": -1}, {"global_steps": True}, {"global_steps": 1e300}, 7],
    "counters.global_steps": [-1, True, 1.5, "1", 1 << 70],
    "files": [None, [], {}, [[]], [{"name": "rank-00000.safetensors"}]],
    "files.0.name": ["../one/rank-00000.safetensors", "/etc/passwd", "", "rank-0.safetensors", 5, "latest"],
    "files.0.bytes": [-1, 1 << 60, "1", True],
    "parameters": [None, [], {"w": None}, {"w": {}}],
    "parameters.w.shape": [[-64], [1 << 62], [64, 1 << 40], "64", [True], [1] * 100],
    "parameters.w.stride": [[2], [1 << 40], [], [-1]],
    "parameters.w.weight": [{}, {"dtype": "float32"}, {"dtype": "float32", "file": 0, "shape": [64]}, 3],
    "parameters.w.weight.dtype": ["float33", "__class__", "Tensor", None],
    "parameters.w.weight.pieces": [
        [], [[0, 0, 32]], [[0, 0, 64], [0, 0, 64]], [[1, 0, 64]], [[-1, 0, 64]], [[0, -64, 64]], [[0, 0]], [[]] * 9,
        [[0, 0.0, 64]], "x", [[0, 64, 0]],
    ],
    "parameters.w.group": [-1, "0", 1 << 40],
    "buffers": [[], {"b": {}}, {"b": {"shape": [1 << 40], "dtype": "float32", "files": [0]}},
                {"b": {"shape": [1], "dtype": "float32", "files": [7]}},
                {"b": {"shape": [1], "dtype": "int8", "files": []}}],
    "optimizer": [5, {"class": "Adam"}, {"class": 5, "groups": []}, {"class": "Adam", "groups": [5]}],
    "scaler": [{"scale": -1.0, "patience": 1, "good_steps": 1}, {"scale": 1e39, "patience": 1, "good_steps": 0}, []],
    "random": [None, [{}], [{"python": [3, "1.0"]}], [{"python": [2, None]}],
               [{"python": [3, None], "numpy": ["MT19937", 1 << 40, 0, "0x0.0p+0"]}], [5, 5, 5]],
    "world_size": [0, 2, -1, "1", 1 << 40],
    "stage": [4, None], "seed": [1 << 70, 0.5], "sequence": [-1, "x"], "latest": [1, None], "id": ["x", 5, "../" * 11],
    "tag": ["../one", "", "/", ".", "a\x1b[2Jb", 5], "client_state": [None, [], 5, {"x": [{"$tensor": "weight/w"}] * 2},
                     {"$dict": [[{"$tensor": "k"}, {"$tuple": [{"$tensor": "k"}]}]]}, {"x": {"$tensor": []}}],
    "scheduler": [5, []],
    "loader": [5, "x"], "version": [0, -1, "1", True, 99], "format": ["x", None], "created": [5, "x" * 10_000],
    "extra_state": [5, []], "loaders": [5, {}, [5], [["x"]], ["x" * 10_000]],
}  # fmt: skip
EACH = [(field, value) for field, values in FIELDS.items() for value in values]


def put(data, field, value):
    *path, last = field.split(".")
    for key in path:
        data = data[int(key) if isinstance(data, list) else key]
    data[int(last) if isinstance(data, list) else last] = value


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_manifest(saved, wrong):
    sign(saved / "two", WRONG[wrong])
    assert "manifest.json" in the_one_before_is_found(saved)


def test_every_field_has_a_type_and_a_range(saved, capsys):
    """In one test, as each is cheap: values that no save writes, with a right checksum."""
    good = content(saved / "two")
    for field, value in EACH:
        data = json.loads(json.dumps(good))
        put(data, field, value)
        sign(saved / "two", data)
        said = the_one_before_is_found(saved)
        assert said and "two/manifest.json has" in said and len(said) < 1000, (field, value, said)
        assert main(["checkpoint", "verify", str(saved), "--all"]) == 1
    for command in ("list", "inspect", "verify"):
        assert main(["checkpoint", command, str(saved)]) in (0, 1)
    assert "has a wrong form" in capsys.readouterr().out
    sign(saved / "two", good | {"unknown": [1, 2], "counters": good["counters"] | {"exit_requested": True}})
    assert set(read_manifest(saved / "two").counters.model_dump()) == set(good["counters"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


def places(value, path=()):
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_field_with_any_value(two, tmp_path_factory, data):
    """150 inputs: nothing but our own errors comes out of a manifest, whichever command reads it, what is read needs no
    more than there is, and the other checkpoint is found."""
    good = content(two / "two")
    place = data.draw(st.sampled_from([place for place in places(good) if place]))
    changed = json.loads(json.dumps(good))
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = data.draw(JSON)
    path = tmp_path_factory.mktemp("any")
    shutil.copytree(two, path, dirs_exist_ok=True)
    sign(path / "two", changed)
    found = {each.tag: each.problem for each in Directory(path).checkpoints()}
    assert "one" in found and found["one"] is None
    for command in ("list", "inspect", "verify", "prune"):
        more = ["--keep", "5"] if command == "prune" else ["--all"] if command == "verify" else []
        assert main(["checkpoint", command, str(path), *more]) in (0, 1)
    with contextlib.suppress(ShardlineError):
        reader = CheckpointReader(path / "two")
        try:
            check_files(reader.path, reader.manifest, range(len(reader.manifest.files)))
            for name in reader.parameters:
                reader.full(name)
            reader.value(reader.manifest.client_state)
        finally:
            reader.close()


def test_a_manifest_is_no_larger_than_a_real_one_can_be(saved, monkeypatch):
    with (saved / "two" / "manifest.json").open("r+b") as file:
        file.truncate(200_000_000)
    with bounded():
        assert "no such file needs more than" in the_one_before_is_found(saved)
    # One that is written is one that is read.
    monkeypatch.setattr(manifest, "_BASE_BYTES", 2_000)
    monkeypatch.setattr(manifest, "_BYTES_PER_FILE", 0)
    large = disk.content(ALONE, 3)
    body = large.body
    large.body = lambda reports: dataclasses.replace(body(reports), client_state={"seen": list(range(1000))})
    with pytest.raises(CheckpointError, match=r"of them for 'client_state'.*Save long lists of numbers as tensors"):
        commit(saved, "three", large, ALONE, lambda point: None)
    assert not [name for name in os.listdir(saved) if name.startswith(".shardline-")]


def test_a_mistake_that_is_made_many_times_costs_no_more_than_one(saved):
    good = content(saved / "two")
    many = {"parameters": [[]] * 100_000, "files": [0] * 100_000, "random": [[]] * 100_000}
    for key, rows in many.items():
        sign(saved / "two", good | {key: dict(enumerate(rows)) if key == "parameters" else rows})
        with bounded(200):
            assert "has a wrong form" in the_one_before_is_found(saved)
    good["parameters"]["w"]["weight"]["pieces"] = [[]] * 100_000
    sign(saved / "two", good)
    with bounded(200):
        assert "is no [file, start, stop]" in the_one_before_is_found(saved)


def test_the_table_of_dtypes_is_that_of_tensor_files():
    assert {name_of(dtype): dtype.itemsize for dtype in CODES} == manifest.ITEM_BYTES


def test_a_parameter_takes_what_the_limit_says():
    """70,000 parameters with two moments, and 1024 ranks that cut each of 126 units: the limit is for such."""
    row = {"aliases": [], "shape": [4096, 4096], "stride": [4096, 1], "dtype": "bfloat16", "trainable": True,
           "group": 0, "weight": {"dtype": "float32", "pieces": [[1023, 123456789, 234567890]]},
           "state": {key: {"dtype": "float32", "pieces": [[1023, 123456789, 234567890]]}
                     for key in ("exp_avg", "exp_avg_sq")},
           "scalars": {"step": {"$scalar": 100000.0, "dtype": "float32"}}}  # fmt: skip
    size = len(json.dumps({"model.layers.61.mlp.experts.255.down_proj.weight": row}, separators=(",", ":")))
    assert size * 70_000 < manifest.largest_manifest(1)
    assert manifest.largest_manifest(2) - manifest.largest_manifest(1) > (126 + 3) * 3 * 35


# -- special files and names ------------------------------------------------------------------------------------------

SPECIAL = {
    "FIFO": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": os.mkdir,
    "link": lambda path: path.symlink_to("../one/" + path.name),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["latest", "two/manifest.json", "two/manifest.sha256", "two/rank-00000.safetensors"])
def test_a_special_file_in_the_place_of_ours(saved, name, kind, capsys):
    (saved / name).unlink()
    SPECIAL[kind](saved / name)
    before = os.lstat(saved / name)
    with bounded():
        if name == "latest":
            assert "not a regular file" in Directory(saved).complaint()
            assert Directory(saved).order() == ["two", "one"]
        else:
            assert "not a regular file" in the_one_before_is_found(saved)
        for command in ("list", "inspect", "verify"):
            main(["checkpoint", command, str(saved)])
        refused = (
            contextlib.nullcontext() if name == "latest" else pytest.raises(CheckpointError, match="not a regular")
        )
        with refused, contextlib.closing(CheckpointReader(saved / "two")) as reader:
            reader.full("w")
    assert "not a regular file" in "".join(capsys.readouterr())
    assert os.lstat(saved / name) == before


def test_files_in_general(tmp_path):
    """Those that could be a device are not even opened."""
    for path in (Path("/dev/zero"), Path("/dev/null"), tmp_path):
        with pytest.raises(OSError, match=r"it is a (device|directory), not a regular file"):
            files.open_regular(path)
    (tmp_path / "file").write_bytes(b"12345")
    assert files.read_limited(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, and no such file needs more than 4"):
        files.read_limited(tmp_path / "file", 4)


@pytest.mark.parametrize("kind", ["link to a folder", "link inside"])
def test_a_tag_that_is_a_link(saved, tmp_path, kind):
    """Outside lies an intact checkpoint, and still nothing is taken from there."""
    shutil.copytree(saved / "two", tmp_path / "outside")
    shutil.rmtree(saved / "two")
    (saved / "two").symlink_to(tmp_path / "outside" if kind == "link to a folder" else "one")
    directory = Directory(saved)
    assert directory.order() == ["two", "one"] and directory.tags() == ["one"]
    with pytest.raises(CheckpointError, match="two is a symbolic link, which is not followed"):
        directory.locate("two")


OUT = [
    "../outside",
    "/outside",
    "..",
    ".",
    "one/../../outside",
    "one/",
    "",
    "a\0b",
    "two\n../one",
    "\x1b[2J",
    "x" * 300,
]


@pytest.mark.parametrize("tag", OUT)
def test_a_name_that_leads_out(saved, tmp_path, tag, capsys):
    shutil.copytree(saved / "two", tmp_path / "outside")
    for name in (tag, tag.replace("/outside", str(tmp_path / "outside"))):
        with pytest.raises(UsageError, match="cannot be the name of a checkpoint"):
            Directory(saved).locate(name)
        (saved / "latest").write_text(name)
        directory = Directory(saved)
        assert directory.order() == ["two", "one"]
        assert "cannot be a checkpoint here" in directory.complaint() and "\x1b" not in directory.complaint()
        if "\0" not in name:
            assert main(["checkpoint", "inspect", str(saved), "--tag", name]) == 1
    assert "\x1b" not in "".join(capsys.readouterr())


def test_nothing_in_a_manifest_steers_a_terminal(saved, capsys):
    """Escape codes in names and values are shown as text, and a folder whose name holds one is not a checkpoint."""
    good = content(saved / "two")
    evil = "\x1b]0;evil\x07\x1b[2J"
    row = good["parameters"].pop("w")
    sign(saved / "two", good | {
        "parameters": {evil: row}, "created": evil, "torch": evil, "shardline": evil, "client_state": {evil: 1},
        "scheduler": {evil: evil}, "loader": {evil: evil}, "extra_state": {evil: 1},
        "optimizer": {"class": evil, "groups": [{}]},
    })  # fmt: skip
    shutil.copytree(saved / "one", saved / f"x{evil}")
    for arguments in (["list"], ["inspect", "--tensors"], ["verify"], ["verify", "--all"], ["prune", "--keep", "5"]):
        assert main(["checkpoint", arguments[0], str(saved), *arguments[1:]]) == 0
    said = capsys.readouterr()
    assert "\\x1b]0;evil" in said.out and "\x1b" not in said.out + said.err and "\x07" not in said.out
    assert Directory(saved).tags() == ["two", "one"]


def test_a_manifest_that_is_read_is_the_one_that_was_written(saved):
    wanted = content(saved / "two")
    seen = Manifest.parse(json.dumps(wanted).encode()).model_dump(by_alias=True, mode="json")
    for key, value in wanted.items():
        if key != "parameters":
            assert seen[key] == value, key


# -- a whole engine that loads it -------------------------------------------------------------------------------------


def engine_places(data):
    """Leaves and branches of a real manifest, without the many pieces and words that are alike."""
    for place in places(data):
        if place and place[0] not in ("config", "files") and not (place[0] == "parameters" and len(place) > 4):
            yield place


def load_any(path, settings, seed):
    """Load a real checkpoint with one field changed after the other: our own errors, or a whole load."""
    built = cases.engine(settings)
    cases.train(built, 1)
    built.save_checkpoint(path, tag="good", client_state={"x": (1, float("inf"))})
    good = content(Path(path, "good"))
    draw = random.Random(seed)
    values = [None, True, -1, 1 << 40, 1 << 70, 1e300, "x", [], {}, [[]], {"$float": "y"}, {"$tensor": "none"},
              {"$dict": [1]}, {"$scalar": "z", "dtype": "float32"}, {"$counter": 5}, {"$tuple": 1}]  # fmt: skip
    outcomes, wrong = {"refused": 0, "loaded": 0}, []
    every = list(engine_places(good))
    chosen = draw.sample(every, min(len(every), 70)) + [place for place in every if place[0] in ("random", "counters")]
    for place in chosen:
        changed = json.loads(json.dumps(good))
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = draw.choice(values)
        sign(Path(path, "good"), changed)
        try:
            built.load_checkpoint(path, "good")
            cases.train(built, built.global_steps + 1)
            outcomes["loaded"] += 1
        except ShardlineError:
            outcomes["refused"] += 1
        except Exception as error:
            wrong.append(f"{place}: {inner[place[-1]]!r}: {type(error).__name__} {error}")
        sign(Path(path, "good"), good)
        built.load_checkpoint(path, "good")
    sign(Path(path, "good"), good | {"counters": good["counters"] | {"exit_requested": True, "norm": "x"}})
    built.load_checkpoint(path, "good")
    cases.train(built, 2)
    steps = built.global_steps
    built.destroy()
    return steps, outcomes, wrong


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_an_engine_that_loads_any_manifest(ranks, tmp_path, seed):
    half = cases.config(1, 1, "fp16")
    ((steps, outcomes, wrong),) = ranks(load_any, 1, str(tmp_path), half, seed)
    assert not wrong
    assert steps == 2 and outcomes["refused"] > 40 and outcomes["loaded"] > 0


def lack(path, settings):
    """What is said of directories that hold no checkpoint, and of tags that are not there."""
    built = cases.engine(settings)
    said = []
    built.events.subscribe(lambda event: said.append(event.message) if isinstance(event, Notice) else None)
    Path(path, "full", "src").mkdir(parents=True)
    Path(path, "empty").mkdir()
    built.save_checkpoint(path + "/run", tag="one")
    for each in ("nowhere", "empty", "full", "run/one"):
        assert built.load_checkpoint(f"{path}/{each}") == (None, None)
    for tag in ("two", "../run/one", "/etc"):
        try:
            built.load_checkpoint(path + "/full", tag)
        except ShardlineError as error:
            said.append(str(error))
    os.mkfifo(path + "/full/latest")
    assert built.load_checkpoint(path + "/full") == (None, None)
    Path(path, "run", "latest").unlink()
    os.mkfifo(path + "/run/latest")
    assert built.load_checkpoint(path + "/run")[0] == path + "/run/one"
    built.destroy()
    return said


def test_a_directory_without_checkpoints_says_what_it_lacks(ranks, tmp_path):
    for said in ranks(lack, 1, str(tmp_path), cases.config(0, 1)):
        nowhere, empty, full, itself, two, up, etc, fifo, newest = said
        assert "nowhere does not exist" in nowhere and "empty has no folder" in empty and "it is empty" in empty
        assert "it holds src" in full and "run/one is itself a checkpoint" in itself and "the tag 'one'" in itself
        assert "there is no" in two and "cannot be the name" in up and "cannot be the name" in etc
        assert "it is a FIFO" in fifo and "it is a FIFO" in newest and "run/one and not a later" in newest


OPTIMIZERS = {
    "AdamW": {"type": "AdamW", "params": {"lr": 0.01}},
    "SGD": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
    "Adafactor": {"type": "Adafactor", "params": {"lr": 0.01}},
    "Muon": {"type": "Muon", "params": {"lr": 0.01}},
}


def load_other_states(path, settings):
    """Remove and change one part of the optimizer's state after the other, of all parameters alike."""
    built = cases.engine(settings)
    cases.train(built, 2)
    built.save_checkpoint(path, tag="good")
    good, said = content(Path(path, "good")), {}
    rows = good["parameters"].values()
    keys = {key for row in rows for key in row["state"]}
    numbers = {key for row in rows for key in row["scalars"]}

    def attempt(name, change):
        changed = json.loads(json.dumps(good))
        for row in changed["parameters"].values():
            change(row)
        sign(Path(path, "good"), changed)
        try:
            built.load_checkpoint(path, "good")
            cases.train(built, built.global_steps + 1)
            said[name] = "stepped"
        except CheckpointError as error:
            said[name] = str(error)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
        sign(Path(path, "good"), good)
        built.load_checkpoint(path, "good")

    for key in sorted(keys):
        attempt(f"no {key}", lambda row, key=key: row["state"].pop(key, None))
        attempt(f"other {key}", lambda row, key=key: row["state"].update({f"{key}2": row["state"].pop(key)})
                if key in row["state"] else None)  # fmt: skip
    for key in sorted(numbers):
        attempt(f"no {key}", lambda row, key=key: row["scalars"].pop(key, None))
        for value in ("x", [1], {}, None, {"$tuple": [1]}):
            attempt(f"{key}: {value}", lambda row, key=key, value=value: row["scalars"].update({key: value})
                    if key in row["scalars"] else None)  # fmt: skip
    built.destroy()
    return said


@pytest.mark.parametrize("name", [*OPTIMIZERS])
def test_state_from_which_the_optimizer_cannot_step_is_found_at_the_load(ranks, tmp_path, name):
    """Where it steps all the same, as SGD does without its momentum, it may be loaded."""
    (said,) = ranks(load_other_states, 1, str(tmp_path), cases.config(2, 1, optimizer=OPTIMIZERS[name]))
    assert len(said) >= 2
    wrong = {how: text for how, text in said.items() if text != "stepped" and "[SL801]" not in text}
    assert not wrong
    if name == "AdamW":
        assert "from which AdamW cannot step (KeyError: 'exp_avg_sq')" in said["no exp_avg_sq"]


def test_a_number_behind_which_there_is_none(saved):
    """A number that no directory reaches is damage, and the next save has the one after the others. Only the very last
    one has no next: that is said."""
    good = content(saved / "two")
    for sequence in (2**53, 2**53 - 1, 2**32):
        sign(saved / "two", good | {"sequence": sequence})
        assert "wrong form: sequence" in the_one_before_is_found(saved)
        disk.save(ALONE, saved, "three", 3)
        assert Directory(saved).order()[:2] == ["three", "one"]
        assert content(saved / "three")["sequence"] == content(saved / "one")["sequence"] + 1
        shutil.rmtree(saved / "three")
    sign(saved / "two", good | {"sequence": 2**32 - 1})
    with pytest.raises(CheckpointError, match="two has the last number that a save can have"):
        disk.save(ALONE, saved, "three", 3)
    assert Directory(saved).tags() == ["two", "one"]
