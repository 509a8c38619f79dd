"""int4q: 4-bit weights for PyTorch linear and mixture-of-experts layers.

from int4q import Int4WeightOnlyConfig, quantize_
quantize_(model, Int4WeightOnlyConfig(version=2))
"""

from int4q._version import __version__
from int4q.calibration import Calibration, CalibrationWarning, calibrate
from int4q.checkpoint import load_file, load_into_, save_file
from int4q.config import Int4WeightOnlyConfig
from int4q.evaluation import Evaluation, evaluate
from int4q.integrations import dtensor as _dtensor  # noqa: F401  (what it adds to torch)
from int4q.integrations import on_import
from int4q.integrations.adopt import adopt
from int4q.integrations.generation import (
    GraphFallbackWarning,
    cuda_graph_generate,
    drop_cuda_graphs,
)
from int4q.integrations.load import load
from int4q.kernels.core.saved import PlansWarning, save_plans
from int4q.kernels.registry import KernelPreference, kernel_preference
from int4q.layouts import to_coalesced_, to_plain_
from int4q.moe import moe_config
from int4q.prepare import prepare_for_inference_, unprepare_
from int4q.quantize import quantize_
from int4q.report import Summary, summary
from int4q.run import Int4SkipWarning
from int4q.tensor import CpuPackedInt4Tensor, CudaCoalescedInt4Tensor, Int4Tensor
from int4q.tuning import tune

__all__ = [
    "Calibration",
    "CalibrationWarning",
    "CpuPackedInt4Tensor",
    "CudaCoalescedInt4Tensor",
    "Evaluation",
    "GraphFallbackWarning",
    "Int4SkipWarning",
    "Int4Tensor",
    "Int4WeightOnlyConfig",
    "KernelPreference",
    "PlansWarning",
    "Summary",
    "__version__",
    "adopt",
    "calibrate",
    "cuda_graph_generate",
    "drop_cuda_graphs",
    "evaluate",
    "kernel_preference",
    "load",
    "load_file",
    "load_into_",
    "moe_config",
    "prepare_for_inference_",
    "quantize_",
    "save_file",
    "save_plans",
    "summary",
    "to_coalesced_",
    "to_plain_",
    "tune",
    "unprepare_",
]

on_import.connect()
