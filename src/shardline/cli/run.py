"""``shardline run``: start a training script on the processes of this node."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["add_parser"]

_UNDERSTOOD = {
    "--nproc": ("--nproc-per-node", "--num-gpus"),
    "--nnodes": ("--num-nodes",),
}
"""Options of torchrun and of DeepSpeed's launcher that mean what ours mean. All may be spelt with underscores."""

_ANSWERED = {
    "start this command on every node, with --nnodes N --node-rank R --master HOST, or the script by srun": (
        *("--launcher", "--launcher-args", "--ssh-port"),
    ),
    "--master HOST:PORT says where the nodes meet, and one node needs nothing": (
        *("--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--rdzv-conf", "--standalone"),
    ),
    "--log-dir DIR writes the output of each rank to files": ("--redirects", "-r", "--tee", "-t"),
    "SCRIPT is a Python file, or a module after -m": ("--no-python",),
}
"""Options of the same two that mean nothing here, by what to do instead."""

_DEEPSPEEDS: dict[str, tuple[tuple[str, ...], type | None, str]] = {
    "include": (("--include", "-i"), str, "CUDA_VISIBLE_DEVICES chooses the devices of a node, --nproc how many"),
    "exclude": (("--exclude", "-e"), str, "CUDA_VISIBLE_DEVICES chooses the devices of a node, --nproc how many"),
    "hostfile": (
        ("--hostfile", "-H"),
        Path,
        "start this command on every node, with --nnodes N --node-rank R --master HOST, or the script by srun",
    ),
    "no_ssh": (("--no-ssh",), None, "this command starts processes on its own node alone"),
    "no_local_rank": (("--no-local-rank",), None, "scripts get no --local_rank, but LOCAL_RANK in the environment"),
    "bind_cores": (("--bind-cores-to-rank",), None, "ranks are not bound; each gets its share of threads"),
    "core_list": (("--bind-core-list",), str, "taskset chooses the cores of this command and its ranks"),
}
"""Options of DeepSpeed's launcher that --as-deepspeed takes: names, kind of value, and what to do without it."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "run",
        help="start a script on several processes",
        usage="shardline run [options] SCRIPT [ARGS ...]\n       shardline run [options] -m MODULE [ARGS ...]",
        description="Start a script on several processes. Rank 0 writes to the terminal, lines of the other ranks are "
        "prefixed. If a rank fails, the others are ended and the first failing rank's traceback is printed last; its "
        "exit code is the command's.",
        allow_abbrev=False,
    )

    def option(name: str, **keywords: Any) -> None:
        action = parser.add_argument(name, **keywords)
        others = _spellings(name, *_UNDERSTOOD.get(name, ())) - {name}
        if others:
            parser.add_argument(*sorted(others), dest=action.dest, **(keywords | {"help": argparse.SUPPRESS}))

    option(
        "--nproc",
        type=_nproc,
        metavar="N|auto",
        help="processes on this node; auto (default): one per accelerator, else 1",
    )
    option(
        "--device",
        metavar="cpu|cuda|...",
        help="what they compute on (default: the accelerator, if any); else SHARDLINE_DEVICE in the environment",
    )
    _add_nodes(option)
    option("--log-dir", type=Path, metavar="DIR", help="write each rank's output to files in DIR")
    option("--max-restarts", type=int, default=0, metavar="N", help="start again after a failure, N times")
    option(
        "--grace",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="from a SIGTERM or SIGUSR1 until ranks are killed; a step and a save must fit in (default 600; Ctrl-C: 5)",
    )
    parser.add_argument(
        "--as-deepspeed",
        "--as_deepspeed",
        action="store_true",
        help="run a script written for DeepSpeed: `import deepspeed` finds Shardline, and the options of DeepSpeed's "
        "launcher are understood",
    )
    _add_foreign(parser)
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    parser.set_defaults(func=_main, error=parser.error, deepspeeds={})


def _add_nodes(option: Callable[..., None]) -> None:
    """Options of a job on several nodes."""
    option(
        "--nnodes",
        type=_nnodes,
        default=(1, None),
        metavar="N|MIN:MAX",
        help="number of nodes (default 1); with MIN:MAX nodes may come and go, which needs a secret",
    )
    option("--node-rank", type=int, default=0, metavar="R", help="number of this node, from 0")
    option("--master", metavar="HOST[:PORT]", help="address of node 0; needed with several nodes")
    option("--master-addr", metavar="HOST", help=argparse.SUPPRESS)
    option("--master-port", type=int, metavar="PORT", help=argparse.SUPPRESS)
    option(
        "--join-timeout", type=float, default=900.0, metavar="S", help="seconds to wait for other nodes (default 900)"
    )
    option(
        "--secret-file",
        type=Path,
        metavar="FILE",
        help="the job's secret, the same on all nodes; else SHARDLINE_SECRET in the environment",
    )


def _add_foreign(parser: argparse.ArgumentParser) -> None:
    """Options of other launchers, which are answered, or understood with ``--as-deepspeed``."""
    for answer, names in _ANSWERED.items():
        hidden: dict[str, Any] = {"nargs": "?", "dest": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument(*sorted(_spellings(*names)), action=_Answer, const=answer, **hidden)
    for dest, (names, kind, _) in _DEEPSPEEDS.items():
        value: dict[str, Any] = {"nargs": 0, "const": True} if kind is None else {"type": kind}
        parser.add_argument(
            *sorted(_spellings(*names)), dest=dest, action=_DeepSpeeds, default=None, help=argparse.SUPPRESS, **value
        )


def _spellings(*names: str) -> set[str]:
    """The names, and those of several letters with underscores."""
    return {*names, *(f"--{name[2:].replace('-', '_')}" for name in names if name.startswith("--"))}


class _Answer(argparse.Action):
    """Refuses an option by saying what to do instead."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        parser.error(f"there is no {option_string} here: {self.const}")


