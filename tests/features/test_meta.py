"""Filling a model on meta: the numbers of its ordinary construction, a module at a time, and nothing left unwritten."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shardline.errors import ModelError, UsageError
from shardline.features.meta import empty_weights, fill, is_on_meta
from tests.models import LateInit, Orphan


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))


class Tied(nn.Module):
    """The head's reset draws numbers although its weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.last = nn.Linear(4, 4)
        self.head.weight = self.embed.weight


class Attention(nn.Module):
    """MultiheadAttention resets its child's weights itself, after the child has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16)


class Cached(nn.Module):
    """Computes a buffer in its reset, next to a buffer that holds no floats."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.empty(4))
        self.register_buffer("count", torch.empty((), dtype=torch.int64), persistent=False)
        self.weight = nn.Parameter(torch.empty(4, dtype=torch.float64), requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.angles.copy_(torch.arange(4.0))
        self.count.fill_(3)
        nn.init.normal_(self.weight)


class Store:
    """Where the engine keeps values: takes whole parameters, and gives them back."""

    def __init__(self, model: nn.Module) -> None:
        self.params = dict(model.named_parameters())
        self.values = {name: param.detach().clone() for name, param in self.params.items() if not param.is_meta}
        self.taken: list[str] = []

    def store(self, name: str) -> None:
        self.taken.append(name)
        self.values[name] = self.params[name].detach().clone()

    def fetch(self, name: str) -> torch.Tensor:
        return self.values[name]

    def put(self, name: str, start: int, elements: torch.Tensor) -> None:
        self.values[name].view(-1)[start : start + elements.numel()] = elements


def fill_from(model, init_fn=None):
    """The values of the parameters of ``model`` after it was filled, by name."""
    kept = Store(model)
    torch.manual_seed(0)
    fill(model, {param: name for name, param in kept.params.items()}, kept, init_fn)
    assert not is_on_meta(model)
    return kept.values


def filled(build, init_fn=None):
    """The model built on meta and filled, and the values of its parameters."""
    with torch.device("meta"):
        model = build()
    assert is_on_meta(model)
    return model, fill_from(model, init_fn)


def assert_as_constructed(build, model, values) -> None:
    torch.manual_seed(0)
    expected = build()
    for name, want in expected.named_parameters():
        got = values[name]
        assert torch.equal(got, want) and got.dtype is want.dtype, name
        assert model.get_parameter(name).requires_grad == want.requires_grad, name
    for (name, got), (_, want) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("build", [LateInit, Norms, Tied, Attention, Cached])
def test_the_numbers_of_the_ordinary_construction(build) -> None:
    assert_as_constructed(build, *filled(build))


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Embedding(7, 4, padding_idx=2),
        lambda: nn.LSTM(4, 5, 2, bidirectional=True, proj_size=2),
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True),
        lambda: nn.TransformerDecoderLayer(8, 2, 16),
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        lambda: nn.AdaptiveLogSoftmaxWithLoss(16, 20, [5, 10]),
        lambda: nn.Sequential(nn.Bilinear(3, 4, 5), nn.ConvTranspose1d(3, 4, 3), nn.GRUCell(3, 4), nn.PReLU(3)),
    ],
)
def test_layers_of_torch(build) -> None:
    assert_as_constructed(build, *filled(build))


# --- a model's own initialiser ----------------------------------------------------------------------------------------


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4, padding_idx=3)


class Applied(nn.Module):
    """As nanoGPT: the constructor ends with ``apply``, and reaches into children."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.blocks = Embeds(), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 9, bias=False)
        if tied:
            self.head.weight = self.embed.words.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                module.bias.data.fill_(0.5)
        elif isinstance(module, Embeds):
            nn.init.normal_(module.words.weight, std=0.3)


class Outer(nn.Module):
    """One such model in another, whose own initialiser comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Applied(), nn.Linear(4, 4)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=2.0)


class Self(nn.Module):
    """An initialiser without arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.empty(4))
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.uniform_(self.scale)
        self.linear.bias.data.zero_()


class Unapplied(nn.Module):
    """An initialiser that users may call, and the constructor does not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=7.0)


class PartlyApplied(Unapplied):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.head.apply(self._init_weights)


@pytest.mark.parametrize("build", [Applied, lambda: Applied(tied=True), Outer, Self, Unapplied, PartlyApplied])
def test_init_weights_runs_where_the_constructor_ran_it(build) -> None:
    model, values = filled(build)
    if build is PartlyApplied:  # what was tried for the other Linear took random numbers
        assert values["linear.weight"].std() < 1.0 < 4.0 < values["head.weight"].std()
    else:
        assert_as_constructed(build, model, values)


