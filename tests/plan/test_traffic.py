"""What a TPU's program moves."""

import pytest

from idattn.plan.hlo import parse
from idattn.plan.traffic import decode_traffic, moved_bytes

HLO = """
HloModule m

%cond (p: (s32[], f32[4,8,128])) -> pred[] {
  %p = (s32[], f32[4,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(4)
  ROOT %lt = pred[]{:T(512)S(6)} compare(%i, %n), direction=LT
}

%fused (a: f32[4,8,128], i: s32[]) -> f32[4,8,128] {
  %a = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %i.1 = s32[]{:T(128)} parameter(1)
  %slice = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%a, %i.1), dynamic_slice_sizes={1,8,128}
  %twice = f32[1,8,128]{2,1,0:T(8,128)} add(%slice, %slice)
  ROOT %update = f32[4,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%a, %twice, %i.1)
}

%body (p.1: (s32[], f32[4,8,128])) -> (s32[], f32[4,8,128]) {
  %p.1 = (s32[], f32[4,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)S(6)} get-tuple-element(%p.1), index=0
  %a.1 = f32[4,8,128]{2,1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %a.2 = f32[4,8,128]{2,1,0:T(8,128)} fusion(%a.1, %i.2), kind=kLoop, calls=%fused
  %near = f32[8,64]{1,0:T(8,128)S(1)} broadcast(%i.2)
  %far = f32[8,64]{1,0:T(8,128)} copy(%near)
  %begun = ((f32[4,8,128]{2,1,0:T(8,128)}), f32[1,8,128]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a.2)
  %one = s32[]{:T(128)S(6)} constant(1)
  %i.3 = s32[]{:T(128)S(6)} add(%i.2, %one)
  ROOT %t = (s32[], f32[4,8,128]{2,1,0:T(8,128)}) tuple(%i.3, %a.2)
}

ENTRY %main (a.3: f32[4,8,128]) -> (s32[], f32[4,8,128]) {
  %a.3 = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %x = (s32[], f32[4,8,128]{2,1,0:T(8,128)}) tuple(%zero, %a.3)
  ROOT %loop = (s32[], f32[4,8,128]{2,1,0:T(8,128)}) while(%x), condition=%cond, body=%body
}
"""


def test_traffic_of_a_program():
    """A slice read and written in place, a copy out of on-chip memory whose tiles are half empty, and a slice read to
    there; four times."""
    module = parse(HLO)
    assert moved_bytes(module, "ENTRY") == 4 * (2 * 4096 + 4096 + 4096)
    with pytest.raises(ValueError, match="0 loops of the program hold loops"):
        decode_traffic(HLO, 8)
    with pytest.raises(ValueError, match="cannot tell how often the loop loop runs"):
        moved_bytes(parse(HLO.replace("constant(4)", "parameter(1)")), "ENTRY")


def test_a_fusion_reads_the_rows_that_it_gathers():
    """Not the whole table; of the indices all."""
    text = """
%rows (table: bf16[1000,16], ids: s32[4]) -> bf16[4,16] {
  %table = bf16[1000,16]{1,0} parameter(0)
  %ids = s32[4]{0} parameter(1)
  ROOT %g = bf16[4,16]{1,0} gather(%table, %ids), offset_dims={1}
}
ENTRY %main (t: bf16[1000,16], i: s32[4]) -> bf16[4,16] {
  %t = bf16[1000,16]{1,0} parameter(0)
  %i = s32[4]{0} parameter(1)
  ROOT %f = bf16[4,16]{1,0} fusion(%t, %i), kind=kLoop, calls=%rows
}
"""
    assert moved_bytes(parse(text), "ENTRY") == 128 + 16 + 128
