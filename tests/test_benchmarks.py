"""The tools that measure the op: their figures on kernels that can be counted by hand, and their refusals."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from helpers import defined_flags, run_main
from jax.experimental import pallas as pl

from idattn.ops import BACKENDS, chunkwise
from launch import bench_ops, tpu_compiler, tpu_schedule


def blocked_product(x, y):
    """x (32, 64) times y (64, 48), rows in blocks of 8, columns of 16, y's block staying for all rows."""

    def kernel(x_ref, y_ref, z_ref):
        z_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    return pl.pallas_call(
        kernel,
        grid=(3, 4),
        in_specs=[pl.BlockSpec((8, 64), lambda j, i: (i, 0)), pl.BlockSpec((64, 16), lambda j, i: (0, j))],
        out_specs=pl.BlockSpec((8, 16), lambda j, i: (i, j)),
        out_shape=jax.ShapeDtypeStruct((32, 48), jnp.float32),
        name="blocked_product",
    )(x, y)


@pytest.mark.parametrize(("chip", "cycles"), [("v5e", 8 / 4), ("v6e", 8 / 4)])
def test_traffic_and_products_of_a_kernel(chip, cycles):
    x, y = jax.ShapeDtypeStruct((32, 64), jnp.bfloat16), jax.ShapeDtypeStruct((64, 48), jnp.bfloat16)
    (kernel,) = tpu_schedule.find_kernels(jax.jit(blocked_product), x, y, chip=chip)
    assert (kernel.name, kernel.steps) == ("blocked_product", 12)
    assert kernel.hbm_bytes == 3 * 32 * 64 * 2 + 64 * 48 * 2 + 32 * 48 * 4  # x again for every block of columns
    assert kernel.mxu_cycles == 12 * cycles
    json.dumps(kernel[1:])  # which an integer of numpy's would refuse


def test_a_missing_compiler_is_said_with_the_extra_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"libtpu.*idattn\[compile\]"):
        tpu_compiler.load_compiler(dump=False)


@pytest.fixture(scope="module", autouse=True)
def bench_flags():
    with defined_flags(bench_ops):
        yield


def run_bench(tmp_path, *arguments):
    file = tmp_path / "table.json"
    run_main(bench_ops, "--seq_len=32", "--repeats=1", f"--json={file}", *arguments)
    return json.loads(file.read_text())


def test_the_benchmark_times_every_backend(tmp_path, capsys):
    rows = run_bench(tmp_path, "--backend=chunkwise", "--backend=associative", "--chunk_size=16")
    names = [row["backend"] for row in rows]
    assert names == ["softmax, written out", "softmax, fused", "chunkwise, K = 16", "associative, K = 16"]
    assert all(row["forward"] > 0 and row["both"] > 0 and row["temp_bytes"] > 0 for row in rows)
    assert capsys.readouterr().out.count("\ncpu 32") == 4


def test_the_benchmark_prints_nothing_for_what_is_wrong(tmp_path, capsys, monkeypatch):
    def wrong(*arguments):
        o, start = chunkwise.forward(*arguments)
        return o * 1.001, start

    backend = dataclasses.replace(chunkwise.BACKEND, rule=(wrong, chunkwise.backward))
    monkeypatch.setitem(BACKENDS, "chunkwise", backend)
    with pytest.raises(SystemExit, match="chunkwise, K = 16: relative error .* exceeds"):
        run_bench(tmp_path, "--chunk_size=16")
    assert "chunkwise" not in capsys.readouterr().out
