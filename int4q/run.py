"""One call of ``quantize_``: the names of its modules, what it made, and what it has to say.

A handler that torchao calls sees one module and no more; this is how it learns the rest. Without a
run (torchao's own ``quantize_``) messages come at once and name the module by its ``repr``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from int4q.calibration import Calibration
from int4q.coverage import protected

SKIPPED = "_int4q_skipped"
"""Module attribute: parameter name -> why it was left alone (:func:`int4q.summary` reads it)."""


class Int4SkipWarning(UserWarning):
    """Weights were left alone; the message names them and says why."""


class Run:
    """What one call of :func:`int4q.quantize_` knows about its model.

    Attributes:
        names: of modules, for messages.
        protected: ``id(parameter)`` -> why it stays as it is, see :func:`coverage.protected`.
        made: parameter -> its 4-bit form, so that tied ones stay tied; an entry lasts as long as
            its parameter is held anywhere.
        calibration: what the inputs of the weights look like, if that is known.
    """

    def __init__(self, model: nn.Module, calibration: Calibration | None = None):
        self.calibration = calibration
        self.names = {module: name for name, module in model.named_modules()}
        self.protected = protected(model, self.names)
        self.made = WeakTensorKeyDictionary()
        self._said: dict[str, list[str]] = {}

    def say(self, name: str, what: str) -> None:
        """Note that ``what`` is to be said of the weight ``name``."""
        self._said.setdefault(what, []).append(name)

    def warn(self) -> None:
        """One :class:`Int4SkipWarning` a cause, which names the weights."""
        for what, names in self._said.items():
            warnings.warn(f"{_listed(names)} {what}", Int4SkipWarning, stacklevel=3)


_RUN: ContextVar[Run | None] = ContextVar("int4q_run", default=None)


def current_run() -> Run | None:
    """The run that is under way, if any."""
    return _RUN.get()


@contextmanager
def run_on(model: nn.Module, calibration: Calibration | None = None) -> Iterator[Run]:
    """A :class:`Run` for what is quantised within the ``with`` block."""
    token = _RUN.set(run := Run(model, calibration))
    try:
        yield run
    finally:
        _RUN.reset(token)


def _listed(names: list[str]) -> str:
    """``layers.0.up, layers.1.up, head`` -> ``layers.*.up (2), head are``."""
    patterns: dict[str, list[str]] = {}
    for name in names:
        patterns.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    listed = [
        alike[0] if len(alike) == 1 else f"{pattern} ({len(alike)})"
        for pattern, alike in patterns.items()
    ]
    return f"{', '.join(listed)} {'is' if len(names) == 1 else 'are'}"


def say(name: str, what: str) -> None:
    """Say about a weight that it is ``what``: at the end of the run, or now where there is none."""
    if run := _RUN.get():
        run.say(name, what)
    else:
        warnings.warn(f"{name} is {what}", Int4SkipWarning, stacklevel=3)


def full_name(module: nn.Module, parameter_name: str) -> str:
    """The parameter's name in the model of the run."""
    run = _RUN.get()
    name = run.names.get(module) if run else None
    if name is None:
        return f"{parameter_name} of {module}"
    return f"{name}.{parameter_name}" if name else parameter_name


def skip(module: nn.Module, parameter_name: str, reason: str) -> None:
    """Leave a parameter as it is: said in a warning, and kept for :func:`int4q.summary`."""
    module.__dict__.setdefault(SKIPPED, {})[parameter_name] = reason
    say(full_name(module, parameter_name), f"left alone: {reason}")


def forget(module: nn.Module, parameter_name: str) -> None:
    """The parameter is quantised now: drop an earlier reason."""
    module.__dict__.get(SKIPPED, {}).pop(parameter_name, None)


def reasons(module: nn.Module) -> dict[str, str]:
    """Parameter name -> why it was left alone."""
    return module.__dict__.get(SKIPPED, {})
