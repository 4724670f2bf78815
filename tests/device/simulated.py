"""CUDA devices simulated on the CPU build of torch, for tests of the path that a GPU takes.

    import tests.device.simulated as simulated      # before anything asks torch for its accelerator

    simulated.races()          # unordered accesses of two streams to one range since the last call
    simulated.kernels()        # operations of the device since the last call
    simulated.waits()          # what made the host wait for the device since the last call
    with simulated.no_wait():  # in it such a wait raises

Every kernel is the CPU's and runs at once, on tensors that torch takes for CUDA's: its streams, events, page-locked
memory, autograd threads, fused optimizers and a backend named "nccl" are the real interfaces. What is simulated is the
order in time (``simulated.cpp`` explains how). The extension is compiled once for each version of torch; a C++ compiler
is all it needs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["COMPILER", "kernels", "memory", "no_wait", "page_locked", "races", "reset_peak", "waits"]

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
_SOURCE = Path(__file__).with_suffix(".cpp")
_NAME = "simulated_device"


def _build() -> Path:
    """The compiled extension of this source for this torch, made if it is not there."""
    key = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    folder = _SOURCE.parents[2] / "build" / "simulated-device" / f"torch-{torch.__version__}-{key}"
    made = folder / f"{_NAME}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # several ranks may need it at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            root = Path(torch.__file__).parent
            includes = [root / "include", root / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
            libraries = ["c10", "torch", "torch_cpu", "torch_python"]
            part = made.with_suffix(".part")
            subprocess.run(
                [
                    str(COMPILER), "-O1", "-std=c++20", "-fPIC", "-shared", "-Wno-deprecated-declarations",
                    "-DUSE_C10D_GLOO", f"-DTORCH_EXTENSION_NAME={_NAME}",
                    *[f"-isystem{path}" for path in includes], str(_SOURCE), "-o", str(part),
                    f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", *[f"-l{name}" for name in libraries],
                ],
                check=True,
            )  # fmt: skip
            part.rename(made)
    return made


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(_NAME, _build())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)
    return module


def _install() -> ModuleType:
    """Let ``torch.cuda`` and ``torch.distributed`` see the devices."""
    found = _load()
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda._initialized = True
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count, cuda.current_device = found.device_count, found.current_device
    cuda.set_device = lambda device: found.set_device(torch._utils._get_device_index(device, True))

    def exchange(index: int) -> int:
        before = int(found.current_device())
        if index >= 0:
            found.set_device(index)
        return before

    cuda._exchange_device = cuda._maybe_exchange_device = exchange
    cuda.synchronize = lambda device=None: torch.accelerator.synchronize()
    cuda.current_stream = lambda device=None: torch.accelerator.current_stream(device)
    cuda.get_rng_state = lambda device="cuda": torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda state, device="cuda": None
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: None
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_name = lambda device=None: "simulated device"
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name="simulated device", total_memory=1 << 34, major=9, minor=0, uuid=str(device), multi_processor_count=1
    )
    cuda.cudart = lambda: SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: found.host_register(address, size) or 0,
        cudaHostUnregister=lambda address: found.host_unregister(address) or 0,
    )
    cuda.empty_cache = lambda: None
    cuda.mem_get_info = lambda device=None: (1 << 33, 1 << 34)
    cuda.max_memory_allocated = torch.accelerator.memory.max_memory_allocated
    cuda.memory_allocated = torch.accelerator.memory.memory_allocated
    cuda.reset_peak_memory_stats = torch.accelerator.memory.reset_peak_memory_stats
    cuda.set_sync_debug_mode = lambda mode: found.set_sync_mode({"default": 0, "warn": 1, "error": 2}.get(mode, mode))

    def make_group(store: Any, rank: int, size: int, timeout: Any) -> Any:
        gloo = dist.ProcessGroupGloo(dist.PrefixStore("simulated", store), rank, size, timeout)
        return found.make_nccl(gloo, rank, size)

    dist.Backend.register_backend("simulated", make_group, devices=["cuda"])
    dist.Backend.default_device_backend_map["cuda"] = "simulated"
    return found


_device = _install()


def races() -> list[str]:
    """Accesses of one range of memory on two streams, one of them a write, without an order since the last call."""
    return list(_device.races())


def kernels() -> dict[str, int]:
    """How often each operation ran on the device since the last call: about a kernel each, on a GPU."""
    return dict(_device.ops())


def waits() -> list[str]:
    """Operations that made the host wait for the device since the last call."""
    return list(_device.syncs())


@contextlib.contextmanager
def no_wait() -> Iterator[None]:
    """Within it, an operation that would make the host wait for the device raises ``RuntimeError``."""
    _device.set_sync_mode(2)
    try:
        yield
    finally:
        _device.set_sync_mode(0)


def memory(*, peak: bool = False) -> int:
    """Bytes of the current device in use, or with ``peak`` the most since :func:`reset_peak`."""
    kept = torch.accelerator.memory
    return int(kept.max_memory_allocated() if peak else kept.memory_allocated())


def page_locked() -> int:
    """Bytes of host memory that are page-locked."""
    return int(_device.page_locked())


def reset_peak() -> None:
    torch.accelerator.memory.reset_peak_memory_stats()
