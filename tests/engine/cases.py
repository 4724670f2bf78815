"""What the tests of an engine share: calls that raise, a step of training, and the same by the twin."""

from __future__ import annotations

from tests.harness import Setup, seeded
from tests.models import Mlp, mse, regression

SGD = Setup("fp32", "SGD")


def attempt(call, *args, **kwargs):
    """The type and text of what a call raises, or ``None``."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def is_sentence(said, kind, *words):
    if said is None or said[0] != kind:
        return False
    text, code = said[1].rsplit(None, 1)
    return text.endswith(".") and code.startswith("[SL") and all(word in text for word in words)


def train(engine, seed=0, steps=1):
    for _ in range(steps):
        engine.backward(mse(engine, engine.module, regression(4, seed=seed)))
        engine.step()


def sgd_by_hand(batches, setup=SGD):
    """The twin's weights after a step on each element of ``batches``, a list of micro-batches."""
    twin = setup.twin(seeded(Mlp))
    for batch in batches:
        twin.backward(mse(twin, twin.model, batch))
        twin.step()
    return twin.state()
