"""Imports point down one list only; read from the source, not from what happens to be loaded."""

import ast
from pathlib import Path

import int4q

ROOT = Path(int4q.__file__).parent
# Each entry may import from those above it, and from itself.
ORDER = ["_version", "errors", "geometry", "packing", "kernels", "qparams", "gptq", "ops",
         "tensor", "q4gsw", "coverage", "calibration", "run", "config", "quantize", "moe",
         "prepare", "layouts", "report", "checkpoint", "export", "evaluation", "integrations",
         "bench", "tuning", "cli", "__main__"]  # fmt: skip
KERNELS_TOP = "table"  # in kernels/, only the table of kernels imports the kernels


def modules():
    return sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "int4q")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module.split(".")[0] != "int4q":
                continue
            yield from (f"{node.module}.{a.name}" for a in node.names)


def layer(name: str) -> int:
    part = name.split(".")[1]
    assert part in ORDER, f"{part} has no place in the list of layers"
    return ORDER.index(part)


def test_imports_point_down():
    for path in modules():
        own = "int4q." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in imports(path):
            public = name == "int4q" or hasattr(int4q, name.removeprefix("int4q."))
            if public and layer(own) >= ORDER.index("bench"):
                continue  # what is built on the package may use it as users do
            assert layer(name) <= layer(own), f"{own} imports {name}"


def test_kernels_do_not_know_the_table():
    for path in (ROOT / "kernels").glob("*.py"):
        if path.stem != KERNELS_TOP:
            assert not any(n.startswith("int4q.kernels.table") for n in imports(path)), path


def test_no_assert_on_user_input():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}"
