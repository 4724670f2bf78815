from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardline.errors import UsageError
from shardline.testing import Pool, RankFailed, RankTimeout, run_distributed


def total(value):
    tensor = torch.tensor([float(value + dist.get_rank())])
    dist.all_reduce(tensor)
    return tensor.item()


def who():
    return os.getpid(), os.environ["RANK"], torch.get_num_threads()


def start_method():
    return multiprocessing.get_start_method()


def variables(*names):
    return [os.environ.get(name) for name in names]


def raise_on(rank, then):
    if dist.get_rank() == rank:
        raise KeyError(f"from rank {rank}")
    if then == "wait":
        dist.barrier()
    time.sleep(0.1)
    raise ValueError("a later failure")


def die_on(rank, how):
    if dist.get_rank() == rank:
        os._exit(7) if how == "exit" else os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


def sleep_on(rank):
    if dist.get_rank() == rank:
        time.sleep(600)
    dist.barrier()


def leave(what):
    if what == "collective" and dist.get_rank() == 1:
        dist.all_reduce(torch.zeros(1), async_op=True)
    if what == "thread":
        threading.Thread(target=time.sleep, args=(600,), daemon=True, name="forgotten").start()
    if what == "thread that ends":
        threading.Thread(target=time.sleep, args=(0.3,), daemon=True).start()
    if what == "group":
        dist.destroy_process_group()
    if what == "hooks":
        torch.autograd.graph.saved_tensors_hooks(abs, abs).__enter__()


def start_sleeper():
    """A process that this rank forgets: it must end with the pool."""
    return subprocess.Popen(["sleep", "600"]).pid


def spoil():
    os.environ["SPOILED"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    return torch.rand(1).item()


def unspoilt():
    return os.environ.get("SPOILED"), os.getcwd(), torch.get_default_dtype()


def unpicklable():
    return lambda: None


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def pool():
    with Pool(2) as shared:
        yield shared


@pytest.fixture(autouse=True)
def warm(pool):
    """Before the watch over leaks looks for the first time: this file's pool is not a leak."""
    pool.start()


@pytest.fixture(autouse=True)
def nothing_left():
    """The suite's watch knows the session's pools only; the tests of this file look for leaks themselves."""


def test_one_call():
    before = set(threading.enumerate()), dict(os.environ)
    assert run_distributed(total, 2, 10) == [21.0, 21.0]
    assert (set(threading.enumerate()), dict(os.environ)) == before


def test_environment_reaches_the_ranks_only():
    with Pool(1, env={"SHARDLINE_TEST": "yes", "RANK": "0"}) as one:
        assert one.run(variables, "SHARDLINE_TEST", "WORLD_SIZE", "OMP_NUM_THREADS") == [["yes", "1", "1"]]
    assert "SHARDLINE_TEST" not in os.environ


def test_children_of_a_rank_start_as_elsewhere(pool):
    """Workers of a loader are forked where that is the default: not new interpreters that import torch."""
    assert pool.run(start_method) == [multiprocessing.get_start_method()] * 2


def test_processes_stay_warm_between_cases(pool):
    first = pool.run(who)
    assert pool.run(who) == first
    assert [pid for pid, _, _ in first] == pool.pids
    assert [(rank, threads) for _, rank, threads in first] == [("0", 1), ("1", 1)]


@pytest.mark.parametrize("then", ["wait", "fail later"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_failing_rank_is_the_one_reported(pool, rank, then):
    before = pool.pids
    with pytest.raises(RankFailed, match=f"Rank {rank} of 2 failed first") as caught:
        pool.run(raise_on, rank, then)
    assert 'in raise_on\n    raise KeyError(f"from rank {rank}")' in str(caught.value)
    assert "a later failure" not in str(caught.value)
    assert caught.value.rank == rank
    assert isinstance(caught.value.error, KeyError)
    assert not any(map(alive, before))
    assert pool.run(total, 0) == [1.0, 1.0]  # on new processes


@pytest.mark.parametrize(("how", "words"), [("exit", "exited with code 7"), ("crash", "was killed by SIGSEGV")])
def test_a_rank_that_dies(pool, how, words):
    with pytest.raises(RankFailed, match=f"Rank 1 of 2 {words}"):
        pool.run(die_on, 1, how)


def test_a_hang_ends_at_the_limit_and_says_where(pool):
    before = pool.pids
    with pytest.raises(RankTimeout, match=r"sleep_on took longer than 4 s on rank 0, 1 of 2") as caught:
        pool.run(sleep_on, 1, timeout=4)  # time to reach the barrier on a busy machine
    assert "in barrier" in str(caught.value)  # rank 0
    assert str(caught.value).count("in sleep_on") == 2
    assert not any(map(alive, before))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("collective", "out of step"),
        ("thread", "threads running: forgotten"),
        ("group", "destroyed the process group"),
        ("hooks", "left saved_tensors_hooks"),
    ],
)
def test_a_case_that_leaves_something_fails(pool, what, words):
    with pytest.raises(RankFailed, match=words):
        pool.run(leave, what)


def test_a_thread_that_ends_by_itself_is_not_left(pool):
    pool.run(leave, "thread that ends")


def test_nothing_survives_the_pool():
    with Pool(1) as one:
        (sleeper,) = one.run(start_sleeper)
        assert alive(sleeper)
    assert not alive(sleeper)
    assert one.pids == []


def test_cases_start_alike(pool):
    first = pool.run(spoil)
    assert pool.run(unspoilt) == [(None, os.getcwd(), torch.float32)] * 2
    assert pool.run(spoil) == first


def test_ranks_end_when_the_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from shardline.testing import Pool\n"
        "def wait(seconds):\n"
        "    time.sleep(seconds)\n"
        "if __name__ == '__main__':\n"
        "    pool = Pool(1)\n"
        "    pool.start()\n"
        "    print(*pool.pids, flush=True)\n"
        "    pool.run(wait, 600, timeout=600)\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert pids and not any(map(alive, pids))


def test_a_function_of_a_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch.distributed as dist\n"
        "from shardline.testing import run_distributed\n"
        "def rank(): return dist.get_rank()\n"
        "if __name__ == '__main__': print(run_distributed(rank, 2))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert (done.stdout, done.returncode) == ("[0, 1]\n", 0), done.stderr


def test_what_cannot_be_sent_is_said(pool):
    with pytest.raises(UsageError, match="top level of a module"):
        pool.run(lambda: None)
    with pytest.raises(RankFailed, match="pickle"):
        pool.run(unpicklable)


def test_world_size_must_be_positive():
    with pytest.raises(UsageError, match="at least 1"):
        run_distributed(total, 0, 1)