class Library(nn.Module):
    """As Hugging Face's: initialised in the constructor but on meta, each module once, and tied after that."""

    std = 0.02

    def post_init(self) -> None:
        if not next(self.parameters()).is_meta:
            self.initialise(self)
        self.tie()

    def initialise(self, module: nn.Module) -> None:
        for child in module.children():
            (child if isinstance(child, Library) else self).initialise(child)
        if not hasattr(module, "_done"):
            self._init_weights(module)
            module._done = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0.0, self.std)
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(0.0, self.std)
            module.weight.data[module.padding_idx].zero_()

    def tie(self) -> None:
        pass


class Trunk(Library):
    """The library's model in another one; its buffer and its parameter are written by its own initialiser alone."""

    std = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear = nn.Embedding(9, 4, padding_idx=3), nn.Linear(4, 4)
        self.token = nn.Parameter(torch.zeros(4))
        self.register_buffer("places", torch.arange(5), persistent=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Trunk):
            module.token.data = torch.full((4,), 0.25)
            module.places.copy_(torch.arange(5))


class LibraryModel(Library):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(), nn.Linear(4, 9, bias=False)
        self.post_init()

    def tie(self) -> None:
        self.head.weight = self.trunk.words.weight


def test_as_a_library_initialises_its_models() -> None:
    """The nearest initialiser, once, past ``.data``, and the padding row of a tied weight stays zero."""
    model, values = filled(LibraryModel)
    assert_as_constructed(LibraryModel, model, values)
    assert not values["trunk.words.weight"][3].any() and model.head.weight is model.trunk.words.weight


# --- what only the constructor knows ----------------------------------------------------------------------------------


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("places", torch.arange(6), persistent=False)
        self.register_buffer("mask", torch.ones(2, 2, dtype=torch.bool).tril())


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.tensor(2.6592))


class Plain(nn.Module):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4), torch.arange(3)


class Scaled(Applied):
    """As GPT-2: some weights get another deviation after ``apply``."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            nn.init.normal_(block.weight, std=0.001)


class Counted(nn.Module):
    """Statistics that do not begin where torch's do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.norm.running_var.fill_(3.0)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (Places, ["places", "mask"]),
        (Scale, ["scale"]),
        (Plain, ["table"]),
        (Scaled, ["blocks.0.weight", "blocks.1.weight"]),
        (Counted, ["norm.running_var"]),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), ["original0", "original1"]),
    ],
)
def test_what_only_the_constructor_knows_is_refused_and_made_by_empty_weights(build, names) -> None:
    with pytest.raises(ModelError, match=r"shardline\.empty_weights\(") as raised:
        filled(build)
    assert all(name in str(raised.value) for name in names) and "linear.weight" not in str(raised.value)
    torch.manual_seed(0)
    with empty_weights(min_numel=1 << 20):  # all of it is small
        model = build()
    assert not is_on_meta(model)
    assert_as_constructed(build, model, Store(model).values)


def test_init_fn_writes_what_cannot_be_repeated() -> None:
    def init_fn(module: nn.Module) -> None:
        if isinstance(module, Scaled):
            for block in module.blocks:
                nn.init.constant_(block.weight, 0.001)

    _, values = filled(Scaled, init_fn)
    assert bool((values["blocks.1.weight"] == 0.001).all()) and 0.2 < values["embed.words.weight"].std() < 0.4


