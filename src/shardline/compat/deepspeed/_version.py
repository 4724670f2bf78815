"""The DeepSpeed whose names these are: what clients compare with the versions that they need."""

VERSION = "0.19.8"
