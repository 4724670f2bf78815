"""The loop of train.py under Ray Train, which makes the process group.

    python examples/jobs/ray_train.py --workers 2

Do not wrap the model with ``ray.train.torch.prepare_model``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

HERE = str(Path(__file__).parent)


def loop(options: dict[str, Any]) -> None:
    sys.path.insert(0, HERE)
    from train import train

    losses = train(options["stage"], options["steps"], options["folder"])
    rank = ray.train.get_context().get_world_rank()
    if options["out"]:
        (Path(options["out"]) / f"{rank}.json").write_text(json.dumps(losses))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", help="of checkpoints, which all workers share")
    parser.add_argument("--out", help="where each worker writes its losses")
    parser.add_argument("--storage", help="where Ray keeps what it knows of the run")
    args = parser.parse_args()
    options = {"stage": args.stage, "steps": args.steps, "folder": args.folder, "out": args.out}
    scaling = ScalingConfig(num_workers=args.workers, use_gpu=args.gpu)
    run = RunConfig(storage_path=args.storage) if args.storage else None
    TorchTrainer(loop, train_loop_config=options, scaling_config=scaling, run_config=run).fit()


if __name__ == "__main__":
    main()
