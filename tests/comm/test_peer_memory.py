"""Ranks that read each other's memory: gloo's bits, no rank that hangs, no buffer that changes under a reader."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardline.comm import Comm, Group, TransitionLog
from shardline.comm import control_page as page_module
from shardline.comm import peer_memory as memory_module
from shardline.comm.control_page import ControlPage, Peer
from shardline.comm.peer_memory import PeerMemoryTransport, Peers, attach
from shardline.comm.transport import AllToAllTransport
from shardline.errors import DisagreementError, LostRankError, UsageError
from shardline.sharding.buffer import BufferPool
from tests.comm.sharing import exchange, leave, peers_here

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reading each other is for Linux")


@pytest.fixture(autouse=True)
def reading_is_wanted(request):
    if request.config.getoption("--transport") == "gloo":
        pytest.skip("this session is for gloo")


CPU = torch.device("cpu")
LARGE = 1 << 18  # fp32 elements; more than is summed at a time


# --- chosen or not ----------------------------------------------------------------------------------------------------


def kinds(transports):
    comm = Comm(dist.group.WORLD, CPU, transport=transports[dist.get_rank()])
    assert type(comm.channel()._transport) is AllToAllTransport, "what another thread may use"
    found = type(comm.gathers).__name__, type(comm.reductions).__name__
    comm.close()
    return found


@pytest.mark.parametrize(
    ("transports", "kind"),
    [
        (("auto", "auto"), "PeerMemoryTransport"),
        (("gloo", "gloo"), "AllToAllTransport"),
        (("auto", "gloo"), "AllToAllTransport"),
        (("gloo", "auto"), "AllToAllTransport"),
    ],
)
def test_which_transport(ranks, transports, kind) -> None:
    assert ranks(kinds, 2, transports) == [(kind, kind)] * 2


def attach_with(trouble):
    """Rank 1 has some trouble. Whether there are no peers, and nothing is left of the attempt."""
    mine, before = dist.get_rank() == 1, pages_here()
    with pytest.MonkeyPatch.context() as patch:
        if mine and trouble == "no page":
            patch.setattr(os, "posix_fallocate", no_space)
        if mine and trouble == "another architecture":
            patch.setattr(memory_module.platform, "machine", lambda: "aarch64")
        if mine and trouble == "another host":
            patch.setattr(memory_module, "_host", lambda: ["elsewhere", 1])
        if mine and trouble == "forbidden":
            patch.setattr(page_module, "_libc", Forbidding)
        wanted = not (mine and trouble == "unwanted")
        peers = attach(Group.of(dist.group.WORLD), exchange, timedelta(seconds=9), TransitionLog(), wanted=wanted)
    found = peers is None, pages_here() == before
    if peers is not None:
        leave(peers)
    return found


def no_space(*_):
    raise OSError(28, "No space left on device")


class Forbidding:
    """A system that keeps processes from each other's memory."""

    prctl = process_vm_readv = staticmethod(lambda *_: -1)


@pytest.mark.parametrize("trouble", ["no page", "another architecture", "another host", "forbidden", "unwanted"])
def test_all_ranks_do_without_if_one_cannot(ranks, trouble) -> None:
    assert ranks(attach_with, 2, trouble) == [(True, True)] * 2


def pages_here():
    """(file descriptors, mappings) of control pages that this process has."""
    gc.collect()
    files = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            files.append(os.readlink(f"/proc/self/fd/{entry}"))
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum("memfd:shardline" in name for name in files), sum("memfd:shardline" in line for line in maps)


# --- bits -------------------------------------------------------------------------------------------------------------


