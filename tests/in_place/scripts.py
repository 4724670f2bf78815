"""Training scripts in the form in which people publish them: each runs plain, and in place with one line more.

``shard(model, optimizer)`` is that line. Where a script reads or writes whole weights outside of a forward, stage 3
asks for one more, ``with whole(engine):``; `changed_lines` counts them. Nothing else knows an engine.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import shardline
from tests.in_place.loops import Shard


def whole(engine: Any, *, write: bool = False) -> AbstractContextManager[None]:
    """The line that stage 3 needs around reads of whole weights; of no effect elsewhere."""
    if isinstance(engine, shardline.Engine) and engine.zero_optimization_stage() == 3:
        return engine.gathered_parameters(write=write)
    return nullcontext()


def own_rows(data: Tensor) -> Tensor:
    """This rank's share of a batch."""
    return data[dist.get_rank() :: dist.get_world_size()]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- a GPT with accumulation, an estimate of the loss, and resume -----------------------------------------------------


class GptBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    def __init__(self, vocab: int = 40, width: int = 16, depth: int = 2, length: int = 8) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(GptBlock(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


def gpt(shard: Shard) -> dict[str, Any]:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Gpt()
        decayed = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return model, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-4)

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        ids = own_rows(torch.randint(40, (4, 9), generator=torch.Generator().manual_seed(seed)))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    @torch.no_grad()
    def estimate_loss(model: nn.Module) -> float:
        model.eval()
        losses = [model(*batch(900 + k))[1] for k in range(2)]
        model.train()
        return float(torch.stack(losses).mean())

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, accumulation: int = 2) -> None:
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (step + 1)
            if step % 2 == 0:
                estimates.append(estimate_loss(model))
            for micro in range(accumulation):
                _, loss = model(*batch(10 * step + micro))
                (loss / accumulation).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    estimates: list[float] = []
    model, optimizer = build()
    engine = shard(model, optimizer)
    train(model, optimizer, range(3))
    checkpoint = {"model": engine.full_state_dict(), "optimizer": engine.full_optimizer_state_dict()}
    engine.destroy()

    model, optimizer = build()
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    engine = shard(model, optimizer)
    train(model, optimizer, range(3, 5))
    return {"estimates": estimates, "weights": engine.full_state_dict()}


# -- a language model of LSTMs ----------------------------------------------------------------------------------------


class Lstm(nn.Module):
    def __init__(self, vocab: int = 30, width: int = 16) -> None:
        super().__init__()
        self.encoder, self.rnn = nn.Embedding(vocab, width), nn.LSTM(width, width, num_layers=2)
        self.decoder = nn.Linear(width, vocab)

    def init_hidden(self, rows: int) -> tuple[Tensor, Tensor]:
        weight = next(self.parameters())
        return weight.new_zeros(2, rows, 16), weight.new_zeros(2, rows, 16)

    def forward(self, ids: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, hidden = self.rnn(self.encoder(ids), hidden)
        return F.log_softmax(self.decoder(out).flatten(0, 1), dim=1), hidden


def lstm(shard: Shard) -> dict[str, Any]:
    torch.manual_seed(1)
    model = Lstm()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = shard(model, optimizer)
    text = torch.randint(30, (33, 4), generator=torch.Generator().manual_seed(5))
    text = text[:, dist.get_rank() :: dist.get_world_size()]
    hidden, losses = model.init_hidden(text.shape[1]), []
    for start in range(0, 32, 8):
        hidden = tuple(h.detach() for h in hidden)
        model.zero_grad()
        output, hidden = model(text[start : start + 8], hidden)
        loss = F.nll_loss(output, text[start + 1 : start + 9].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "weights": engine.full_state_dict()}


# -- GAN, and WGAN with a gradient penalty ----------------------------------------------------------------------------


def networks(width: int = 16) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(2)
    generator = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 8), nn.Tanh())
    critic = nn.Sequential(nn.Linear(8, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.Tanh(),
                           nn.Linear(width, 1))  # fmt: skip
    return generator, critic


def gan(shard: Shard) -> dict[str, Any]:
    generator, critic = networks()
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999), eps=1e-3)
    optimizer_d = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.999), eps=1e-3)
    engine_g, engine_d = shard(generator, optimizer_g), shard(critic, optimizer_d)
    losses = []
    for step in range(3):
        real, noise = own_rows(drawn(8, 8, seed=step)), own_rows(drawn(8, 4, seed=50 + step))
        fake = generator(noise)
        optimizer_g.zero_grad()
        loss = F.binary_cross_entropy_with_logits(critic(fake), torch.ones(len(real), 1))
        loss.backward()
        optimizer_g.step()
        optimizer_d.zero_grad()
        loss_real = F.binary_cross_entropy_with_logits(critic(real), torch.ones(len(real), 1))
        loss_real.backward()
        loss_fake = F.binary_cross_entropy_with_logits(critic(fake.detach()), torch.zeros(len(real), 1))
        loss_fake.backward()
        optimizer_d.step()
        losses += [loss_real.item(), loss_fake.item(), loss.item()]
    parameters = [name for name, _ in generator.named_parameters()]  # statistics are each rank's own
    weights = engine_g.full_state_dict()
    return {"losses": losses, "g": {name: weights[name] for name in parameters}, "d": engine_d.full_state_dict()}


