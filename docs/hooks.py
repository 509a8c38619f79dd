"""Hooks of the site: the list of ops is read from the package, so that it cannot be out of date."""

import torch

import int4q  # noqa: F401  (defines the ops)

OPS = "<!-- ops -->"


def schemas() -> list[str]:
    """The schema of every op in the namespace ``int4q``, sorted."""
    found = torch._C._jit_get_all_schemas()
    return sorted(str(s).removeprefix("int4q::") for s in found if s.name.startswith("int4q::"))


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Put the schemas where a page asks for them."""
    return markdown.replace(OPS, "\n".join(["```text", *schemas(), "```"]))
