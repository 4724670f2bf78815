"""The nearest name, and calls with parameters that a user wrote."""

from __future__ import annotations

import pytest

from shardline.errors import ConfigError
from shardline.names import call, listed, nearest, ranks_text


def build(optimizer: str, size: int, rate: float = 1.0, *, stairs: bool = False) -> tuple[str, int, float, bool]:
    if size < 0:
        raise ValueError("size is negative")
    return optimizer, size, rate, stairs


def test_nearest_ignores_case_and_says_nothing_when_nothing_is_near() -> None:
    assert nearest("adamv", ["AdamW", "SGD"]) == " Did you mean 'AdamW'?"
    assert nearest("zzz", ["AdamW", "SGD"]) == ""


def test_lists_are_cut_and_say_how_much_is_left() -> None:
    assert [listed(range(count), 2) for count in (0, 1, 2, 4)] == ["", "0", "0, 1", "0, 1 and 2 more"]


def test_ranks_in_a_row_are_a_range() -> None:
    assert [ranks_text(ranks) for ranks in ([3], [0, 1], [1, 2, 3], [0, 2, 5], [0, *range(2, 12)])] == [
        "rank 3",
        "ranks 0, 1",
        "ranks 1 to 3",
        "ranks 0, 2, 5",
        "ranks 0, 2, 3, 4, 5, 6, 7, 8 and 3 more",
    ]


def test_call_passes_on_what_was_given() -> None:
    assert call(build, "o", what="thing", params={"size": 2, "stairs": True}) == ("o", 2, 1.0, True)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"sise": 2}, "thing has no parameter 'sise'. Did you mean 'size'\\? It takes: also, rate, size, stairs."),
        ({"optimizer": "x", "size": 2}, "thing has no parameter 'optimizer'"),
        ({"rate": 2.0}, "thing needs the parameter 'size'"),
        ({"size": -1}, "thing cannot be built from its params {'size': -1}: size is negative"),
        ({"size": "x"}, "thing cannot be built .* '<' not supported"),
    ],
)
def test_every_mistake_is_a_config_error(params: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(build, "o", what="thing", params=params, also={"also"})