def wgan(shard: Shard) -> dict[str, Any]:
    generator, critic = networks()
    generator[1] = nn.Identity()
    optimizer_g = torch.optim.RMSprop(generator.parameters(), lr=1e-3, eps=1e-2)
    optimizer_c = torch.optim.RMSprop(critic.parameters(), lr=1e-3, eps=1e-2)
    engine_g, engine_c = shard(generator, optimizer_g), shard(critic, optimizer_c)
    penalties = []
    for step in range(2):
        for inner in range(2):
            seed = 10 * step + inner
            real, noise = own_rows(drawn(8, 8, seed=seed)), own_rows(drawn(8, 4, seed=50 + seed))
            fake = generator(noise).detach()
            mix = own_rows(torch.rand(8, 1, generator=torch.Generator().manual_seed(seed)))
            between = (mix * real + (1 - mix) * fake).requires_grad_(True)
            scores = critic(between)
            (gradient,) = torch.autograd.grad(scores, between, torch.ones_like(scores), create_graph=True)
            penalty = ((gradient.norm(2, dim=1) - 1) ** 2).mean()
            loss = critic(fake).mean() - critic(real).mean() + 10 * penalty
            optimizer_c.zero_grad()
            loss.backward()
            optimizer_c.step()
            penalties.append(penalty.item())
        optimizer_g.zero_grad()
        (-critic(generator(own_rows(drawn(8, 4, seed=90 + step)))).mean()).backward()
        optimizer_g.step()
    return {"penalties": penalties, "g": engine_g.full_state_dict(), "c": engine_c.full_state_dict()}


# -- PPO --------------------------------------------------------------------------------------------------------------


