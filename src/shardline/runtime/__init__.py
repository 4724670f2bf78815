"""The machine: rank, world, host, device, memory, network. Beside launch/, the only reader of the environment."""
