"""The corpus: the prose of Python's own documentation as one text, split by position, and windows into it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

# Typographic signs that the documentation uses now and then, as plain ASCII: a smaller alphabet learns faster.
ASCII = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
        "\xa0": " ",
    }
)


def prose(documents: Iterable[str]) -> list[str]:
    """Return the distinct paragraphs of running English in ``documents``, each on one line, in order.

    Code, grammar, tables, headings and signatures are left out. A paragraph that comes again is left out too:
    Python's topics quote one another, and a held-out text that was also trained on would measure memory.
    """
    paragraphs: dict[str, None] = {}
    for document in documents:
        for block in re.split(r"\n\s*\n", document.translate(ASCII)):
            text = re.sub(r"^[*\d]+[.)]? ", "", " ".join(block.split()))
            if is_prose(text):
                paragraphs[text] = None
    return list(paragraphs)


def is_prose(text: str) -> bool:
    """Say whether one line of text reads as English: it starts and ends as a sentence and is mostly letters."""
    if len(text) < 40 or not text.isascii() or not text.isprintable():
        return False
    if not re.match(r"[A-Z\"(*]", text) or not re.search(r"[.:!?)]$", text):
        return False
    letters = sum(character.isalpha() or character == " " for character in text)
    return letters / len(text) > 0.85 and not re.search(r">>>|::=|\+--|\|", text)


@dataclass(frozen=True)
class Corpus:
    """Two texts of one alphabet as symbols: ``train`` and ``held_out``, both 1-D int64."""

    alphabet: str
    train: Tensor
    held_out: Tensor

    @classmethod
    def from_text(cls, text: str, held_out: float = 0.1) -> Corpus:
        """Split ``text`` by position: its last ``held_out`` share is kept away from training."""
        alphabet = "".join(sorted(set(text)))
        number = {character: index for index, character in enumerate(alphabet)}
        symbols = torch.tensor([number[character] for character in text])
        cut = round(len(text) * (1 - held_out))
        return cls(alphabet, symbols[:cut], symbols[cut:])

    @classmethod
    def python_documentation(cls) -> Corpus:
        """Build the corpus from ``pydoc_data.topics``, which every Python carries: about 250,000 characters."""
        from pydoc_data.topics import topics

        return cls.from_text("\n".join(prose(topics[name] for name in sorted(topics))))

    def encode(self, text: str) -> Tensor:
        """Return the symbols of ``text``, 1-D int64. Raises ``ValueError`` for a character outside the alphabet."""
        return torch.tensor([self.alphabet.index(character) for character in text])

    def decode(self, symbols: Tensor) -> str:
        """Return the text of 1-D ``symbols``."""
        return "".join(self.alphabet[symbol] for symbol in symbols.tolist())


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of ``context`` symbols, one every ``stride``, each with its targets: the symbols one further on."""

    def __init__(self, symbols: Tensor, context: int, stride: int = 1) -> None:
        self.symbols, self.context, self.stride = symbols, context, stride

    def __len__(self) -> int:
        return max(0, (len(self.symbols) - 1 - self.context) // self.stride + 1)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.stride
        window = self.symbols[start : start + self.context + 1]
        return window[:-1], window[1:]
