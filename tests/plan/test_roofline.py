"""The bound of a program for a GPU, written by hand: its launches, their bytes and products, by part."""

import re

import pytest

from idattn.chips import CHIPS
from idattn.plan.hlo import parse
from idattn.plan.roofline import GPU_PARTS, bound

CHIP = CHIPS["H100"]._replace(hbm_bytes=1e9, flops=2e12, float32_flops=1e12, link_bytes=1e9, clock=1e9)  # a byte a ns

HLO = """HloModule step
%gemm (p: bf16[64,32], p.1: bf16[32,64]) -> f32[64,64] {
  %p = bf16[64,32]{1,0} parameter(0)
  %p.1 = bf16[32,64]{1,0} parameter(1)
  %inner = bf16[64,32]{1,0} fusion(%p), kind=kCustom, calls=%nested
  ROOT %dot.1 = f32[64,64]{1,0} dot(%inner, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%nested (p.2: bf16[64,32]) -> bf16[64,32] {
  %p.2 = bf16[64,32]{1,0} parameter(0)
  ROOT %n = bf16[64,32]{1,0} negate(%p.2)
}
%part (p.3: f32[100,8]) -> f32[10,8] {
  %p.3 = f32[100,8]{1,0} parameter(0)
  %first = f32[10,8]{1,0} slice(%p.3), slice={[0:10], [0:8]}
  ROOT %twice = f32[10,8]{1,0} add(%first, %first)
}
%condition (t: (s32[], f32[100,8])) -> pred[] {
  %t = (s32[], f32[100,8]{1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}
%body (t.1: (s32[], f32[100,8])) -> (s32[], f32[100,8]) {
  %t.1 = (s32[], f32[100,8]{1,0}) parameter(0)
  %x = f32[100,8]{1,0} get-tuple-element(%t.1), index=1
  %cut = f32[10,8]{1,0} fusion(%x), kind=kLoop, calls=%part, metadata={op_name="jit(step)/jvp()/block_0/mixer/op/slice"}
  %kept = f32[10,8]{1,0} copy(%cut), metadata={op_name="jit(step)/jvp()/block_0/mul"}
  ROOT %t.2 = (s32[], f32[100,8]{1,0}) tuple(%i, %x)
}
ENTRY %main (a: bf16[64,32], b: bf16[32,64], c: f32[256,512], d: f32[100,8]) -> f32[64,64] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,64]{1,0} parameter(1)
  %c = f32[256,512]{1,0} parameter(2)
  %d = f32[100,8]{1,0} parameter(3)
  %t.3 = (s32[], f32[100,8]{1,0}) tuple(%zero, %d)
  %r = f32[250]{0} all-reduce-start(%s), channel_id=1, replica_groups={{0,1}}, to_apply=%sum
  %loop = (s32[], f32[100,8]{1,0}) while(%t.3), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %product = f32[64,64]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm, metadata={op_name="jit(step)/jvp()/block_0/dot_general"}
  %squares = (f32[512,512]{1,0}, s8[4194304]{0}) custom-call(%c, %c), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/loss/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}
  %only = f32[512,512]{1,0} get-tuple-element(%squares), index=0
  %r.1 = f32[250]{0} all-reduce-done(%r)
  %g = (f32[250]{0}, f32[500]{0}) all-gather-start(%s), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  %g.1 = f32[500]{0} all-gather-done(%g)
  ROOT %out = f32[64,64]{1,0} bitcast(%product)
}
"""  # noqa: E501


def test_bound_of_a_program_written_by_hand():
    """Of each launch the longer of bytes and products; scratch memory, slices left out and what is free count nothing;
    one exchange passes behind the work, the other is waited for."""
    total = bound(parse(HLO), CHIP)
    product, squares = 2 * 2 * 64 * 32 + 4 * 64 * 64, 2 * 4 * 256 * 512 + 4 * 512 * 512
    assert total.runs == {"kernels": 3, "copies": 3, "products": 1, "loss": 1}
    assert total.moved_bytes == {"kernels": 3 * 640, "copies": 3 * 640, "products": product, "loss": squares}
    assert total.parts == pytest.approx({**total.moved_bytes, "links": 4 * 500 // 2})
    assert total.parts.keys() <= GPU_PARTS.keys()


@pytest.mark.parametrize(("dtype", "flops"), [("bf16", 2e12), ("f32", 1e12)])
def test_products_at_the_peak_of_their_dtype(dtype, flops):
    text = re.sub(r"bf16\[", f"{dtype}[", HLO)
    total = bound(parse(text), CHIP._replace(hbm_bytes=1e30))
    assert total.parts["products"] == pytest.approx(1e9 * 2 * 64 * 64 * 32 / flops)
    assert total.parts["loss"] == pytest.approx(1e9 * 2 * 512 * 512 * 256 / 1e12)
