from __future__ import annotations

import argparse

import pytest

from shardline.config.arguments import add_config_arguments, config_path
from shardline.errors import UsageError


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)  # as training scripts do
    assert add_config_arguments(parser) is parser
    return parser


@pytest.mark.parametrize("name", ["shardline", "deepspeed"])
def test_both_spellings(parser, name):
    args = parser.parse_args([f"--{name}", f"--{name}_config", "config.json"])
    assert getattr(args, name) is True
    assert config_path(args) == "config.json"


def test_nothing_given(parser):
    args = parser.parse_args([])
    assert (args.shardline, args.deepspeed, config_path(args)) == (False, False, None)


def test_a_namespace_of_another_origin():
    assert config_path(None) is None
    assert config_path(argparse.Namespace(deepspeed_config="x.json")) == "x.json"


def test_two_different_configs_are_an_error(parser):
    given = ["--shardline_config", "a.json", "--deepspeed_config"]
    assert config_path(parser.parse_args([*given, "a.json"])) == "a.json"
    with pytest.raises(UsageError, match=r"a\.json and --deepspeed_config b\.json"):
        config_path(parser.parse_args([*given, "b.json"]))
