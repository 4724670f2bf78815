"""Transitions over shared memory: the bits of gloo's, no rank that hangs, no buffer that changes under a reader."""

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

from shardline.buffer import Pool
from shardline.comm import Comm
from shardline.comm import shared as shared_module
from shardline.comm.arena import Arena, Peer
from shardline.comm.shared import SharedMemory, SharedTransport, attach
from shardline.errors import DisagreementError, LostRankError, UsageError
from tests.comm.sharing import exchange, leave, memory_here

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory is for Linux")


@pytest.fixture(autouse=True)
def shared_memory_is_wanted(request):
    if request.config.getoption("--transport") == "gloo":
        pytest.skip("this session is for gloo")


CPU = torch.device("cpu")
LARGE = 1 << 15  # fp32 elements; enough for the arena


# --- chosen or not ----------------------------------------------------------------------------------------------------


def kinds(transports):
    comm = Comm(dist.group.WORLD, CPU, transport=transports[dist.get_rank()])
    assert comm.channel()._memory is None, "what another thread may use"
    found = type(comm._transports[0]).__name__, type(comm._transports[1]).__name__
    comm.close()
    return found


@pytest.mark.parametrize(
    ("transports", "kind"),
    [
        (("auto", "auto"), "SharedTransport"),
        (("gloo", "gloo"), "ExchangeTransport"),
        (("auto", "gloo"), "ExchangeTransport"),
        (("gloo", "auto"), "ExchangeTransport"),
    ],
)
def test_which_transport(ranks, transports, kind) -> None:
    assert ranks(kinds, 2, transports) == [(kind, kind)] * 2


def attach_with(trouble):
    """Rank 1 has some trouble."""
    mine = dist.get_rank() == 1
    with pytest.MonkeyPatch.context() as patch:
        if mine and trouble == "no memory":
            patch.setattr(os, "posix_fallocate", no_space)
        if mine and trouble == "another architecture":
            patch.setattr(shared_module.platform, "machine", lambda: "aarch64")
        if mine and trouble == "another host":
            patch.setattr(shared_module, "_host", lambda: ["elsewhere", 1])
        if mine and trouble == "forbidden":
            patch.setattr(shared_module, "Peer", forbidden)
        wanted = not (mine and trouble == "unwanted")
        memory = attach(dist.get_rank(), 2, exchange, timedelta(seconds=9), wanted=wanted)
    found = memory is None, shared_memory_here()
    if memory is not None:
        leave(memory)
    return found


def no_space(*_):
    raise OSError(28, "No space left on device")


def forbidden(*_):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("trouble", ["no memory", "another architecture", "another host", "forbidden", "unwanted"])
def test_all_ranks_do_without_if_one_cannot(ranks, trouble) -> None:
    assert ranks(attach_with, 2, trouble) == [(True, (0, 0))] * 2


def shared_memory_here():
    """(file descriptors, mappings) of shared memory that this process has."""
    gc.collect()
    files = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            files.append(os.readlink(f"/proc/self/fd/{entry}"))
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum("memfd:shardline" in name for name in files), sum("memfd:shardline" in line for line in maps)


# --- bits -------------------------------------------------------------------------------------------------------------


def both_transports(numel, dtype, out_dtype, add, share):
    found = []
    for transport in ("auto", "gloo"):
        comm = Comm(dist.group.WORLD, CPU, transport=transport)
        pool, rank, size = Pool(CPU, comm), comm.rank, comm.world_size
        boundaries = [numel * part // size // 64 * 64 for part in range(size)] + [numel]
        low, high = boundaries[rank], boundaries[rank + 1]
        make = comm.empty if share else lambda numel, dtype: torch.empty(numel, dtype=dtype)
        source = make(numel, dtype).copy_(torch.randn(numel, generator=torch.Generator().manual_seed(rank)))
        out = make(high - low, out_dtype).fill_(0.3)
        comm.reduce(0, source, boundaries, out, add=add, scratch=pool).wait()
        own, whole = make(high - low, out_dtype).copy_(out), make(numel, out_dtype)
        comm.gather(0, whole, boundaries, own=own).wait()
        in_place = make(numel, out_dtype)
        in_place[low:high].copy_(out)
        comm.gather(0, in_place, boundaries).wait()
        row = comm.rows(out[:8].double())
        found.append([each.clone() for each in (out, whole, in_place, row)])
        if not add and dtype is out_dtype:  # the sum may take the place of this rank's term
            comm.reduce(0, source, boundaries, source[low:high], add=False, scratch=pool).wait()
            found[-1].append(source[low:high].clone())
        comm.close()
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True)), found[0][1]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_the_bits_are_those_of_gloo(ranks, dtype, out_dtype, add, share) -> None:
    for world, numel in ((2, 2 * LARGE), (3, 7 * LARGE + 64)):
        results = ranks(both_transports, world, numel, dtype, out_dtype, add, share)
        assert all(same and torch.equal(whole, results[0][1]) for same, whole in results)


