"""Which children a module calls with one and the same activation, read from its source."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator

from torch import nn

_Block = tuple[int, ...]
"""Where a statement stands: which branch of which compound statement, from the outside in."""
_ANY = ""
"""Stands for every variable: what is changed in place may be a view of any."""


@functools.cache
def calls_of_one_input(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Names of the children that ``cls.forward`` calls with one and the same variable, in groups.

    ``self.q_proj(x)`` and ``self.k_proj(x)`` make a group where both stand in the same block of
    code, each child is called once, and nothing between them assigns ``x``, changes anything in
    place or passes ``x`` to other code. Without source there are no groups.
    """
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return ()
    groups: dict[object, list[str]] = {}
    changes: Counter[str] = Counter()
    for node, block in _in_order(function, ()):
        if (call := _child_call(node)) is not None:
            child, variable = call
            when = variable, block, changes[variable], changes[_ANY]
            groups.setdefault(when, []).append(child)
        else:
            changes.update(_changed(node))
    calls = Counter(child for group in groups.values() for child in group)
    once = (tuple(child for child in group if calls[child] == 1) for group in groups.values())
    return tuple(group for group in once if len(group) > 1)


def _in_order(node: ast.AST, block: _Block) -> Iterator[tuple[ast.AST, _Block]]:
    """Nodes in the order of evaluation: operands first, and a value before its targets."""
    for _, value in sorted(ast.iter_fields(node), key=lambda field: field[0] != "value"):
        items = value if isinstance(value, list) else [value]
        branches = bool(items) and isinstance(items[0], ast.stmt)
        for item in items:
            if isinstance(item, ast.AST):
                yield from _in_order(item, (*block, id(value)) if branches else block)
    yield node, block


def _changed(node: ast.AST) -> list[str]:
    """The variables that a node assigns, may change in place, or passes to code not seen here."""
    if isinstance(node, ast.Name):
        return [] if isinstance(node.ctx, ast.Load) else [node.id]
    if isinstance(node, (ast.AugAssign, ast.Subscript, ast.Attribute)):
        return [] if isinstance(getattr(node, "ctx", None), ast.Load) else [_ANY]
    if not isinstance(node, ast.Call):
        return []
    arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
    passed = [name for argument in arguments for name in _names(argument)]
    in_place = isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_")
    return [_ANY, *passed] if in_place else passed


def _names(argument: ast.AST) -> list[str]:
    """The variables that an argument hands over as they are, in tuples and the like too."""
    if isinstance(argument, ast.Name):
        return [argument.id]
    if isinstance(argument, (ast.Starred, ast.Tuple, ast.List, ast.Set, ast.Dict)):
        return [name for item in ast.iter_child_nodes(argument) for name in _names(item)]
    return []


def _child_call(node: ast.AST) -> tuple[str, str] | None:
    """``(child, variable)`` of ``self.child(variable)``."""
    if not isinstance(node, ast.Call) or node.keywords or len(node.args) != 1:
        return None
    called, variable = node.func, node.args[0]
    if not isinstance(called, ast.Attribute) or not isinstance(variable, ast.Name):
        return None
    is_own = isinstance(called.value, ast.Name) and called.value.id == "self"
    return (called.attr, variable.id) if is_own else None
