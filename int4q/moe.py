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
    r"gate_proj|up_proj|down_proj|gate_up_proj|input_linear|output_linear|w[123])\.weight"
)
"""Weights of attention, of dense layers, of shared experts, and of experts that are modules."""


def moe_config(
    config: Int4WeightOnlyConfig | None = None,
    *,
    linears: Int4WeightOnlyConfig | bool = True,
    contracted_dim: int | None = None,
) -> FqnToConfig:
    """Experts in 4 bits, attention and shared layers too; router and output head stay.

    Args:
        config: for the experts; ``Int4WeightOnlyConfig()`` by default.
        linears: for the weights of attention, dense layers and shared experts: the experts'
            config (``True``), another one, or none (``False``).
        contracted_dim: of the experts, see :class:`~int4q.Int4WeightOnlyConfig`. The default is
            right for every model of transformers.

    Returns:
        A config for :func:`int4q.quantize_`, torchao's, or transformers' ``TorchAoConfig``. What
        it does not name is left alone: routers (``gate``, ``router``), ``lm_head``, embeddings.
        It is a dict of regular expressions (``.fqn_to_config``), to be read and changed.

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
    named = OrderedDict({EXPERTS: experts})
    if linears is not False:
        named[LINEARS] = config if linears is True else linears
    return FqnToConfig(named)
