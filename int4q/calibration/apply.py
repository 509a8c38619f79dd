"""One weight by int4q's own algorithms: with what a calibration knows of its inputs, or without."""

from __future__ import annotations

from torch import Tensor

from int4q import errors, gptq, qparams
from int4q.calibration.moments import Calibration

ALGORITHMS = ("search", "gptq", "auto")
"""Those that can use a calibration."""


def quantize(
    w: Tensor, group_size: int, algorithm: str, calibration: Calibration | None, name: str
) -> tuple[Tensor, Tensor, Tensor, str | None]:
    """``qdata``, ``scale`` and ``zero_point`` as :func:`int4q.qparams.quantize` gives them.

    And, if something about the weight is to be said, what it is: "<name> is ...".

    Args:
        w: ``[N, K]`` or ``[E, N, K]``.
        group_size: divides K.
        algorithm: one of ``ALGORITHMS``.
        calibration: of the model that holds the weight.
        name: of the weight there.

    Raises:
        ValueError: ``"gptq"`` without any Hessian, moments of another shape, NaN or Inf in ``w``.
    """
    moments = None if calibration is None else calibration.get(name)
    importance = None if moments is None else moments.mean_square
    note = None
    if calibration is not None and moments is None:
        note = "quantised without importance: the calibration has nothing on its inputs"
    if algorithm == "auto":
        # Without importance a search clips what may matter most. It pays in small groups only.
        alone = "search" if group_size == 32 else "refit"
        algorithm = alone if moments is None else "search"
    if algorithm == "gptq":
        if calibration is None or not calibration.has_hessians:
            raise errors.value(
                'int4_choose_qparams_algorithm="gptq" needs a calibration with Hessians',
                calibration,
                "Pass calibration=int4q.calibrate(model, data, statistics='hessian') to "
                "int4q.quantize_",
            )
        if moments is not None and moments.hessian is not None:
            q, s, z, how = gptq.quantize(w, group_size, moments.hessian, moments.tokens)
            return q, s, z, how and f"quantised {how}"
        note = "quantised by search: the calibration has no Hessian of its inputs"
        algorithm = "search"
    return *qparams.quantize(w, group_size, algorithm, importance), note
