"""What the inputs of a model's weights look like: what ``search`` and ``gptq`` weigh errors by."""

from int4q.calibration.collect import calibrate
from int4q.calibration.moments import MIN_TOKENS, Calibration, CalibrationWarning, Moments

__all__ = ["MIN_TOKENS", "Calibration", "CalibrationWarning", "Moments", "calibrate"]
