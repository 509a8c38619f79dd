"""The figures of an evaluation as a section of a model's card."""

from __future__ import annotations

import re
from pathlib import Path

from int4q import errors
from int4q.checkpoint.files import replaced
from int4q.evaluation.measure import Evaluation

_TITLE = "## Measured with `int4q eval`"
_SECTION = re.compile(rf"\n*^{re.escape(_TITLE)}$.*?(?=^#|\Z)", re.DOTALL | re.MULTILINE)


def check(model: str) -> Path:
    """The card of a model, before anything is measured.

    Args:
        model: its folder.

    Raises:
        ValueError: it has none.
    """
    path = Path(model) / "README.md"
    if not path.is_file():
        raise errors.value("--card is for a folder with a README.md", model)
    return path


def add(path: Path, measured: Evaluation, text: str, window: int) -> None:
    """Put the figures into the card, in place of those that it had.

    Args:
        path: of the card.
        text: what was measured on.
        window: tokens that the model saw at once.
    """
    old = _SECTION.sub("\n\n", path.read_text(encoding="utf-8")).rstrip("\n")
    new = "\n".join([old, "", _TITLE, "", *_lines(measured, text, window), ""])
    with replaced(path) as part:
        part.write_text(new, encoding="utf-8")


def _lines(measured: Evaluation, text: str, window: int) -> list[str]:
    rows = {"perplexity": f"{measured.perplexity:.3f}"}
    if measured.reference_perplexity is not None:
        rows |= {
            "perplexity of the original": f"{measured.reference_perplexity:.3f}",
            "KL(original, this), nats a token": f"{measured.kl:.4f} ± {measured.kl_error:.4f}",
            "same likeliest token": f"{measured.top1:.1%}",
        }
    said = f"{measured.tokens} tokens of {text}, in windows of {window}:"
    return [said, "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]