class Half(nn.Module):
    """Small parameters and buffers that say more than their modules' initialisers, beside a large weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 8), nn.Linear(8, 40)
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("places", torch.arange(6))
        self.norm = nn.BatchNorm1d(8)
        self.head.weight = self.embed.weight
        nn.init.constant_(self.head.bias, -2.0)
        self.norm.running_mean.fill_(4.0)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


def test_empty_weights_leaves_large_parameters_alone_and_filling_the_others() -> None:
    with empty_weights(min_numel=300):
        model = Half()
    assert [name for name, param in model.named_parameters() if param.is_meta] == ["embed.weight"]
    assert model.head.weight is model.embed.weight and not any(buffer.is_meta for buffer in model.buffers())
    values = fill_from(model)
    assert 0.015 < values["embed.weight"].std() < 0.025
    assert values["scale"] == 2.5 and bool((values["head.bias"] == -2.0).all())
    assert model.places.tolist() == list(range(6)) and bool((model.norm.running_mean == 4.0).all())


def test_empty_weights_ends_and_says_what_it_takes() -> None:
    with pytest.raises(ZeroDivisionError), empty_weights(min_numel=1):
        1 / 0  # noqa: B018
    assert not is_on_meta(nn.Linear(2, 2))
    for wrong in (0, -1, 1.5, True, "1"):
        with pytest.raises(UsageError, match="min_numel"), empty_weights(min_numel=wrong):
            pass


def test_a_weight_that_is_tied_before_a_module_gets_it_stays_tied() -> None:
    with empty_weights(min_numel=4):
        weight = nn.Parameter(torch.zeros(4, 4))
        model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        model[0].weight = model[1].weight = weight
    assert model[0].weight is model[1].weight and model[0].weight.is_meta and not weight.is_meta


class Replaces(nn.Module):
    """Its initialiser makes new tensors instead of writing into the old ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("table", torch.zeros(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.weight = nn.Parameter(torch.arange(3.0))
        self.table = torch.ones(3)


def test_an_initialiser_may_make_new_tensors() -> None:
    with torch.device("meta"):
        model = Replaces()
    weight = model.weight
    values = fill_from(model)
    assert model.weight is weight and values["weight"].tolist() == [0.0, 1.0, 2.0] and model.table.tolist() == [1.0] * 3


class Reshapes(Replaces):
    def reset_parameters(self) -> None:
        self.weight = nn.Parameter(torch.arange(4.0))


def test_but_not_of_another_shape() -> None:
    with torch.device("meta"):
        model = Replaces()
    model.reset_parameters = Reshapes.reset_parameters.__get__(model)
    with pytest.raises(ModelError, match=r"a tensor of \(4,\) .* parameter 'weight' of \(3,\)"):
        fill_from(model)


def test_a_buffer_of_nan_is_written_if_something_writes_it() -> None:
    class Nan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("unknown", torch.empty(3))
            self.reset_parameters()

        def reset_parameters(self) -> None:
            self.unknown.fill_(float("nan"))

    model, _ = filled(Nan)
    assert bool(model.unknown.isnan().all())


def test_parameters_stay_the_objects_they_are_and_ties_ties() -> None:
    with torch.device("meta"):
        model = Tied()
    before = {name: id(param) for name, param in model.named_parameters()}
    model.embed.weight.note = "kept"
    fill_from(model)
    assert {name: id(param) for name, param in model.named_parameters()} == before
    assert model.head.weight is model.embed.weight and model.embed.weight.note == "kept"


def test_initialisers_get_what_they_touch_and_nobody_holds_the_model_whole() -> None:
    with torch.device("meta"):
        model = LateInit()
    here = []

    class Counting(Store):
        def store(self, name: str) -> None:
            with torch._C.DisableTorchFunctionSubclass():
                here.append(sum(param.untyped_storage().nbytes() > 8 for param in self.params.values()))
            super().store(name)

    kept = Counting(model)
    fill(model, {param: name for name, param in kept.params.items()}, kept)
    assert set(here) <= {1, 2}, "one module's weight and bias"


def test_what_nothing_writes_is_named() -> None:
    with pytest.raises(ModelError, match="orphan") as raised:
        filled(Orphan)
    assert "embed" not in str(raised.value) and "init_fn" in str(raised.value)


def test_init_fn_writes_what_reset_does_not_and_sees_modules_as_apply_does() -> None:
    visited = []

    def init_fn(module: nn.Module) -> None:
        visited.append(type(module).__name__)
        if isinstance(module, Orphan):
            nn.init.zeros_(module.orphan)

    _, values = filled(Orphan, init_fn)
    assert bool((values["orphan"] == 0).all())
    expected: list[str] = []
    Orphan().apply(lambda module: expected.append(type(module).__name__))
    assert visited == expected


def test_init_fn_reaches_children_and_what_is_real() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3, device="meta"), nn.Linear(3, 3)))

    def init_fn(module: nn.Module) -> None:
        if len(list(module.children())) == 2 and isinstance(module[1], nn.Linear):
            nn.init.ones_(module[0].bias)
            module[1].bias.mul_(0.0)

    kept = model[0].weight.detach().clone()
    values = fill_from(model, init_fn)
    assert torch.equal(values["0.weight"], kept)
    assert bool((values["1.0.bias"] == 1).all()) and bool((values["1.1.bias"] == 0).all())


def test_a_mixture_keeps_what_is_real() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    kept = Store(model)
    before = dict(kept.values)
    fill(model, {p: n for n, p in model.named_parameters()}, kept)
    assert kept.taken == ["1.weight", "1.bias"]
    assert all(torch.equal(kept.values[name], value) for name, value in before.items())


def test_on_meta_is_any_tensor() -> None:
    assert not is_on_meta(Norms())
    model = Norms()
    model.norm.running_mean = torch.empty(4, device="meta")
    assert is_on_meta(model) and not is_on_meta(SimpleNamespace(parameters=list, buffers=list))
