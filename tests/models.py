"""Small models for the tests, each with one thing that is easy to get wrong, and the losses that go with them.

A loss is `loss(call, module, batch)`: `call` is the engine or the twin (what casts inputs), `module` the user's model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Loss = Callable[[Callable[..., object], nn.Module, tuple[Tensor, ...]], Tensor]

WIDTH = 32


def mse(call: Callable[..., Tensor], module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean squared error, computed in fp32."""
    return F.mse_loss(call(batch[0]).float(), batch[1])


def cross_entropy(call: Callable[..., Tensor], module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean cross entropy over all positions, computed in fp32."""
    logits = call(batch[0]).float()
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[1].reshape(-1))


def regression(n: int, width: int = WIDTH, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`n` samples of a smooth target of `width` inputs: (n, width) and (n, width), fp32."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g)
    return x, torch.tanh(x @ torch.randn(width, width, generator=g) / width**0.5)


def tokens(n: int, length: int = 8, vocab: int = 37, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`n` token sequences and the same shifted by one: (n, length) int64 twice."""
    ids = torch.randint(vocab, (n, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def images(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`n` 3x8x8 images and their classes of 5."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=g), torch.randint(5, (n,), generator=g)


class Block(nn.Module):
    """Residual block of two linear layers; all blocks are of equal size, as in the swap that DESIGN.md warns of."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Mlp(nn.Module):
    """Equal blocks in a ModuleList and a head; `skip` leaves blocks out, `order` changes their order."""

    def __init__(self, width: int = WIDTH, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor, skip: tuple[int, ...] = (), order: tuple[int, ...] | None = None) -> Tensor:
        for i in range(len(self.blocks)) if order is None else order:
            if i not in skip:
                x = self.blocks[i](x)
        return self.head(x)

    def encode(self, x: Tensor) -> Tensor:
        """The blocks without the head, and without going through `forward`."""
        for block in self.blocks:
            x = block(x)
        return x


class GptBlock(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, w)
        x = x + self.proj(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyGpt(nn.Module):
    """Causal language model whose head is tied to its embedding, with a positional parameter held by the root."""

    def __init__(
        self, vocab: int = 37, width: int = WIDTH, depth: int = 2, context: int = 8, tied: bool = True
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.position = nn.Parameter(torch.randn(context, width) * 0.1)
        self.blocks = nn.ModuleList(GptBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int) -> Tensor:
        """`count` greedy tokens, one forward each."""
        for _ in range(count):
            ids = torch.cat([ids, self(ids[:, -8:])[:, -1:].float().argmax(-1)], dim=1)
        return ids


class ConvNet(nn.Module):
    """Convolutions with BatchNorm: parameters that stay fp32, statistics that are buffers.

    No biases before the norms: their gradient is zero but for rounding, and nothing can be compared with noise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 10, 3, bias=False), nn.BatchNorm2d(10)
        self.head = nn.Linear(10 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(x.to(self.head.weight.dtype).flatten(1))


class Branches(nn.Module):
    """`left`, `right` and `never`; a call uses what it names."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.trunk = Block(width)
        self.branches = nn.ModuleDict({name: Block(width) for name in ("left", "right", "never")})
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor, use: tuple[str, ...] = ("left",)) -> Tensor:
        x = self.trunk(x)
        for name in use:
            x = self.branches[name](x)
        return self.head(x)


class LoraLinear(nn.Module):
    """A frozen square weight plus a trainable product of rank `rank`."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width, bias=False)
        self.base.weight.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.b = nn.Parameter(torch.randn(width, rank) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Lora(nn.Module):
    """LoRA blocks; at width 512 and rank 2 it is 0.8% trainable."""

    def __init__(self, width: int = 512, rank: int = 2, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LoraLinear(width, rank) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


class Checkpointed(Mlp):
    """The MLP with activation checkpointing of every block, reentrant or not."""

    def __init__(self, reentrant: bool, width: int = WIDTH, depth: int = 4) -> None:
        super().__init__(width, depth)
        self.reentrant, self.first = reentrant, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)  # so that the checkpointed input needs a gradient, which reentrant checkpointing demands
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


# --- side doors: ways in which a tensor that needs a weight leaves a module unseen ----------------------------------


class AuxBlock(Block):
    """Keeps an auxiliary loss, made of its own weights, on `self`."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        self.aux = F.linear(hidden, self.down.weight).pow(2).mean() + self.up.weight.pow(2).mean()
        return x + self.down(F.gelu(hidden))


class AuxMlp(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AuxBlock() for _ in range(3))


def aux_loss(call: Callable[..., Tensor], module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    loss = mse(call, module, batch)
    return loss + 0.1 * torch.stack([block.aux.float() for block in module.blocks]).sum()


@dataclass
class Opaque:
    """An output that no pytree knows."""

    hidden: Tensor
    residual: Tensor


class OpaqueBlock(Block):
    def forward(self, x: Tensor | Opaque) -> Opaque:
        if isinstance(x, Opaque):
            x = x.hidden + x.residual
        return Opaque(self.down(F.gelu(self.up(x))), x)


class OpaqueMlp(Mlp):
    """Blocks hand each other a dataclass, and so does the model."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(OpaqueBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Opaque:
        for block in self.blocks:
            x = block(x)
        return Opaque(self.head(x.hidden), x.residual)


def opaque_loss(call: Callable[..., Opaque], module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    out = call(batch[0])
    return F.mse_loss((out.hidden + out.residual).float(), batch[1])


class ViewBlock(Block):
    """Returns a view of its output, which the caller then changes in place."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x))).view(x.shape[0], 2, -1)


class ViewMlp(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ViewBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            out = block(x)
            out.mul_(0.5).add_(x.view_as(out))
            x = out.view_as(x)
        return self.head(x)


def gradient_penalty(call: Callable[..., Tensor], module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """As in WGAN-GP: the loss holds a gradient with respect to the input, so backward goes through backward."""
    x = batch[0].clone().requires_grad_()
    out = call(x).float()
    (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    return F.mse_loss(out, batch[1]) + 0.01 * slope.square().sum(1).mean()


def encode_loss(call: Callable[..., Tensor], module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Uses the model by another method than forward."""
    dtype = module.blocks[0].up.weight.dtype
    return F.mse_loss(module.encode(batch[0].to(dtype)).float(), batch[1])


# --- the rest of the list ---------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """The root uses weights that belong to children, outside their forwards."""

    def __init__(self, vocab: int = 37, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x) + F.linear(x, block.up.weight.t())
        return F.linear(x, self.embed.weight)


class Twice(nn.Module):
    """One block called twice in a forward, with another in between."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.blocks[1](self.blocks[0](x)))


class Nested(nn.Module):
    """Blocks inside blocks, and a parameter beside each inner list."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(NestedStage() for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


class NestedStage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) * self.gain
        return x


class Doubles(nn.Module):
    """An fp32 model with one fp64 parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(WIDTH, WIDTH)
        self.exact = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.block(x).double() * self.exact).to(x.dtype))


class Odd(nn.Module):
    """Parameters of rank 0, of size 0 and of odd shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.nothing = nn.Parameter(torch.zeros(0, 5))
        self.cube = nn.Parameter(torch.randn(3, 5, 7) * 0.2)
        self.blocks = nn.ModuleList([nn.Linear(7, 13), nn.Linear(13, 7), nn.Linear(7, 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("ni,ijk->nk", x[:, :3], self.cube) * self.scale + self.nothing.sum()
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def odd_loss(call: Callable[..., Tensor], module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return F.mse_loss(call(batch[0]).float()[:, 0], batch[1][:, 0])


class Speck(nn.Module):
    """Three parameters of one element: on four ranks some rank owns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, :1] * self.scale).expand(-1, x.shape[1])


class SparseEmbedding(nn.Module):
    """An embedding whose gradient is sparse."""

    def __init__(self, vocab: int = 37, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width, sparse=True)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, vocab)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Failing(Mlp):
    """Raises inside the forward of its second block when told to."""

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        x = self.blocks[0](x)
        if fail:
            self.blocks[1].up(x)
            raise ValueError("as asked")
        for block in self.blocks[1:]:
            x = block(x)
        return self.head(x)


class TwoHeads(Mlp):
    """Two outputs, for two losses."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.encode(x)
        return self.head(x), self.other(x)


class LateInit(nn.Module):
    """Buildable on `meta`: every module that holds parameters or buffers has `reset_parameters`."""

    def __init__(self, width: int = WIDTH, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(depth))
        self.head = nn.Linear(width, 37)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Orphan(LateInit):
    """Not buildable on `meta`: the root holds a parameter that no `reset_parameters` writes."""

    def __init__(self) -> None:
        super().__init__()
        self.orphan = nn.Parameter(torch.zeros(7))


class OddGradients(nn.Module):
    """Gradients that do not lie as their parameters do: expanded, transposed, sparse, absent, two in one memory."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.one, self.other = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(1, width))
        self.expanded, self.turned = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width, 3).t())
        self.rows, self.unused = nn.Embedding(5, width, sparse=True), nn.Linear(width, width)
        self.first.weight.register_post_accumulate_grad_hook(self._turn)

    @staticmethod
    def _turn(param: Tensor) -> None:
        grad, rows = param.grad, param.shape[0]
        param.grad = torch.empty_strided(param.shape, (1, rows), dtype=grad.dtype).copy_(grad)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + (self.one.view(-1) + self.other.view(-1)) + self.expanded.sum() / 8
        x = x + (self.turned * self.turned + self.turned).sum(0) + self.rows(torch.tensor([1, 3, 3])).mean(0)
        return x + self.last(torch.tanh(x))
