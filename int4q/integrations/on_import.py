"""Plugging into a library when it is imported, so that it does not matter who comes first.

transformers finds the quantizer of a checkpoint in a table of its own. int4q puts its quantizer
there without importing transformers, which takes a while and may not be wanted.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

BRIDGES = {"transformers.quantizers.auto": "int4q.integrations.transformers_quantizer"}
"""Module of another library -> the module of int4q to import right after it."""


def connect() -> None:
    """Import the bridges to what is imported already, the others when it comes to that."""
    for library, bridge in BRIDGES.items():
        if library in sys.modules:
            importlib.import_module(bridge)
        else:
            sys.meta_path.insert(0, _Finder(library, bridge))


class _Finder(MetaPathFinder):
    """Finds one module, as the finders after it do, once, and has a bridge imported after it."""

    def __init__(self, library: str, bridge: str):
        self.library, self.bridge = library, bridge

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.library:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.bridge)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, bridge: str):
        self.loader, self.bridge = loader, bridge

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.bridge)
