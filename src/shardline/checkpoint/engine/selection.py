"""Which checkpoint of a directory is loaded: all ranks choose and verify it together."""

from __future__ import annotations

from pathlib import Path

from shardline.checkpoint.format.commit import together
from shardline.checkpoint.format.directory import Directory, check_files
from shardline.checkpoint.format.manifest import Manifest, check_tag, read_manifest
from shardline.checkpoint.format.reader import CheckpointReader
from shardline.comm import Comm
from shardline.errors import CheckpointError, text_of

__all__ = ["select"]


def select(directory: Directory, tag: str | None, comm: Comm) -> tuple[CheckpointReader | None, list[str]]:
    """Open the checkpoint ``tag``, else the newest intact one. Collective; each rank reads a part of the files.

    Returns:
        The checkpoint, and why later ones were passed over; or ``None``, and why there is none to load.

    Raises:
        CheckpointError: if the one that ``tag`` names, or every one that there is, is damaged.
        UsageError: if ``tag`` cannot be a checkpoint's name.
    """
    if tag is not None:
        check_tag(tag)

    def look() -> tuple[list[str], str | None, str | None] | None:
        if comm.data.rank > 0 or tag is not None:
            return None if tag is None else ([tag], None, None)
        order = directory.order()
        return order, directory.complaint(), None if order else directory.lack()

    order, complaint, lack = together(comm.messages, f"looking for checkpoints in {directory.path}", look)[0]
    passed_over: list[str] = [] if complaint is None else [complaint]
    for each in order:
        opened = _verify(directory, each, comm)
        if isinstance(opened, CheckpointReader):
            return opened, passed_over
        passed_over.append(opened)
    if not order:
        return None, [str(lack), *passed_over]
    if tag is None:
        raise CheckpointError(f"no checkpoint in {directory.path} is intact: {'; '.join(passed_over)}.")
    raise CheckpointError(
        f"the checkpoint {directory.path / tag} cannot be loaded: {'; '.join(passed_over)}. There are: "
        f"{', '.join(directory.tags()) or 'none'}."
    )


def _verify(directory: Directory, tag: str, comm: Comm) -> CheckpointReader | str:
    """The checkpoint ``tag`` if all ranks find it intact, else what is wrong. Collective."""
    path, manifest, mine = _inspect(directory, tag, comm)
    everyone = comm.messages.exchange([None if manifest is None else manifest.id, mine])
    problems = [str(text) for _, theirs in everyone for text in theirs]
    if len({identity for identity, _ in everyone}) > 1 and not problems:
        problems = [f"{directory.path / tag} is not the same checkpoint on all ranks"]
    if not problems and manifest is not None and path is not None:
        return CheckpointReader(path, manifest)
    return "; ".join(dict.fromkeys(problems))


def _inspect(directory: Directory, tag: str, comm: Comm) -> tuple[Path | None, Manifest | None, list[str]]:
    """Where it is, its manifest, and what is wrong with it and with this rank's part of the files."""
    try:
        path = directory.locate(tag)
        if path is None:
            return None, None, [f"there is no {directory.path / tag}"]
        manifest = read_manifest(path)
    except (CheckpointError, OSError) as error:
        return None, None, [text_of(error).removesuffix(".")]
    return path, manifest, check_files(path, manifest, range(comm.data.rank, len(manifest.files), comm.data.size))
