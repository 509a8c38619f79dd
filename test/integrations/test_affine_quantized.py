"""torchao's older 4-bit weights, where torchao still has them (up to 0.17)."""

import pytest
import torch
from torch import nn

import int4q
from int4q import Int4Tensor

dtypes = pytest.importorskip("torchao.dtypes")
if not hasattr(dtypes, "to_affine_quantized_intx"):
    pytest.skip("torchao has no AffineQuantizedTensor any more", allow_module_level=True)
from torchao.quantization.quant_primitives import MappingType, ZeroPointDomain  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*[Dd]eprecat")
KINDS = {
    "tinygemm": dict(mapping_type=MappingType.ASYMMETRIC, target_dtype=torch.int32, quant_min=0,
                     quant_max=15, preserve_zero=False, zero_point_domain=ZeroPointDomain.FLOAT),
    "integer zeros": dict(mapping_type=MappingType.ASYMMETRIC, target_dtype=torch.int32,
                          quant_min=0, quant_max=15),
    "symmetric": dict(mapping_type=MappingType.SYMMETRIC, target_dtype=torch.int8, quant_min=-8,
                      quant_max=7),
}  # fmt: skip


def older(w, group_size=32, **how):
    return dtypes.to_affine_quantized_intx(w, block_size=(1, group_size), **how)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adopt(kind, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=False, dtype=dtype))
    how = dict(scale_dtype=torch.float32, zero_point_dtype=torch.float32)
    if kind != "tinygemm":
        how = dict(zero_point_dtype=torch.int32)
    theirs = older(model[0].weight.detach(), **KINDS[kind], **how)
    model[0].weight = nn.Parameter(theirs, requires_grad=False)
    int4q.adopt(model)
    ours = model[0].weight
    assert isinstance(ours, Int4Tensor) and ours.group_size == 32
    expected = theirs.dequantize(torch.float32)
    rounded = kind == "integer zeros" and dtype == torch.float32
    bound = float(expected.abs().max()) * 2**-23 if rounded else 0
    torch.testing.assert_close(ours.dequantize(torch.float32), expected, rtol=0, atol=bound)
    assert model(torch.randn(3, 64, dtype=dtype)).shape == (3, 32)


def test_eight_bits_stay():
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    theirs = older(model[0].weight.detach(), mapping_type=MappingType.SYMMETRIC,
                   target_dtype=torch.int8)  # fmt: skip
    model[0].weight = nn.Parameter(theirs, requires_grad=False)
    before = model[0].weight
    int4q.adopt(model)
    assert model[0].weight is before


def test_a_group_size_that_int4q_does_not_have():
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    theirs = older(model[0].weight.detach(), group_size=16, **KINDS["symmetric"])
    model[0].weight = nn.Parameter(theirs, requires_grad=False)
    with pytest.raises(ValueError, match="group_size must be"):
        int4q.adopt(model)
