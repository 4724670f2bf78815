"""The models of the benchmark and their data: the same weights, batches and seed for every engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]

SEED = 1234
LEARNING_RATE = 1e-3
CLIP = 1.0
BATCHES = 8
"""Different micro-batches of a rank; they come again and again, so the loss falls."""


class Block(nn.Module):
    """One pre-norm transformer block: causal self-attention, then an MLP four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder-only transformer with untied embedding and head; ``forward(tokens, targets)`` is the loss in fp32."""

    def __init__(self, depth: int, width: int, heads: int, vocabulary: int, time: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(time, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


class ConvBlock(nn.Module):
    """A residual block of two convolutions with group norms (a batch norm would not mix with bf16 weights on CPU)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.GroupNorm(8, out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.GroupNorm(8, out)
        self.skip = nn.Conv2d(channels, out, 1, bias=False) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.skip(x))


class ConvNet(nn.Module):
    """A small residual network for 32 x 32 images; ``forward(images, labels)`` gives the loss in fp32."""

    def __init__(self, widths: tuple[int, ...], classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(ConvBlock(a, b) for a, b in zip((widths[0], *widths), widths, strict=False))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.stem(images)
        for number, block in enumerate(self.blocks):
            x = block(F.max_pool2d(x, 2) if number else x)
        return F.cross_entropy(self.head(x.mean((2, 3))).float(), labels)


class Tiny(nn.Module):
    """One linear layer with a residual: a unit whose computation costs next to nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Chain(nn.Module):
    """Tiny blocks in a row: what is left to see is the cost per unit."""

    def __init__(self, depth: int, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Tiny(width) for _ in range(depth))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return (x - y).float().square().mean()


@dataclass(frozen=True)
class Model:
    """A model and the work of one micro-batch.

    Attributes:
        build: makes it with fresh weights, in fp32 on the default device.
        batch: ``batch(generator)`` draws one micro-batch of a rank.
        samples: tokens, images or rows in one micro-batch of a rank.
        turn: optimizer steps that an engine does before it is another's turn.
        unit_min_numel: Shardline's key of that name, where the default would merge the blocks.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    samples: int
    turn: int
    unit_min_numel: int | None = None

    def data(self, rank: int, dtype: torch.dtype, device: str = "cpu") -> list[Batch]:
        """The rank's micro-batches; floating inputs come in the dtype of the computation."""
        generator = torch.Generator().manual_seed(SEED + 1 + rank)
        batches = [self.batch(generator) for _ in range(BATCHES)]
        return [(_cast(x, dtype).to(device), _cast(y, dtype).to(device)) for x, y in batches]

    def fresh(self) -> nn.Module:
        """The model with the weights that every rank and every engine starts from."""
        torch.manual_seed(SEED)
        return self.build()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def gpt(depth: int, width: int, vocabulary: int, time: int, micro: int, turn: int) -> Model:
    def batch(generator: torch.Generator) -> Batch:
        text = torch.randint(vocabulary, (micro, time + 1), generator=generator)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    heads = max(1, width // 64)
    return Model(lambda: GPT(depth, width, heads, vocabulary, time), batch, samples=micro * time, turn=turn)


def convnet(widths: tuple[int, ...], micro: int, turn: int) -> Model:
    def batch(generator: torch.Generator) -> Batch:
        return torch.randn(micro, 3, 32, 32, generator=generator), torch.randint(10, (micro,), generator=generator)

    return Model(lambda: ConvNet(widths), batch, samples=micro, turn=turn)


def chain(depth: int) -> Model:
    def batch(generator: torch.Generator) -> Batch:
        return torch.randn(4, 32, generator=generator), torch.randn(4, 32, generator=generator)

    turn = max(3, 1600 // depth)
    return Model(lambda: Chain(depth), batch, samples=4, turn=turn, unit_min_numel=1)


MODELS = {
    "gpt": gpt(depth=8, width=512, vocabulary=8192, time=128, micro=2, turn=3),
    "deep": gpt(depth=48, width=128, vocabulary=1024, time=128, micro=2, turn=4),
    "wide": gpt(depth=2, width=1536, vocabulary=1024, time=128, micro=1, turn=2),
    "conv": convnet(widths=(64, 128, 256, 512), micro=8, turn=4),
    "tiny": gpt(depth=3, width=64, vocabulary=256, time=16, micro=2, turn=2),
    "tiny-conv": convnet(widths=(8, 16), micro=2, turn=2),
    **{f"units-{count}": chain(count) for count in (8, 64, 512)},
}
"""``gpt`` has 34M parameters. ``units-N`` are N tiny blocks of one unit each."""


def parts(model: nn.Module) -> list[int]:
    """Numbers of elements of the parts that are worth gathering as one: every block, every other layer of its own."""
    blocks = [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]
    inside = {id(module) for block in blocks for module in block.modules()}
    alone = [module for module in model.modules() if id(module) not in inside and module._parameters]
    return [sum(param.numel() for param in part.parameters()) for part in (*blocks, *alone)]