def both_transports(numel, dtype, out_dtype, add):
    found = []
    for transport in ("auto", "gloo"):
        comm = Comm(dist.group.WORLD, CPU, transport=transport)
        pool, rank, size = BufferPool(CPU, comm.wait_for_readers), comm.data.rank, comm.data.size
        cuts = [numel * part // size // 64 * 64 for part in range(size)] + [numel]
        low, high = cuts[rank], cuts[rank + 1]
        source = torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(dtype)
        out = torch.full((high - low,), 0.3, dtype=out_dtype)
        comm.reductions.reduce(0, source, cuts, out, add=add, scratch=pool).wait()
        own, whole = out.clone(), torch.empty(numel, dtype=out_dtype)
        comm.gathers.gather(0, whole, cuts, own=own).wait()
        in_place = torch.empty(numel, dtype=out_dtype)
        in_place[low:high].copy_(out)
        comm.gathers.gather(0, in_place, cuts).wait()
        row = comm.all_gather_vector(out[:8].double())
        found.append([each.clone() for each in (out, whole, in_place, row)])
        if not add and dtype is out_dtype:  # the sum may take the place of this rank's term
            comm.reductions.reduce(0, source, cuts, source[low:high], add=False, scratch=pool).wait()
            found[-1].append(source[low:high].clone())
        comm.close()
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True)), found[0][1]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_the_bits_are_those_of_gloo(ranks, dtype, out_dtype, add) -> None:
    for world, numel in ((2, 2 * LARGE), (3, 7 * LARGE + 64)):
        results = ranks(both_transports, world, numel, dtype, out_dtype, add)
        assert all(same and torch.equal(whole, results[0][1]) for same, whole in results)


# --- no rank waits without end ----------------------------------------------------------------------------------------


def rank_0_is_late(others):
    """Rank 1 starts a gather alone, and then waits for something else; rank 0 cannot go on before it is carried out."""
    comm, pool = Comm(dist.group.WORLD, CPU), BufferPool(CPU)
    buffer, out = torch.full((2 * LARGE,), float(comm.data.rank)), torch.zeros(LARGE)

    def reduce():
        ones = torch.ones(2 * LARGE)
        return comm.reductions.reduce(0, ones, [0, LARGE, 2 * LARGE], out, add=False, scratch=pool)

    def other():
        return {
            "reduce": lambda: reduce().wait(),
            "rows": lambda: comm.all_gather_vector(torch.zeros(8)),
            "values": lambda: comm.messages.exchange(comm.data.rank),
            "broadcast": lambda: comm.messages.broadcast([torch.zeros(4)]),
            "pool": lambda: comm.wait_for_readers(),
        }[others]()

    if comm.data.rank:
        work = comm.gathers.gather(0, buffer, [0, LARGE, 2 * LARGE])
        other()
        work.wait()
    else:
        time.sleep(0.2)
        comm.gathers.gather(0, buffer, [0, LARGE, 2 * LARGE]).wait()  # in place: it ends when rank 1 has read
        other()
    comm.close()
    return buffer[::LARGE].tolist()


@pytest.mark.parametrize("others", ["reduce", "rows", "values", "broadcast", "pool"])
def test_whoever_waits_does_what_others_wait_for(ranks, others) -> None:
    assert ranks(rank_0_is_late, 2, others, timeout=20) == [[0.0, 1.0]] * 2


def two_engines():
    """Rank 1 starts a gather of one engine and then waits in another one."""
    one, other = Comm(dist.group.WORLD, CPU), Comm(dist.group.WORLD, CPU)
    buffer = torch.full((2 * LARGE,), float(one.data.rank))
    if one.data.rank:
        work = one.gathers.gather(0, buffer, [0, LARGE, 2 * LARGE])
        other.all_gather_vector(torch.zeros(8))
        work.wait()
    else:
        time.sleep(0.2)
        one.gathers.gather(0, buffer, [0, LARGE, 2 * LARGE]).wait()
        other.all_gather_vector(torch.zeros(8))
    one.close()
    other.close()
    return buffer[::LARGE].tolist()


def test_engines_of_one_process_do_not_wait_for_each_other(ranks) -> None:
    assert ranks(two_engines, 2, timeout=20) == [[0.0, 1.0]] * 2


def waits_too_late():
    peers = peers_here()
    work = peers.transports[0].gather(0, torch.zeros(128), [0, 64, 128], torch.zeros(64))
    dist.barrier()
    peers.close()
    try:
        work.wait()
        return None
    except UsageError as error:
        return str(error)


def test_a_wait_after_the_end_is_an_error(ranks) -> None:
    for said in ranks(waits_too_late, 2):
        assert "destroyed" in said


def more_than_the_ring_holds(count):
    peers = peers_here()
    rank, transport = peers.rank, peers.transports[0]
    buffers = [torch.full((2,), float(rank * count + turn)) for turn in range(count)]
    works = [transport.gather(0, each, [0, 1, 2]) for each in buffers]
    for work in works:
        work.wait()
    peers.wait_for_readers()
    kept = len(transport.kept)
    leave(peers)
    return torch.stack(buffers), kept


