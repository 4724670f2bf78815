import json

from shardline.config import load_config
from shardline.config.explain import explain

from . import configs


def lines(raw, world_size=2):
    found = {}
    for line in explain(load_config(raw, world_size)).splitlines():
        value, _, origin = line.strip().partition("  ")
        found.setdefault(value.split(":")[0], (value.partition(": ")[2], origin.strip()))
    return found


def test_every_value_has_its_origin():
    found = lines(configs.HF_FILLED)
    assert found["train_batch_size"] == ("16", "computed: micro 4 x accumulation 2 x world 2")
    assert found["gradient_accumulation_steps"] == ("2", "given")
    assert found["stage3_param_persistence_threshold"] == ("10000", "auto: the default")
    assert found["warmup_max_lr"] == ("null", "auto: the optimizer's lr")
    assert found["lr"] == ('"auto"', "auto: the default"), "the class decides, so there is no value to show"
    assert found["wall_clock_breakdown"] == ("false", "given")
    assert found["unit_min_numel"] == ("100000", "default")


def test_what_has_no_effect_comes_last_with_its_reason():
    text = explain(load_config(configs.CHAT, 2)).splitlines()
    tail = [line for line in text if line.startswith("no effect: ")]
    assert text[-len(tail) :] == tail and len(tail) == 3
    assert tail[0].startswith("no effect: zero_optimization.overlap_comm: communication always")


def test_the_other_name_is_shown_as_written():
    raw = {"train_batch_size": 1, "zero_optimization": {"max_reuse_distance": 1}}
    assert "no effect: zero_optimization.max_reuse_distance: " in explain(load_config(raw, 1))


def test_values_are_json():
    for line in explain(load_config(configs.CIFAR, 1)).splitlines():
        text = line.strip().split("  ")[0]
        if not line.startswith("no effect") and not text.endswith(":"):
            json.loads(text.partition(": ")[2])
