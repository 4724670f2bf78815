"""Mixtures of experts: each token passes through the one or two experts that a gate chooses for it."""

from __future__ import annotations

from shardline.moe.layer import MoE

__all__ = ["MoE"]
