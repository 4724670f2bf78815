"""``python -m shardline.compat.deepspeed [-m] SCRIPT ...``: a script written for DeepSpeed, without the launcher."""

from __future__ import annotations

import sys

from shardline.compat.deepspeed.launching import run_command

if __name__ == "__main__":
    run_command(sys.argv[1:])
