import argparse
import json

import pytest
import torch._dynamo  # noqa: F401  # an optimizer imports it and it sets an environment variable: not inside a test

from shardline.cli import config as command
from shardline.config.json_schema import json_schema

from . import configs


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        parser = argparse.ArgumentParser()
        command.add_parser(parser.add_subparsers())
        args = parser.parse_args(["config", *arguments])
        code = args.func(args)
        return code, capsys.readouterr()

    return run


def write(name, value):
    with open(name, "w") as file:
        json.dump(value, file)


def test_check_says_yes(run):
    write("ds.json", configs.CIFAR)
    code, said = run("check", "ds.json", "--world-size", "4")
    assert code == 0 and not said.err
    assert said.out.startswith(
        "ds.json can be used on a world of 4: train_batch_size 16 = micro 4 x accumulation 1 x world 4\n"
    )
    assert said.out.count("no effect: ") == 7


def test_check_says_no_to_everything_at_once(run):
    write("ds.json", {"train_batch_size": 7, "gradient_cliping": 1})
    code, said = run("check", "ds.json", "--world-size", "2")
    assert code == 1 and not said.out
    assert "gradient_clipping?" in said.err and "train_batch_size 6 or 8" in said.err


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"optimizer": {"type": "AdmaW"}}, "AdamW"),
        ({"optimizer": {"type": "RMSprop", "params": {"momentun": 0.9}}}, "momentum"),
        ({"scheduler": {"type": "StepLR", "params": {}}}, "step_size"),
    ],
)
def test_check_asks_the_classes(run, raw, words):
    write("ds.json", {"train_batch_size": 8, **raw})
    code, said = run("check", "ds.json")
    assert code == 1 and words in said.err


def test_explain(run):
    write("ds.json", configs.CIFAR)
    code, said = run("explain", "ds.json", "--world-size", "2")
    assert code == 0 and "computed: train_batch_size 16 / (world 2 x accumulation 1)" in said.out and "file" in said.out
    assert run("explain", "none.json")[0] == 1


def test_schema(run, tmp_path):
    code, said = run("schema")
    assert code == 0 and json.loads(said.out) == json_schema()
    assert run("schema", "schema.json")[0] == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == json_schema()


def test_a_world_has_at_least_one_rank(run, capsys):
    with pytest.raises(SystemExit):
        run("check", "ds.json", "--world-size", "0")
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err
