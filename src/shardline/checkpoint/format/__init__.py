"""The files of a checkpoint and their safety. Nothing here imports torch.distributed."""
