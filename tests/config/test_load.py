import base64
import json
import re
from copy import deepcopy

import pytest

from shardline.config import Config, load_config
from shardline.config.deepspeed import ALIASES, NO_EFFECT, UNSUPPORTED
from shardline.config.schema import FP16, ZeroOptimization
from shardline.errors import ConfigError

from . import configs


def problems(source, world_size=2):
    """The sentences of the error that a configuration gives."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, world_size)
    text = caught.value.message
    return text.split("\n  - ")[1:] if "\n" in text else [text.partition("cannot be used: ")[2]]


def nested(path, value):
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def merged(base, path, value):
    """``base`` with ``value`` at a dotted path."""
    tree = deepcopy(base)
    *parents, last = path.split(".")
    inner = tree
    for name in parents:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return tree


@pytest.mark.parametrize("name", configs.WORKING)
def test_configurations_that_people_have(name):
    raw = deepcopy(configs.WORKING[name])
    config = load_config(raw, 2)
    assert raw == configs.WORKING[name] == config.raw, "the user's dict is left alone"
    assert config.train_batch_size == 2 * config.train_micro_batch_size_per_gpu * config.gradient_accumulation_steps
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_cifar():
    config = load_config(configs.CIFAR, 2)
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (16, 8)
    assert config.optimizer.type == "Adam"
    assert config.optimizer.params == {"lr": 1e-3, "betas": (0.8, 0.999), "eps": 1e-8, "weight_decay": 3e-7}
    assert config.scheduler.params == {"warmup_min_lr": 0.0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000}
    assert config.fp16.enabled and config.fp16.initial_scale_power == 15 and config.fp16.loss_scale_window == 500
    assert config.zero_optimization.stage == 2 and config.gradient_clipping == 1.0 and config.steps_per_print == 2000
    assert set(config.no_effect) == {
        "prescale_gradients",
        *(
            f"zero_optimization.{name}"
            for name in [
                "allgather_partitions",
                "reduce_scatter",
                "allgather_bucket_size",
                "reduce_bucket_size",
                "overlap_comm",
                "contiguous_gradients",
            ]
        ),
    }


def test_chat_uses_the_other_name_of_bf16():
    config = load_config(configs.CHAT, 2)
    assert config.bf16.enabled and config.zero_optimization.stage3_prefetch_bucket_size == 30_000_000
    assert config.gradient_accumulation_steps == 4
    assert config.get("bfloat16") == {"enabled": True} and config.get("zero_optimization", {}).get("stage") == 3
    assert config.get("bf16", "none") == "none"


def test_infinite_steps_per_print_prints_never():
    assert load_config(configs.ACCELERATE, 2).steps_per_print is None


@pytest.mark.parametrize("raw", [configs.HF_ZERO2, configs.HF_ZERO3])
def test_auto_that_only_a_trainer_can_fill_is_named(raw):
    found = problems(raw)
    named = {"train_batch_size and train_micro_batch_size_per_gpu and", "gradient_clipping is", "fp16.enabled is"}
    named |= {"bf16.enabled is"} if "bf16" in raw else set()
    assert len(found) == len(named) and all(any(each.startswith(name) for each in found) for name in named)
    assert all('"auto"' in each and "--filled-by transformers" in each for each in found)
    filled = load_config(raw, 2, filled_by="transformers")
    assert (filled.train_micro_batch_size_per_gpu, filled.gradient_clipping, filled.fp16.enabled) == (2, 1.0, False)
    assert filled.optimizer.params["lr"] == 5e-5 and filled.bf16.enabled == ("bf16" in raw)
    assert filled.origins["gradient_clipping"] == "a stand-in for what transformers fills in"


def test_what_a_file_says_is_not_filled():
    given = {"train_batch_size": 6, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    filled = load_config(
        {**given, "fp16": {"enabled": True}, "bfloat16": {"enabled": "auto"}}, 2, filled_by="transformers"
    )
    assert (filled.train_batch_size, filled.train_micro_batch_size_per_gpu) == (6, 3)
    assert filled.fp16.enabled and not filled.bf16.enabled
    assert load_config({"zero_optimization": {"stage": 1}}, 1, filled_by="transformers").train_batch_size == 2


def test_keys_that_are_comments():
    raw = {"_why": {"any": 1}, "// note": [], "train_batch_size": 2, "zero_optimization": {"stage": 1, "_": None}}
    raw["optimizer"] = {"type": "SGD", "params": {"lr": 0.1, "_lr": "small"}}
    config = load_config(raw, 1)
    assert config.zero_optimization.stage == 1 and config.optimizer.params == {"lr": 0.1}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"zero_optimization": {"stage": None}}, "zero_optimization.stage is null; allowed is a whole number"),
        ({"checkpoint": {"tag_validation": "foo"}}, 'checkpoint.tag_validation is "foo"; allowed is "Ignore"'),
        ({"compression_training": {"row_pruning": {"shared_parameters": {"enabled": True}}}}, "compression_training: "),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "zero_optimization.offload_param.device: "),
    ],
)
def test_refused(raw, said):
    (found,) = problems({"train_batch_size": 2, **raw}, 1)
    assert found.startswith(said)


def test_accepted():
    off = {
        "weight_quantization": {"shared_parameters": {"enabled": False}, "different_groups": {}},
        "layer_reduction": {},
    }
    raw = {"train_batch_size": 2, "compression_training": off, "checkpoint": {"tag_validation": "WARN"}}
    raw["torch_autocast"] = {"enabled": True, "dtype": "torch.bfloat16"}
    raw["zero_optimization"] = {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}
    assert load_config(raw, 1).torch_autocast.dtype == "bf16"


def test_auto_that_can_be_resolved():
    config = load_config(configs.HF_FILLED, 2)
    assert config.optimizer.params == {}  # the class's own defaults
    assert config.scheduler.params == {"warmup_max_lr": None}  # None: the optimizer's lr
    assert config.zero_optimization.stage3_param_persistence_threshold == 10_000
    assert config.train_batch_size == 16
    assert config.origins["scheduler.params.warmup_max_lr"] == "auto: the optimizer's lr"
    auto = load_config({**configs.HF_FILLED, "fp16": {"enabled": "auto"}, "train_batch_size": "auto"}, 2)
    assert not auto.fp16.enabled and auto.origins["fp16.enabled"] == "auto: false, since bf16 is on"
    decay = {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}
    assert problems({**configs.HF_FILLED, "scheduler": decay}) == [
        'scheduler.params.total_num_steps is "auto", which Hugging Face\'s Trainer fills in from its own arguments and '
        "nothing here can decide; write a value (`shardline config check --filled-by transformers` checks the file as "
        "it would be then)."
    ]


def test_deepspeeds_defaults_all_load():
    config = load_config(configs.DEFAULTS, 1)
    assert config.optimizer.type == "Adam" and config.gradient_clipping == 1.0
    covered = {*_paths(configs.DEFAULTS)}
    for table in (NO_EFFECT, UNSUPPORTED):
        strange = {path for path in table if path not in covered}
        assert strange <= {
            *(f"checkpoint.{name}" for name in ["dir", "every_steps", "keep", "async_save", "resume", "writer"]),
            "data_parallel_size",
            "sequence_parallel_size",
            "optimizer.params.max_grad_norm",
            "zero_optimization.grad_hooks",
            "zero_optimization.compute_grad_norm",
            "zero_optimization.parameter_alignment",
            "data_types.keep_in_fp32_modules",
            "disable_python_gc",
            "zero_optimization.offload_optimizer.nvme_path",
            "pipeline",
            "datastates_ckpt",
            "weight_quantization",
        }


def _paths(tree, prefix=""):
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")


def _looked_at(path):
    """What a section holds that is switched off or without effect is not looked at."""
    parents = [path[: at.start()] for at in re.finditer(r"\.", path)]
    return not any(parent in NO_EFFECT or (parent in UNSUPPORTED) for parent in parents)


@pytest.mark.parametrize("path", [path for path in _paths(configs.DEFAULTS) if _looked_at(path)])
def test_a_typo_at_every_depth_is_found(path):
    """Every known key with its last letter twice is unknown, and the error suggests the key."""
    typo = path + path[-1]
    (found,) = problems(merged({"train_batch_size": 8, "optimizer": {"type": "Adam"}}, typo, 1))
    parent = path.rpartition(".")[0]
    assert found.startswith(f"{typo} is not a key of {parent or 'the top level'}")
    assert f"; did you mean {path}?" in found


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"gradient_clipp1ng": 1}, "gradient_clipp1ng is not a key of the top level; did you mean gradient_clipping?"),
        ({"bf16": {"loss_scale": 0}}, "bf16.loss_scale is not a key of bf16; loss_scale belongs to fp16."),
        ({"stage": 2}, "stage is not a key of the top level; stage belongs to zero_optimization."),
        (
            {"fp16": {"gradient_clipping": 1}},
            "fp16.gradient_clipping is not a key of fp16; gradient_clipping belongs to the top level.",
        ),
        ({"Zero_Optimization": {}}, "Zero_Optimization is not a key of the top level; did you mean zero_optimization?"),
        (
            {"zero_optimization": {"offload_optimizer": {"devcie": "cpu"}}},
            "zero_optimization.offload_optimizer.devcie is not a key of zero_optimization.offload_optimizer; did you "
            "mean zero_optimization.offload_optimizer.device?",
        ),
        (
            {"optimizer": {"type": "adamw", "params": {"weight_deacy": 0}}},
            "optimizer.params.weight_deacy is not a key of optimizer.params of Adam; did you mean "
            "optimizer.params.weight_decay?",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}},
            "optimizer.params.max_grad_norm: 1.0 is not supported; write gradient_clipping at the top level instead.",
        ),
        (
            {"optimizer": {"type": "NAdam", "params": {"max_grad_norm": 1.0}}},
            "optimizer.params.max_grad_norm: 1.0 is not supported; write gradient_clipping at the top level instead.",
        ),
        ({"scheduler": {"type": "OneCycle"}}, None),
        (
            {"train_micro_batch_size_per_gpu": "4"},
            'train_micro_batch_size_per_gpu is "4" (a string; write it without quotes); allowed is a whole number from '
            "1 to 1e+09.",
        ),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; allowed is a whole number from 0 to 3."),
        ({"zero_optimization": True}, "zero_optimization is true; allowed is an object {...}."),
        (
            {"zero_optimization": {"stage": True}},
            "zero_optimization.stage is true; allowed is a whole number from 0 to 3.",
        ),
        ({"zero_optimization": {"overlap_comm": 1}}, "zero_optimization.overlap_comm is 1; allowed is true or false."),
        ({"gradient_clipping": -1}, "gradient_clipping is -1; allowed is a number of at least 0."),
        ({"gradient_clipping": float("nan")}, "gradient_clipping is NaN; allowed is a number of at least 0."),
        ({"steps_per_print": 0}, "steps_per_print is 0; allowed is a whole number of at least 1."),
        (
            {"fp16": {"enabled": "true"}},
            'fp16.enabled is "true" (a string; write it without quotes); allowed is true or false.',
        ),
        ({"communication_data_type": "int8"}, None),
        ({"data_types": {"module_dtypes": {"LayerNorm": "fp32", "Linear": 16}}}, None),
        (
            {"zero_optimization": {"leaf_module": {"classes": ["A", 1]}}},
            'zero_optimization.leaf_module.classes is ["A", 1]; allowed is a list of strings.',
        ),
        ({"optimizer": {"params": {"lr": 1}}}, None),
        ({"optimizer": {"type": "AdamW", "params": [1]}}, "optimizer.params is [1]; allowed is an object {...}."),
        ({"bf16": {"enabled": False}, "bfloat16": {}}, "bfloat16 and bf16 are two names of one key; keep one of them."),
        ({"bfloat16": {"enabled": 1}}, "bfloat16.enabled is 1; allowed is true or false."),
        ({"checkpoint": {"async": 1}}, None),
        ({7: 1}, None),
    ],
)
def test_sentences(raw, sentence):
    found = problems({"train_batch_size": 8} | raw if "train_micro_batch_size_per_gpu" not in raw else raw)
    if sentence is not None:
        assert found == [sentence]
    path = next(iter(raw))
    assert all(str(path) in each for each in found) and all(each.endswith((".", "?")) for each in found)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled and bf16.enabled are true"),
        ({"torch_autocast": {"enabled": True}, "bf16": {"enabled": True}}, "bf16.enabled and torch_autocast.enabled"),
        ({"torch_autocast": {"enabled": True, "dtype": "fp32"}}, "torch_autocast.dtype"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp16"}}, "grad_accum_dtype"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype"),
        ({"zero_optimization": {"unit_min_numel": 2, "unit_max_numel": 1}}, "unit_min_numel 2 is above"),
        ({"fp16": {"enabled": True, "initial_scale_power": 2, "min_loss_scale": 8}}, "2^2 = 4"),
        ({"data_loader": {"prefetch_factor": 2}}, "data_loader.num_workers is 0"),
        ({"data_loader": {"persistent_workers": True}}, "data_loader.num_workers is 0"),
        ({"train_batch_size": 7}, "train_batch_size 6 or 8 would be"),
        ({"checkpoint": {"keep": 2}}, "checkpoint.keep needs checkpoint.dir"),
        ({"checkpoint": {"async": True}}, "checkpoint.async_save needs checkpoint.dir"),
        (
            {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.2, "cycle_max_lr": 0.1}}},
            "cycle_min_lr 0.2 is above scheduler.params.cycle_max_lr 0.1",
        ),
        (
            {"scheduler": {"type": "onecycle", "params": {"cycle_min_lr": 0.2, "cycle_max_lr": [0.3, 0.1]}}},
            "cycle_min_lr 0.2 is above scheduler.params.cycle_max_lr 0.1",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 2, "warmup_max_lr": 1}}},
            "warmup_min_lr 2 is above scheduler.params.warmup_max_lr 1",
        ),
    ],
)
def test_combinations(raw, words):
    (found,) = problems({"train_batch_size": 8} | raw)
    assert words in found


def test_a_wrong_value_does_not_cause_a_second_complaint():
    raw = {"train_batch_size": "x", "data_loader": {"num_workers": "x", "prefetch_factor": 2}}
    assert [each.split()[0] for each in problems(raw)] == ["train_batch_size", "data_loader.num_workers"]


def test_all_problems_at_once():
    raw = {
        "train_batch_size": 7,
        "gradient_cliping": 1,
        "zero_optimization": {"stage": 9, "mics_shard_size": 8},
        "optimizer": {"type": "OneBitAdam"},
        "autotuning": {"enabled": True},
        "fp16": {"enabled": True},
        "bf16": {"enabled": True},
    }
    assert len(problems(raw)) == 7


ENABLING = {
    "managed_gradient_accumulation": False,
    "gradient_allreduce_op": "sum",
    "data_parallel_size": 2,
    "sequence_parallel_size": 2,
    "optimizer.type": "onebitadam",
    "optimizer.params.max_grad_norm": 1.0,
    "data_types.param_dtype": "bf16",
    "zero_optimization.offload_optimizer.device": "nvme",
    "zero_optimization.offload_optimizer.ratio": 0.3,
    "zero_optimization.offload_param.device": "nvme",
    "zero_optimization.mics_shard_size": 8,
    "zero_optimization.zero_hpz_partition_size": 8,
    "zero_optimization.zeropp_loco_param": {"err_beta": 0.8},
    "zero_optimization.zenflow": {"topk_ratio": 0.1},
    "datastates_ckpt": {"host_cache_size": 16},
    "comet.api_key": "secret",
    "compile": {"deepcompile": True},
    "tensor_parallel": {"autotp_size": 4},
    "pipeline": {"stages": "auto"},
    "weight_quantization": {"q": 1},
    "compression_training": {"layer_reduction": {"enabled": True}},
    "sparse_attention": {"mode": "fixed"},
}


@pytest.mark.parametrize("path", UNSUPPORTED)
def test_what_is_not_supported_says_so_and_is_accepted_when_off(path):
    row = UNSUPPORTED[path]
    base = {"train_batch_size": 8}
    if path.startswith("optimizer"):
        base["optimizer"] = {"type": "AdamW"}
    on = ENABLING.get(path, {"enabled": True} if row.switch == "enabled" else True)
    found = problems(merged(base, path, on))
    assert any(each.startswith(f"{path}: ") and row.reason in each for each in found)
    off = [None, *row.off] if not (row.switch or row.present) else [None, False, {}]
    if row.switch:
        off += [{row.switch: value, "anything": 1} for value in row.off]
    for value in off if not row.refused else [None]:
        if path != "optimizer.type":
            assert path not in load_config(merged(base, path, value), 1).no_effect


@pytest.mark.parametrize("path", NO_EFFECT)
def test_what_has_no_effect_is_listed(path):
    row = NO_EFFECT[path]
    base = {"train_batch_size": 8}
    if path.startswith("optimizer"):
        base["optimizer"] = {"type": "AdamW"}
    value = {"boolean": True, "number": 5e8, "object": {"a": 1}, "any": ["x"], "tag validation": "Fail"}[row.kind]
    for good in (value, "auto", None):
        assert load_config(merged(base, path, good), 1).no_effect == (path,)
    if row.kind != "any":
        (found,) = problems(merged(base, path, "yes"), 1)
        assert found.startswith(f'{path} is "yes"; allowed is ')


@pytest.mark.parametrize("other", ALIASES)
def test_other_names(other):
    canonical = ALIASES[other]
    values = {"bfloat16": {"enabled": True}, "dataloader_drop_last": True, "checkpoint.async": False}
    switches = ("16", "all_reduce", "allgather_sequential")
    value = values.get(other, any(word in other for word in switches) or 7)
    one, two = (load_config(merged({"train_batch_size": 8}, path, value), 1) for path in (other, canonical))
    assert one.to_dict() == two.to_dict()
    assert one.no_effect == ((other,) if two.no_effect else ())


def test_defaults():
    config = load_config({"train_batch_size": 8}, 2)
    assert config.gradient_clipping == 0.0, "no key, no clipping: DeepSpeed 0.19 clips at 1.0"
    assert config.steps_per_print is None and config.seed == 1234 and config.fp16.auto_cast
    assert config.optimizer is None and config.scheduler is None and config.no_effect == ()
    assert config.zero_optimization.stage3_param_persistence_threshold == 10_000
    with pytest.raises(ValueError, match="frozen"):
        config.train_batch_size = 4


def test_numbers_as_json_writes_them():
    zero = load_config({"train_batch_size": 8.0, "zero_optimization": {"unit_max_numel": 5e8}}, 2).zero_optimization
    assert zero.unit_max_numel == 500_000_000 and isinstance(zero.unit_max_numel, int)
    (sentence,) = problems({"train_batch_size": 8.5})
    assert sentence == "train_batch_size is 8.5; allowed is a whole number from 1 to 1e+09."


def test_dtypes_have_one_spelling_each():
    raw = {"train_batch_size": 8, "data_types": {"grad_accum_dtype": "float32", "module_dtypes": {"A": "bfloat16"}}}
    config = load_config(raw | {"communication_data_type": "half"}, 2)
    assert config.data_types.grad_accum_dtype == "fp32" and config.data_types.module_dtypes == {"A": "bf16"}
    assert config.communication_data_type == "fp16"


def test_an_optimizer_of_torch_is_left_to_torch():
    params = {"lr": 1e-2, "momentum": 0.9, "alpha": "auto"}
    config = load_config({"train_batch_size": 8, "optimizer": {"type": "RMSprop", "params": params}}, 2)
    assert config.optimizer.params == {"lr": 1e-2, "momentum": 0.9}


def test_sources(tmp_path, monkeypatch):
    text = json.dumps(configs.CIFAR)
    file = tmp_path / "ds.json"
    file.write_text("// mine\n" + text)
    monkeypatch.chdir(tmp_path)
    sources = [configs.CIFAR, file, str(file), "ds.json", base64.urlsafe_b64encode(text.encode()).decode()]
    loaded = [load_config(source, 2) for source in sources]
    assert all(config.to_dict() == loaded[0].to_dict() and config.raw == configs.CIFAR for config in loaded)
    assert loaded[1].origins["train_batch_size"] == "file" and loaded[0].origins["train_batch_size"] == "given"
    again = load_config(loaded[0], 4)
    assert again.train_micro_batch_size_per_gpu == 4, "another world size, from what the user wrote"
    assert load_config(loaded[0].to_dict(), 2).to_dict() == loaded[0].to_dict()


def test_sources_that_cannot_be_read(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "wrong.json").write_text('{"train_batch_sise": 8}')
    for source, words in [
        (None, "There is no configuration; pass config="),
        (tmp_path / "none.json", "none.json cannot be read: no such file or directory"),
        (str(tmp_path / "none.json"), "cannot be read"),
        (tmp_path, "is a directory"),
        (tmp_path / "list.json", r"holds \[1\]; allowed is one object"),
        (tmp_path / "bytes.json", "is not text in UTF-8"),
        (tmp_path / "wrong.json", r"wrong\.json cannot be used, for 2 reasons"),
        (["x"], "is a list; allowed is a dict, a path or a Config"),
    ]:
        with pytest.raises(ConfigError, match=words):
            load_config(source, 1)


def test_a_config_from_keywords():
    config = Config(train_batch_size=8, fp16=FP16(enabled=True), zero_optimization={"stage": 2, "overlap_comm": True})
    assert config.zero_optimization == ZeroOptimization(stage=2)
    assert config.no_effect == ("zero_optimization.overlap_comm",)
    loaded = load_config(config, 4)
    assert loaded.train_micro_batch_size_per_gpu == 2 and loaded.fp16.enabled
    assert loaded.raw == {
        "train_batch_size": 8,
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 2, "overlap_comm": True},
    }
    with pytest.raises(ConfigError, match="did you mean train_batch_size"):
        Config(train_batch=8)
