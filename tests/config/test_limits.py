"""Configurations that no one writes on purpose: nothing but a ConfigError comes out, and it is short."""

import base64
import json
import os
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardline.config import Config, load_config
from shardline.config.catalogue import catalogue
from shardline.config.explain import explain
from shardline.config.limits import BYTES
from shardline.errors import ConfigError

from .test_load import merged

BASE = {"train_micro_batch_size_per_gpu": 1}


def refused(source):
    """The sentence about a configuration that must not be used: it is short, and a terminal shows it as it is."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, 1)
    text = str(caught.value)
    assert len(text) < 50_000 and all(char.isprintable() or char == "\n" for char in text)
    return text


def deep(levels):
    tree = {}
    for _ in range(levels):
        tree = {"optimizer": tree}
    return tree


@pytest.mark.parametrize("levels", [60, 300, 900, 5_000, 200_000])
def test_nesting(tmp_path, levels):
    file = tmp_path / "a.json"
    for opening, closing in (('{"a":', "}"), ("[", "]"), ('{"a":[', "]}")):
        file.write_text(f'{{"optimizer": {opening * levels}1{closing * levels}}}')
        assert "nested too deep" in refused(file)
    if levels < sys.getrecursionlimit():
        assert "nested too deep" in refused(deep(levels))
        with pytest.raises(ConfigError, match="nested too deep"):
            Config(optimizer=deep(levels))


def test_an_object_that_holds_itself():
    tree = {}
    tree |= {"optimizer": tree, "fp16": [tree, tree]}
    text = refused(tree)
    assert "nested too deep" in text or "more than 100000 values" in text


@pytest.mark.parametrize("path", ["train_batch_size", "seed", "optimizer.params.lr", "optimizer.params.betas", "zz"])
def test_numbers_of_many_digits(tmp_path, path):
    file = tmp_path / "a.json"
    base = BASE | {"optimizer": {"type": "AdamW"}}
    for digits in (30, 400, 4_000, 5_000, 100_000):
        text = json.dumps(merged(base, path, "HERE"))
        for sign in ("", "-"):
            file.write_text(text.replace('"HERE"', sign + "9" * digits))
            text_of_error = refused(file)
            assert "64 bits" in text_of_error or "2^63" in text_of_error
        refused(merged(base, path, 10**digits))
        refused(merged(base, path, [10**digits]))


def test_large_files_are_not_read(tmp_path):
    file = tmp_path / "a.json"
    with file.open("wb") as opened:
        opened.truncate(1 << 40)  # sparse
    assert f"more than {BYTES} bytes" in refused(file)
    assert "more than" in refused("/dev/zero")
    file.write_text(json.dumps([0] * 200_000))
    refused(file)
    file.write_text(json.dumps({"fp16": [0] * 200_000}))
    assert "more than 100000 values" in refused(file)


def test_paths_that_are_none(tmp_path):
    assert "cannot be read" in refused("a\0b")
    assert "cannot be read" in refused("x" * 1_000_000)
    assert "cannot be read" in refused("/proc/nothing")
    assert "cannot be read" in refused(tmp_path)
    assert "cannot be read" in refused("\x1b[31m\n")
    refused(os.fsdecode(b"\xff\xfe"))
    refused(base64.urlsafe_b64encode(b"{" * 100_000).decode())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train_batch_size", 1e30),
        ("train_batch_size", 2**62),
        ("gradient_accumulation_steps", 1e18),
        ("fp16.loss_scale", 1e39),
        ("fp16.loss_scale", 1e38),
        ("fp16.initial_scale_power", 126),
        ("fp16.min_loss_scale", 0),
        ("fp16.min_loss_scale", 1e-45),
        ("gradient_clipping", 1e-320),
        ("gradient_clipping", 1e300),
        ("optimizer.params.lr", 1e308),
        ("optimizer.params.eps", 5e-324),
        ("optimizer.params.betas", [0.9, 1e-310]),
        ("scheduler.params.warmup_max_lr", [1e-3, 1e200]),
        ("seed", 1e30),
        ("steps_per_print", 1e30),
        ("zero_optimization.unit_max_numel", 1e19),
        ("checkpoint.dir", "a\0b"),
        ("tensorboard.output_path", "\0"),
        ("checkpoint.resume", "a\0"),
        ("data_types.module_dtypes", {"a": "\0"}),
    ],
)
def test_values_beyond_use_are_named(path, value):
    base = BASE | {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
    assert path in refused(merged(base, path, value))


def test_many_unknown_keys_give_a_short_message():
    text = refused(BASE | {f"key_{index}": 1 for index in range(10_000)})
    assert "for 10000 reasons" in text and text.count("\n") < 60 and "and 9950 more" in text
    assert len(refused(BASE | {"k" * 1_000_000: 1})) < 5_000
    assert len(refused(BASE | {"fp16": {"enabled": "v" * 1_000_000}})) < 500


def test_terminal_codes_are_shown_and_not_sent(tmp_path):
    code = "\x1b]0;title\x07\x1b[2J\r\n\u202e"
    for raw in ({code: 1}, {"fp16": {code: 1}}, {"optimizer": {"type": "AdamW", "params": {code: 1}}}, {"seed": code}):
        text = refused(BASE | raw)
        assert "\\x1b]0;title\\x07" in text or "u001b]0;title" in text
    file = tmp_path / "a.json"
    file.write_text(f'{{"a": 1, "a": 2, oops{code}}}', newline="")
    refused(file)
    raw = BASE | {"optimizer": {"type": "RMSprop", "params": {code: 1, "lr": code}}}
    assert "\x1b" not in explain(load_config(raw, 1))


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text()
    | st.sampled_from(["auto", "cpu", "fp16", "AdamW", "OneCycle", "\0", "\x1b[31m", 1e308, 1e-320, 2**64, 2**63, -5]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("enabled"), inner, max_size=3),
    max_leaves=6,
)
PATHS = sorted(catalogue(Config))


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), junk), min_size=1, max_size=4))
def test_any_value_at_any_key_is_used_or_refused_in_words(written):
    """1,500 configurations, each with one to four keys of the schema that hold anything."""
    raw = dict(BASE)
    for path, value in written:
        try:
            raw = merged(raw, path, value)
        except (TypeError, AttributeError):
            continue  # lies in what is not an object here
    try:
        config = load_config(raw, 2)
    except ConfigError as error:
        assert all(char.isprintable() or char == "\n" for char in str(error)) and len(str(error)) < 50_000
    else:
        assert load_config(config, 2) == config
        explain(config)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:/*#\\ 0e9-\n\0a', max_size=60).map(str.encode))
def test_any_file_is_used_or_refused_in_words(tmp_path_factory, content):
    """500 files of any bytes, or of what JSON and its comments are made of."""
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(content)
    refused(file)


class Odd:
    def __eq__(self, other):
        raise RuntimeError("no comparison")

    def __repr__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize("value", [np.array([1, 2]), torch.tensor([1, 2]), np.int64(3), Odd(), threading.Lock(), int])
@pytest.mark.parametrize("path", ["zero_optimization.stage", "optimizer.params.lr", "csv_monitor", "amp.enabled", "x"])
def test_what_json_has_no_value_for(path, value):
    """Objects whose comparison is no truth value, or that cannot be copied or shown."""
    tree = value
    for name in reversed(path.split(".")):
        tree = {name: tree}
    assert f"{path} is of type " in refused({**BASE, **tree})
    with pytest.raises(ConfigError, match="JSON has no value for"):
        Config(**BASE, **tree)
