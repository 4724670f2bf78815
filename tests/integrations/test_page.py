"""The Python of docs/integrations.md runs, on two ranks, around tiny models."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F

from tests.integrations.clients import (
    common,
    dataset,
    fresh,
    gpt,
    needs,
    net,
    rows_of_rank,
    texts,
    under_torchrun,
)
from tests.integrations.table import PAGE

pytestmark = needs("transformers", "accelerate", "lightning", "trl")
BLOCK = re.compile(r"<!-- not run: needs (\w+) -->\n```python\n(.*?)```", re.DOTALL)


def code(package, number=0):
    """The block of that number among those that need ``package``."""
    return [block for name, block in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if name == package][number]


def pretrained(out):
    import transformers

    if not torch.distributed.get_rank():
        gpt().save_pretrained(out)
    torch.distributed.barrier()
    names = {"transformers": transformers, "torch": torch}
    exec(compile(code("transformers", 1).replace("folder-or-name", out), "docs/integrations.md", "exec"), names)
    shapes = {name: param.shape for name, param in names["model"].named_parameters()}
    assert shapes == {name: param.shape for name, param in gpt().named_parameters()}


def trainer(out):
    import transformers
    import trl

    fresh()
    arguments = transformers.TrainingArguments(**common(out, num_train_epochs=1))
    names = {"trl": trl, "model": gpt(), "arguments": arguments, "data": texts(1, 8)}
    exec(compile(code("transformers"), "docs/integrations.md", "exec"), names)
    assert names["trainer"].state.global_step == 1
    assert issubclass(names["MyTrainer"], trl.SFTTrainer)
    names["trainer"].engine.destroy()


def accelerator():
    fresh()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    loader = torch.utils.data.DataLoader(dataset(), batch_size=4)
    names = {"model": model, "optimizer": optimizer, "loader": loader, "scheduler": scheduler}
    exec(compile(code("accelerate"), "docs/integrations.md", "exec"), names)
    assert names["model"] is model and names["accelerator"].engine_of(model) is not None
    for x, y in names["loader"]:
        with names["accelerator"].accumulate(model):
            names["accelerator"].backward(F.mse_loss(model(x), y))
            names["optimizer"].step()
            names["optimizer"].zero_grad()
    names["accelerator"].free_memory(model)


def strategies():
    under_torchrun()
    model = net()
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    exec(compile(code("lightning").replace("devices=2", "accelerator='cpu', devices=2"), "page", "exec"), names)
    x, y = rows_of_rank()[0]
    names["fabric"].backward(F.mse_loss(names["model"](x), y))
    names["optimizer"].step()
    (engine,) = names["fabric"].strategy.engines
    assert engine.global_steps == 1
    engine.destroy()


def test_every_block_runs(ranks, tmp_path) -> None:
    found = [name for name, _ in BLOCK.findall(PAGE.read_text(encoding="utf-8"))]
    assert found == ["transformers", "transformers", "accelerate", "lightning"]
    ranks(pretrained, 2, str(tmp_path / "model"))
    ranks(trainer, 2, str(tmp_path), timeout=200)
    ranks(accelerator, 2)
    ranks(strategies, 2, timeout=200)
