"""What must be the same on all ranks: digests that tell it apart, and a sentence that names what differs."""

from __future__ import annotations

import math
import random

import pytest
import torch

from shardline.sharding.consistency import ConsistencyCheck


class Given:
    """A source of what the test says."""

    def __init__(self, values=(), tensors=(), advice="Do as the others."):
        self.values, self.tensors, self.advice = values, tensors, advice

    def read(self):
        return self.values, self.tensors

    def names(self, values, tensors):
        named = {f"value {place}": str(value) for place, value in enumerate(values)}
        return named | {f"tensor {place}": str(value) for place, value in enumerate(tensors)}


def scalar(value):
    return torch.tensor(value)


def state(values=(), tensors=()):
    return ConsistencyCheck([Given(values, tensors)]).fingerprint()


def test_a_digest_is_that_of_the_values_and_follows_them() -> None:
    one = Given(["a", 0.1, None, True])
    check = ConsistencyCheck([one, Given([3])])
    first = check.fingerprint().digest
    assert (
        check.fingerprint().digest
        == first
        == ConsistencyCheck([Given(["a", 0.1, None, True]), Given([3])]).fingerprint().digest
    )
    assert 0 <= first < 2**32
    for other in (["a", 0.1 + 1e-17 * 3, None, False], ["a", 0.10000000000000002, None, True], ["a", 0.1, None], []):
        one.values = other
        assert check.fingerprint().digest != first
    one.values = ["a", 0.1, None, True]
    assert check.fingerprint().digest == first
    assert ConsistencyCheck([Given([3]), one]).fingerprint().digest != first


def test_values_on_a_device_are_told_apart_there() -> None:
    assert state([1.0]).on_device is None
    same = [float(state(tensors=[scalar(0.1), scalar(0.2)]).on_device) for _ in range(2)]
    assert same[0] == same[1] and 0 <= same[0] < 2**31
    draw = random.Random(0)
    seen: dict[tuple[float, ...], float] = {}
    for _ in range(300):  # each option by a power of two, by the last bit, or exchanged with another
        values = [0.1, 0.2]
        place = draw.randrange(2)
        values[place] = draw.choice([values[place] * 2.0 ** draw.randint(-40, 40), math.nextafter(values[place], 1)])
        values = values[:: draw.choice([1, -1])]
        found = state(tensors=[torch.tensor(value, dtype=torch.float64) for value in values]).on_device
        twice = state(tensors=[torch.tensor(value, dtype=torch.float64) for value in values]).on_device
        assert found == twice
        seen[tuple(values)] = float(found)
    assert len(seen) > 100 and len(set(seen.values())) == len(seen)
    nan = state(tensors=[scalar(math.nan)]).on_device
    assert nan == state(tensors=[scalar(math.nan)]).on_device, "the same NaN on all ranks is no difference"


def refused(*sources: Given) -> str:
    """What rank 0 says when each rank's is one of ``sources``."""
    sides = []

    def exchange(value):
        sides.append(value)
        return [value]

    for source in sources:
        check = ConsistencyCheck([source])
        check.error(check.fingerprint(), exchange, "this step")
    check = ConsistencyCheck([sources[0]])
    return str(check.error(check.fingerprint(), lambda value: sides, "this step"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[1, 2], [1, 3]], "value 1 is 2 on rank 0, 3 on rank 1. Do"),
        ([[1], [2], [2], [2]], "value 0 is 1 on rank 0, 2 on ranks 1 to 3. Do"),
        ([[2], [1], [2], [3]], "value 0 is 2 on ranks 0, 2, 1 on rank 1, 3 on rank 3. Do"),
        ([[1], []], "value 0 is 1 on rank 0, none on rank 1. Do"),
        ([[1, 2, 3, 4, 5], [0, 0, 0, 0, 0]], "; and 2 more values differ. Do"),
    ],
)
def test_what_differs_is_named(values, words) -> None:
    said = refused(*map(Given, values))
    assert words in said and "this step was not applied" in said


def test_a_value_on_a_device_is_named_as_it_was() -> None:
    """By the time it is asked for, a scheduler may have changed the tensor."""
    watched = torch.tensor(0.5)
    check = ConsistencyCheck([Given(tensors=[watched])])
    statement = check.fingerprint()
    watched.fill_(0.25)
    said = check.error(statement, lambda mine: [mine, [{"tensor 0": "0.25"}]], "the step before")
    assert "tensor 0 is 0.5 on rank 0, 0.25 on rank 1" in str(said)
