"""The only package that calls collectives: transitions of flat buffers, one vector a step, and set-up messages."""

from __future__ import annotations

from shardline.comm.comm import Comm
from shardline.comm.exchange import Exchange, check_alike
from shardline.comm.groups import Group
from shardline.comm.log import TransitionLog, digest
from shardline.comm.transport import DONE, Work

__all__ = ["DONE", "Comm", "Exchange", "Group", "TransitionLog", "Work", "check_alike", "digest"]