def test_more_at_once_than_the_ring_holds(ranks) -> None:
    count = 2500
    expected = torch.stack([torch.arange(float(count)), torch.arange(float(count)) + count], dim=1)
    for found, kept in ranks(more_than_the_ring_holds, 2, count):
        assert torch.equal(found, expected) and not kept


def differ():
    peers = peers_here()
    numel = 64 * (1 + peers.rank)
    try:
        peers.transports[0].gather(0, torch.zeros(numel), [0, numel // 2, numel], torch.zeros(numel // 2)).wait()
        return None
    except DisagreementError as error:
        return str(error)
    finally:
        leave(peers)


def test_ranks_that_gather_different_things_are_told(ranks) -> None:
    first, second = ranks(differ, 2)
    assert "rank 1 sends 256 bytes where rank 0 expects 128" in first
    assert "rank 0 sends 128 bytes where rank 1 expects 256" in second


OTHER = f"""
import time
from shardline.comm.control_page import ControlPage
page = ControlPage({memory_module._PAGE})
print(page.fd, page.size, page.counters[0], page.probe.data_ptr(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("fate", ["dies", "does not come", "reads nothing"])
def test_a_peer_that_is_lost_is_named(fate, monkeypatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        peer = Peer(1, process.pid, *map(int, process.stdout.readline().split()))
        peers = Peers(
            0,
            ControlPage(memory_module._PAGE),
            [peer],
            timedelta(seconds=60 if fate == "dies" else 0.3),
            TransitionLog(),
        )
        buffer = torch.zeros(2 * LARGE)
        work = peers.transports[0].gather(0, buffer, [0, LARGE, 2 * LARGE])
        if fate == "dies":
            process.send_signal(signal.SIGKILL)
            with pytest.raises(LostRankError, match=rf"rank 1 \(process {process.pid}\) ended"):
                work.wait()
            peers.close()
            return
        with pytest.raises(LostRankError, match=r"waited 0\.3 s for rank 1, which runs but does not come"):
            work.wait()
        peers.wait_for_readers(patience=0.1)  # nothing was carried out
    finally:
        process.kill()
        process.communicate()


KILLED = """
import os, signal
import torch
import shardline
rank = int(os.environ["RANK"])
model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
engine = shardline.initialize(model=model, config={
    "train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 3, "unit_min_numel": 1, "stage3_param_persistence_threshold": 0},
})[0]
assert type(engine.comm.gathers).__name__ == "PeerMemoryTransport"
print("ready", flush=True)
for step in range(10**6):
    engine.backward(engine(torch.randn(4, 256)).square().mean())
    if rank and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    engine.step()
"""


def test_a_rank_that_is_killed_in_training_takes_the_others_along_and_leaves_nothing(tmp_path) -> None:
    before = set(os.listdir("/dev/shm"))
    script = tmp_path / "job.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, "-m", "shardline.cli", "run", "--nproc", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode != 0 and done.stdout.count("ready") == 2
    assert set(os.listdir("/dev/shm")) <= before


# --- nothing changes under a reader -----------------------------------------------------------------------------------


def pool_lends_again():
    """Rank 0 is through with a reduction whose buffer rank 1 has not read; then it takes a buffer again."""
    comm = Comm(dist.group.WORLD, CPU)
    pool, out = BufferPool(CPU, comm.wait_for_readers), torch.zeros(LARGE)
    source = pool.borrow(2 * LARGE, torch.float32).fill_(comm.data.rank + 1.0)
    address = source.data_ptr()
    if not comm.data.rank:
        time.sleep(0.2)  # so that rank 1 finds nothing to do when it starts
    work = comm.reductions.reduce(0, source, [0, LARGE, 2 * LARGE], out, add=False, scratch=pool)
    if comm.data.rank:
        time.sleep(0.4)
    work.wait()
    del work
    pool.give_back(source)
    del source
    again = pool.borrow(2 * LARGE, torch.float32).fill_(-1.0)
    same = again.data_ptr() == address
    dist.barrier()
    comm.close()
    return bool((out == 3).all()), same


def test_the_pool_lends_nothing_that_a_peer_reads_and_then_the_same_again(ranks) -> None:
    assert ranks(pool_lends_again, 2) == [(True, True)] * 2


def written_after(what):
    comm = Comm(dist.group.WORLD, CPU)
    buffer = torch.full((2 * LARGE,), float(comm.data.rank))
    own = torch.full((LARGE,), float(comm.data.rank))
    if not comm.data.rank:
        time.sleep(0.2)
    work = comm.gathers.gather(0, buffer, [0, LARGE, 2 * LARGE], own=None if what == "in place" else own)
    if comm.data.rank:
        time.sleep(0.4)
    work.wait()
    found = buffer.clone()
    if what == "waited for":
        comm.wait_for_readers()
    elif what == "row":
        comm.all_gather_vector(torch.zeros(8))
    buffer.fill_(-1.0)
    if what != "freed":
        own.fill_(-1.0)
    del own
    gc.collect()
    dist.barrier()
    comm.close()
    return found[::LARGE].tolist(), found.sum().item()


@pytest.mark.parametrize("what", ["in place", "waited for", "row", "freed"])
def test_what_was_announced_is_whole_until_all_have_read_it(ranks, what) -> None:
    assert ranks(written_after, 2, what) == [([0.0, 1.0], float(LARGE))] * 2


def checked_before_a_write():
    comm = Comm(dist.group.WORLD, CPU)
    own, buffer, found = torch.zeros(LARGE), torch.zeros(2 * LARGE), []

    def check(*buffers):
        try:
            comm.check_unread(buffers)
            found.append("free")
        except AssertionError:
            found.append("read")

    if comm.data.rank:  # starts first, so that it has not read rank 0's part before its own wait
        work = comm.gathers.gather(0, buffer, [0, LARGE, 2 * LARGE], own=own)
        dist.barrier()
        dist.barrier()
        work.wait()
    else:
        dist.barrier()
        comm.gathers.gather(0, buffer, [0, LARGE, 2 * LARGE], own=own).wait()
        check(torch.zeros(8), own[-8:])
        check(torch.zeros(8), buffer)
        dist.barrier()
        comm.wait_for_readers()
        check(own)
    comm.close()
    return found


def test_a_write_to_what_a_peer_reads_is_noticed(ranks) -> None:
    assert ranks(checked_before_a_write, 2) == [["read", "free", "free"], []]


def leaves_early(patience):
    """Rank 1 announces a buffer, closes, and is busy with other things; rank 0 reads it later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_module, "_DRAIN_SECONDS", patience)
        peers = peers_here()
        buffer = torch.full((2 * LARGE,), float(peers.rank))
        work = peers.transports[0].gather(0, buffer, [0, LARGE, 2 * LARGE])
        if peers.rank:
            peers.close()
            del work, buffer
            others = [torch.full((2 * LARGE,), -1.0) for _ in range(4)]
            dist.barrier()
            return [0.0, len(others) - 3.0]
        if not patience:
            dist.barrier()
        time.sleep(0.3)
        peers.finish_started(lambda: False)
        if patience:
            dist.barrier()
        peers.close()
        return buffer[::LARGE].tolist()


@pytest.mark.parametrize("patience", [0.0, 30.0])
def test_who_leaves_keeps_what_others_have_yet_to_read(ranks, patience) -> None:
    assert ranks(leaves_early, 2, patience) == [[0.0, 1.0]] * 2


def forgotten():
    """Rank 1's engine is collected, not closed, before rank 0 has read what it announced; its memory is used again."""
    peers = peers_here()
    rank = peers.rank
    buffer = torch.full((2 * LARGE,), float(rank))
    cuts = [0, LARGE, 2 * LARGE]
    if rank:
        peers.transports[0].gather(0, buffer, cuts)
        dist.barrier()
        del peers, buffer
        gc.collect()
        others = [torch.full((2 * LARGE,), -1.0) for _ in range(8)]
        dist.barrier()
        dist.barrier()
        return len(others), 1.0
    dist.barrier()
    dist.barrier()
    peers.transports[0].gather(0, buffer, cuts)
    found = len(memory_module._UNREAD), buffer[LARGE:].mean().item()
    dist.barrier()
    memory_module._UNREAD.clear()
    return 8, found[1]


def test_an_engine_that_is_only_forgotten_keeps_what_others_have_yet_to_read(ranks) -> None:
    assert ranks(forgotten, 2) == [(8, 1.0)] * 2


def interrupted():
    """Something ends rank 0's sum in its second block."""
    peers = peers_here()
    out, work, blocks, read = torch.zeros(2 * LARGE), None, [], Peer.read

    def interrupt(peer, address, part):
        blocks.append(part)
        if peers.rank == 0 and len(blocks) == 2:
            raise KeyboardInterrupt
        read(peer, address, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Peer, "read", interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            peers.transports[1].reduce(0, torch.ones(4 * LARGE), [0, 2 * LARGE, 4 * LARGE], out, add=True, scratch=None)
        dist.barrier()
        with contextlib.suppress(KeyboardInterrupt):
            peers.transports[1].advance()
    said = ""
    try:
        work = peers.transports[1].reduce(0, out, [0, LARGE, 2 * LARGE], out[:LARGE], add=False, scratch=None)
    except UsageError as error:
        said = str(error)
    dist.barrier()
    peers.close()
    return work is None, said, out[0].item()


def test_what_was_interrupted_is_not_started_again(ranks) -> None:
    first, second = ranks(interrupted, 2)
    assert first[0] and "half-way by KeyboardInterrupt" in first[1] and first[2] == 2.0
    assert not second[0] and second[2] == 2.0


def elsewhere():
    """Tensors are made on another device unless one is given."""
    with torch.device("meta"):
        comm = Comm(dist.group.WORLD, CPU)
        source, out = torch.ones(2 * LARGE, device="cpu"), torch.zeros(LARGE, device="cpu")
        comm.reductions.reduce(0, source, [0, LARGE, 2 * LARGE], out, add=False, scratch=BufferPool(CPU)).wait()
        kind = type(comm.gathers).__name__
        comm.close()
    return kind, out.sum().item()


def test_the_default_device_does_not_matter(ranks) -> None:
    assert ranks(elsewhere, 2) == [("PeerMemoryTransport", 2.0 * LARGE)] * 2


EARLY = """
import os, time
import torch, torch.distributed as dist
from shardline.comm import Comm, Group, TransitionLog
dist.init_process_group("gloo")
comm, buffer = Comm(dist.group.WORLD, torch.device("cpu")), torch.full((1 << 20,), float(os.environ["RANK"]))
if comm.data.rank == 0:
    time.sleep(1.5)
work = comm.gathers.gather(0, buffer, [0, 1 << 19, 1 << 20])
if comm.data.rank == 0:
    work.wait()
    print("read", buffer[-1].item(), flush=True)
    dist.destroy_process_group()
"""


def test_a_process_ends_when_what_it_announced_was_read(tmp_path) -> None:
    script = tmp_path / "job.py"
    script.write_text(EARLY)
    command = [sys.executable, "-m", "shardline.cli", "run", "--nproc", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert "read 1.0" in done.stdout and not done.returncode, done.stderr


# --- nothing is left --------------------------------------------------------------------------------------------------


def many(count):
    found = [pages_here()]  # of other tests whose engine was not destroyed
    for _ in range(count):
        peers = peers_here()
        buffer = torch.zeros(2 * LARGE)
        peers.transports[0].gather(0, buffer, [0, LARGE, 2 * LARGE]).wait()
        leave(peers)
        del peers, buffer
        found.append(pages_here())
    return found


def test_files_and_mappings_go(ranks) -> None:
    for found in ranks(many, 2, 50):
        assert len(set(found)) == 1


def engines(count):
    import shardline

    found = [pages_here()]
    for turn in range(count):
        model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256))
        engine = shardline.initialize(
            model=model,
            config={
                "train_micro_batch_size_per_gpu": 2,
                "optimizer": {"type": "AdamW"},
                "zero_optimization": {"stage": turn % 4, "stage3_param_persistence_threshold": 0},
            },
        )[0]
        assert isinstance(engine.comm.gathers, PeerMemoryTransport)
        engine.backward(engine(torch.ones(2, 256)).square().mean())
        engine.step()
        engine.destroy()
        del engine
        found.append(pages_here())
        assert all(bool(torch.isfinite(param).all()) for param in model.parameters())
    return found


def test_engines_give_everything_back(ranks) -> None:
    for found in ranks(engines, 2, 8):
        assert len(set(found)) == 1
