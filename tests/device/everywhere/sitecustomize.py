"""With this folder first on PYTHONPATH, every Python process has simulated devices, whatever it runs."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))

import tests.device.simulated  # noqa: F401
