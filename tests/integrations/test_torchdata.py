"""torchdata's StatefulDataLoader beside an engine: with workers, shuffling and augmentation it goes on where it was."""

from __future__ import annotations

import pytest
import torch

import shardline
from tests.integrations.clients import needs

pytestmark = needs("torchdata")


class Noisy(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.inputs = torch.randn(26, 8, generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index):
        return index, self.inputs[index]


class Stream(torch.utils.data.IterableDataset):
    """Keeps its own position, which torchdata asks for in the worker."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self):
        while self.next < 26:
            self.next += 1
            yield self.next - 1, torch.full((8,), float(self.next))
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def start(kind, workers, folder=None):
    from torchdata.stateful_dataloader import StatefulDataLoader

    # by the global generator: one that it is given torchdata does not restore without workers
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    loader = StatefulDataLoader(kind(), batch_size=4, num_workers=workers, shuffle=kind is Noisy or None)
    config = {
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, "zero_optimization": {"stage": 3},
        "checkpoint": {"dir": folder, "resume": "auto"} if folder else {},
    }  # fmt: skip
    engine = shardline.initialize(model=torch.nn.Linear(8, 4), config=config)[0]
    return engine, engine.register_loader(loader)


def train(engine, loader, micro_steps, save_at=None, folder=None):
    seen = []
    while engine.micro_steps < micro_steps:
        for index, inputs in loader:
            if engine.micro_steps == save_at:
                engine.save_checkpoint(folder)
            seen.append(index.tolist())
            engine.backward(engine(inputs).square().mean())
            engine.step()
            if engine.micro_steps >= micro_steps:
                break
    return seen


def interrupted(folder, kind, workers, save_at):
    engine, loader = start(kind, workers)
    seen = train(engine, loader, 20, save_at, folder)
    straight = engine.full_state_dict()
    engine.destroy()
    engine, loader = start(kind, workers, folder)
    begun = engine.micro_steps
    again = seen[:begun] + train(engine, loader, 20)
    resumed = engine.full_state_dict()
    engine.destroy()
    return begun, seen == again, all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("kind", [Noisy, Stream])
@pytest.mark.parametrize(("workers", "save_at"), [(0, 5), (2, 5), (0, 14), (2, 14)])
def test_a_resume_sees_the_batches_that_were_not_trained(ranks, tmp_path, kind, workers, save_at):
    """Inside a window, and at the end of an epoch of 7 batches."""
    for begun, same, equal in ranks(interrupted, 2, str(tmp_path), kind, workers, save_at):
        assert begun == save_at // 2 * 2 and same and equal
