"""The pool lends nothing that somebody still holds; a sealed parameter is an error with its name, and never a crash."""

from __future__ import annotations

import gc
import json
import mmap
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from shardline.buffer import Pool, empty, is_sealed, seal, unseal, view
from shardline.errors import SealedError
from shardline.memory import resident_bytes
from shardline.plan import Entry, ParamSpec

CPU = torch.device("cpu")
LARGE = 1 << 16  # elements; well above what the pool thinks worth keeping


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux only")
@pytest.mark.parametrize("pages", [1.0, 1.3, 4.999, 17.0])
def test_large_buffers_lie_in_large_pages_but_for_their_end(pages: float) -> None:
    size = int(pages * (2 << 20)) // 4
    buffer = empty(size, torch.float32, CPU)
    assert buffer.shape == (size,) and buffer.is_contiguous() and buffer.untyped_storage().nbytes() == 4 * size
    assert buffer.data_ptr() % (2 << 20) == 0
    buffer.fill_(1.0)
    assert dict(huge_areas())[buffer.data_ptr()] == int(pages) * (2 << 20)


def huge_areas() -> list[tuple[int, int]]:
    """(first address, bytes) of the areas of this process for which large pages were asked."""
    found, area = [], (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            start, stop = (int(each, 16) for each in match.groups())
            area = start, stop - start
        elif line.startswith("VmFlags:") and " hg" in line:
            found.append(area)
    return found


def test_small_buffers_and_those_of_inference_mode_are_ordinary_tensors() -> None:
    with torch.inference_mode():
        for numel in (0, 5, 1 << 20):
            buffer = empty(numel, torch.float32, CPU)
            assert buffer.shape == (numel,) and not buffer.is_inference()
    buffer.fill_(1.0).requires_grad_(True).sum().backward()


def test_memory_goes_with_the_last_view() -> None:
    before = resident_bytes()
    view = empty(16 << 20, torch.float32, CPU).fill_(1.0)[7:9]
    assert resident_bytes() - before > 60e6 and view.sum() == 2
    del view
    assert resident_bytes() - before < 4e6


# --- pool -------------------------------------------------------------------------------------------------------------


def test_what_is_given_back_is_lent_again() -> None:
    pool = Pool(CPU)
    buffer = pool.take(LARGE, torch.float32)
    address = buffer.data_ptr()
    pool.give(buffer)
    del buffer
    again = pool.take(2 * LARGE - 64, torch.bfloat16)  # another dtype, nearly the same bytes
    assert again.data_ptr() == address and again.shape == (2 * LARGE - 64,) and again.dtype is torch.bfloat16
    assert pool.take(LARGE, torch.float32).data_ptr() != address


@pytest.mark.parametrize("keep", ["the buffer", "a view", "autograd"])
def test_what_somebody_holds_is_not_lent(keep: str) -> None:
    pool = Pool(CPU)
    buffer = pool.take(LARGE, torch.float32).fill_(1.0)
    address = buffer.data_ptr()
    if keep == "autograd":
        weight = torch.ones(LARGE, requires_grad=True)
        held = (weight * buffer).sum()  # saves the buffer
    else:
        held = buffer if keep == "the buffer" else buffer[64:128].view(8, 8)
    pool.give(buffer)
    del buffer
    other = pool.take(LARGE, torch.float32).fill_(2.0)
    assert other.data_ptr() != address
    if keep == "autograd":
        held.backward()
        assert bool((weight.grad == 1.0).all())
    else:
        assert bool((held == 1.0).all())
    del held, other
    gc.collect()
    if keep == "autograd":
        return
    assert not pool._free, "what somebody kept is forgotten, not piled up: it goes when its holder does"


def test_the_best_fitting_piece_is_lent_and_none_that_is_much_too_large() -> None:
    pool = Pool(CPU)
    sizes = (LARGE, 9 * LARGE // 8, 4 * LARGE)
    buffers = {size: pool.take(size, torch.float32) for size in sizes}
    places = {size: buffer.data_ptr() for size, buffer in buffers.items()}
    for size in sizes:
        pool.give(buffers.pop(size))
    got = pool.take(LARGE + 64, torch.float32)
    assert got.data_ptr() == places[9 * LARGE // 8]
    small = pool.take(LARGE, torch.float32)
    assert small.data_ptr() == places[LARGE]
    assert pool.take(LARGE, torch.float32).data_ptr() != places[4 * LARGE]


def test_two_buffers_in_use_never_overlap() -> None:
    pool, lent = Pool(CPU), []
    for turn in range(200):
        if turn % 3 == 2:
            pool.give(lent.pop(turn % len(lent)))
        else:
            lent.append(pool.take(LARGE + 64 * (turn % 7), torch.float32))
        spans = sorted((b.data_ptr(), b.data_ptr() + b.numel() * 4) for b in lent)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))


def test_buffers_are_no_inference_tensors_and_may_be_empty() -> None:
    pool = Pool(CPU)
    with torch.inference_mode():
        first = pool.take(LARGE, torch.float32)
        pool.give(first)
        del first
        second = pool.take(LARGE, torch.float32)
    assert not second.is_inference()
    second.requires_grad_(True)
    assert pool.take(0, torch.float32).shape == (0,)


def test_clear_lets_go() -> None:
    pool = Pool(CPU)
    buffer = pool.take(LARGE, torch.float32)
    pool.give(buffer)
    pool.clear()
    assert not pool._free


# --- views ------------------------------------------------------------------------------------------------------------


def test_a_view_has_the_shape_and_strides_of_its_parameter() -> None:
    spec = ParamSpec("w", ("w",), (2, 3, 4), (12, 1, 3), torch.float32, 0)
    flat = torch.arange(200.0)[8:]  # a slab need not begin its storage
    shown = view(flat, Entry(spec, 64))
    assert shown.shape == (2, 3, 4) and shown.stride() == (12, 1, 3)
    assert sorted(shown.flatten().tolist()) == flat[64:88].tolist()
    shown.zero_()
    assert bool((flat[64:88] == 0).all()) and flat[63] != 0 and flat[88] != 0


# --- seal -------------------------------------------------------------------------------------------------------------


class Tagged(nn.Parameter):
    """A subclass, as libraries make them to mark parameters."""


def test_sealing_takes_the_data_and_leaves_everything_else() -> None:
    param = Tagged(torch.randn(3, 4, dtype=torch.float64), requires_grad=False)
    param.note = "kept"
    before, data = param, param.data.clone()
    seal(param, "net.w", lambda: False, data)
    assert is_sealed(param) and param is before and isinstance(param, nn.Parameter)
    assert (param.shape, param.dtype, param.requires_grad, param.note) == ((3, 4), torch.float64, False, "kept")
    assert "net.w" in repr(param) and "(3, 4)" in repr(param)
    with torch._C.DisableTorchFunctionSubclass():
        assert param.untyped_storage().nbytes() == 8
    seal(param, "other", lambda: False, data)  # once is enough
    with pytest.raises(SealedError, match=r"'net\.w'.*gathered_parameters"):
        param + 1
    unseal(param, data)
    assert type(param) is Tagged and torch.equal(param, data) and param.note == "kept"
    assert not any(name.startswith("_shardline") for name in param.__dict__)


def test_a_sealed_parameter_has_the_dtype_that_it_will_have() -> None:
    """One that was made in fp32 for a model in bf16 says what is true from now on."""
    param = nn.Parameter(torch.zeros(4, 5))
    seal(param, "w", lambda: False, torch.ones(64, dtype=torch.bfloat16))
    assert (param.shape, param.dtype) == ((4, 5), torch.bfloat16)


def test_identity_survives_hooks_hashes_and_optimizers() -> None:
    param = nn.Parameter(torch.randn(4))
    optimizer = torch.optim.SGD([param], lr=0.1)
    seal(param, "w", lambda: False, param.data)
    assert param in {param: 1} and optimizer.param_groups[0]["params"][0] is param
    param.requires_grad_(False)
    assert not param.requires_grad
    param.grad = None


def test_an_operation_gathers_where_it_may() -> None:
    param, data, calls = nn.Parameter(torch.zeros(2, 2)), torch.ones(2, 2), []

    def gather() -> bool:
        calls.append(1)
        unseal(param, data)
        return True

    seal(param, "w", gather, data)
    assert torch.equal(torch.stack([param, param]), torch.ones(2, 2, 2)) and calls == [1]


def test_sealed_integers_and_scalars() -> None:
    for value in (torch.tensor(3), torch.tensor(0.5), torch.zeros(0, 5)):
        param = nn.Parameter(value, requires_grad=False)
        seal(param, "w", lambda: False, param.data)
        assert param.shape == value.shape and param.numel() == value.numel()
        with pytest.raises(SealedError):
            param.clone()


def test_sealing_in_inference_mode_leaves_an_ordinary_parameter() -> None:
    param = nn.Parameter(torch.zeros(3))
    with torch.inference_mode():
        seal(param, "w", lambda: False, param.data)
        unseal(param, torch.ones(3))
    (param * 2).sum().backward()
    assert bool((param.grad == 2).all())


SWEEP = """
import copy, faulthandler, inspect, io, json, pickle, signal, warnings
import torch
from torch import nn
from shardline.buffer import seal, is_sealed
from shardline.errors import SealedError

faulthandler.enable()
warnings.simplefilter("ignore")
outcomes = {}


def fresh():
    param = nn.Parameter(torch.randn(6, 6))
    seal(param, "net.weight", lambda: False, torch.ones(1))
    return param


def attempt(name, call):
    print(name, flush=True)
    param = fresh()
    try:
        call(param)
        outcomes[name] = "ok"
    except SealedError as error:
        outcomes[name] = "named" if "'net.weight'" in str(error) else f"unnamed: {error}"
    except Exception as error:
        outcomes[name] = f"{type(error).__name__}: {error}"


SKIP = {"__class__", "__init__", "__new__", "__subclasshook__", "__init_subclass__", "__setattr__", "__delattr__",
        "__getattribute__", "__torch_function__", "__setstate__", "__dir__", "__sizeof__", "__doc__"}
ARGUMENTS = [(), (1,), (torch.ones(6, 6),), (0, 1), (torch.float64,), (0, torch.zeros(6, dtype=torch.long)),
             (0, torch.zeros(6, 6, dtype=torch.long), torch.ones(6, 6))]
for name in sorted(set(dir(torch.Tensor)) - SKIP):
    member = getattr(torch.Tensor, name, None)
    if not callable(member):
        attempt(f"get {name}", lambda p: getattr(p, name))
        continue
    for count, arguments in enumerate(ARGUMENTS):
        attempt(f"{name}/{count}", lambda p: getattr(p, name)(*arguments))

x = torch.ones(2, 6)
for name, call in {
    "linear": lambda p: nn.functional.linear(x, p),
    "bmm": lambda p: torch.bmm(p.unsqueeze(0), p.unsqueeze(0)),
    "cat": lambda p: torch.cat([torch.ones(1, 6), p]),
    "einsum": lambda p: torch.einsum("ij,kj->ik", x, p),
    "out": lambda p: torch.add(torch.ones(6, 6), 1.0, out=p),
    "into": lambda p: torch.zeros(6, 6).copy_(p),
    "foreach": lambda p: torch._foreach_add_([p], 1.0),
    "where": lambda p: torch.where(torch.ones(6, 6) > 0, p, p),
    "norm": lambda p: nn.utils.clip_grad_norm_([p], 1.0),
    "vector": lambda p: nn.utils.parameters_to_vector([p]),
    "normal_": lambda p: nn.init.normal_(p),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "save": lambda p: torch.save({"w": p}, io.BytesIO()),
    "index": lambda p: p[0],
    "mask": lambda p: p[torch.ones(6, 6) > 0],
    "setitem": lambda p: p.__setitem__(0, 1.0),
    "as_tensor": lambda p: torch.as_tensor(p) + 1,
    "tensor": lambda p: torch.tensor(p),
    "iterate": lambda p: list(p),
    "data": lambda p: p.data.sum(),
    "detach": lambda p: p.detach().sum(),
    "backward": lambda p: (x * p.sum()).sum().backward(),
    "functional_call": lambda p: torch.func.functional_call(nn.Linear(6, 6), {"weight": p}, (x,)),
}.items():
    attempt(name, call)
print("RESULT" + json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def sweep() -> dict[str, str]:
    """Every method and attribute of a tensor, with seven kinds of arguments, on a sealed parameter; one process."""
    done = subprocess.run([sys.executable, "-c", SWEEP], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"crashed at {done.stdout.splitlines()[-1:]}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.rpartition("RESULT")[2])


def test_every_operation_is_named_or_harmless(sweep: dict[str, str]) -> None:
    assert len(sweep) > 2000  # so that the sweep itself cannot quietly shrink
    assert not [name for name, outcome in sweep.items() if outcome.startswith("unnamed")]
    assert sum(outcome == "named" for outcome in sweep.values()) > 1000


READS = [
    "clone/0", "sum/0", "item/0", "tolist/0", "numpy/0", "__array__/0", "add/1", "__add__/1", "__radd__/1", "mul_/1",
    "copy_/2", "zero_/0", "view/1", "to/4", "cpu/0", "double/0", "detach/0", "storage/0", "untyped_storage/0",
    "data_ptr/0", "__reduce_ex__/1", "__deepcopy__/1", "__repr__/0", "__str__/0", "__format__/0", "__eq__/1", "get T",
    "get data", "get mT", "is_contiguous/0", "stride/0",
]  # fmt: skip
METADATA = {"__repr__/0", "__str__/0", "__format__/0"}


def test_reads_and_writes_of_elements_are_named(sweep: dict[str, str]) -> None:
    wrong = {name: sweep[name] for name in READS if sweep.get(name) != ("ok" if name in METADATA else "named")}
    assert set(wrong) <= {"__format__/0", "__deepcopy__/1"}, wrong  # these two want an argument of another kind


def test_functions_are_named(sweep: dict[str, str]) -> None:
    plain = [name for name in sweep if "/" not in name and not name.startswith("get ")]
    wrong = {name: sweep[name] for name in plain if sweep[name] != "named"}
    # clip_grad_norm_ finds no gradient; torch.tensor() asks no class and copies the NaN of the filler
    assert set(wrong) <= {"norm", "tensor"}, wrong


def test_nothing_reads_the_filler(sweep: dict[str, str]) -> None:
    """What is allowed must not look at elements: these names alone, whatever the arguments."""
    allowed = {name.split("/")[0].removeprefix("get ") for name, outcome in sweep.items() if outcome == "ok"}
    looks = {"sum", "item", "clone", "add", "mean", "tolist", "numpy", "data", "T", "view", "equal", "dot", "any"}
    assert not allowed & looks
