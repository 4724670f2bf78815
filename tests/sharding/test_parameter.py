"""A managed parameter knows what was done to it; a sealed one is an error with its name, and never a crash."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from shardline.errors import SealedError
from shardline.sharding.bucket import Bucket
from shardline.sharding.parameter import ParamRecord, is_sealed, make_ordinary, record_of, seal, show


class Diary:
    """An owner that writes down what it is told."""

    detaches, advice, conversion = Bucket.detaches, Bucket.advice, Bucket.conversion

    def __init__(self, gather=None):
        self.gather, self.told, self.collected = gather, [], None

    def on_sealed_access(self):
        self.told.append("touched")
        return self.gather is not None and self.gather()

    def on_data_read(self, index, alias):
        self.told.append(("handed out", index))

    def on_data_assigned(self, index, value):
        self.told.append(("assigned", index, value))

    def stride_of(self, index):
        return (30, 5, 1)

    def grad_of(self, index):
        return self.collected


def record(name="net.w", index=0, gather=None):
    return ParamRecord(name, index, Diary(gather))


class Tagged(nn.Parameter):
    """A subclass, as libraries make them to mark parameters."""


# --- seal -------------------------------------------------------------------------------------------------------------


def test_sealing_takes_the_data_and_leaves_everything_else() -> None:
    param = Tagged(torch.randn(3, 4, dtype=torch.float64), requires_grad=False)
    param.note = "kept"
    before, data = param, param.data.clone()
    seal(param, record(), data)
    assert is_sealed(param) and param is before and isinstance(param, Tagged)
    assert (param.shape, param.dtype, param.requires_grad, param.note) == ((3, 4), torch.float64, False, "kept")
    assert param.stride() == (30, 5, 1) and (param.stride(0), param.stride(dim=-1)) == (30, 1)  # as its owner says
    assert "net.w" in repr(param) and "(3, 4)" in repr(param)
    with torch._C.DisableTorchFunctionSubclass():
        assert param.untyped_storage().nbytes() == 8
    with pytest.raises(SealedError, match=r"'net\.w'.*gathered_parameters"):
        param + 1
    show(param, data, record())
    assert not is_sealed(param) and isinstance(param, Tagged) and torch.equal(param, data)
    make_ordinary(param, data)
    assert type(param) is Tagged and torch.equal(param, data) and param.__dict__ == {"note": "kept"}


def test_a_sealed_parameter_has_the_dtype_that_it_will_have() -> None:
    """One that was made in fp32 for a model in bf16 says what is true from now on."""
    param = nn.Parameter(torch.zeros(4, 5))
    seal(param, record(), torch.ones(64, dtype=torch.bfloat16))
    assert (param.shape, param.dtype) == ((4, 5), torch.bfloat16)


def test_identity_survives_hooks_hashes_and_optimizers() -> None:
    param = nn.Parameter(torch.randn(4))
    optimizer = torch.optim.SGD([param], lr=0.1)
    seal(param, record(), param.data)
    assert param in {param: 1} and optimizer.param_groups[0]["params"][0] is param
    param.requires_grad_(False)
    assert not param.requires_grad
    param.grad = None


def test_an_operation_gathers_where_it_may() -> None:
    param, data, calls = nn.Parameter(torch.zeros(2, 2)), torch.ones(2, 2), []

    def gather() -> bool:
        calls.append(1)
        show(param, data, record())
        return True

    seal(param, record(gather=gather), data)
    assert torch.equal(torch.stack([param, param]), torch.ones(2, 2, 2)) and calls == [1]


def test_sealed_integers_and_scalars() -> None:
    for value in (torch.tensor(3), torch.tensor(0.5), torch.zeros(0, 5)):
        param = nn.Parameter(value, requires_grad=False)
        seal(param, record(), param.data)
        assert param.shape == value.shape and param.numel() == value.numel()
        with pytest.raises(SealedError):
            param.clone()


def test_sealing_in_inference_mode_leaves_an_ordinary_parameter() -> None:
    param = nn.Parameter(torch.zeros(3))
    with torch.inference_mode():
        seal(param, record(), param.data)
        show(param, torch.ones(3), record())
    (param * 2).sum().backward()
    assert bool((param.grad == 2).all())


SWEEP = """
import copy, faulthandler, inspect, io, json, pickle, signal, warnings
import torch
from torch import nn
from shardline.sharding.parameter import ParamRecord, seal
from shardline.errors import SealedError

faulthandler.enable()
warnings.simplefilter("ignore")
outcomes = {}


class Owner:
    detaches, advice, conversion = False, "Gather it.", "Before that."

    def on_sealed_access(self):
        return False

    def stride_of(self, index):
        return (6, 1)

    def grad_of(self, index):
        return None


