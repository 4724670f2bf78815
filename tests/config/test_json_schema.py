import json
import re
from copy import deepcopy

import pytest

from shardline.config import load_config
from shardline.config.catalogue import catalogue
from shardline.config.json_schema import json_schema
from shardline.config.schema import Config
from shardline.errors import ConfigError

from . import configs
from .test_load import merged

SCHEMA = json_schema()
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def valid(value, schema):
    """The keywords of Draft 2020-12 that the schema uses, as the specification words them; an unknown one fails."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    for word, rule in schema.items():
        match word:
            case "$schema" | "title" | "description" | "default" | "then":
                continue
            case "type":
                kinds = rule if isinstance(rule, list) else [rule]
                ok = any(
                    number and (kind == "number" or float(value).is_integer())
                    if kind in ("number", "integer")
                    else isinstance(value, TYPES[kind])
                    for kind in kinds
                )
            case "enum":
                ok = any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in rule)
            case "const":
                ok = value == rule and isinstance(value, bool) == isinstance(rule, bool)
            case "not":
                ok = not valid(value, rule)
            case "anyOf":
                ok = any(valid(value, option) for option in rule)
            case "allOf":
                ok = all(valid(value, option) for option in rule)
            case "if":
                ok = not valid(value, rule) or valid(value, schema["then"])
            case "properties":
                ok = not isinstance(value, dict) or all(valid(value[k], rule[k]) for k in rule if k in value)
            case "patternProperties":
                pairs = [(p, k) for p in rule for k in value if re.search(p, k)] if isinstance(value, dict) else []
                ok = all(valid(value[key], rule[pattern]) for pattern, key in pairs)
            case "additionalProperties":
                known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
                keys = [key for key in value if key not in known] if isinstance(value, dict) else []
                others = [key for key in keys if not any(re.search(pattern, key) for pattern in patterns)]
                ok = not others if rule is False else all(valid(value[k], rule) for k in others)
            case "required":
                ok = not isinstance(value, dict) or all(k in value for k in rule)
            case "maxProperties":
                ok = not isinstance(value, dict) or len(value) <= rule
            case "pattern":
                ok = not isinstance(value, str) or re.search(rule, value) is not None
            case "minimum":
                ok = not number or value >= rule
            case "maximum":
                ok = not number or value <= rule
            case "exclusiveMinimum":
                ok = not number or value > rule
            case "items":
                ok = not isinstance(value, list) or all(valid(item, rule) for item in value)
            case "minItems":
                ok = not isinstance(value, list) or len(value) >= rule
            case "maxItems":
                ok = not isinstance(value, list) or len(value) <= rule
            case _:
                raise NotImplementedError(word)
        if not ok:
            return False
    return True


def test_it_is_a_json_schema():
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", [*configs.WORKING, "defaults", "hf"])
def test_it_accepts_what_people_have(name):
    raw = {**configs.WORKING, "defaults": configs.DEFAULTS, "hf": configs.HF_ZERO3}[name]
    for key in ("gradient_clipping", "fp16", "bf16"):  # only a trainer can fill these in
        if name == "hf":
            raw = {other: value for other, value in raw.items() if other != key}
    if raw.get("steps_per_print") == float("inf"):
        raw = {**raw, "steps_per_print": None}  # Infinity is Python's, not JSON's
    assert valid(raw, SCHEMA)
    assert valid({**raw, "$schema": "./shardline.json"}, SCHEMA)
    load_config({**configs.CIFAR, "$schema": "./shardline.json"}, 1)


PROBES = [
    "auto",
    None,
    False,
    True,
    0,
    1,
    2.5,
    -1,
    7e8,
    "none",
    "cpu",
    "fp32",
    "sum",
    "zz",
    [],
    ["a"],
    {},
    {"enabled": True},
]


@pytest.mark.parametrize("path", [path for path in catalogue(Config) if "params." not in path])
def test_schema_and_loader_agree_on_every_key(path):
    base = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "NAdam"}, "scheduler": {"type": "StepLR"}}
    if path == "train_batch_size":
        del base["train_micro_batch_size_per_gpu"]
        base["data_loader"] = {"uneven": True}
    if path == "zero_optimization.unit_min_numel":
        base["zero_optimization"] = {"unit_max_numel": 10**9}
    if path == "zero_optimization.unit_max_numel":
        base["zero_optimization"] = {"unit_min_numel": 0}
    if path in ("data_loader.prefetch_factor", "data_loader.persistent_workers"):
        base["data_loader"] = {"num_workers": 1}
    if path.startswith("checkpoint.") and path != "checkpoint.dir":
        base["checkpoint"] = {"dir": "out"}
    for probe in PROBES:
        if path.startswith("train_") and probe in (None, "auto"):
            continue  # neither train nor micro: a rule between keys, which a schema does not hold
        raw = merged(base, path, deepcopy(probe))
        try:
            load_config(raw, 1)
            loads = True
        except ConfigError as error:
            loads, why = False, error
        assert valid(raw, SCHEMA) == loads, f"{path}: {probe!r}: {'accepted' if loads else why}"


@pytest.mark.parametrize(
    ("section", "good", "bad"),
    [
        (
            "optimizer",
            {"type": "adamw", "params": {"lr": "auto", "betas": [0.9, 0.99]}},
            {"type": "AdamW", "params": {"momentum": 1}},
        ),
        ("optimizer", {"type": "Rprop", "params": {"whatever": 1}}, {"params": {}}),
        ("optimizer", {"type": "Lion"}, {"type": "Lion", "params": {"betas": [0.9]}}),
        ("optimizer", None, {"type": "AdamW", "params": {"max_grad_norm": 1}}),
        (
            "scheduler",
            {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
            {"type": "WarmupLR", "params": {"a": 1}},
        ),
        (
            "scheduler",
            {"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1}},
            {"type": "OneCycle", "params": {}},
        ),
    ],
)
def test_params_by_type(section, good, bad):
    assert valid({section: good}, SCHEMA)
    load_config({"train_batch_size": 1, section: good}, 1)
    assert not valid({section: bad}, SCHEMA)
    with pytest.raises(ConfigError):
        load_config({"train_batch_size": 1, section: bad}, 1)


def test_every_key_is_described():
    def walk(schema, path):
        for name, inner in schema.get("properties", {}).items():
            assert inner.get("description"), f"{path}.{name}"
            walk(inner, f"{path}.{name}".strip("."))

        for branch in schema.get("allOf", ()):
            for inner in branch["then"]["properties"].values():
                walk(inner, path)

    walk(SCHEMA, "")
    assert SCHEMA["properties"]["bfloat16"]["properties"]["enabled"]["default"] is False
