"""What an engine refuses before anything is changed: what others manage, shared memory, a model that was changed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

from shardline.errors import ModelError
from shardline.sharding.admission import HeldParameters, check_model
from shardline.sharding.parameter import ParamRecord, show


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x))


# --- memory -----------------------------------------------------------------------------------------------------------


def tied_by_data(net):
    net.a.weight.data = net.b.weight.data


def piece(net):
    net.part = nn.Parameter(net.a.weight.data[1:3, :2])


def buffer(net):
    net.register_buffer("shown", net.a.weight.data[1])


def attribute(net):
    net.shown = net.a.weight.data


def listed(net):
    net.shown = [net.a.weight.data.t()]


def on_meta(net):
    tied_by_data(net.to("meta"))


@pytest.mark.parametrize("share", [tied_by_data, piece, buffer, attribute, listed, on_meta])
def test_memory_that_would_be_torn_apart_is_refused_by_both_names(share) -> None:
    net = Pair()
    share(net)
    with pytest.raises(ModelError, match="share memory") as caught:
        check_model(net)
    other = {"tied_by_data": "b.weight", "on_meta": "b.weight", "piece": "part"}.get(share.__name__, "shown")
    assert "'a.weight'" in str(caught.value) and f"'{other}'" in str(caught.value)


def columns(net):
    fused = torch.randn(4, 8)
    net.a.weight, net.b.weight = nn.Parameter(fused[:, :4]), nn.Parameter(fused[:, 4:])


def neighbours(net):
    fused = torch.randn(8, 4)
    net.a.weight, net.b.weight = (nn.Parameter(part) for part in fused.chunk(2))


def same_object(net):
    net.b.weight, net.again = net.a.weight, [net.a.weight]
    net.register_buffer("one", torch.ones(3))
    net.a.register_buffer("view", net.one[:2])


def reparametrised(net):
    nn.utils.spectral_norm(net.a)
    nn.utils.parametrizations.weight_norm(net.b)


def without_memory(net):
    net.to("meta")
    net.lazy, net.empty = nn.LazyLinear(3), nn.Parameter(torch.zeros(0, 4))


@pytest.mark.parametrize("share", [columns, neighbours, same_object, reparametrised, without_memory])
def test_memory_that_nobody_shares_or_that_stays_shared_is_fine(share) -> None:
    net = Pair()
    share(net)
    check_model(net)


# --- what others manage -----------------------------------------------------------------------------------------------


def refused(wrap):
    """What check_model says about a Pair that ``wrap`` has wrapped, on a rank."""
    net = Pair()
    try:
        check_model(wrap(net))
    except ModelError as error:
        return str(error)
    return None


def by_ddp(net):
    return nn.Sequential(nn.parallel.DistributedDataParallel(net))


def by_fsdp2(net):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return net


def distributed(net):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net.b.weight = nn.Parameter(distribute_tensor(net.b.weight.detach(), mesh, [Shard(0)]))
    return net


def data_parallel(net):
    return nn.DataParallel(net)


def all_refused():
    return [refused(wrap) for wrap in (by_ddp, by_fsdp2, distributed, data_parallel)]


def test_a_model_that_others_manage_is_refused(ranks) -> None:
    for ddp, fsdp2, tensor, parallel in ranks(all_refused, 2):
        assert "module '0' is wrapped by DistributedDataParallel" in ddp and ".module" in ddp
        assert "the model is wrapped by FSDPModule" in fsdp2 and "fully_shard" in fsdp2
        assert "'b.weight' is a DTensor" in tensor
        assert "the model is wrapped by DataParallel" in parallel


def test_a_parameter_of_an_engine_is_refused() -> None:
    net = Pair()
    show(net.b.weight, net.b.weight.detach().clone(), ParamRecord("head", 0, None))
    with pytest.raises(ModelError, match=r"'0\.b\.weight' is managed by an engine already"):
        check_model(nn.Sequential(net))


# --- what is changed later --------------------------------------------------------------------------------------------


def replace(net):
    net.b = nn.Linear(4, 4)


def replace_parameter(net):
    net.b.weight = nn.Parameter(torch.zeros(4, 4))


def replace_behind(net):
    net._modules["b"] = nn.Linear(4, 4)


def wrap(net):
    net.b = nn.Sequential(net.b, nn.Linear(4, 4))


def add(net):
    net.a.register_parameter("scale", nn.Parameter(torch.ones(4)))


def fill(net):
    net.none.bias = nn.Parameter(torch.ones(4))


def delete(net):
    del net.blocks[1]


def tie(net):
    net.b.weight = net.a.weight


NAMED = {
    replace: "parameters 'b.weight', 'b.bias' are another",
    replace_parameter: "parameter 'b.weight' is another",
    replace_behind: "parameters 'b.weight', 'b.bias' are another",
    wrap: "'b.0.weight', 'b.0.bias', 'b.1.weight' and 1 more are new, parameters 'b.weight', 'b.bias' are gone",
    add: "parameter 'a.scale' is new",
    fill: "parameter 'none.bias' is new",
    delete: "parameters 'blocks.1.weight', 'blocks.1.bias' are another",
    tie: "parameter 'b.weight' is another",
}


@pytest.mark.parametrize("change", NAMED)
def test_a_changed_model_is_named(change) -> None:
    net = Pair()
    net.none, net.blocks = nn.Linear(4, 4, bias=False), nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    held = HeldParameters(net)
    held.check()
    change(net)
    with pytest.raises(ModelError) as caught:
        held.check()
    assert NAMED[change] in str(caught.value)


def test_what_holds_no_parameter_may_come_and_go() -> None:
    net = Pair()
    held = HeldParameters(net)
    net.metric, net.extra = nn.Identity(), None
    held.check()
    net.metric.weight = nn.Parameter(torch.ones(1))  # now it does
    with pytest.raises(ModelError, match=r"'metric\.weight' is new"):
        held.check()
    del net.metric
    held.check()


def test_tensors_lent_for_one_call_are_none_of_our_business() -> None:
    net = Pair()
    held, seen = HeldParameters(net), []
    net.register_forward_pre_hook(lambda module, args: seen.append(held.check()))
    lent = {"a.weight": torch.zeros(4, 4), "b.bias": torch.ones(4)}
    out = functional_call(net, lent, torch.ones(1, 4))
    torch.testing.assert_close(out, net.b(net.a.bias[None]) - net.b.bias + 1)
    assert seen == [None]
    held.check()
