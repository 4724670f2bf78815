from __future__ import annotations

import base64
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from shardline.errors import LaunchError
from shardline.launch import rendezvous
from shardline.launch.rendezvous import BACKEND, ChangingNodes, FixedNodes, Meeting, SignedBackend
from shardline.runtime import network, patience
from shardline.runtime.network import open_store
from shardline.runtime.process_group import init_distributed
from tests.sockets import descendants, free_port, listening
from tests.watch.documented import documented

LIMIT = 90
SECRET = b"a secret of enough letters"
ENVIRONMENT = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Takes away, and puts back, what the launcher may set."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


class Forged:
    """What runs where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture(scope="module")
def forge():
    """Writes a state of the rendezvous from another process, as any program that reaches the port may."""
    code = (
        "import sys, torch.distributed as dist\n"
        "for line in sys.stdin:\n"
        "    port, text = line.split()\n"
        "    store = dist.TCPStore('127.0.0.1', int(port), is_master=False, wait_for_workers=False)\n"
        f"    store.set('torch.rendezvous.{BACKEND}', text)\n"
        "    print('done', flush=True)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def write(port: int, payload: bytes) -> None:
            process.stdin.write(f"{port} {base64.b64encode(payload).decode()}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"

        yield write
        process.stdin.close()


def changing(port: int, secret: bytes = SECRET, seconds: float = 20) -> ChangingNodes:
    return ChangingNodes.at(Meeting("127.0.0.1", port, (1, 2), seconds=seconds, secret=secret))


# ------------------------------------------------------------------------------------------------ what listens where

WAITING = """
import os, sys, time
import torch, torch.distributed as dist
{join}
total = torch.ones(1)
dist.all_reduce(total)
dist.new_group()
assert total.item() == 2.0
folder = sys.argv[1]
with open(f"{{folder}}/new{{os.environ['RANK']}}", "w") as file:
    file.write(os.environ["GLOO_SOCKET_IFNAME"] + os.environ["NCCL_SOCKET_IFNAME"])
os.rename(file.name, f"{{folder}}/joined{{os.environ['RANK']}}")
while not os.path.exists(f"{{folder}}/end"):
    time.sleep(0.02)
