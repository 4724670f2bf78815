"""Train the small network of PyTorch's tutorial on CIFAR-10, and tell its accuracy in all and per class.

    shardline run --nproc 2 examples/cifar10/train.py    # or torchrun, or a world of one: python examples/cifar10/train.py

The network is so small that a step's own cost outweighs its arithmetic: an example of the calls, not of speed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import CIFAR10, CLASSES, Images, Unavailable, collate, load, normalize
from model import Net
from torch import Tensor
from tqdm import tqdm

import shardline


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train the small network of PyTorch's tutorial on CIFAR-10.")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the 50,000 training images")
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="bf16", help="compute dtype")
    parser.add_argument("--stage", type=int, choices=range(4), default=0, help="ZeRO stage")
    parser.add_argument("--log-interval", type=int, default=500, help="steps between two lines with the running loss")
    parser.add_argument("--data", type=Path, help="folder of the official archive, binary or Python; else downloaded")
    return parser.parse_args()


def configure(args: argparse.Namespace) -> dict[str, Any]:
    """Read the config file and lay the command line over it."""
    config: dict[str, Any] = json.loads(Path(__file__).with_name("config.json").read_text())
    config |= {dtype: {"enabled": dtype == args.dtype} for dtype in ("bf16", "fp16")}
    return config | {"zero_optimization": {"stage": args.stage}}
