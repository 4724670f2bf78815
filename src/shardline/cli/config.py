"""``shardline config check|explain|schema``: a configuration's verdict, its resolved tree, its JSON Schema."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from shardline.cli.values import positive
from shardline.config import Config, load_config
from shardline.config.deepspeed import TRAINERS
from shardline.config.explain import explain, ineffective
from shardline.config.json_schema import json_schema
from shardline.errors import ShardlineError, UsageError

__all__ = ["add_parser"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``config``; the chosen command is ``args.func(args)``, which returns the exit code."""
    parser = subparsers.add_parser("config", help="check or explain a configuration, or print its JSON Schema")
    commands = parser.add_subparsers(dest="config_command", required=True, metavar="{check,explain,schema}")
    for name, func, text in (
        ("check", _check, "say whether a configuration can be used, and everything that is wrong with it"),
        ("explain", _explain, "print every value and where it came from"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("file", metavar="FILE", help="a JSON file")
        command.add_argument(
            "--world-size", type=positive, default=1, metavar="N", help="number of ranks the batch is for (default 1)"
        )
        command.add_argument(
            "--filled-by",
            choices=sorted(TRAINERS),
            help='put stand-ins for each "auto" that this trainer fills in from its own arguments',
        )
        command.set_defaults(func=_guarded(func))
    text = "print the JSON Schema of configuration files, for editors"
    command = commands.add_parser("schema", help=text, description=text)
    command.add_argument("file", metavar="FILE", nargs="?", help="write it to this file instead")
    command.set_defaults(func=_schema)


def _guarded(command: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        try:
            command(args)
        except ShardlineError as error:
            print(error, file=sys.stderr)
            return 1
        return 0

    return run


def _check(args: argparse.Namespace) -> None:
    config = load_config(Path(args.file), args.world_size, filled_by=args.filled_by)
    _try_classes(config)
    print(
        f"{args.file} can be used on a world of {args.world_size}: train_batch_size {config.train_batch_size} = "
        f"micro {config.train_micro_batch_size_per_gpu} x accumulation {config.gradient_accumulation_steps} x world "
        f"{args.world_size}"
    )
    for line in ineffective(config):
        print(f"no effect: {line}")


def _explain(args: argparse.Namespace) -> None:
    print(explain(load_config(Path(args.file), args.world_size, filled_by=args.filled_by)))


def _schema(args: argparse.Namespace) -> int:
    text = json.dumps(json_schema(), indent=2)
    if args.file is None:
        print(text)
    else:
        try:
            Path(args.file).write_text(text + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise UsageError(f"Cannot write {args.file}: {getattr(error, 'strerror', None) or error}.") from None
    return 0


def _try_classes(config: Config) -> None:
    """Build the optimizer and the scheduler over one number: their classes check their arguments."""
    if config.optimizer is None and config.scheduler is None:
        return
    import torch  # the other commands answer without it

    from shardline import optim as optimizer
    from shardline.optim import lr

    parameters: list[dict[str, object]] = [{"params": [torch.zeros(1, requires_grad=True)]}]
    if config.optimizer is None:
        built: torch.optim.Optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    else:
        built = optimizer.build(config.optimizer.type, config.optimizer.params, parameters)
    if config.scheduler is not None:
        lr.build(config.scheduler.type, built, config.scheduler.params)
