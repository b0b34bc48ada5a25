"""Programs written by hand: how often their parts run, and the bytes that their collectives send."""

import pytest

from idattn.plan import hlo

HLO = """HloModule step
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}
%all-reduce-scatter.3 (input: bf16[256,128]) -> bf16[64,128] {
  %all-reduce.1 = bf16[256,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=7, replica_groups={{0,1,2,3}}
}
%condition (i: s32[]) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(24)
  %n = s32[] get-tuple-element(%i), index=1
  ROOT %lt = pred[] compare(%n, %constant.2), direction=LT
}
%start (p: bf16[1,128,64]) -> bf16[4,128,64] {
  %all-gather.1 = bf16[4,128,64]{2,1,0} all-gather(%p), channel_id=5, replica_groups=mesh['a'=2,'b'=4] {'b'}
}
%done (p: bf16[1,128,64]) -> bf16[4,128,64] {
  %all-gather.2 = bf16[4,128,64]{2,1,0} all-gather(%p), channel_id=5, replica_groups=mesh['a'=2,'b'=4] {'b'}
}
%body (i: s32[]) -> s32[] {
  %two = s32[]{:T(128)} constant(2)
  %m = s32[] get-tuple-element(%i), index=1
  %next = s32[] add(%two, %m)
  %fusion.1 = bf16[4,128,64]{2,1,0} fusion(%p), kind=kCustom, calls=%start
  %fusion.2 = bf16[4,128,64]{2,1,0} fusion(%p), kind=kCustom, calls=%done
  %fusion.3 = bf16[64,128]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  %copy.4 = s32[] copy(%next)
  ROOT %tuple = (f32[], /*index=1*/s32[]) tuple(%x, /*index=1*/%copy.4)
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %zero = s32[]{:T(128)} constant(0)
  %t = (f32[], s32[]) tuple(%x, %zero)
  %while.1 = s32[] while(%t), condition=%condition, body=%body
  %permute = (f32[2,16]{1,0}, f32[2,16]{1,0}, u32[], u32[]) collective-permute-start(%a), channel_id=1
  %pmax.1 = f32[100]{0} all-reduce(%a), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%add
  %psum.2 = (f32[100]{0}, f32[4]{0}) all-reduce(%a, %a), channel_id=1, replica_groups=[1,4]<=[4]
}
"""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"  %n = s32[] get-tuple-element(%i), index=1\n": "", "%n,": "%i#1,"},  # newer compilers
        {"channel_id=5": 'channel_id=1, frontend_attributes={chain_id="5"}'},  # of layers that are written out
    ],
)
def test_bytes_of_a_program_written_by_hand(changes):
    text = HLO
    for old, new in changes.items():
        text = text.replace(old, new)
    assert hlo.count_collectives(hlo.parse(text)) == {
        "all-gather": 12 * 4 * 128 * 64 * 2 * 3 // 4,  # once for its parts, as often as the loop runs, by two to 24
        "reduce-scatter": 12 * 256 * 128 * 2 * 3 // 4,
        "collective-permute": 2 * 16 * 4,
        "all-reduce": 2 * 400 * 1 // 2 + 2 * 416 * 3 // 4,
    }


