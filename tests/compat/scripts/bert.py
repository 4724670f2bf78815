"""A BERT script as DeepSpeed's users write it: masked words, LAMB, fp16, checkpoints with the state of the script."""

import argparse
import json
import os

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.runtime.dataloader import RepeatingLoader
from deepspeed.runtime.lr_schedules import WarmupDecayLR
from deepspeed.utils import log_dist, logger
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

WORDS, LENGTH, MASK = 40, 16, 3


class Bert(nn.Module):
    def __init__(self, width, layers, checkpoint_activations):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(
            [nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True) for _ in range(layers)]
        )
        self.head = nn.Linear(width, WORDS)
        self.checkpoint_activations = checkpoint_activations

    def forward(self, ids, labels):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = deepspeed.checkpointing.checkpoint(layer, x) if self.checkpoint_activations else layer(x)
        return F.cross_entropy(self.head(x).float().flatten(0, 1), labels.flatten(), ignore_index=-100)


class Sentences(torch.utils.data.Dataset):
    def __init__(self, count):
        draw = torch.Generator().manual_seed(11)
        self.ids = (torch.randint(4, WORDS, (count, 1), generator=draw) + torch.arange(LENGTH)) % (WORDS - 4) + 4
        self.masked = torch.rand(count, LENGTH, generator=draw) < 0.3

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return torch.where(self.masked[i], MASK, self.ids[i]), torch.where(self.masked[i], self.ids[i], -100)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save_dir")
    parser.add_argument("--load_dir")
    parser.add_argument("--checkpoint_activations", action="store_true")
    parser.add_argument("--out", required=True)
    args = deepspeed.add_config_arguments(parser).parse_args()
    deepspeed.init_distributed(dist_backend="gloo")
    device = torch.device(deepspeed.get_accelerator().current_device_name())

    torch.manual_seed(1)
    model = Bert(32, 3, args.checkpoint_activations)
    if args.checkpoint_activations:
        deepspeed.checkpointing.configure(None, deepspeed_config=args.deepspeed_config)
    no_decay = ["bias", "norm"]
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if not any(each in n for each in no_decay)], "weight_decay": 0.01},
        {"params": [p for n, p in named if any(each in n for each in no_decay)], "weight_decay": 0.0},
    ]
    model, optimizer, _, scheduler = deepspeed.initialize(args=args, model=model, model_parameters=groups)
    assert isinstance(scheduler, WarmupDecayLR)
    data = Sentences(48)
    sampler = DistributedSampler(data, shuffle=False)
    loader = RepeatingLoader(
        DataLoader(data, batch_size=model.train_micro_batch_size_per_gpu(), sampler=sampler, drop_last=True)
    )
    step = 0
    if args.load_dir:
        _, client_state = model.load_checkpoint(load_dir=args.load_dir)
        step = client_state["checkpoint_step"]
        for _ in range(step * model.gradient_accumulation_steps()):
            next(loader)
    losses, total = [], 0.0
    while step < args.steps:
        ids, labels = (each.to(device) for each in next(loader))
        loss = model(ids, labels=labels)
        model.backward(loss)
        reduced = loss.detach().clone()
        deepspeed.comm.all_reduce(reduced, op=deepspeed.comm.ReduceOp.SUM)
        total += reduced.item() / deepspeed.comm.get_world_size() / model.gradient_accumulation_steps()
        boundary = model.is_gradient_accumulation_boundary()
        model.step()
        if boundary:
            step += 1
            losses.append(total)
            total = 0.0
            log_dist(f"step {step}: loss {losses[-1]}, lr {scheduler.get_last_lr()}", ranks=[0])
            if args.save_dir and step == args.steps // 2:
                model.save_checkpoint(save_dir=args.save_dir, client_state={"checkpoint_step": step})
    logger.info("done")
    found = {
        "losses": losses,
        "rates": scheduler.get_last_lr(),
        "scale": optimizer.cur_scale,
        "skipped": model.skipped_steps,
        "steps": model.global_steps,
    }
    if deepspeed.comm.get_rank() == 0:
        if args.save_dir:
            assert os.path.exists(os.path.join(args.save_dir, "latest"))
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            state = get_fp32_state_dict_from_zero_checkpoint(args.save_dir)
            assert {value.dtype for value in state.values()} == {torch.float32}
            found["saved"] = {name: value.double().norm().item() for name, value in state.items()}
        with open(args.out, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main()
