"""Checks at every step that ranks have the same values where they must: the step report carries a digest of them.

A difference shows in the report, before a weight changes. Only then do ranks exchange the values, to name them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from shardline.errors import DisagreementError
from shardline.names import ranks_text

__all__ = ["ConsistencyCheck", "Fingerprint", "Source"]

_NAMED = 3  # values that a message spells out

_GOLDEN, _MIX = 0x9E37_79B9_7F4A_7C15 - 2**64, 0xBF58_476D_1CE4_E5B9 - 2**64
"""Of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"), as int64."""


class Source(Protocol):
    """Where values come from that must be the same on all ranks.

    Attributes:
        advice: a sentence that says what to do where ranks differ.
    """

    advice: str

    def read(self) -> tuple[Sequence[Any], Sequence[Tensor]]:
        """The values now, read at every step.

        Returns:
            Numbers, strings, booleans and None, also in tuples, whose ``repr`` is the same if and only if they are; and
            0-dim tensors on a device, whose values the host does not wait for.
        """
        ...

    def names(self, values: Sequence[Any], tensors: Sequence[float]) -> Mapping[str, str]:
        """What :meth:`read` gave, as text by name, for a message."""
        ...


@dataclass(frozen=True)
class Fingerprint:
    """The values of one rank at one step, and their digests.

    Attributes:
        digest: 32 bits of everything that the host knows.
        on_device: 31 bits of what only the device knows (0-dim, float64); ``None`` where there is no such thing.
    """

    digest: int
    on_device: Tensor | None
    values: list[Sequence[Any]] = field(repr=False)
    tensors: list[Tensor | None] = field(repr=False)


class ConsistencyCheck:
    """The values of all ``sources``, and the error if ranks differ in them."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self._latest: list[tuple[Sequence[Any], int]] = [((), 0)] * len(sources)

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of this rank's values now. Nothing waits for a device."""
        values, tensors, digest = [], [], 0
        for place, source in enumerate(self.sources):
            found, watched = source.read()
            latest, crc = self._latest[place]
            if found != latest:
                crc = zlib.crc32(repr(found).encode())
                self._latest[place] = found, crc
            digest = zlib.crc32(crc.to_bytes(4, "little"), digest)
            values.append(found)
            # A copy: a scheduler changes them before they are read.
            tensors.append(torch.stack([each.detach().double() for each in watched]) if watched else None)
        return Fingerprint(digest, _bits([each for each in tensors if each is not None]), values, tensors)

    def error(self, fingerprint: Fingerprint, exchange: Callable[[Any], list[Any]], when: str) -> DisagreementError:
        """The error that names the values that differ, by rank. Collective: ``exchange`` gives each rank's value.

        ``when`` is the text for the step that was not applied.
        """
        named = [
            dict(source.names(values, [] if tensors is None else tensors.tolist()))
            for source, values, tensors in zip(self.sources, fingerprint.values, fingerprint.tensors, strict=True)
        ]
        differing: list[str] = []
        advice: dict[str, None] = {}
        for source, *sides in zip(self.sources, *exchange(named), strict=True):
            for name in dict.fromkeys(name for side in sides for name in side):
                texts = [side.get(name, "none") for side in sides]
                if len(set(texts)) > 1:
                    differing.append(f"{name} is {_by_rank(texts)}")
                    advice[source.advice] = None
        more = f"; and {len(differing) - _NAMED} more values differ" if len(differing) > _NAMED else ""
        return DisagreementError(
            f"ranks differ in what must be the same on all, so {when} was not applied: "
            f"{'; '.join(differing[:_NAMED])}{more}. {' '.join(advice)}"
        )


def _bits(values: Sequence[Tensor]) -> Tensor | None:
    """A digest of float64 values that is computed where they are: 31 bits, exact in a float64 (0-dim)."""
    if not values:
        return None
    bits = torch.cat(list(values)).view(torch.int64)
    bits = bits + torch.arange(1, 1 + len(bits), device=bits.device) * _GOLDEN  # each place has a digest of its own
    bits = (bits ^ (bits >> 30)) * _MIX
    bits = bits ^ (bits >> 27)
    return (bits.sum() & 0x7FFF_FFFF).double()


def _by_rank(texts: Sequence[str]) -> str:
    """``0.1 on rank 0, 0.05 on ranks 1 to 3``."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(rank)
    return ", ".join(f"{text} on {ranks_text(having)}" for text, having in ranks.items())
