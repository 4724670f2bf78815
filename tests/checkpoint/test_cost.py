"""What a checkpoint costs, as a promise: no byte twice, and no more memory at load than the rank's own share."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

import shardline
from shardline.checkpoint.format.reader import CheckpointReader

WIDTH = 1024


def big(settings):
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8)))
    return shardline.initialize(model=model, config=settings)[0]


def anonymous():
    """Bytes of this process that are not files: mapped files would count as the page cache."""
    rows = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["RssAnon"].split()[0]) * 1024


def save_big(path, settings):
    built = big(settings)
    built.backward(built(torch.randn(4, WIDTH, dtype=built.precision.compute)).float().square().mean())
    built.step()
    built.save_checkpoint(path)
    built.destroy()


def peak_of_load(path, settings):
    """How far memory rises above the engine's own state while it loads."""
    built = big(settings)
    built.load_checkpoint(path)  # the optimizer's state is there now, as is everything that a first load imports
    before, peak, fill = anonymous(), [0], CheckpointReader.fill

    def watched(self, *args, **kwargs):
        result = fill(self, *args, **kwargs)
        peak[0] = max(peak[0], anonymous())
        return result

    CheckpointReader.fill = watched
    try:
        built.load_checkpoint(path)
    finally:
        CheckpointReader.fill = fill
    built.destroy()
    return peak[0] - before


def config(stage, dtype=None):
    extra = {dtype: {"enabled": True}} if dtype else {}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage},
    } | extra


def test_bytes_and_memory(ranks, tmp_path):
    numel = 8 * (WIDTH * WIDTH + WIDTH)
    for stage, dtype in ((0, None), (3, "bf16")):
        path = str(tmp_path / str(stage))
        ranks(save_big, 2, path, config(stage, dtype))
        size = sum(os.path.getsize(Path(root) / name) for root, _, names in os.walk(path) for name in names)
        assert numel * 12 <= size <= numel * 12 * 1.01
    share = numel * 8 // 2  # the moments of a rank, of which a second load makes new ones
    largest = WIDTH * WIDTH * 4
    for rise in ranks(peak_of_load, 2, str(tmp_path / "3"), config(3, "bf16")):
        assert rise <= share + largest
