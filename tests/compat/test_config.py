"""Configurations as DeepSpeed reads them."""

from __future__ import annotations

import base64
import json

import pytest

from shardline.compat.deepspeed.config import OFFLOAD_PARAM, read, translate
from shardline.config import load_config
from shardline.errors import ConfigError
from tests.compat.rows import differs, unchanged
from tests.config.configs import HF_ZERO3, WORKING

BATCH = {"train_micro_batch_size_per_gpu": 2}


def resolved(raw, **options):
    settings, notices = translate({**BATCH, **raw}, **{"on_accelerator": False, **options})
    return load_config(settings, 1), notices


def test_defaults_are_deepspeeds():
    config, notices = resolved({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}})
    assert (config.gradient_clipping, config.data_loader.weighting) == (1.0, "none")
    assert (config.fp16.enabled, config.bf16.enabled, notices) == (False, False, [])
    assert resolved({"gradient_clipping": 0.0})[0].gradient_clipping == 0.0
    assert resolved({"bfloat16": {"enabled": True}})[0].bf16.enabled


@differs("unknown keys of the configuration", "ignored at the top level", "the same, and named once; below it refused")
def test_unknown_keys_at_the_top_are_named_once_and_those_below_are_refused():
    config, notices = resolved({"zero_optimization.reduce_bucket_size": 5, "junk": {}, "_comment": "x"})
    assert config.train_micro_batch_size_per_gpu == 2
    assert notices == [
        "unknown keys of the configuration, which DeepSpeed ignores as well: junk, zero_optimization.reduce_bucket_size"
    ]
    with pytest.raises(ConfigError, match="stagee"):
        resolved({"zero_optimization": {"stagee": 1}})


def test_old_spellings():
    assert resolved({"zero_optimization": True})[0].zero_optimization.stage == 1
    config, _ = resolved({"zero_optimization": {"stage": 2, "overlap_comm": 1}, "wall_clock_breakdown": 0})
    assert config.zero_optimization.stage == 2
    assert config.wall_clock_breakdown is False


@differs(
    "`offload_param` on an accelerator",
    "weights rest in host memory",
    "accepted with a notice of the bytes that stay on the device",
)
def test_offload_param_is_accepted_with_a_notice_on_an_accelerator():
    raw = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}}
    assert resolved(raw)[1] == []
    config, notices = resolved(raw, on_accelerator=True)
    assert (config.zero_optimization.offload_param.device, notices) == ("none", [OFFLOAD_PARAM])


def test_sources(tmp_path):
    raw = {"train_batch_size": 8}
    file = tmp_path / "ds.json"
    file.write_text('{"train_batch_size": 8, // all ranks\n}')
    encoded = base64.urlsafe_b64encode(json.dumps(raw).encode()).decode()
    assert read(raw) == read(file) == read(encoded) == raw
    for source, words in ((None, "type NoneType"), ("absent.json", "no configuration file"), ([], "type list")):
        with pytest.raises(ConfigError, match=words):
            read(source)


@unchanged(
    "configurations as people have them",
    'with "auto", comments and unknown keys at the top; those that cannot be get a verdict in `shardline config check`',
)
@pytest.mark.parametrize("name", WORKING)
def test_configurations_as_people_have_them(name):
    settings, notices = translate(WORKING[name], on_accelerator=False)
    load_config(settings, 2, filled_by="transformers")
    assert notices == []


@pytest.mark.parametrize("on_accelerator", [False, True])
def test_presets(on_accelerator):
    """What differs between the presets that people start from, and the verdict on each."""
    batch = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    preset = {**HF_ZERO3, **batch}
    on_host = {"device": "cpu", "pin_memory": True}
    offloaded = {"zero_optimization": {**HF_ZERO3["zero_optimization"], "offload_param": on_host}}
    for changed, expected in (
        ({}, []),
        ({"comms_config": {}, "monitor_config": {"enabled": True}}, ["comms_config, monitor_config"]),
        ({"_tensor_parallel": "a comment"}, []),
        (offloaded, [OFFLOAD_PARAM] if on_accelerator else []),
        ({"zero_optimization": {"stage": 0}, "fp16": {"enabled": False}}, []),
    ):
        settings, notices = translate(preset | changed, on_accelerator=on_accelerator)
        load_config(settings, 2, filled_by="transformers")
        assert [each.rpartition(": ")[2] for each in notices] == expected
    settings, _ = translate(preset | {"tensor_parallel": {"autotp_size": 2}}, on_accelerator=on_accelerator)
    with pytest.raises(ConfigError, match="there is no tensor parallelism") as refusal:
        load_config(settings, 2, filled_by="transformers")
    assert "reasons" not in str(refusal.value)  # that one alone
