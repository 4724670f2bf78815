"""A small character GPT: pre-norm transformer blocks in a ``ModuleList``; nothing in it knows of Shardline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(x: Tensor) -> Tensor:
    """Turn each half-pair of channels of ``[..., time, size]`` by an angle that grows with time.

    Rotary position embedding (Su et al. 2021, "RoFormer"): the product of a rotated query and a rotated key depends on
    their distance only. Its base is 1,000 instead of 10,000, as the context is short.
    """
    time, size = x.shape[-2:]
    frequencies = 1000.0 ** -torch.linspace(0, 1, size // 2, device=x.device)
    angles = torch.outer(torch.arange(time, device=x.device), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """One pre-norm transformer block: causal self-attention, then an MLP four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream ``[batch, time, width]`` to the same shape."""
        batch, time, width = x.shape
        # [batch, time, 3 * width] -> three of [batch, heads, time, width / heads]
        q, k, v = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class GPT(nn.Module):
    """A decoder-only transformer over ``vocabulary`` symbols that sees at most ``context`` of them."""

    def __init__(self, vocabulary: int, context: int, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # As in GPT-2, what is added to the residual stream starts smaller the more is added.
                added = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=(width * (2 * depth if added else 1)) ** -0.5)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the mean cross entropy of ``targets`` in nats, or without targets the logits.

        ``tokens`` and ``targets`` are ``[batch, time]`` int64 with ``time <= context``; the loss is an fp32 scalar, the
        logits are ``[batch, time, vocabulary]`` in the compute dtype.
        """
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, temperature: float = 0.6, seed: int = 0) -> Tensor:
        """Append ``count`` sampled symbols to ``tokens`` ``[batch, time]``: the same ones for the same seed."""
        generator = torch.Generator(tokens.device).manual_seed(seed)
        for _ in range(count):
            logits = self(tokens[:, -self.context :])[:, -1].float()
            sampled = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
            tokens = torch.cat([tokens, sampled], dim=1)
        return tokens