def test_bytes_of_exchanges_of_several_arrays():
    """As GPUs start them: operands and results in one tuple, or in a tuple of two; of a sum only the results."""
    text = """HloModule step
ENTRY %main (a: f32[8]) -> f32[8] {
  %g = ((f32[8]{0}, f32[2,8]{1,0}), (f32[32]{0}, /*index=1*/f32[8,8]{1,0})) all-gather-start(%a, %b), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %g.1 = (f32[32]{0}, f32[8,8]{1,0}) all-gather-done(%g)
  %h = (f32[8]{0}, f32[16]{0}) all-gather-start(%a), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  %s = ((f32[32]{0}, f32[8,8]{1,0}), (f32[8]{0}, f32[2,8]{1,0})) reduce-scatter-start(%c, %d), channel_id=1, replica_groups={{0,1,2,3}}
  %r = (f32[8]{0}, f32[4]{0}) all-reduce-start(%a, %e), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""  # noqa: E501
    assert hlo.count_collectives(hlo.parse(text)) == {
        "all-gather": 4 * (32 + 64) * 3 // 4 + 4 * 16 // 2,
        "reduce-scatter": 4 * (32 + 64) * 3 // 4,
        "all-reduce": 2 * 4 * (8 + 4) * 3 // 4,
    }


def test_bytes_between_slices():
    """Hosts of four slices exchange what each sends, in a loop that runs 12 times; links carry what they did before."""

    def exchange(kind, sent, received, target='"{1,2,3,4}x{0:3}"'):
        attributes = f'_xla_host_transfer_rendezvous="{kind}_0",_xla_megascale_target={target}'
        attributes = f'frontend_attributes={{{attributes},_xla_megascale_transfer_type="{kind}"}}'
        return f"""
  %send.{kind} = (f32[{sent}]{{0}}, u32[], token[]) send(%x, %y), channel_id=8, is_host_transfer=true, {attributes}
  %recv.{kind} = (f32[{received}]{{0}}, u32[], token[]) recv(%y), channel_id=9, is_host_transfer=true, {attributes}"""

    lines = [
        exchange("ALL_REDUCE", 100, 100, "{{100000,200000},{300000,400000}}"),
        exchange("ALL_GATHER", 100, 400),
        exchange("REDUCE_SCATTER", 400, 100),
        exchange("ALL_TO_ALL", 400, 400),
        exchange("ONE_TO_ONE", 100, 100, "{{100000->200000}}"),
        "\n  %copied = (f32[8]{0}, u32[], token[]) send(%x, %y), channel_id=7, is_host_transfer=true",
    ]
    body = "%body (i: s32[]) -> s32[] {"
    module = hlo.parse(HLO.replace(body, body + "".join(lines)))
    assert hlo.count_collectives(module, "DCN") == {
        "all-reduce": 12 * 400 * 2 // 2,
        "all-gather": 12 * 3 * 400,
        "reduce-scatter": 12 * 1600 * 3 // 4,
        "all-to-all": 12 * 1600 * 3 // 4,
        "collective-permute": 12 * 400,
    }
    assert hlo.count_collectives(module) == hlo.count_collectives(hlo.parse(HLO))
    for sent in (x for x in module["body"].values() if x.kind == "send" and "megascale" in x.line):
        received = module["body"][sent.name.replace("send", "recv")]
        assert hlo.collectives(module, "body", sent) == hlo.collectives(module, "body", received)


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("constant(24)", "constant(23)", 12),
        ("constant(0)", "constant(21)", 2),
        ("constant(0)", "constant(24)", 0),
        ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}', 7),
    ],
)
def test_trips_of_a_loop(old, new, trips):
    module = hlo.parse(HLO.replace(old, new))
    assert hlo.trip_count(module, "ENTRY", module["ENTRY"]["while.1"]) == trips


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("constant(24)", "parameter(1)"),  # the limit is not known
        ("constant(0)", "parameter(1)"),  # nor the start
        ("constant(2)", "parameter(1)"),  # nor the step
        ("direction=LT", "direction=NE"),
        ("add(%two, %m)", "multiply(%two, %m)"),
        ("add(%two, %m)", "add(%two, %two)"),
        ("get-tuple-element(%i), index=1\n  %next", "get-tuple-element(%i), index=0\n  %next"),  # another counter
    ],
)
def test_a_loop_that_cannot_be_counted_is_an_error(old, new):
    assert old in HLO
    with pytest.raises(ValueError, match="cannot tell how often the loop while.1 runs"):
        hlo.count_collectives(hlo.parse(HLO.replace(old, new)))
