"""The GPT example: its corpus, its model, and a few steps of the script itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from examples.gpt.data import Corpus, Windows, is_prose, prose
from examples.gpt.model import GPT, rotate
from examples.gpt.report import read

EXAMPLE = Path(__file__).parents[2] / "examples" / "gpt"

DOCUMENT = """The "pass" statement
********************

   pass_stmt ::= "pass"

"pass" is a null operation — when it is executed, nothing happens. It
is useful as a placeholder when a statement is required.

   >>> def f(arg): pass    # a function that does nothing (yet)

* It is a list item that goes on for long enough to be read as a
  sentence.

object.__add__(self, other)
"""


def test_prose_keeps_sentences_and_leaves_code_grammar_and_headings_out():
    assert prose([DOCUMENT]) == [
        '"pass" is a null operation - when it is executed, nothing happens. '
        "It is useful as a placeholder when a statement is required.",
        "It is a list item that goes on for long enough to be read as a sentence.",
    ]


def test_prose_keeps_each_paragraph_once_over_all_documents():
    assert prose([DOCUMENT, DOCUMENT]) == prose([DOCUMENT])


@pytest.mark.parametrize(
    "text",
    [
        "Too short.",
        "this goes on for long enough but does not begin the way that a sentence does.",
        "This goes on for long enough but does not end the way that a sentence does",
        "x = [1, 2, 3, 4, 5]; y = {6: 7, 8: 9}; z = (x[0] + y[6]) * 10 ** 11 - 12 / 13.",
        "Na\u00efve letters outside of the alphabet are few, and not worth a symbol of their own.",
    ],
)
def test_is_prose_refuses(text):
    assert not is_prose(text)


def test_corpus_is_split_by_position_and_decodes_to_the_text():
    text = "abcdefghij" * 10
    corpus = Corpus.from_text(text, held_out=0.2)
    assert corpus.decode(corpus.train) == text[:80]
    assert corpus.decode(corpus.held_out) == text[80:]
    assert corpus.alphabet == "abcdefghij"
    assert torch.equal(corpus.encode("cab"), torch.tensor([2, 0, 1]))


def test_the_documentation_of_python_is_enough_text_and_no_held_out_paragraph_is_trained_on():
    corpus = Corpus.python_documentation()
    train, held_out = corpus.decode(corpus.train), corpus.decode(corpus.held_out)
    assert len(train) > 150_000
    assert len(held_out) > 15_000
    # Not the first: the cut goes through it. Not as substrings: "X." may end a longer paragraph "See Y for X.".
    assert not set(train.split("\n")) & set(held_out.split("\n")[1:])


def test_windows_pair_each_symbol_with_the_next():
    windows = Windows(torch.arange(10), context=4)
    assert len(windows) == 6
    tokens, targets = windows[5]
    assert tokens.tolist() == [5, 6, 7, 8]
    assert targets.tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize("length", range(1, 30))
def test_windows_side_by_side_ask_for_each_symbol_at_most_once_and_never_run_over(length):
    windows = Windows(torch.arange(length), context=4, stride=4)
    targets = [symbol for index in range(len(windows)) for symbol in windows[index][1].tolist()]
    assert targets == list(range(1, 4 * ((length - 1) // 4) + 1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(vocabulary=11, context=16, depth=2, width=32, heads=4)


def test_model_gives_logits_and_with_targets_their_cross_entropy(model):
    tokens = torch.randint(11, (3, 7))
    targets = torch.randint(11, (3, 7))
    logits = model(tokens)
    assert logits.shape == (3, 7, 11)
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(model(tokens, targets), expected)


def test_model_is_causal(model):
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_model_computes_in_bf16_with_a_loss_in_fp32(model):
    tokens = torch.randint(11, (2, 8))
    expected = model(tokens, tokens)
    loss = model.bfloat16()(tokens, tokens)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < 0.05


def test_rotated_products_depend_on_the_distance_only():
    q, k = torch.randn(2, 8)
    products = rotate(q.expand(6, 8)) @ rotate(k.expand(6, 8)).T
    for distance in range(-5, 6):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert not torch.allclose(products[0, 0], products[0, 3])


def test_generation_sees_no_more_than_the_context(model):
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    model.generate(torch.randint(11, (1, 14)), 5)
    assert seen == [14, 15, 16, 16, 16]


def test_generation_appends_and_is_repeatable(model):
    prompt = torch.tensor([[1, 2, 3]])
    once = model.generate(prompt, 30, seed=5)
    assert once.shape == (1, 33)
    assert torch.equal(once[:, :3], prompt)
    assert torch.equal(once, model.generate(prompt, 30, seed=5))
    assert not torch.equal(once, model.generate(prompt, 30, seed=6))


def test_generation_samples_from_the_softmax(model):
    prompt = torch.tensor([[1, 2, 3]]).repeat(4000, 1)
    sampled = model.generate(prompt, 1, temperature=0.7)[:, -1]
    expected = F.softmax(model(prompt[:1])[0, -1] / 0.7, dim=-1)
    torch.testing.assert_close(sampled.bincount(minlength=11) / 4000, expected.detach(), atol=0.03, rtol=0)


def run(script, tmp_path, *options):
    config = json.loads((EXAMPLE / "config.json").read_text()) | {"train_batch_size": 8}
    config["checkpoint"]["every_steps"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, EXAMPLE / script, *options, f"--config={tmp_path / 'config.json'}"],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.timeout(300)
def test_a_few_steps_of_the_script_lower_the_loss_leave_a_picture_and_are_not_done_twice(tmp_path):
    options = ["--steps=8", "--eval-every=8", "--sample=20", f"--out={tmp_path}"]
    done = run("train.py", tmp_path, *options)
    found = re.search(r"held-out loss +([\d.]+) -> ([\d.]+)", done.stdout)
    assert found, done.stdout
    first, last = map(float, found.groups())
    assert (
        4 < first < 5.5
    )  # an untrained model guesses among 90 to 170 characters, by the version of Python: ln 90 = 4.5
    assert last < first - 0.3
    assert re.search(r"^steps +8$", done.stdout, re.MULTILINE)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

    again = run("train.py", tmp_path, *options)
    assert f"resumed from {tmp_path / 'checkpoints' / 'global_step8'}, step 8" in again.stderr
    assert f"{tmp_path} holds a run that is finished" in again.stdout
    table = [line for line in done.stdout.splitlines() if re.match("steps|train loss|held-out loss|bits", line)]
    assert len(table) == 4 and set(table) <= set(again.stdout.splitlines())


@pytest.mark.parametrize(("first", "then"), [(1, 1), (2, 3)])
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_run_ends_at_the_same_loss(tmp_path, first, then):
    out = tmp_path / "runs"
    options = ["--steps=8", "--report-every=1", "--eval-every=8", f"--ranks={first}", f"--resume-on={then}"]
    done = run("kill_and_resume.py", tmp_path, *options, f"--out={out}")
    assert re.search(rf"Sent SIGKILL to {first} ranks .* last step that they reported is [5-8]\.", done.stdout)
    assert re.search(r"resumed from .*/killed/checkpoints/global_step([2-8]), step \1\n", done.stderr)
    assert f"ranks: {then} on cpu" in done.stdout
    (alone, looks), (resumed, looks_again) = (read(out / name / "losses.jsonl") for name in ("straight", "killed"))
    if first == then:  # the same bits
        assert alone == resumed and looks.items() <= looks_again.items()
    else:
        assert alone.keys() == resumed.keys() and looks.keys() <= looks_again.keys()
        assert all(abs(alone[step] - resumed[step]) < 2e-3 for step in alone)
        assert all(abs(looks[step] - looks_again[step]) < 2e-3 for step in looks)
    refused = subprocess.run([sys.executable, EXAMPLE / "kill_and_resume.py", f"--out={out}"], capture_output=True)
    assert refused.returncode == 1 and b"is not empty" in refused.stderr
