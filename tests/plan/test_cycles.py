"""The time of a program written by hand, and to which part of a step its instructions belong."""

import pytest

from idattn.chips import CHIPS
from idattn.plan import cycles
from idattn.plan.hlo import parse

CHIP = CHIPS["v5e"]._replace(link_bytes=1e9, clock=1e9)  # a byte a cycle


def costs(n, scopes="x/mul"):
    return f'metadata={{op_name="jit(step)/{scopes}"}}, backend_config={{"window_config":{{"estimated_cycles":"{n}"}}}}'


HLO = f"""HloModule step
%inner (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %held = f32[8]{{0}} multiply(%p, %p), {costs(999)}
}}
%product (p.1: f32[8]) -> f32[8] {{
  %p.1 = f32[8]{{0}} parameter(0)
  ROOT %dot = f32[8]{{0}} convolution(%p.1, %p.1), {costs(999)}
}}
%called (p.2: f32[8]) -> f32[8] {{
  %p.2 = f32[8]{{0}} parameter(0)
  ROOT %in.call = f32[8]{{0}} fusion(%p.2), kind=kLoop, calls=%inner, {costs(5, "loss/log")}
}}
%short (p.3: f32[8]) -> f32[8] {{
  %p.3 = f32[8]{{0}} parameter(0)
  ROOT %in.short = f32[8]{{0}} fusion(%p.3), kind=kLoop, calls=%inner, {costs(2)}
}}
%long (p.4: f32[8]) -> f32[8] {{
  %p.4 = f32[8]{{0}} parameter(0)
  ROOT %in.long = f32[8]{{0}} fusion(%p.4), kind=kLoop, calls=%inner, {costs(30)}
}}
%condition (t: (s32[], f32[8])) -> pred[] {{
  %t = (s32[], f32[8]{{0}}) parameter(0)
  %limit = s32[] constant(3)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}}
%body (t.1: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %t.1 = (s32[], f32[8]{{0}}) parameter(0)
  %one = s32[] constant(1)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %next = s32[] add(%one, %i.1)
  %x.1 = f32[8]{{0}} get-tuple-element(%t.1), index=1
  %mixed = f32[8]{{0}} fusion(%x.1), kind=kLoop, calls=%inner, {costs(10, "block_0/mixer/mul")}
  %heads = f32[8]{{0}} fusion(%mixed), kind=kOutput, calls=%product, {costs(20, "block_0/mixer/dot_general")}
  %kernel.1 = f32[8]{{0}} custom-call(%heads), custom_call_target="tpu_custom_call", operand_layout_constraints={{f32[8]{{0}}}}, metadata={{}}
  ROOT %t.2 = (s32[], f32[8]{{0}}) tuple(%next, %kernel.1)
}}
ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  %zero = s32[] constant(0)
  %t.3 = (s32[], f32[8]{{0}}) tuple(%zero, %a)
  %sent = (f32[8]{{0}}, f32[8]{{0}}, u32[], u32[]) collective-permute-start(%a), channel_id=2
  %also = (f32[8]{{0}}, f32[8]{{0}}, u32[], u32[]) collective-permute-start(%a), channel_id=3
  %short.1 = f32[8]{{0}} fusion(%a), kind=kLoop, calls=%inner, {costs(40, "block_0/mul")}
  %sent.1 = f32[8]{{0}} collective-permute-done(%sent)
  %also.1 = f32[8]{{0}} collective-permute-done(%also)
  %loop = (s32[], f32[8]{{0}}) while(%t.3), condition=%condition, body=%body
  %call.1 = f32[8]{{0}} call(%a), to_apply=%called
  %either = f32[8]{{0}} conditional(%p, %a, %a), branch_computations={{%short, %long}}
  %copied = f32[8]{{0}} copy(%a), {costs(6, "while/body/dynamic_update_slice")}
  %turned = f32[8]{{0}} fusion(%a), kind=kLoop, calls=%inner, {costs(8, "block_0/mixer/transpose")}
  %moment = f32[8]{{0}} fusion(%a), kind=kLoop, calls=%inner, {costs(4, "optimizer/add")}
  %silent = f32[8]{{0}} add(%a, %a)
  ROOT %summed = f32[8]{{0}} all-reduce(%a), channel_id=4, replica_groups={{{{0,1}}}}, to_apply=%inner
}}
"""  # noqa: E501


