"""Optional features, which register with the core: compilation, recomputation, offload, models on ``meta``."""