# --- nobody waits for ever --------------------------------------------------------------------------------------------


def rank_0_is_late(others):
    """Rank 1 starts a gather alone, and then waits for something else; rank 0 cannot go on before it is carried out."""
    comm, pool = Comm(dist.group.WORLD, CPU), Pool(CPU)
    buffer, out = comm.empty(2 * LARGE, torch.float32).fill_(comm.rank), torch.zeros(LARGE)

    def reduce():
        ones = comm.empty(2 * LARGE, torch.float32).fill_(1.0)
        return comm.reduce(0, ones, [0, LARGE, 2 * LARGE], out, add=False, scratch=pool)

    def other():
        return {
            "reduce": lambda: reduce().wait(),
            "rows": lambda: comm.rows(torch.zeros(8)),
            "values": lambda: comm.exchange(comm.rank),
            "broadcast": lambda: comm.broadcast([torch.zeros(4)]),
            "pool": lambda: comm.settle(),
        }[others]()

    if comm.rank:
        work = comm.gather(0, buffer, [0, LARGE, 2 * LARGE])
        other()
        work.wait()
    else:
        time.sleep(0.2)
        comm.gather(0, buffer, [0, LARGE, 2 * LARGE]).wait()  # in place: it ends when rank 1 has read
        other()
    comm.close()
    return buffer[::LARGE].tolist()


@pytest.mark.parametrize("others", ["reduce", "rows", "values", "broadcast", "pool"])
def test_whoever_waits_does_what_others_wait_for(ranks, others) -> None:
    assert ranks(rank_0_is_late, 2, others, timeout=20) == [[0.0, 1.0]] * 2


def two_engines():
    """Rank 1 starts a gather of one engine and then waits in another one."""
    one, other = Comm(dist.group.WORLD, CPU), Comm(dist.group.WORLD, CPU)
    buffer = one.empty(2 * LARGE, torch.float32).fill_(one.rank)
    if one.rank:
        work = one.gather(0, buffer, [0, LARGE, 2 * LARGE])
        other.rows(torch.zeros(8))
        work.wait()
    else:
        time.sleep(0.2)
        one.gather(0, buffer, [0, LARGE, 2 * LARGE]).wait()
        other.rows(torch.zeros(8))
    one.close()
    other.close()
    return buffer[::LARGE].tolist()


def test_engines_of_one_process_do_not_wait_for_each_other(ranks) -> None:
    assert ranks(two_engines, 2, timeout=20) == [[0.0, 1.0]] * 2


def waits_too_late():
    memory = memory_here()
    work = memory.transports[0].gather(torch.zeros(64), torch.zeros(128), [0, 64, 128])
    dist.barrier()
    memory.close()
    try:
        work.wait()
        return None
    except UsageError as error:
        return str(error)


def test_a_wait_after_the_end_is_an_error(ranks) -> None:
    for said in ranks(waits_too_late, 2):
        assert "destroyed" in said


def more_than_the_ring_holds(count):
    memory = memory_here()
    rank, transport = memory.rank, memory.transports[0]
    buffers = [torch.full((2,), float(rank * count + turn)) for turn in range(count)]
    works = [transport.gather(each[rank : rank + 1], each, [0, 1, 2]) for each in buffers]
    for work in works:
        work.wait()
    copies = len(memory._copies)
    leave(memory)
    return torch.stack(buffers), copies


def test_more_at_once_than_the_ring_holds(ranks) -> None:
    count = 2500
    expected = torch.stack([torch.arange(float(count)), torch.arange(float(count)) + count], dim=1)
    for found, copies in ranks(more_than_the_ring_holds, 2, count):
        assert torch.equal(found, expected) and copies <= shared_module._COPIES


