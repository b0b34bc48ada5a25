"""The plan of a run on a slice that is not there: bytes of a program written by hand, and one real compilation."""

import dataclasses

import pytest
from helpers import defined_flags, run_main

from configs import study_paper
from idattn.config import (
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    SSMConfig,
    TrainConfig,
    from_config_dict,
)
from idattn.costs import count_parameters
from launch import aot, scaling

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
  %next = s32[] add(%two, %m)
  %fusion.1 = bf16[4,128,64]{2,1,0} fusion(%p), kind=kCustom, calls=%start
  %fusion.2 = bf16[4,128,64]{2,1,0} fusion(%p), kind=kCustom, calls=%done
  %fusion.3 = bf16[64,128]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  %copy.4 = s32[] copy(%next)
  ROOT %tuple = (f32[], /*index=1*/s32[]) tuple(%x, /*index=1*/%copy.4)
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %while.1 = s32[] while(%t), condition=%condition, body=%body
  %permute = (f32[2,16]{1,0}, f32[2,16]{1,0}, u32[], u32[]) collective-permute-start(%a), channel_id=1
  %pmax.1 = f32[100]{0} all-reduce(%a), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%add
  %psum.2 = (f32[100]{0}, f32[4]{0}) all-reduce(%a, %a), channel_id=1, replica_groups=[1,4]<=[4]
}
"""


@pytest.mark.parametrize("newer", [False, True])
def test_bytes_of_a_program_written_by_hand(newer):
    text = HLO.replace("  %n = s32[] get-tuple-element(%i), index=1\n", "").replace("%n,", "%i#1,") if newer else HLO
    assert aot.count_collectives(text) == {
        "all-gather": 12 * 4 * 128 * 64 * 2 * 3 // 4,  # once for its parts, as often as the loop runs, by two to 24
        "reduce-scatter": 12 * 256 * 128 * 2 * 3 // 4,
        "collective-permute": 2 * 16 * 4,
        "all-reduce": 2 * 400 * 1 // 2 + 2 * 416 * 3 // 4,
    }
    with pytest.raises(ValueError, match="cannot tell how often a loop runs"):
        aot.count_collectives(text.replace("constant(24)", "parameter(1)"))


def make_config(**changes):
    config = Config(
        model=ModelConfig(
            vocab_size=512, model_dim=256, num_layers=2, num_heads=4, mlp_dim=512, ssm=SSMConfig(num_modes=64)
        ),
        data=DataConfig(seq_len=512),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=2),
        train=TrainConfig(steps=10, batch_size=64),
        compute=ComputeConfig(remat="block"),
        mesh=MeshConfig(fsdp=2, tensor=2),
    )
    return dataclasses.replace(config, **changes)


def test_a_step_compiles_for_a_slice(libtpu):
    """The real train step with its kernels, for four chips; memory and bytes against what the shapes say."""
    config = make_config()
    figures = aot.compile_step(config, "v5e:2x2")
    assert (figures["fits"], figures["chips"]) == (True, 4)
    layers, words = 2 * 256 * (4 * 256 + 3 * 512), 2 * 256 * 512
    matrices = layers + words
    assert matrices < figures["parameter_bytes"] < 1.5 * matrices  # a quarter of each, four bytes
    assert figures["optimiser_bytes"] == pytest.approx(2 * figures["parameter_bytes"], rel=1e-3)
    assert figures["temporary_bytes"] > 0 and figures["peak_gib"] < 1
    # A half of each matrix, in bfloat16, half of it from others: for the forward and again for the backward pass, the
    # vocabulary's once.
    assert figures["sent_bytes"]["all-gather"] >= 2 * layers / 2 + words / 2
    assert figures["sent_bytes"]["reduce-scatter"] + figures["sent_bytes"]["all-reduce"] >= matrices / 2
    assert 0 < figures["mfu_at_most"] < 0.75
    text = aot.describe(figures, config)
    assert "fits, " in text and "all-gather sends" in text and "MFU at most" in text


def test_what_does_not_fit_says_what_to_change():
    figures = {"topology": "v5e:2x2", "chips": 4, "mesh": {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 1}}
    figures |= {"fits": False, "needed_gib": 20.5, "usable_gib": 15.75, "parameter_bytes": 2**30}
    text = aot.describe(
        figures, make_config(compute=ComputeConfig(remat="mixer"), train=TrainConfig(steps=2, batch_size=8))
    )
    assert "DOES NOT FIT: 20.50 GiB needed, 15.75 GiB there" in text
    for option in ("compute.remat=block", "train.accumulation=2 (2 rows a chip now)", "mesh.fsdp=4"):
        assert option in text
    smallest = aot.advice(figures, make_config(train=TrainConfig(steps=2, batch_size=4)))
    assert "remat" not in smallest and "accumulation" not in smallest


@pytest.mark.slow
@pytest.mark.parametrize("mixer", study_paper.CELLS)
def test_the_papers_cells_compile(libtpu, mixer):
    """The paper's ablation at its size and budget, for the smallest slice of v5p."""
    config = from_config_dict(study_paper.get_config(f"125M,{mixer},42"))
    assert config.train.batch_size * config.data.seq_len == 524_288
    changes = dict(mesh=MeshConfig(fsdp=4), compute=ComputeConfig(remat="dots"))
    figures = aot.compile_step(dataclasses.replace(config, **changes), "v5p:2x2x1")
    assert (figures["fits"], figures["chips"]) == (True, 4)
    assert figures["flops"] * 4 > 6 * count_parameters(config.model)["total"] * 524_288 * 0.75  # without the embedding


