"""What goes wrong on one rank, the last one: scripts as people write them."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import shardline
from tests.models import Mlp, regression

QUIET = 0.5  # seconds


def config(stage, transport, **more):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
        "zero_optimization": {"stage": stage, "unit_min_numel": 1, "stage3_param_persistence_threshold": 0},
        "communication_transport": transport,
        "watchdog": {"quiet_seconds": QUIET, **more.pop("watchdog", {})},
        **more,
    }


def live_apart(*hosts):
    """Let ranks believe that they are on ``hosts``, one name for each rank, and see no page of another one's."""
    from shardline.watch import member, tables

    here = hosts[int(os.environ["RANK"])]
    member._machine = lambda: [here]
    member.socket = SimpleNamespace(gethostname=lambda: here)
    tables._BEAT = QUIET / 5


def train_apart(hosts, *args, **kwargs):
    live_apart(*hosts)
    train(*args, **kwargs)


def sleep_for_ever():
    while True:
        time.sleep(1.0)


def train(what, stage, transport, folder, timeout=6.0, steps=6, at=3):
    """Six steps; in the fourth one the last rank does ``what``."""
    shardline.init_distributed()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    settings = config(stage, transport, watchdog={"timeout_seconds": timeout}, checkpoint={"dir": folder})
    guilty = rank == world - 1
    if guilty and what == "other configuration":
        settings["gradient_clipping"] = 1.0
    engine, *_ = shardline.initialize(model=Mlp(), config=settings)
    print("initialized", flush=True)
    for step in range(steps):
        x, y = regression(4, seed=10 * step + rank)
        if guilty and step == at:
            if what == "endless loop":
                sleep_for_ever()
            elif what == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif what == "slow":
                time.sleep(5 * QUIET)
            elif what == "fewer batches":
                break
            elif what == "sys.exit(0)":
                raise SystemExit(0)
            elif what == "os._exit(0)":
                os._exit(0)
            elif what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "abort":
                os.abort()
            elif what == "exception":
                raise ValueError("the batch is bad")
            elif what == "save":
                engine.save_checkpoint(folder)
            elif what == "load":
                engine.load_checkpoint(folder)
            elif what == "state dict":
                engine.full_state_dict()
            elif what == "gathered":
                with engine.gathered_parameters():
                    pass
            elif what == "evaluation":
                engine.eval()
                with torch.no_grad():
                    engine(x)
                engine.train()
            elif what == "skipped batch":
                continue
            elif what == "frozen":
                next(engine.module.parameters()).requires_grad_(False)
            elif what == "no step":
                engine.backward(F.mse_loss(engine(x), y))
                continue
            elif what == "no backward":
                engine(x)
                engine.step()
                continue
        engine.backward(F.mse_loss(engine(x), y))
        engine.step()
    if guilty and what == "one more step":
        engine.backward(F.mse_loss(engine(x), y))
        engine.step()
    print(f"loop over after {engine.global_steps}", flush=True)
    engine.destroy()
    print("ended", flush=True)
