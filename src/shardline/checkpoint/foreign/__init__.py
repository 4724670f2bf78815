"""Formats of others: DeepSpeed's checkpoints, torch.distributed.checkpoint, Hugging Face's safetensors."""
