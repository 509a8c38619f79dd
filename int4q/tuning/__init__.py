"""``int4q.tune()``: the fastest tile of every Triton kernel on this GPU."""

from int4q.tuning.families import FAMILIES
from int4q.tuning.search import ROWS, tune

__all__ = ["FAMILIES", "ROWS", "tune"]
