"""A GAN as DeepSpeed's users train it: two engines, of which the generator's loss goes through both."""

import argparse
import json

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

NOISE, WIDTH = 8, 24


def generator():
    return nn.Sequential(nn.Linear(NOISE, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Tanh())


def discriminator():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2),
                         nn.Linear(WIDTH, 1))  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", required=True)
    args = deepspeed.add_config_arguments(parser).parse_args()
    deepspeed.init_distributed()
    device = torch.device(get_accelerator().current_device_name())
    torch.manual_seed(2)
    netG, netD = generator(), discriminator()
    optimizerD = torch.optim.Adam(netD.parameters(), lr=2e-3, betas=(0.5, 0.999))
    optimizerG = torch.optim.Adam(netG.parameters(), lr=2e-3, betas=(0.5, 0.999))
    model_engineD, optimizerD, _, _ = deepspeed.initialize(
        args=args, model=netD, model_parameters=netD.parameters(), optimizer=optimizerD
    )
    model_engineG, optimizerG, _, _ = deepspeed.initialize(
        args=args, model=netG, model_parameters=netG.parameters(), optimizer=optimizerG
    )
    half = torch.float16 if model_engineG.fp16_enabled() else torch.float32
    criterion = nn.BCEWithLogitsLoss()
    draw = torch.Generator().manual_seed(100 + torch.distributed.get_rank())
    size = model_engineD.train_micro_batch_size_per_gpu()
    lossesD, lossesG = [], []
    for _ in range(args.steps):
        # the discriminator: real, then fake
        model_engineD.zero_grad()
        real = torch.randn(size, WIDTH, generator=draw).to(device).to(half)
        output = model_engineD(real)
        errD_real = criterion(output.float(), torch.ones(size, 1, device=device))
        model_engineD.backward(errD_real)
        noise = torch.randn(size, NOISE, generator=draw).to(device).to(half)
        fake = model_engineG(noise)
        output = model_engineD(fake.detach())
        errD_fake = criterion(output.float(), torch.zeros(size, 1, device=device))
        model_engineD.backward(errD_fake)
        model_engineD.step()
        # the generator
        model_engineG.zero_grad()
        output = model_engineD(fake)
        errG = criterion(output.float(), torch.ones(size, 1, device=device))
        model_engineG.backward(errG)
        model_engineG.step()
        both = torch.stack([errD_real + errD_fake, errG]).detach()
        torch.distributed.all_reduce(both)
        lossesD.append(both[0].item() / torch.distributed.get_world_size())
        lossesG.append(both[1].item() / torch.distributed.get_world_size())
    if torch.distributed.get_rank() == 0:
        with open(args.out, "w") as file:
            json.dump({"D": lossesD, "G": lossesG, "skipped": model_engineD.skipped_steps}, file)


if __name__ == "__main__":
    main()