def test_time_of_a_program_written_by_hand():
    """Two exchanges of 32 bytes, one after the other, over 40 cycles of work, and one of 32 over none."""
    total = cycles.estimate(parse(HLO), CHIP, lambda x: 100)
    assert total.parts == {
        "mixer": 3 * 10,
        "products": 3 * 20,
        "kernels": 3 * 100,
        "loss": 5,
        "other": 30,  # the longer branch
        "block": 40,
        "copies": 6,
        "layout": 8,
        "optimizer": 4,
        "links": (2 * 32 - 40) + 32,
    }
    assert set(total.parts) == set(cycles.PARTS)
    assert total.cycles == 539
    assert (total.runs, total.moved_bytes) == (
        {"uncounted": 1 + 3},
        {"uncounted": 3 * 32 + 3 * 12},
    )  # a sum, and the loop's counter


def test_parts_of_one_exchange_are_waited_for_at_the_last():
    """An all-gather that is started in one fusion and finished in another; in between 50 of its 96 bytes pass."""
    gather = "all-gather(%q), channel_id=9, replica_groups={{0,1,2,3}}"
    text = f"""HloModule step
%start (q: f32[8]) -> f32[32] {{
  ROOT %g = f32[32]{{0}} {gather}
}}
%done (q: f32[8]) -> f32[32] {{
  ROOT %g.1 = f32[32]{{0}} {gather}
}}
ENTRY %main (a: f32[8]) -> f32[32] {{
  %f = f32[32]{{0}} fusion(%a), kind=kCustom, calls=%start
  %work = f32[8]{{0}} multiply(%a, %a), {costs(50)}
  ROOT %f.1 = f32[32]{{0}} fusion(%f), kind=kCustom, calls=%done
}}
"""
    assert cycles.estimate(parse(text), CHIP, None).parts == {"other": 50, "links": 46}


def test_links_and_the_network_between_slices_work_at_once():
    """64 bytes go to another slice at a quarter of the links' speed once they are sent, 32 over links meanwhile."""
    attributes = '_xla_host_transfer_rendezvous="r",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type='
    attributes = f'frontend_attributes={{{attributes}"ALL_REDUCE"}}'
    text = f"""HloModule step
ENTRY %main (a: f32[8]) -> f32[8] {{
  %s = (f32[16]{{0}}, u32[], token[]) send(%a, %t), channel_id=5, {attributes}
  %work = f32[8]{{0}} multiply(%a, %a), {costs(50)}
  %r = (f32[16]{{0}}, u32[], token[]) recv(%t), channel_id=6, {attributes}
  %sent = (f32[8]{{0}}, f32[8]{{0}}, u32[], u32[]) collective-permute-start(%a), channel_id=2
  %sent.1 = f32[8]{{0}} collective-permute-done(%sent)
  %s.1 = token[] send-done(%s), channel_id=5
  %r.1 = (f32[16]{{0}}, token[]) recv-done(%r), channel_id=6
}}
"""
    chip = CHIP._replace(dcn_bytes=CHIP.link_bytes / 4)
    assert cycles.estimate(parse(text), chip, None).parts == {"other": 50, "links": 4 * 64 - 50}


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("estimated_cycles", "cycles", "no cost model for this topology"),
        ("constant(3)", "parameter(1)", "cannot tell how often the loop loop runs"),
    ],
)
def test_what_cannot_be_counted_is_an_error(old, new, match):
    with pytest.raises(ValueError, match=match):
        cycles.estimate(parse(HLO.replace(old, new)), CHIP, lambda x: 100)