def differ():
    memory = memory_here()
    numel = 64 * (1 + memory.rank)
    try:
        memory.transports[0].gather(torch.zeros(numel // 2), torch.zeros(numel), [0, numel // 2, numel]).wait()
        return None
    except DisagreementError as error:
        return str(error)
    finally:
        leave(memory)


def test_ranks_that_gather_different_things_are_told(ranks) -> None:
    first, second = ranks(differ, 2)
    assert "rank 1 sends 256 bytes where rank 0 expects 128" in first
    assert "rank 0 sends 128 bytes where rank 1 expects 256" in second


OTHER = f"""
import time
from shardline.comm.arena import Arena
arena = Arena(1 << 20, {shared_module._HEADER})
print(arena.fd, arena.token, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("fate", ["dies", "does not come", "reads nothing"])
def test_a_peer_that_is_lost_is_named(fate) -> None:
    process = subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        fd, token = map(int, process.stdout.readline().split())
        peer = Peer(1, process.pid, fd, 1 << 20, shared_module._HEADER, token)
        arena = Arena(1 << 20, shared_module._HEADER)
        memory = SharedMemory(0, arena, [peer], timedelta(seconds=60 if fate == "dies" else 0.3))
        buffer = memory.empty(2 * LARGE, torch.float32)
        work = memory.transports[0].gather(buffer[:LARGE], buffer, [0, LARGE, 2 * LARGE])
        if fate == "dies":
            process.send_signal(signal.SIGKILL)
            with pytest.raises(LostRankError, match=rf"rank 1 \(process {process.pid}\) ended"):
                work.wait()
            memory.close()
            return
        with pytest.raises(LostRankError, match=r"waited 0\.3 s for rank 1, which runs but does not come"):
            work.wait()
        memory.settle(patience=0.1)  # nothing was carried out
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
assert type(engine.comm._transports[0]).__name__ == "SharedTransport"
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
        timeout=100,
    )
    assert done.returncode != 0 and done.stdout.count("ready") == 2
    assert set(os.listdir("/dev/shm")) <= before


# --- nothing changes under a reader -----------------------------------------------------------------------------------


def pool_lends_again():
    """Rank 0 is through with a reduction whose buffer rank 1 has not read; then it takes a buffer again."""
    comm = Comm(dist.group.WORLD, CPU)
    pool, out = Pool(CPU, comm), torch.zeros(LARGE)
    source = pool.take(2 * LARGE, torch.float32).fill_(comm.rank + 1.0)
    address = source.data_ptr()
    if not comm.rank:
        time.sleep(0.2)  # so that rank 1 finds nothing to do when it starts
    work = comm.reduce(0, source, [0, LARGE, 2 * LARGE], out, add=False, scratch=pool)
    if comm.rank:
        time.sleep(0.4)
    work.wait()
    del work
    pool.give(source)
    del source
    again = pool.take(2 * LARGE, torch.float32).fill_(-1.0)
    same = again.data_ptr() == address
    dist.barrier()
    comm.close()
    return bool((out == 3).all()), same


def test_the_pool_lends_nothing_that_a_peer_reads_and_then_the_same_again(ranks) -> None:
    assert ranks(pool_lends_again, 2) == [(True, True)] * 2


def written_after(what):
    comm = Comm(dist.group.WORLD, CPU)
    buffer = comm.empty(2 * LARGE, torch.float32).fill_(comm.rank)
    own = comm.empty(LARGE, torch.float32).fill_(comm.rank)
    if not comm.rank:
        time.sleep(0.2)
    work = comm.gather(0, buffer, [0, LARGE, 2 * LARGE], own=None if what == "in place" else own)
    if comm.rank:
        time.sleep(0.4)
    work.wait()
    found = buffer.clone()
    if what == "settled":
        comm.settle()
    elif what == "row":
        comm.rows(torch.zeros(8))
    buffer.fill_(-1.0)
    if what != "freed":
        own.fill_(-1.0)
    del own
    gc.collect()
    dist.barrier()
    comm.close()
    return found[::LARGE].tolist(), found.sum().item()


@pytest.mark.parametrize("what", ["in place", "settled", "row", "freed"])
def test_what_was_announced_is_whole_until_all_have_read_it(ranks, what) -> None:
    assert ranks(written_after, 2, what) == [([0.0, 1.0], float(LARGE))] * 2


def small_memory():
    """More is asked for than there is: buffers come from elsewhere and travel as copies."""
    memory = memory_here()
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_space)
        kept.append(memory.empty(LARGE, torch.float32))
        lost = memory.arena.place(kept[0]) is None
        try:
            memory.transports[0].gather(kept[0], torch.zeros(2 * LARGE), [0, LARGE, 2 * LARGE])
            said = None
        except MemoryError as error:
            said = str(error)
    buffer = torch.zeros(2 * LARGE)
    memory.transports[0].gather(kept[0].fill_(memory.rank), buffer, [0, LARGE, 2 * LARGE]).wait()
    leave(memory)
    return lost, said, buffer[::LARGE].tolist()


def test_no_room_in_the_arena(ranks) -> None:
    for lost, said, found in ranks(small_memory, 2):
        assert lost and "communication_transport" in said and found == [0.0, 1.0]


# --- nothing is left --------------------------------------------------------------------------------------------------


def many(count):
    found = []
    for _ in range(count):
        memory = memory_here()
        buffer = memory.empty(2 * LARGE, torch.float32)
        own = buffer[memory.rank * LARGE :][:LARGE]
        memory.transports[0].gather(own, buffer, [0, LARGE, 2 * LARGE]).wait()
        leave(memory)
        del memory, buffer, own
        found.append(shared_memory_here())
    return found


def test_files_and_mappings_go(ranks) -> None:
    for found in ranks(many, 2, 50):
        assert set(found) == {(0, 0)}


def engines(count):
    import shardline

    found = []
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
        assert isinstance(engine.comm._transports[0], SharedTransport)
        engine.backward(engine(torch.ones(2, 256)).square().mean())
        engine.step()
        engine.destroy()
        del engine
        found.append(shared_memory_here())
        assert all(bool(torch.isfinite(param).all()) for param in model.parameters())
    return found


def test_engines_give_everything_back(ranks) -> None:
    for found in ranks(engines, 2, 8):
        assert set(found) == {(0, 0)}
