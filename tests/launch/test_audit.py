"""Python's audit hooks over a whole job: started, trained, saved, killed, resumed, exported, in launcher and ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import shardline
from tests.checkpoint import cases

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks end with their launcher on Linux only")

LISTENER = """
import os, sys
def listen(report, package, folders):
    said = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    seen = set()
    def say(what):
        if what not in seen:
            seen.add(what)
            os.write(said, (what + "\\n").encode())
    def stack():
        frame, found = sys._getframe(2), []
        while frame is not None:
            found.append(frame.f_code.co_filename)
            frame = frame.f_back
        return found
    def inside(path):
        if isinstance(path, int):
            return True
        try:
            path = os.path.abspath(os.fsdecode(path))
        except (TypeError, ValueError):
            return False
        return any(path == each or path.startswith(each + "/") for each in folders)
    CHANGES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.symlink": 2, "os.link": 2,
               "os.truncate": 1, "os.chmod": 1, "shutil.rmtree": 1, "shutil.copyfile": 2, "shutil.move": 2}
    def hook(event, args):
        if event in ("exec", "compile") and sys._getframe(1).f_code.co_filename.startswith(package):
            say(f"{event} from {sys._getframe(1).f_code.co_filename}")
        elif event == "pickle.find_class":
            where = stack()
            if not any("/multiprocessing/" in file for file in where):
                say(f"unpickled {args[1:]} in {where[:8]}")
        elif event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or any(c in (mode or "") for c in "wax+")
            if path is not None and writes and not inside(path):
                say(f"wrote {path!r} in {stack()[:6]}")
        elif event in CHANGES:
            for path in args[:CHANGES[event]]:
                if event in ("os.remove", "os.rmdir") and args[1] >= 0:  # relative to an open directory
                    path = os.path.join(os.readlink("/proc/self/fd/%d" % args[1]), os.fsdecode(path))
                if not inside(path):
                    say(f"{event} {path!r} in {stack()[:6]}")
    sys.addaudithook(hook)
listen(*{arguments!r})
"""

LAUNCHER = """
sys.path[:0] = {path!r}
from shardline.cli import main
sys.exit(main(sys.argv[1:]))
"""

JOB = """
import json, signal
sys.path[:0] = {path!r}
from tests.checkpoint import cases
settings, folder = json.loads(sys.argv[1])
built = cases.engine(settings)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    cases.train(built, 5)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
assert built.global_steps in (0, 4)
cases.train(built, 8)
built.save_checkpoint(folder + "/more", tag="last", client_state={{"seen": (1, 2)}})
built.load_checkpoint(folder + "/more")
built.export(folder + "/export")
built.destroy()
"""

BAD = """
import pickle, signal
source = compile("exec(compile('x = 1', 'text', 'exec'))", {package!r} + "/made_up.py", "exec")
exec(source)
pickle.loads(pickle.dumps(signal.Signals(9)))
open({outside!r}, "w").close()
os.remove({outside!r})
"""


def test_the_listener_hears(tmp_path):
    said, package = tmp_path / "said", "/package"
    listener = LISTENER.replace("{arguments!r}", repr((str(said), package, [str(tmp_path / "inside")])))
    body = BAD.format(package=package, outside=str(tmp_path / "outside"))
    subprocess.run([sys.executable, "-c", listener + body], check=True, timeout=200)
    heard = [line.split()[0] for line in said.read_text().splitlines()]
    assert heard == ["compile", "exec", "unpickled", "wrote", "os.remove"]


def run(tmp_path: Path) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What was said, and what the listeners in launcher and ranks heard."""
    package = os.path.dirname(shardline.__file__)
    folder = tmp_path / "run"
    folder.mkdir()
    temporary = tmp_path / "tmp"  # of launcher, ranks and workers
    temporary.mkdir()
    folders = [str(folder), str(temporary), "/dev/null", "/dev/shm", "/proc/self"]
    checkpoint = {"dir": str(folder / "saves"), "every_steps": 2, "resume": "auto", "async": True}
    settings = cases.config(3, 2, workers=1, checkpoint=checkpoint)
    scripts = {}
    for name, body in (("launcher", LAUNCHER), ("job", JOB)):
        listener = LISTENER.replace("{arguments!r}", repr((str(tmp_path / f"{name}.said"), package, folders)))
        text = body.format(path=sys.path)
        scripts[name] = folder / f"{name}.py"
        scripts[name].write_text(listener + text)
    command = [str(scripts["launcher"]), "run", "--nproc", "2", "--device", "cpu", "--max-restarts", "1"]
    command += [str(scripts["job"]), json.dumps([settings, str(folder)])]
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(temporary / "inductor")  # torch's, made when it is imported
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=200, env=environment)
    said = [line for file in tmp_path.glob("*.said") for line in file.read_text().splitlines()]
    return done, said


def test_a_whole_job_unpickles_nothing_runs_no_text_and_writes_nowhere_else(tmp_path):
    done, said = run(tmp_path)
    assert done.returncode == 0 and "restart 1 of 1" in done.stderr, done.stderr
    assert not said, "\n".join(said)
    assert len(list(tmp_path.glob("*.said"))) == 2 and (tmp_path / "run" / "export" / "model.safetensors").exists()
    assert not list((tmp_path / "tmp").glob("shardline-*")), "the launcher removes what it has made"
