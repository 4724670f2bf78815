"""Transformers' own Trainer, unchanged, with ``deepspeed=``: its figures are those of a run without DeepSpeed."""

from __future__ import annotations

import pytest

from tests.compat.clients.scripts import needs, run
from tests.compat.rows import differs, unchanged

pytestmark = needs("transformers", "accelerate")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One process, no DeepSpeed: what all others are compared with. Resumed half-way as well."""
    out = tmp_path_factory.mktemp("plain")
    (found,) = run("trainer.py", out, [{"stage": None}])
    return found


def close(found, expected, *, rel=2e-5):
    assert found["steps"] == expected["steps"]
    for name in ("losses", "norms", "eval", "rates"):
        assert found[name] == pytest.approx(expected[name], rel=rel, abs=1e-6), name
    for name in ("weights", "saved"):
        common = found[name].keys() & expected[name].keys()
        assert len(common) > 20
        assert {key: found[name][key] for key in common} == pytest.approx(
            {key: expected[name][key] for key in common}, rel=rel
        )


@unchanged(
    "Transformers 5.23: `Trainer(deepspeed=)`",
    'dict or file with "auto"; accumulation with an incomplete last window, clipping, gradient checkpointing, '
    "evaluation in between, `save_model`",
)
def test_one_process(plain, tmp_path):
    cases = [{"stage": 2}, {"stage": 3, "gradient_checkpointing": True}, {"stage": 3, "from_file": True}]
    *same, own = run("trainer.py", tmp_path, cases, world=1)
    for each in same:
        close(each, plain)
    assert own["steps"] == plain["steps"]  # DeepSpeed's schedule is not Transformers'
    assert own["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-5)


@unchanged("Transformers 5.23: `Trainer(deepspeed=)`", "stages 0 to 3 in fp32")
def test_stages_on_two_ranks(plain, tmp_path):
    cases = [{"stage": stage} for stage in (0, 1, 2, 3)]
    for each in run("trainer.py", tmp_path, cases, world=2):
        close(each, plain)


@unchanged("Transformers 5.23: `Trainer(deepspeed=)`", "0, 2 and 3 in bf16")
def test_bf16(plain, tmp_path):
    cases = [{"stage": stage, "bf16": True} for stage in (0, 2, 3)]
    for each in run("trainer.py", tmp_path, cases, world=2):
        assert each["losses"] == pytest.approx(plain["losses"], rel=2e-2)
        assert each["eval"] == pytest.approx(plain["eval"], rel=2e-2)


@unchanged("Transformers 5.23: `Trainer(deepspeed=)`", "resumed on another number of ranks and at another stage")
def test_resume_on_another_number_of_ranks(plain, tmp_path):
    run("trainer.py", tmp_path / "two", [{"stage": 3}], world=2)
    checkpoint = str(tmp_path / "two" / "0" / "checkpoint-5")
    (found,) = run("trainer.py", tmp_path / "one", [{"stage": 2, "resume": checkpoint}], world=1)
    close(found, plain)


@differs(
    "a second `train()` of one Trainer",
    "`AttributeError` in Accelerate",
    "`UsageError`, which says the line that makes it work: `trainer.model_wrapped = trainer.model`",
)
@unchanged(
    "Transformers 5.23: `Trainer(deepspeed=)`",
    "`from_pretrained` under `zero.Init`; a second `train()` after one line, and a second Trainer over the model",
)
def test_a_second_trainer_and_pretrained_weights(plain, tmp_path):
    """``from_pretrained`` builds under ``zero.Init`` at stage 3, and trains on from what it has read."""
    source = tmp_path / "plain"
    (first,) = run("trainer.py", source, [{"stage": None}])
    pretrained = str(source / "0" / "final")
    plainly = [{"stage": None, "pretrained": pretrained}, {"stage": None, "again": "another Trainer"}]
    expected, again = run("trainer.py", tmp_path / "more", plainly)
    cases = (
        [{"stage": stage, "pretrained": pretrained} for stage in (2, 3)]
        + [{"stage": stage, "again": again} for stage in (2, 3) for again in ("another Trainer", "the same")]
        + [{"stage": 3, "again": "as it is"}]
    )
    *found, a, b, c, d, refused = run("trainer.py", tmp_path / "two", cases, world=2)
    assert expected["losses"][0] < first["losses"][0]
    for each in found:
        close(each, expected)
    for each in (a, b, c, d):
        close(each, again)
    assert refused["error"].startswith("UsageError") and "trainer.model_wrapped = trainer.model" in refused["error"]
