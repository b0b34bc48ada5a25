"""Programs compiled for GPUs that are not there, by their compiler."""

import jax
import jax.numpy as jnp
import pytest

from idattn.chips import CHIPS
from idattn.config import (
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    SSMConfig,
    TrainConfig,
)
from idattn.ops import interdomain_attention
from idattn.plan import step
from idattn.plan.compiler import compile_for, load_compiler
from idattn.plan.cycles import PARTS
from idattn.plan.gpus import GPUS, gpu_devices, gpu_of, pool_fraction
from idattn.plan.op_shapes import SHAPES, abstract_inputs


def test_names():
    assert [gpu_of(name) for name in ("h100:8", "a100", "t4:1", "v5e:2x2")] == ["H100", "A100", "T4", None]
    assert gpu_of("2xh100:8") == "H100"  # which has no slices: an error that says so
    for wrong in ("h100:0", "h100:2x2", "2xh100:8", "v5e:2x2"):
        with pytest.raises(ValueError, match="must be as h100:8"):
            gpu_devices(wrong)


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for topology, named, extra in (("h100:8", "", "compile-gpu"), ("v5e:2x2", "libtpu", "compile")):
        with pytest.raises(SystemExit, match=rf"{named}.*pip install 'idattn\[{extra}\]'"):
            load_compiler(topology)


def test_the_part_of_the_memory_that_jax_takes(monkeypatch):
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert pool_fraction() == 0.75
    for name in names:
        with monkeypatch.context() as patch:
            patch.setenv(name, ".9")
            assert pool_fraction() == 0.9


def test_every_gpu_has_its_peaks():
    assert all(min(CHIPS[name][1:4]) > 0 for name in GPUS)


@pytest.mark.parametrize("name", GPUS)
def test_devices(gpu_compile, name):
    devices = gpu_devices(f"{name.lower()}:4")
    assert {x.device_kind for x in devices} == {CHIPS[name].kinds[0]} and len(devices) == 4


@pytest.mark.parametrize("name", GPUS)
def test_the_op_compiles(gpu_compile, name):
    """Forward, on every card; of T4 in float16, as it has no bfloat16."""
    dtype = jnp.float16 if name == "T4" else jnp.bfloat16
    *inputs, _ = abstract_inputs(SHAPES["cpu"], 1, 300, dtype)
    compiled = compile_for(name.lower(), interdomain_attention, *inputs)
    (o,) = jax.tree.leaves(compiled.out_info)
    assert (o.shape, o.dtype) == ((1, 300, 4, 64), dtype)
    assert compiled.memory_analysis().temp_size_in_bytes > 0


def test_a_step_compiles_for_a_host(gpu_compile, monkeypatch):
    """The real train step, for four GPUs; memory and bytes against what the shapes say. JAX takes too little of it."""
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "1e-6")
    config = Config(
        model=ModelConfig(
            vocab_size=512, model_dim=256, num_layers=1, num_heads=2, mlp_dim=512, ssm=SSMConfig(num_modes=64)
        ),
        data=DataConfig(seq_len=256),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=2),
        train=TrainConfig(steps=10, batch_size=8),
        compute=ComputeConfig(remat="none"),
        mesh=MeshConfig(fsdp=4),
    )
    figures = step.compile_step(config, "h100:4")
    assert (figures["fits"], figures["chips"], figures["hbm_gib"]) == (False, 4, 79.1)
    assert figures["needed_gib"] == figures["peak_gib"] > figures["usable_gib"] == pytest.approx(79.1e-6)
    assert "DOES NOT FIT" in step.describe(figures, config)
    layer, words = 256 * (4 * 256 + 3 * 512), 256 * 512
    assert layer + 2 * words < figures["parameter_bytes"] < 1.5 * (layer + 2 * words)  # a quarter of each, four bytes
    assert figures["optimiser_bytes"] == pytest.approx(2 * figures["parameter_bytes"], rel=1e-3)
    assert figures["temporary_bytes"] > 0 and figures["peak_gib"] < 1
    # Three quarters of each matrix in bfloat16, of the embedding too, and of the head in float32.
    sent = figures["sent_bytes"]
    assert sent["all-gather"] == pytest.approx((2 * layer + 6 * words) * 3 / 4, rel=0.05)
    assert sent["reduce-scatter"] + sent["all-reduce"] / 2 == pytest.approx(sent["all-gather"], rel=0.1)
    predicted = figures["predicted"]
    launches, moved, parts = (predicted[name] for name in ("launches", "moved_bytes", "parts"))
    assert set(parts) == set(PARTS) and launches.keys() == moved.keys() <= set(PARTS)
    for part in ("kernels", "products", "mixer", "loss", "block", "optimizer"):
        assert launches[part] > 0 and parts[part] >= 0.999 * moved[part] / 3350e9 * 1e9 > 0
    assert predicted["seconds"] == pytest.approx(sum(parts.values()) / 1e9)
    assert 0 < predicted["mfu"] < figures["mfu_at_most"] < 1
    text = step.describe(figures | {"fits": True, "usable_gib": 59.3}, config)
    assert "GiB of 59.3, the part that JAX takes of the card's 79.1: fits, " in text
    assert text.index("program: at least ") < text.index("the op  ") < text.index(" launches move ")
