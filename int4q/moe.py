"""``moe_config``: what to quantise in a mixture-of-experts model, by the names of its parameters.

Experts are 3-D parameters, which a plain config does not reach; torchao's ``FqnToConfig`` names
them. The names here are those of transformers 5 and of Llama 4's own code.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from torchao.quantization import FqnToConfig

from int4q import errors
from int4q.config import Int4WeightOnlyConfig

EXPERTS = r"re:(.*\.)?\w*experts\.(gate_up_proj|gate_proj|up_proj|down_proj|w[123])"
"""Stacks of experts: ``model.layers.0.mlp.experts.gate_up_proj``, ``feed_forward.experts.w1``."""

LINEARS = (
    r"re:(.*\.)?"
    r"(q_proj|k_proj|v_proj|o_proj|qkv_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|w[qkvo]|"
    r"gate_proj|up_proj|down_proj|gate_up_proj|input_linear|output_linear|w[123]|"
    r"in_proj|in_proj_qkvz?|in_proj_z|out_proj)\.weight"
)
"""Weights of attention, of linear attention and state-space layers (Qwen3-Next, Jamba), of dense
layers, of shared experts, and of experts that are modules."""

KEPT = (
    r"re:(.*\.)?"
    r"(gate|router(\.\w+)?|shared_expert_gate|lm_head|in_proj_(ba|a|b)|x_proj|dt_proj)\.weight"
)
"""Routers, the output head, and the small projections that set gates and decays of a state."""


def moe_config(
    config: Int4WeightOnlyConfig | None = None,
    *,
    linears: Int4WeightOnlyConfig | bool = True,
    contracted_dim: int | None = None,
) -> FqnToConfig:
    """Experts in 4 bits, attention and shared layers too; router and output head stay.

    Args:
        config: for the experts; ``Int4WeightOnlyConfig()`` by default.
        linears: for the weights of attention (linear attention and state-space layers too), dense
            layers and shared experts: the experts' config (``True``), another one, or none
            (``False``).
        contracted_dim: of the experts, see :class:`~int4q.Int4WeightOnlyConfig`. The default is
            right for every model of transformers.

    Returns:
        A config for :func:`int4q.quantize_`, torchao's, or transformers' ``TorchAoConfig``: a dict
        of regular expressions (``.fqn_to_config``), to be read and changed. ``None`` stands at
        what is to stay: routers (``gate``, ``router``), ``lm_head``, the small projections of
        a state (``in_proj_ba``, ``x_proj``, ``dt_proj``). A linear layer that it does not name
        stays, too, and :func:`int4q.quantize_` says so.

    Raises:
        TypeError: ``config`` or ``linears`` is none of these.
    """
    config = Int4WeightOnlyConfig() if config is None else config
    for name, given in (("config", config), ("linears", linears)):
        if not isinstance(given, Int4WeightOnlyConfig) and not (
            name == "linears" and isinstance(given, bool)
        ):
            raise errors.type_(f"{name} must be an Int4WeightOnlyConfig", given)
    experts = config if contracted_dim is None else replace(config, contracted_dim=contracted_dim)
    if isinstance(linears, bool):
        others = config if linears else None
    else:
        others = linears
    return FqnToConfig(OrderedDict({EXPERTS: experts, LINEARS: others, KEPT: None}))