def fresh():
    param = nn.Parameter(torch.randn(6, 6))
    seal(param, ParamRecord("net.weight", 0, Owner()), torch.ones(1))
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
    done = subprocess.run([sys.executable, "-c", SWEEP], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"crashed at {done.stdout.splitlines()[-1:]}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.rpartition("RESULT")[2])


def test_every_operation_is_named_or_harmless(sweep: dict[str, str]) -> None:
    assert len(sweep) > 2000  # so that the sweep itself cannot quietly shrink
    assert not [name for name, outcome in sweep.items() if outcome.startswith("unnamed")]
    assert sum(outcome == "named" for outcome in sweep.values()) > 1000


READS = [
    "clone/0", "sum/0", "item/0", "tolist/0", "numpy/0", "__array__/0", "add/1", "__add__/1", "__radd__/1", "mul_/1",
    "copy_/2", "zero_/0", "view/1", "to/4", "half/0", "double/0", "detach/0", "storage/0", "untyped_storage/0",
    "data_ptr/0", "__reduce_ex__/1", "__deepcopy__/1", "__repr__/0", "__str__/0", "__format__/0", "__eq__/1", "get T",
    "get mT", "get mT", "is_contiguous/0", "stride/0",
]  # fmt: skip
METADATA = {"__repr__/0", "__str__/0", "__format__/0", "stride/0"}


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
    looks = {"sum", "item", "clone", "add", "mean", "tolist", "numpy", "T", "view", "equal", "dot", "any"}
    assert not allowed & looks


LIKE = {
    "new_zeros": lambda p: p.new_zeros(2),
    "new_full": lambda p: p.new_full((2,), 0.0),
    "new_tensor": lambda p: p.new_tensor([0.0, 0.0]),
    "data.new_zeros": lambda p: p.data.new_zeros(2),
    "data.new": lambda p: p.data.new(2).zero_(),
    "data.size": lambda p: torch.zeros(p.data.size()).to(p.dtype)[0],
    "zeros_like": lambda p: torch.zeros_like(p)[0],
    "full_like": lambda p: torch.full_like(p, 0.0)[0],
    "type_as": lambda p: torch.zeros(2, dtype=torch.float64).type_as(p),
    "to": lambda p: torch.zeros(2, dtype=torch.float64).to(p),
    "to tensor=": lambda p: torch.zeros(2, dtype=torch.float64).to(tensor=p),
    "type": lambda p: torch.zeros(2).type(p.type()),
    "expand_as": lambda p: torch.zeros(2).expand_as(p)[0].to(p.dtype),
    "result_type": lambda p: torch.zeros(2, dtype=torch.result_type(p, 1)),
}


@pytest.mark.parametrize("what", LIKE)
def test_what_needs_no_elements_works_as_on_a_plain_parameter(what) -> None:
    plain, sealed = (nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16)) for _ in range(2))
    seal(sealed, record(), sealed.data)
    expected, found = LIKE[what](plain), LIKE[what](sealed)
    assert type(found) is torch.Tensor and found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize(
    ("convert", "operation"),
    [(lambda m: m.half(), "half"), (lambda m: m.to(torch.float64), "to"), (lambda m: m.to("meta"), "to")],
)
def test_a_module_of_sealed_parameters_is_converted_to_what_it_is_and_to_nothing_else(convert, operation) -> None:
    module = nn.Linear(3, 2)
    for param in module.parameters():
        seal(param, record(), param.data)
    module.float().cpu().to("cpu", torch.float32).requires_grad_(False)
    with pytest.raises(SealedError, match=f"^{operation}: parameter 'net.w'"):
        convert(module)
    assert all(p.shape and p.dtype is torch.float32 and is_sealed(p) for p in module.parameters())


@pytest.mark.parametrize(
    ("call", "operation"),
    [
        (lambda p: p.data.sum(), "sum"),
        (lambda p: torch.zeros(3, 2).copy_(p.data), "copy_"),
        (lambda p: p.data.__setitem__(0, 1.0), "__setitem__"),
        (lambda p: p.T, r"\.T"),
        (lambda p: setattr(p, "data", torch.ones(3, 2)), r"assigning \.data"),
        (lambda p: setattr(p.data, "data", torch.ones(3, 2)), r"assigning \.data"),
        (lambda p: p.new_tensor(p), "new_tensor"),
        (lambda p: p.to("cpu", copy=True), "to"),
        (lambda p: p.expand_as(torch.zeros(2, 3, 2)), "expand_as"),
    ],
)
def test_the_error_says_what_was_written(call, operation) -> None:
    param = nn.Parameter(torch.ones(3, 2))
    seal(param, record(), param.data)
    with pytest.raises(SealedError, match=f"^{operation}: parameter 'net.w'"):
        call(param)