class Agent(nn.Module):
    """Called by its methods alone; a parameter of its own beside the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
        self.actor = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))
        self.log_std = nn.Parameter(torch.zeros(1, 2))

    def get_value(self, x: Tensor) -> Tensor:
        return self.critic(x)

    def get_action_and_value(self, x: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = self.actor(x)
        normal = torch.distributions.Normal(mean, self.log_std.expand_as(mean).exp())
        return normal.log_prob(action).sum(1), normal.entropy().sum(1), self.critic(x)


def ppo(shard: Shard) -> dict[str, Any]:
    torch.manual_seed(3)
    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2, eps=1e-3)
    engine = shard(agent, optimizer)
    norms = []
    for update in range(2):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - update / 4)
        obs, actions = own_rows(drawn(16, 5, seed=update)), own_rows(drawn(16, 2, seed=20 + update))
        rewards = own_rows(drawn(16, 1, seed=40 + update)).squeeze(1)
        with torch.no_grad():
            old, _, values = agent.get_action_and_value(obs, actions)
            advantages = rewards - values.squeeze(1) + 0.1 * agent.get_value(obs).squeeze(1)
        for _ in range(2):
            for start in range(0, len(obs), 4):
                rows = slice(start, start + 4)
                new, entropy, value = agent.get_action_and_value(obs[rows], actions[rows])
                ratio = (new - old[rows]).exp()
                clipped = torch.clamp(ratio, 0.8, 1.2)
                policy = -torch.min(advantages[rows] * ratio, advantages[rows] * clipped).mean()
                loss = policy - 0.01 * entropy.mean() + 0.5 * ((value.squeeze(1) - rewards[rows]) ** 2).mean()
                optimizer.zero_grad()
                loss.backward()
                norms.append(nn.utils.clip_grad_norm_(agent.parameters(), 0.5).item())
                optimizer.step()
    return {"norms": norms, "weights": engine.full_state_dict()}


# -- moving averages: DDPM with an EMA for sampling, a teacher of its student, MoCo -----------------------------------


class Ema:
    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.shadow = decay, {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, param in model.named_parameters():
            self.shadow[name].lerp_(param.detach(), 1 - self.decay)


def ddpm(shard: Shard) -> dict[str, Any]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(9, 24), nn.SiLU(), nn.Linear(24, 24), nn.SiLU(), nn.Linear(24, 8))
    ema = Ema(model, 0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3)
    engine = shard(model, optimizer)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 20), 0)
    for step in range(4):
        x, noise = own_rows(drawn(8, 8, seed=step)), own_rows(drawn(8, 8, seed=60 + step))
        t = own_rows(torch.randint(20, (8,), generator=torch.Generator().manual_seed(step)))
        noisy = alphas[t].sqrt()[:, None] * x + (1 - alphas[t]).sqrt()[:, None] * noise
        optimizer.zero_grad()
        F.mse_loss(model(torch.cat([noisy, t[:, None] / 20], 1)), noise).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with whole(engine):
            ema.update(model)
    return {"ema": ema.shadow, "weights": engine.full_state_dict()}


def teacher(shard: Shard) -> dict[str, Any]:
    torch.manual_seed(5)
    student = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    mean = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    engine = shard(student, optimizer)
    for step in range(4):
        x = own_rows(drawn(8, 8, seed=step))
        with torch.no_grad():
            target = F.softmax(mean(x) / 0.5, dim=-1)
        optimizer.zero_grad()
        loss = -(target * F.log_softmax(student(x + 0.1), dim=-1)).sum(-1).mean()
        loss.backward()
        optimizer.step()
        with whole(engine), torch.no_grad():
            for ours, theirs in zip(mean.parameters(), student.parameters(), strict=True):
                ours.data.mul_(0.9).add_(theirs.data, alpha=0.1)
    return {"teacher": dict(mean.state_dict()), "weights": engine.full_state_dict()}


class Moco(nn.Module):
    """The key encoder follows the query encoder inside the forward, and a queue holds old keys."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in "qk")
        for q, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            k.data.copy_(q.data)
            k.requires_grad = False
        self.register_buffer("queue", F.normalize(drawn(4, 16, seed=8), dim=0))

    @torch.no_grad()
    def _follow(self) -> None:
        for q, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            k.data = k.data * 0.9 + q.data * 0.1

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        q = F.normalize(self.encoder_q(x), dim=1)
        with torch.no_grad():
            self._follow()
            k = F.normalize(self.encoder_k(other), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone().detach()], dim=1) / 0.2
        keys = [torch.empty_like(k) for _ in range(dist.get_world_size())]
        dist.all_gather(keys, k.contiguous())
        self.queue = torch.cat([torch.cat(keys).T, self.queue], dim=1)[:, :16].contiguous()
        return logits, torch.zeros(len(logits), dtype=torch.long)