"""


@pytest.mark.parametrize(
    "join",
    [
        "dist.init_process_group('gloo')",
        pytest.param("import shardline; shardline.init_distributed()", marks=pytest.mark.slow),
    ],
)
def test_one_host_listens_on_loopback_only(tmp_path, join):
    script = tmp_path / "script.py"
    script.write_text(WAITING.format(join=join))
    command = [sys.executable, "-m", "shardline", "run", "--nproc", "2", str(script), str(tmp_path)]
    with subprocess.Popen(command) as launcher:
        try:
            wait_for([tmp_path / "joined0", tmp_path / "joined1"], launcher)
            assert {file.read_text() for file in tmp_path.glob("joined*")} == {"lo=lo"}
            ranks = descendants(launcher.pid)
            assert len(ranks) == 2
            assert len(listening(launcher.pid)) == 1
            sockets = listening(launcher.pid, *ranks)
            assert len(sockets) > 1  # gloo's are among them
            assert {str(address) for address, _ in sockets} == {"127.0.0.1"}
        finally:
            (tmp_path / "end").touch()
            assert launcher.wait(LIMIT) == 0


def wait_for(files, *processes):
    deadline = time.monotonic() + LIMIT
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


def own_sockets():
    return sorted({str(address) for address, _ in listening()}), os.environ["GLOO_SOCKET_IFNAME"]


def test_ranks_of_tests_listen_on_loopback_only(ranks):
    assert ranks(own_sockets, 2) == [(["127.0.0.1"], "lo")] * 2


def test_a_single_process_listens_on_loopback_only(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    init_distributed("gloo")
    try:
        assert own_sockets() == (["127.0.0.1"], "lo")
    finally:
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------------- a fixed number of nodes


def meet(*handlers):
    """Each handler's answer, or its error, as if each were on a node."""
    answers: list[object] = [None] * len(handlers)

    def come(number):
        try:
            answers[number] = handlers[number]().next_rendezvous()
        except LaunchError as error:
            answers[number] = error

    threads = [threading.Thread(target=come, args=(number,)) for number in range(len(handlers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    return answers


def fixed(port, rank, count=2, seconds=20.0):
    return FixedNodes(Meeting("127.0.0.1", port, (count, count), rank, seconds))


def test_nodes_meet_and_each_attempt_has_a_store_of_its_own():
    port = free_port()
    nodes = [fixed(port, rank) for rank in range(2)]
    stores = set()
    for _ in range(2):
        first, second = meet(*(lambda node=node: node for node in nodes))
        assert (first.rank, first.world_size, second.rank, second.world_size) == (0, 2, 1, 2)
        where = first.bootstrap_store_info
        assert where == second.bootstrap_store_info
        assert where.master_addr == "127.0.0.1"
        stores.add(where.master_port)
        assert {(str(address), number) for address, number in listening()} == {
            ("127.0.0.1", port),
            ("127.0.0.1", where.master_port),
        }
    assert len(stores) == 2


def test_nodes_that_do_not_fit_say_so(monkeypatch, capsys):
    port = free_port()
    answers = meet(*(lambda rank=rank: fixed(port, rank, 4, seconds=1) for rank in (0, 2)))
    late = f"2 of 4 nodes are at 127.0.0.1:{port}: nodes 1, 3 did not come in 1 s (--join-timeout)."
    assert late in [answer.message for answer in answers], (
        answers
    )  # the other node may see no more than that this one gave up

    port = free_port()
    answers = meet(*(lambda rank=rank: fixed(port, rank, 3, seconds=1) for rank in (0, 1, 1)))
    assert "Two launchers at 127.0.0.1" in str(answers[1]) + str(answers[2]), answers

    port = free_port()
    answers = meet(lambda: fixed(port, 0, seconds=1), lambda: fixed(port, 1, count=3))
    assert "--nnodes is 3 here and '2' on node 0" in str(answers[1]), answers
    assert f"1 of 2 nodes is at 127.0.0.1:{port}: node 1 did not come" in str(answers[0]), answers

    monkeypatch.setattr(patience, "_WORD_SECONDS", 0.1)
    port = free_port()
    meet(*(lambda rank=rank: fixed(port, rank, 4, seconds=1) for rank in (0, 2)))
    assert re.search(documented("nodes are at"), capsys.readouterr().err)
    port = free_port()
    (answer,) = meet(lambda: fixed(port, 1, seconds=0.5))
    nobody = f"o launcher of node 0 answers at 127.0.0.1:{port} (Connection refused)"
    assert answer.message == f"N{nobody} in 0.5 s (--join-timeout)."
    said = capsys.readouterr().err.splitlines()
    assert len(said) > 1 and re.search(documented("no launcher of node 0"), said[0])
    for line in said:
        assert re.fullmatch(
            rf"shardline run: n{re.escape(nobody)} yet; waiting until \d\d:\d\d:\d\d \(--join-timeout\)\.", line
        ), line

    (answer,) = meet(lambda: FixedNodes(Meeting("absent.invalid", port, (2, 2), 1, 0.3)))
    assert "No launcher of node 0 answers at absent.invalid" in str(answer)


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "another program"])
def test_a_master_that_is_no_launcher(monkeypatch, says):
    monkeypatch.setattr(network, "_HANDSHAKE_SECONDS", 1.0)
    others = set(threading.enumerate())
    kept = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                connection, _ = server.accept()
                kept.append(connection)
                connection.sendall(says or b"")
                if done.is_set():
                    return

        done = threading.Event()
        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        (answer,) = meet(lambda: fixed(port, 1))
        done.set()
        socket.create_connection(("127.0.0.1", port)).close()
        thread.join(LIMIT)
    for connection in kept:
        connection.close()
    for thread in set(threading.enumerate()) - others:
        thread.join(LIMIT)
    assert answer.message == f"What answers at 127.0.0.1:{port} is not the launcher of node 0."


def test_what_no_launcher_wrote_is_an_error():
    port = free_port()
    node = fixed(port, 1)

    def meddle():
        store = open_store("127.0.0.1", port, rendezvous._STORE_TIMEOUT)
        for key, value in {"node 0": "1", "nodes": "2", "store of the ranks": "no address"}.items():
            store.set(f"attempt 1/{key}", value)
        meddle.store = store

    meddle()
    (answer,) = meet(lambda: node)
    assert isinstance(answer, LaunchError)
    assert "could not communicate" in str(answer)
    del meddle.store


# --------------------------------------------------------------------------------------- a number that may change


def test_torch_alone_runs_what_is_forged(tmp_path, forge):
    """The attack itself, on torch's own rendezvous: without this the tests below would prove nothing."""
    store = open_store("127.0.0.1", 0, rendezvous._STORE_TIMEOUT)
    handler = DynamicRendezvousHandler.from_backend(BACKEND, store, C10dRendezvousBackend(store, BACKEND), 1, 1)
    file = tmp_path / "ran"
    forge(store.port, pickle.dumps(Forged(file)))
    with pytest.raises(AttributeError):
        handler.num_nodes_waiting()
    assert file.exists()


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_forged_state_is_not_unpickled(tmp_path, forge, where):
    port, file = free_port(), tmp_path / "ran"
    payload = pickle.dumps(Forged(file))
    node = changing(port)
    if where == "after":
        infos = meet(lambda: node, lambda: changing(port))
        assert sorted(info.rank for info in infos) == [0, 1]
        node._state_holder._last_sync_time = -1  # what was read a moment ago is not read again
    for forged in (payload, b"\0" * 32 + payload, SignedBackend(None, b"another")._digest(payload) + payload, b"x"):
        forge(port, forged)
        with pytest.raises(LaunchError, match="is not this job's: it was not written with this launcher's secret"):
            (node.num_nodes_waiting if where == "after" else node.next_rendezvous)()
        with pytest.raises(LaunchError, match="secret"):
            node.num_nodes_waiting()
    assert node.shutdown() is False  # nor there
    assert not file.exists()
    forge(port, SignedBackend(None, SECRET)._digest(payload) + payload)  # who knows the secret may
    with pytest.raises(AttributeError):
        node.num_nodes_waiting()
    assert file.exists()


def test_a_state_that_changed_meanwhile_is_checked_too(tmp_path, forge):
    """What a node gets back where its own write comes too late."""
    port = free_port()
    node = changing(port)
    meet(lambda: node, lambda: changing(port))
    forge(port, pickle.dumps(Forged(tmp_path / "ran")))
    node._state_holder.mark_dirty()
    with pytest.raises(LaunchError, match="secret"):
        node.num_nodes_waiting()
    assert not (tmp_path / "ran").exists()


def test_nodes_with_different_secrets_do_not_meet():
    port = free_port()
    first = changing(port)
    meet_first = threading.Thread(target=meet, args=(lambda: first,))
    meet_first.start()
    while first._store.get(f"torch.rendezvous.{BACKEND}") == C10dRendezvousBackend._NULL_SENTINEL.encode():
        time.sleep(0.02)
    (answer,) = meet(lambda: changing(port, b"another secret of enough letters"))
    assert "the nodes have different secrets" in str(answer)
    assert [info.rank for info in meet(lambda: changing(port))] == [1]
    meet_first.join(LIMIT)


def test_too_few_nodes_come(monkeypatch, capsys):
    monkeypatch.setattr(patience, "_WORD_SECONDS", 0.2)
    port = free_port()
    meeting = Meeting("127.0.0.1", port, (2, 3), seconds=1, secret=SECRET)
    (answer,) = meet(lambda: ChangingNodes.at(meeting))
    assert answer.message == f"Fewer than 2 nodes joined 127.0.0.1:{port} in 1 s (--join-timeout)."
    said = capsys.readouterr().err.splitlines()
    assert len(said) > 1 and f"fewer than 2 nodes joined 127.0.0.1:{port} yet; waiting until" in said[1]


@pytest.mark.slow
def test_a_changing_number_of_nodes_as_a_job(tmp_path, forge):
    """Two launchers: one socket each listens besides gloo's, and a forged state ends both with a sentence."""
    script = tmp_path / "script.py"
    script.write_text(WAITING.format(join="dist.init_process_group('gloo')"))
    port, secret = free_port(), tmp_path / "secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    options = ["--nproc", "1", "--nnodes", "1:2", "--master", f"127.0.0.1:{port}", "--secret-file", str(secret)]
    command = [sys.executable, "-m", "shardline", "run", *options, str(script), str(tmp_path)]
    launchers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        wait_for([tmp_path / "joined0", tmp_path / "joined1"], *launchers)
        sockets = [listening(launcher.pid) for launcher in launchers]
        assert sum(map(len, sockets)) == 2  # the launchers' and the ranks'
        everybody = [pid for launcher in launchers for pid in [launcher.pid, *descendants(launcher.pid)]]
        assert {str(address) for address, _ in listening(*everybody)} == {"127.0.0.1"}
        forge(port, pickle.dumps(Forged(tmp_path / "ran")))
        errors = [launcher.communicate(timeout=LIMIT)[1] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.send_signal(signal.SIGKILL)
            launcher.wait()
    assert not (tmp_path / "ran").exists()
    assert [launcher.returncode for launcher in launchers] == [2, 2]
    assert any("it was not written with this launcher's secret" in error for error in errors), errors
    assert all(error.splitlines()[-1].startswith("shardline: The ") for error in errors), errors
    assert not any("Traceback" in error for error in errors), errors
