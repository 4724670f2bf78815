"""What ``import deepspeed`` finds where Shardline stands in: its folder is put on the path of a run, and no other."""

from shardline.compat.deepspeed.finder import stand_in

stand_in()
