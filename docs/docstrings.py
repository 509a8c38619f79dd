"""How docstrings become pages: Sphinx's roles, ``:class:`~int4q.Int4Tensor```, as plain code."""

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod):`~?(?:int4q\.)?([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrite the roles of every docstring that is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
