import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardline.config.text import parse
from shardline.errors import ConfigError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(values, st.sampled_from([None, 2]))
def test_json_is_read_as_json_does(value, indent):
    text = json.dumps(value, indent=indent, ensure_ascii=indent is None)
    assert parse(text, "it") == json.loads(text)


def test_comments_and_trailing_commas():
    text = """
    // the whole thing
    {"a": [1, 2,], # two
     "b": "// no comment, # nor this, /* nor */ this,]", /* over
     lines */ "c": {"d": 5e8,},
    }"""
    assert parse(text, "it") == {"a": [1, 2], "b": "// no comment, # nor this, /* nor */ this,]", "c": {"d": 5e8}}


def test_duplicate_keys_are_named_by_path():
    with pytest.raises(ConfigError, match=r"holds zero\.stage, list\[1\]\.a twice"):
        parse('{"zero": {"stage": 1, "stage": 2}, "list": [0, {"a": 1, "a": 1}]}', "it")


def test_errors_give_true_positions():
    with pytest.raises(ConfigError, match=r"it is not JSON: .* in line 3, column 7: \"b\": oops"):
        parse('{ // one\n "a": 1, /* x */\n "b": oops\n}', "it")
