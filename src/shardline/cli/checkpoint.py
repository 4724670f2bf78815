"""``shardline checkpoint list|inspect|verify|export|prune``: inspect and manage checkpoints, in one process.

Nothing here needs a GPU, and only ``export`` imports torch, for its dtypes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from shardline.cli.values import positive
from shardline.errors import CheckpointError, ShardlineError, text_of

if TYPE_CHECKING:
    from shardline.checkpoint.format.manifest import Manifest

__all__ = ["add_parser"]

Command = Callable[[argparse.Namespace], int]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``checkpoint``; the chosen command is ``args.func(args)``, which returns the exit code."""
    parser = subparsers.add_parser("checkpoint", help="list, inspect, verify, export or prune checkpoints")
    commands = parser.add_subparsers(required=True, metavar="{list,inspect,verify,export,prune,import-deepspeed}")

    def command(name: str, func: Command, text: str, *, tag: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.add_argument("dir", metavar="DIR", type=Path, help="a directory of checkpoints, or one checkpoint in it")
        if tag:
            made.add_argument("--tag", metavar="TAG", help="which checkpoint (default: the newest)")
        made.set_defaults(func=_guarded(func))
        return made

    command("list", _list, "list the checkpoints, the newest first", tag=False)
    inspect = command("inspect", _inspect, "show what a checkpoint holds")
    inspect.add_argument("--tensors", action="store_true", help="every parameter and buffer as well")
    verify = command("verify", _verify, "read every byte and compare the checksums; exit code 1 if any is wrong")
    verify.add_argument("--all", action="store_true", help="all checkpoints of the directory")
    export = command(
        "export", _export, "write the whole model as safetensors with an index, as Hugging Face lays it out"
    )
    export.add_argument("out", metavar="OUT", type=Path, help="directory to write to")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of floating weights (default: the masters')")
    export.add_argument("--max-shard-bytes", type=int, default=5_000_000_000, metavar="N", help="(default 5 GB)")
    text = "write a DeepSpeed checkpoint (stages 0 to 3) as one of Shardline's; its pickles may hold plain values only"
    imported = command("import-deepspeed", _import, text)
    imported.add_argument("out", metavar="OUT", type=Path, help="directory of checkpoints to write to")
    prune = command("prune", _prune, "delete all but the newest checkpoints", tag=False)
    prune.add_argument("--keep", type=positive, required=True, metavar="N", help="keep the N newest")


def _guarded(command: Command) -> Command:
    def run(args: argparse.Namespace) -> int:
        try:
            return command(args)
        except ShardlineError as error:
            _say(error, file=sys.stderr)
        except OSError as error:
            _say(f"{error.filename or args.dir}: {error.strerror or error}.", file=sys.stderr)
        return 1

    return run


def _say(text: object, file: TextIO | None = None) -> None:
    """Print a line. Names and values come from files: what would steer a terminal is escaped."""
    from shardline.errors import shown

    print(shown(text, 10_000), file=file)


def _chosen(args: argparse.Namespace) -> tuple[str, Path]:
    """The tag and the path of the checkpoint that the arguments name, or of the newest intact one."""
    from shardline.checkpoint.format.directory import Directory

    tag, path, passed_over = Directory(args.dir).choose(args.tag)
    for each in passed_over:
        _say(f"{path} is taken, and not a later one: {each}.", file=sys.stderr)
    return tag, path


def _size(manifest: Manifest) -> str:
    size = float(sum(entry.bytes for entry in manifest.files))
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _list(args: argparse.Namespace) -> int:
    from shardline.checkpoint.format.directory import Directory
    from shardline.checkpoint.format.manifest import read_manifest

    directory = Directory(args.dir)
    found = directory.checkpoints()
    if not found:
        _say(f"there is no checkpoint: {directory.lack()}")
        return 0
    first = next(iter(directory.order()), None)
    rows = [("", "tag", "step", "saved", "ranks", "stage", "size")]
    problems = []
    for each in found:
        star = "*" if each.tag == first else ""
        try:
            manifest = read_manifest(each.path)
        except CheckpointError:
            rows.append(("!", each.tag, "", "", "", "", ""))
        else:
            rows.append((
                "!" if each.problem else star,
                each.tag,
                str(manifest.counters.global_steps),
                manifest.created,
                str(manifest.world_size),
                str(manifest.stage),
                _size(manifest),
            ))  # fmt: skip
        if each.problem:
            problems.append(f"! {each.problem}")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\n* is what a load without a tag takes, if its checksums are right (see verify)")
    for problem in filter(None, [*problems, directory.complaint()]):
        _say(problem)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from shardline.checkpoint.format.manifest import read_manifest

    tag, path = _chosen(args)
    manifest = read_manifest(path)
    parameters, buffers = manifest.parameters, manifest.buffers
    trained = sum(entry.numel for entry in parameters.values() if entry.trainable)
    total = sum(entry.numel for entry in parameters.values())
    optimizer = manifest.optimizer
    _say(f"{path} (tag {tag}, format {manifest.format} {manifest.version}, id {manifest.id})")
    _say(f"  saved      {manifest.created} by shardline {manifest.shardline}, torch {manifest.torch}")
    _say(f"  layout     stage {manifest.stage} on {manifest.world_size} ranks, {len(manifest.files)} files, "
         f"{_size(manifest)}")  # fmt: skip
    _say(f"  counters   {', '.join(f'{name} {value}' for name, value in manifest.counters)}")
    _say(f"  parameters {len(parameters)} with {total:,} elements, {trained:,} trained; {len(buffers)} buffers")
    if optimizer is not None:
        keys = sorted({key for entry in parameters.values() for key in (*entry.state, *entry.scalars)})
        _say(f"  optimizer  {optimizer.kind}, {len(optimizer.groups)} param groups; state: {', '.join(keys)}")
    if manifest.scheduler is not None:
        _say(f"  scheduler  {manifest.scheduler}")
    if manifest.scaler is not None:
        _say(f"  scaler     {manifest.scaler.model_dump()}")
    if manifest.loader is not None:
        _say(f"  loader     {manifest.loader}")
    if manifest.extra_state:
        _say(f"  extra state of {', '.join(map(repr, manifest.extra_state))}")
    _say(f"  client_state has {', '.join(manifest.client_state) or 'nothing'}")
    if args.tensors:
        for name, entry in parameters.items():
            kind = "trained" if entry.trainable else "frozen"
            stored = entry.weight.dtype if entry.weight is not None else "left out"
            _say(f"    {name} {tuple(entry.shape)} {kind}, stored as {stored}")
        for name, buffer in buffers.items():
            _say(f"    {name} {tuple(buffer.shape)} buffer, {buffer.dtype}, from ranks {buffer.files}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from shardline.checkpoint.format.directory import Directory, check_files
    from shardline.checkpoint.format.manifest import read_manifest

    directory = Directory(args.dir)
    chosen = directory.candidates(args.tag)
    if args.all:
        chosen = iter([(each.tag, each.path, each.problem) for each in directory.checkpoints()])
    wrong = 0
    for tag, path, _ in chosen:
        try:
            manifest = read_manifest(path)
            problems = check_files(path, manifest, range(len(manifest.files)))
        except CheckpointError as error:
            problems = [text_of(error)]
        _say(f"{tag}: {'; '.join(problems) if problems else 'intact'}")
        wrong += bool(problems)
        if not problems and not args.all:
            break
    return 1 if wrong else 0


def _export(args: argparse.Namespace) -> int:
    from shardline.checkpoint.foreign.huggingface import export_checkpoint
    from shardline.checkpoint.format.directory import check_files
    from shardline.checkpoint.format.reader import CheckpointReader
    from shardline.sharding.precision import DTYPES

    _, path = _chosen(args)
    reader = CheckpointReader(path)
    problems = check_files(path, reader.manifest, range(len(reader.manifest.files)))
    if problems:
        raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}.")
    try:
        dtype = DTYPES[args.dtype] if args.dtype else None
        for file in export_checkpoint(reader, args.out, dtype, args.max_shard_bytes):
            _say(file)
    finally:
        reader.close()
    return 0


def _import(args: argparse.Namespace) -> int:
    from shardline.checkpoint.foreign.deepspeed import import_deepspeed

    _say(import_deepspeed(args.dir, args.out, args.tag))
    return 0


def _prune(args: argparse.Namespace) -> int:
    from shardline.checkpoint.format.directory import Directory
    from shardline.checkpoint.format.lock import Lock

    directory = Directory(args.dir)
    if not directory.checkpoints():
        raise CheckpointError(f"there is no checkpoint: {directory.lack()}.")
    lock = Lock.of(directory.path)
    for tag in directory.prune(args.keep):
        _say(f"deleted {tag}")
    left = directory.checkpoints()
    _say(f"kept {', '.join(each.tag for each in left if each.problem is None) or 'none'}")
    for each in left:
        if each.problem is not None:
            _say(f"left {each.tag}, which is not intact: {each.problem}")
    del lock
    return 0
