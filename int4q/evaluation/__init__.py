"""How far a quantised language model is from the original."""

from int4q.evaluation.layers import Layer, compare_layers
from int4q.evaluation.measure import Evaluation, evaluate

__all__ = ["Evaluation", "Layer", "compare_layers", "evaluate"]
