"""One-line builders of the errors users see: the rule, the value, the fix.

Every builder *returns* the exception, so that a call site reads ``raise errors.value(...)``
and the traceback ends where the check is.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def value(rule: str, got: object, fix: str = "") -> ValueError:
    """``ValueError``: "<rule>, got <got>[. <fix>]"."""
    return ValueError(_text(rule, got, fix))


def type_(rule: str, got: object, fix: str = "") -> TypeError:
    """``TypeError``: "<rule>, got <got>[. <fix>]"."""
    return TypeError(_text(rule, got, fix))


def _text(rule: str, got: object, fix: str) -> str:
    return f"{rule}, got {got}" + (f". {fix}" if fix else "")


def dtypes(allowed: tuple[torch.dtype, ...]) -> str:
    """``(torch.float32, torch.bfloat16)`` -> ``"float32 or bfloat16"``."""
    return " or ".join(str(d).removeprefix("torch.") for d in allowed)


def dims(shape: Iterable[int]) -> str:
    """``torch.Size([4, 2])`` -> ``"[4, 2]"``."""
    return "[" + ", ".join(str(s) for s in shape) + "]"