def moco(shard: Shard) -> dict[str, Any]:
    torch.manual_seed(6)
    model = Moco()
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    engine = shard(model, optimizer)
    losses = []
    for step in range(4):
        x = own_rows(drawn(8, 8, seed=step))
        loss = F.cross_entropy(*model(x, x + 0.1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "weights": engine.full_state_dict()}


# -- SimCLR, LoRA, image classification -------------------------------------------------------------------------------


class Gathered(torch.autograd.Function):
    """All ranks' rows; the gradient of this rank's, summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        every = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(every, rows.contiguous())
        return torch.cat(every)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def simclr(shard: Shard) -> dict[str, Any]:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-3)
    engine = shard(model, optimizer)
    losses = []
    for step in range(3):
        x = own_rows(drawn(8, 8, seed=step))
        one, other = (Gathered.apply(F.normalize(model(x + shift), dim=1)) for shift in (0.1, -0.1))
        both = torch.cat([one, other])
        similar = both @ both.T / 0.5 - 1e9 * torch.eye(len(both))
        loss = F.cross_entropy(similar, torch.arange(len(both)).roll(len(one)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "weights": engine.full_state_dict()}


class LoraLinear(nn.Linear):
    """Merges its two small matrices into the weight in ``eval()``, and takes them out again in ``train()``."""

    def __init__(self, width: int, rank: int = 2) -> None:
        super().__init__(width, width)
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(rank, width)), nn.Parameter(torch.zeros(width, rank))
        self.weight.requires_grad = False
        self.merged = False

    def train(self, mode: bool = True) -> LoraLinear:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.lora_b @ self.lora_a).detach()
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        return out if self.merged else out + x @ self.lora_a.T @ self.lora_b.T


def lora(shard: Shard) -> dict[str, Any]:
    torch.manual_seed(8)
    model = nn.Sequential(LoraLinear(8), nn.GELU(), LoraLinear(8), nn.GELU(), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)
    engine = shard(model, optimizer)
    evaluated = []
    for step in range(4):
        x, y = own_rows(drawn(8, 8, seed=step)), own_rows(drawn(8, 4, seed=30 + step))
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        with whole(engine, write=True):
            model.eval()
        with torch.no_grad():
            evaluated.append(F.mse_loss(model(x), y).item())
        with whole(engine, write=True):
            model.train()
    return {"evaluated": evaluated, "weights": engine.full_state_dict()}


def images(shard: Shard) -> dict[str, Any]:
    torch.manual_seed(9)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))  # fmt: skip
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD(
        [{"params": matrices, "weight_decay": 1e-3}, {"params": others, "warmup": 4}], lr=0.1, momentum=0.9,
        nesterov=True,
    )  # fmt: skip
    engine = shard(model, optimizer)
    losses, batch = [], 0
    for step in range(4):
        for group in optimizer.param_groups:  # warm-up per group
            group["lr"] = 0.1 * min(1.0, (step + 1) / group.get("warmup", 2))
        accumulation = 1 + step // 2  # it grows
        optimizer.zero_grad()
        for _ in range(accumulation):
            x = own_rows(drawn(8, 3, 6, 6, seed=batch))
            y = own_rows(torch.randint(5, (8,), generator=torch.Generator().manual_seed(batch)))
            loss = F.cross_entropy(model(x), y) / accumulation
            loss.backward()
            losses.append(loss.item())
            batch += 1
        optimizer.step()
    return {"losses": losses, "weights": engine.full_state_dict()}


WHAT: dict[Callable[[Shard], dict[str, Any]], tuple[str, str]] = {
    gpt: (
        "GPT: accumulation, weight decay by group, clipping, estimate of the loss, resume",
        "where it saves: `engine.full_state_dict()` and `engine.full_optimizer_state_dict()`, on every rank",
    ),
    lstm: ("LSTM language model: hidden state carried over, clipping", ""),
    gan: ("GAN: two models, two optimizers, a loss through both, in either order", ""),
    wgan: ("WGAN-GP: a penalty on gradients (double backward)", ""),
    ppo: ("PPO: methods instead of `forward`, a parameter outside of the modules, clipping", ""),
    ddpm: ("DDPM with an EMA for sampling, a schedule, clipping", "around the EMA's update"),
    teacher: ("a teacher that is the EMA of its student", "around the teacher's update"),
    moco: ("MoCo: the key encoder is an EMA inside the forward, a queue", ""),
    simclr: ("SimCLR: negatives gathered from all ranks", ""),
    lora: ("LoRA that merges in `eval()`", "around `model.eval()` and `model.train()`, with `write=True`"),
    images: ("image classification: warm-up by group, growing accumulation", ""),
}
"""The scripts: what is in each, and which lines stage 3 asks for, or saving."""

BY_METHODS = (ppo, ddpm, moco)
"""They give other modules than the model their inputs: in lower precision they need autocast."""


def changed_lines(script: Callable[[Shard], dict[str, Any]]) -> tuple[int, int]:
    """How many lines of ``script`` differ from the plain one at stages 0 to 2, and at stage 3; what saves aside."""
    source = [line.strip() for line in inspect.getsource(script).splitlines()]
    sharding = {line for line in source if "shard(" in line and not line.startswith("def ")}
    calls = sum(line.count("shard(") for line in sharding)  # of each model
    return calls, calls + sum("with whole(" in line for line in source)


def table() -> str:
    """The table of docs/integrations.md."""
    lines = ["| script | stages 0 to 2 | stage 3 | the other lines |", "|---|---|---|---|"]
    for script, (what, others) in WHAT.items():
        lines.append(f"| {what} | {' | '.join(map(str, changed_lines(script)))} | {others} |".replace("|  |", "| |"))
    return "".join(f"{line}\n" for line in lines)