class _DeepSpeeds(argparse.Action):
    """Keeps an option that is understood only with ``--as-deepspeed``, which may come behind it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)
        namespace.deepspeeds = {**namespace.deepspeeds, self.dest: option_string}


def _nproc(text: str) -> int | None:
    if text in ("auto", "gpu"):  # torchrun's word
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def _nnodes(text: str) -> tuple[int, int | None]:
    least, colon, most = text.partition(":")
    try:
        return int(least), int(most) if colon else None
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor MIN:MAX") from None


def _master(parsed: argparse.Namespace) -> str | None:
    """``--master``, or torchrun's two options for it."""
    host, port = parsed.master_addr, parsed.master_port
    if host is None and port is not None and parsed.nnodes == (1, None):
        host = "127.0.0.1"
    if parsed.master is not None or host is None:
        return parsed.master  # type: ignore[no-any-return]
    if ":" in host:
        host = f"[{host}]"
    return host if port is None else f"{host}:{port}"


def _main(parsed: argparse.Namespace) -> int:
    if parsed.deepspeeds and not parsed.as_deepspeed:
        dest, option = next(iter(parsed.deepspeeds.items()))
        parsed.error(f"there is no {option} here: {_DEEPSPEEDS[dest][2]}; or give --as-deepspeed")
    from shardline.launch import run  # torch takes seconds to import: not for --help

    nnodes, max_nnodes = parsed.nnodes
    job = run.Launch(
        parsed.script,
        tuple(parsed.arguments),
        module=parsed.module,
        nproc=parsed.nproc,
        device=parsed.device,
        nnodes=nnodes,
        max_nnodes=max_nnodes,
        node_rank=parsed.node_rank,
        master=_master(parsed),
        join_timeout=parsed.join_timeout,
        secret_file=parsed.secret_file,
        log_dir=parsed.log_dir,
        max_restarts=parsed.max_restarts,
        grace=parsed.grace,
    )
    if parsed.as_deepspeed:
        from shardline.compat.deepspeed.launching import LauncherOptions, adapt

        given = {name: getattr(parsed, name) for name in _DEEPSPEEDS if getattr(parsed, name) is not None}
        job = adapt(job, LauncherOptions(**given))
    return run.launch(job)