@pytest.mark.slow
def test_too_large_is_reported_not_raised(libtpu):
    config = make_config(train=TrainConfig(steps=10, batch_size=4096), compute=ComputeConfig(remat="none"))
    figures = aot.compile_step(config, "v5e:2x2")
    assert not figures["fits"]
    assert figures["needed_gib"] > figures["usable_gib"] > 10


def test_an_unknown_chip_is_refused():
    with pytest.raises(ValueError, match="'v9:2x2' must start with one of v5e, v5p, v6e"):
        aot.compile_step(make_config(), "v9:2x2")


def test_scaling_takes_the_first_plan_that_fits(monkeypatch, tmp_path, capsys):
    """Tables and plots of plans on a compiler that finds room for dots in four parts; what is known is not redone."""
    tried = []

    def compile_step(config, name):
        tried.append((name, config.data.seq_len, config.compute.remat, config.train.accumulation, config.mesh))
        figures = {"mesh": dataclasses.asdict(config.mesh), "chips": scaling.SLICES[name], "hbm_gib": 16}
        if name == "v5e:2x2" or (config.compute.remat, config.train.accumulation) != ("dots", 4):
            return figures | {"fits": False, "needed_gib": 56.0, "usable_gib": 15.75}
        return (
            figures
            | {"fits": True, "peak_gib": 12.3, "sent_bytes": {"all-gather": 4.2e9}, "mfu_at_most": 0.98}
            | {"seconds": {"products": 1.5}}
        )

    monkeypatch.setattr(scaling, "compile_step", compile_step)
    monkeypatch.setattr(scaling, "load_compiler", lambda dump: None)
    with defined_flags(scaling):
        arguments = ["--models=1.3B", "--slices=v5e:2x2,v5e:4x4", "--contexts=4096", f"--out={tmp_path / 'plans'}"]
        run_main(scaling, *arguments)
        seen = len(tried)
        run_main(scaling, *arguments)
    assert len(tried) == seen
    mesh = MeshConfig(data=1, fsdp=16)
    plans = [(remat, parts, mesh) for remat in ("none", "dots") for parts in (1, 4)]
    assert [t[2:] for t in tried if t[0] == "v5e:4x4"] == plans
    assert [t[2:4] for t in tried if t[0] == "v5e:2x2"][-2:] == [("block", 4), ("block", 16)]
    table = (tmp_path / "plans.md").read_text()
    assert "| 1.3B | v5e:2x2 | 4,096 | fsdp 4 | block | 16 | **56 of 16: does not fit** |" in table
    assert "| 1.3B | v5e:4x4 | 4,096 | fsdp 16 | dots | 4 | 12.3 of 16 | 4.2 | 1,500 | 98% |" in table
    assert (tmp_path / "plans.png").stat().st_size > 10_000
