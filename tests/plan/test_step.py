"""The plan of a run on a slice that is not there: one real compilation, and what is said of those that do not fit."""

import dataclasses

import pytest

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
from idattn.plan import step
from idattn.plan.cycles import PARTS


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
    figures = step.compile_step(config, "v5e:2x2")
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
    predicted = figures["predicted"]
    assert predicted["cycles"] == pytest.approx(sum(predicted["parts"].values()))
    assert set(predicted["parts"]) == set(PARTS)
    assert min(predicted["parts"][name] for name in ("kernels", "products", "mixer", "loss", "block")) > 0
    assert 0 < predicted["mfu"] < figures["mfu_at_most"]
    assert predicted["seconds"] == pytest.approx(predicted["cycles"] / 1.5e9)
    text = step.describe(figures, config)
    assert "fits, " in text and "all-gather sends" in text
    assert text.index("predicted: ") < text.index("kernels of the mixer") < text.index("bound: ")


def test_only_gradients_cross_between_slices(libtpu):
    """Those of matrices in bfloat16, of the head and of vectors in float32, each summed within its slice before."""
    model = ModelConfig(vocab_size=512, model_dim=512, num_layers=1, num_heads=4, mlp_dim=512, mixers=("softmax",))
    changes = dict(data=DataConfig(seq_len=128), train=TrainConfig(steps=10, batch_size=16))
    config = make_config(model=model, mesh=MeshConfig(data=2, fsdp=4, slices=2), **changes)
    figures = step.compile_step(config, "2xv5e:2x2")
    assert (figures["fits"], figures["chips"]) == (True, 8)
    layers, words, vectors = 512 * (4 * 512 + 3 * 512), 512 * 512, 3 * 512
    gradients = (2 * layers + 2 * words + 4 * words) / 4 + 4 * vectors
    assert list(figures["dcn_bytes"]) == ["all-reduce"]
    assert gradients < figures["dcn_bytes"]["all-reduce"] < gradients + 4096  # the loss and its like
    assert figures["sent_bytes"]["all-gather"] >= 2 * layers * 3 / 4
    assert figures["seconds"]["DCN"] == figures["dcn_bytes"]["all-reduce"] / 3.125e9
    text = step.describe(figures, config)
    assert "on 2xv5e:2x2, 8 chips (data 2, fsdp 4)" in text
    assert "all-reduce over DCN            0.001 GB a step" in text and "DCN 0.4 ms;" in text
    with pytest.raises(ValueError, match="mesh.slices=1 must be 2"):
        step.compile_step(make_config(mesh=MeshConfig(fsdp=4)), "2xv5e:2x2")


def test_what_does_not_fit_says_what_to_change():
    figures = {"topology": "v5e:2x2", "chips": 4, "mesh": {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 1}}
    figures |= {"fits": False, "needed_gib": 20.5, "usable_gib": 15.75, "parameter_bytes": 2**30}
    text = step.describe(
        figures, make_config(compute=ComputeConfig(remat="mixer"), train=TrainConfig(steps=2, batch_size=8))
    )
    assert "DOES NOT FIT: 20.50 GiB needed, 15.75 GiB there" in text
    for option in ("compute.remat=block", "train.accumulation=2 (2 rows a chip now)", "mesh.fsdp=4"):
        assert option in text
    # Three rows a chip have no two equal parts, and six no four.
    for batch_size, needed, parts in ((12, 20.5, 3), (24, 16.0, 2), (24, 48.0, 6), (12, 99.0, 3)):
        config = make_config(train=TrainConfig(steps=2, batch_size=batch_size))
        assert f"train.accumulation={parts} (" in step.advice(figures | {"needed_gib": needed}, config)
    smallest = step.advice(figures, make_config(train=TrainConfig(steps=2, batch_size=4)))
    assert "remat" not in smallest and "accumulation" not in smallest


def test_what_does_not_fit_a_gpu_says_by_which_figure():
    figures = {"topology": "t4:1", "chips": 1, "mesh": {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}}
    figures |= {"fits": False, "needed_gib": 12.5, "usable_gib": 11.03, "hbm_gib": 14.7}
    text = step.describe(figures, make_config())
    assert text.startswith("interdomain on t4:1, one chip:\n")
    assert "DOES NOT FIT: 12.50 GiB needed, 11.03 GiB there, the part that JAX takes of the card's 14.7." in text
    assert "XLA_CLIENT_MEM_FRACTION=0.9" in text
    assert "XLA_CLIENT_MEM_FRACTION" not in step.advice(figures | {"needed_gib": 14.0}, make_config())


def test_a_gpu_without_bfloat16_is_refused():
    with pytest.raises(ValueError, match="topology='t4:1' has no units for bfloat16; .*compute.dtype=float32"):
        step.compile_step(make_config(), "t4:1")


@pytest.mark.slow
def test_layers_that_are_written_out_stack_nothing(libtpu):
    """Fewer copies and cycles than a loop, the same bytes between chips; and what is recomputed is not kept."""
    config = make_config(train=TrainConfig(steps=10, batch_size=128))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=4))
    computes = [
        ComputeConfig(remat=remat, scan_layers=loop)
        for remat, loop in (("none", True), ("none", False), ("block", False))
    ]
    loop, out, again = (step.compile_step(dataclasses.replace(config, compute=x), "v5e:2x2") for x in computes)
    assert out["predicted"]["parts"]["copies"] < loop["predicted"]["parts"]["copies"] / 2
    assert out["predicted"]["cycles"] < loop["predicted"]["cycles"]
    assert sum(out["sent_bytes"].values()) == pytest.approx(sum(loop["sent_bytes"].values()), rel=0.05)
    assert again["temporary_bytes"] < out["temporary_bytes"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("mixer", study_paper.CELLS)
def test_the_papers_cells_compile(libtpu, mixer):
    """The paper's ablation at its size and budget, for the smallest slice of v5p."""
    config = from_config_dict(study_paper.get_config(f"125M,{mixer},42"))
    assert config.train.batch_size * config.data.seq_len == 524_288
    changes = dict(mesh=MeshConfig(fsdp=4), compute=ComputeConfig(remat="dots"))
    figures = step.compile_step(dataclasses.replace(config, **changes), "v5p:2x2x1")
    assert (figures["fits"], figures["chips"]) == (True, 4)
    assert figures["flops"] * 4 > 6 * count_parameters(config.model)["total"] * 524_288 * 0.75  # without the embedding


@pytest.mark.slow
def test_too_large_is_reported_not_raised(libtpu):
    config = make_config(train=TrainConfig(steps=10, batch_size=4096), compute=ComputeConfig(remat="none"))
    figures = step.compile_step(config, "v5e:2x2")
    assert not figures["fits"]
    assert figures["needed_gib"] > figures["usable_gib"] > 10


@pytest.mark.parametrize("topology", ["v9:2x2", "0xv5e:2x2"])
def test_an_unknown_chip_is_refused(topology):
    with pytest.raises(ValueError, match=f"'{topology}' must start with one of v5e, v5p, v6e, a100, h100, l4, t4"):
        step.compile_step(make_config(), topology)
