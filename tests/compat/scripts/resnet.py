"""An ImageNet script as DeepSpeed's users write it: residual network, SGD, a schedule of torch's, resume."""

import argparse
import json
import os

import deepspeed
import deepspeed.comm as dist
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


class Block(nn.Module):
    def __init__(self, width_in, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.short = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + self.short(x)).relu()


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 8, 1), Block(8, 16, 2),
        Block(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def dataset(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    centres = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(centres[labels] + 0.3 * torch.randn(count, 3, 8, 8, generator=generator), labels)


def accuracy(output, target, topk=(1,)):
    with torch.no_grad():
        _, pred = output.topk(max(topk), 1, True, True)
        correct = pred.t().eq(target.view(1, -1).expand_as(pred.t()))
        return [correct[:k].reshape(-1).float().sum(0) * 100.0 / target.size(0) for k in topk]


def average(value, device):
    total = torch.tensor([float(value)], dtype=torch.float32, device=device)
    dist.all_reduce(total, dist.ReduceOp.SUM, async_op=False)
    return total.item() / dist.get_world_size()


def train(loader, model, criterion, device, half):
    losses = []
    model.train()
    for images, target in loader:
        output = model(images.to(device).to(half))
        loss = criterion(output.float(), target.to(device))
        acc1, acc5 = accuracy(output, target.to(device), topk=(1, 5))
        assert acc5 >= acc1
        model.backward(loss)
        model.step()
        losses.append(average(loss, device))
    return losses


def validate(loader, model, device, half):
    model.eval()
    seen = []
    with torch.no_grad():
        for images, target in loader:
            (acc1,) = accuracy(model(images.to(device).to(half)), target.to(device))
            seen.append(acc1.item())
    return average(sum(seen) / len(seen), device)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--resume", default="")
    parser.add_argument("--save", default="")
    parser.add_argument("--out", required=True)
    args = deepspeed.add_config_arguments(parser).parse_args()
    deepspeed.init_distributed()
    torch.manual_seed(4)
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    model, optimizer, _, _ = deepspeed.initialize(
        args=args, model=model, model_parameters=filter(lambda p: p.requires_grad, model.parameters()),
        optimizer=optimizer,
    )  # fmt: skip
    device = model.device
    half = torch.half if model.fp16_enabled() else torch.bfloat16 if model.bfloat16_enabled() else torch.float32
    criterion = nn.CrossEntropyLoss().to(device)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.1)
    first = 0
    if args.resume:
        path, state = model.load_checkpoint(args.resume, tag="epoch1")
        assert os.path.isdir(path), path
        first = state["epoch"]
        scheduler.load_state_dict(state["scheduler"])
    sampler = DistributedSampler(dataset(40, 1))
    size = model.train_micro_batch_size_per_gpu()
    loader = DataLoader(dataset(40, 1), batch_size=size, sampler=sampler, num_workers=0)
    val_loader = DataLoader(dataset(20, 2), batch_size=size, shuffle=False)
    losses = []
    for epoch in range(first, args.epochs):
        sampler.set_epoch(epoch)
        losses += train(loader, model, criterion, device, half)
        acc1 = validate(val_loader, model, device, half)
        scheduler.step()
        if args.save:
            state = {"epoch": epoch + 1, "best_acc1": acc1, "scheduler": scheduler.state_dict()}
            model.save_checkpoint(args.save, tag=f"epoch{epoch + 1}", client_state=state)
    found = {"losses": losses, "accuracy": acc1, "rate": optimizer.param_groups[0]["lr"]}
    if dist.get_rank() == 0:
        with open(args.out, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main()