def test_data_read_before_a_gather_stays_an_error_after_it() -> None:
    """It is none of the parameters, so no gather fills it."""
    param = nn.Parameter(torch.ones(3))
    seal(param, record(), param.data)
    early = param.data
    seal(param, record(gather=lambda: show(param, torch.ones(3), record()) is None), param)
    assert bool((param.data == 1).all()), "read where it may be gathered"
    with pytest.raises(SealedError, match="sum"):
        early.sum()


# --- shown ------------------------------------------------------------------------------------------------------------


def shown(kind=nn.Parameter, shape=(3, 2)):
    param = kind(torch.zeros(shape))
    param.note = "kept"
    known = record()
    show(param, torch.arange(6.0).reshape(shape), known)
    return param, known.owner.told


@pytest.mark.parametrize("kind", [nn.Parameter, Tagged])
def test_data_is_noted_when_it_is_read_or_assigned_and_nothing_else_is(kind) -> None:
    param, told = shown(kind)
    assert isinstance(param, kind) and isinstance(param, nn.Parameter) and type(param).__name__ == kind.__name__
    param.data.clamp_(max=1.0)
    assert told.pop() == ("handed out", 0) and float(param.detach().max()) == 1.0
    value = torch.ones(3, 2)
    param.data = value
    assert told.pop()[2] is value and float(param.detach().max()) == 1.0, "what is to be done is the owner's affair"
    param.data = param  # Module.to() where nothing changes
    module = nn.Linear(2, 3, bias=False)
    module.weight = param
    module(torch.ones(1, 2)).sum().backward()
    torch.optim.AdamW([param], fused=True).step()
    torch.optim.SGD([param], foreach=True).step()
    nn.utils.clip_grad_norm_([param], 1.0)
    module.float().requires_grad_(True).zero_grad()
    module.load_state_dict(module.state_dict())
    torch.func.functional_call(module, {"weight": torch.ones(3, 2)}, torch.ones(1, 2))
    assert told == []


def test_a_shown_parameter_is_compiled_like_any_other() -> None:
    module = nn.Linear(2, 3, bias=False)
    module.weight, _ = shown()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, backend=count, fullgraph=True)
    x = torch.ones(1, 2)
    assert torch.equal(compiled(x), torch.nn.functional.linear(x, module.weight)) and len(graphs) == 1
    show(module.weight, torch.zeros(3, 2), record())
    assert bool((compiled(x) == 0).all()) and len(graphs) == 1, "a view of another buffer needs no second compilation"
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [nn.Parameter, Tagged])
def test_copies_of_a_shown_parameter_are_ordinary(kind) -> None:
    param, _ = shown(kind)
    saved = io.BytesIO()
    torch.save(param, saved)
    saved.seek(0)
    copies = [copy.deepcopy(param), pickle.loads(pickle.dumps(param)), torch.load(saved), type(param)(param.detach())]
    for made in copies:
        assert torch.equal(made, param) and isinstance(made, nn.Parameter) and record_of(made) is None
        assert not {"_shardline"} & set(made.__dict__) and made.data.sum() == 15
    assert type(copies[0]) is kind and type(copies[3]) is kind
    assert copies[1].note == "kept" and param.note == "kept" and record_of(param) is not None


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Parameter, Tagged])
def test_grad_is_what_autograd_left_and_then_what_the_owner_says(kind) -> None:
    param, _ = shown(kind)
    known = record_of(param)
    assert param.grad is None
    (param * 2).sum().backward()
    (param * 3).sum().backward()
    assert bool((param.grad == 5).all()), "autograd adds up as ever"
    param.grad = None
    known.owner.collected = torch.ones(3, 2)
    assert param.grad is known.owner.collected
    param.grad.mul_(4)
    param.grad += 1
    assert bool((known.owner.collected == 5).all())
    param.grad = torch.full((3, 2), 7.0)
    assert bool((known.owner.collected == 7).all())
    del param.grad
    assert not known.owner.collected.any()
    (param * 2).sum().backward()
    assert bool((param.grad == 2).all()), "what is newer and not collected yet"
    param.grad = None
    assert param.grad is known.owner.collected


def test_a_compiler_sees_no_collected_gradient() -> None:
    module = nn.Linear(2, 3, bias=False)
    module.weight, _ = shown()
    record_of(module.weight).owner.grad_of = None  # a call of it fails
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert bool((compiled(torch.ones(1, 2)) == torch.nn.functional.linear(torch.ones(1, 2), module.weight)).all())
    torch._dynamo.reset()
