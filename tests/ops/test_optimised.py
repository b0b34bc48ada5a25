"""What the op is compiled to: numbers of optimised programs at the size of real chunks, and shapes that occur."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import helpers

from idattn.ops import Basis, blockwise, interdomain_attention, step
from idattn.ops.prepare import COMPOSED, HeadInputs, Preparation, compose, rotary_table

B, T, H, G, R, M = 2, 256, 4, 2, 16, 8
# What tests/conftest.py turns off, where this version of XLA can be told so.
AS_USERS = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ.get("XLA_FLAGS", "") else {}


def basis_of(case):
    c = (case["c_re"], case["c_im"]) if "c_re" in case else None
    return Basis(case["log_delta"], case["a_log"], case["a_imag"], c)


def both(backend, segment_ids):
    """Jitted (case, cotangent) -> outputs and the cotangents of the case."""

    def function(case):
        inputs = case["q"], case["k"], case["v"], basis_of(case)
        return interdomain_attention(
            *inputs, backend=backend, segment_ids=segment_ids, initial_state=case["initial_state"]
        )

    def outputs(case, g):
        o, pullback = jax.vjp(function, case)
        return {"outputs": o, **pullback(g)[0]}

    return outputs


def example(c, M=M):
    rng = np.random.default_rng(0)
    case = helpers.random_case(rng, B=B, T=T, H=H, G=G, R=R, E=R, M=M, c=c, fast_phase=np.pi)
    case = {name: jnp.asarray(x, jnp.float32) for name, x in case.items()}
    return case, jnp.asarray(rng.normal(size=(B, T, H, R)), jnp.float32)


@pytest.mark.parametrize(
    ("backend", "c"),
    [
        ("chunkwise", "full"),
        pytest.param("chunkwise", "identity", marks=pytest.mark.slow),
        pytest.param("associative", "diagonal", marks=pytest.mark.slow),
    ],
)
def test_equals_the_recurrence(backend, c, optimised):
    case, g = example(c)
    segment_ids = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, (B, T)), axis=1), jnp.int32)
    expected = jax.jit(both("recurrent", segment_ids), compiler_options=AS_USERS)(case, g)
    actual = jax.jit(both(backend, segment_ids), compiler_options=AS_USERS)(case, g)
    for name in expected:
        gradient = name != "outputs"
        helpers.assert_close(actual[name], expected[name], "float32", reduction=T * M, gradient=gradient, name=name)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("c", ["full", "diagonal", "identity"])
@pytest.mark.parametrize("backend", ["chunkwise", "associative", "recurrent", "fft"])
def test_no_sum_is_over_an_array_of_more_than_six_axes(backend, c):
    """Of such sums of products, programs for CPUs are wrong from jaxlib 0.10.2 on."""
    jaxpr = jax.make_jaxpr(both(backend, None))(*example(c)).jaxpr
    sums = [e.invars[0].aval.ndim for e in equations(jaxpr) if e.primitive.name == "reduce_sum"]
    assert sums and max(sums) <= 6


@pytest.mark.parametrize("c", ["diagonal", "identity", "full"])
@pytest.mark.parametrize("function", ["chunkwise", "associative", "fft", "step", "block"])
def test_a_diagonal_c_has_no_table_of_all_pairs_of_modes(function, c):
    """The work is M (R + E) a token, as `idattn.costs` counts; the reference, `recurrent`, and a full C take more."""
    case = {name: x[:, :4] if name in ("q", "k", "v") else x for name, x in example(c, M=11)[0].items()}

    def outputs(case):
        if function not in ("step", "block"):
            return both(function, None)(case, case["v"].repeat(2, axis=2))
        basis, (q, k, v) = basis_of(case), (case[name][:, 0] for name in ("q", "k", "v"))
        if function == "step":
            return step(q, k, v, basis, case["initial_state"])
        block = blockwise.open_block(basis, B, 4, 2 * R, q.dtype)
        block = blockwise.add_token(block, jnp.concatenate([k, v], axis=-1))
        return blockwise.interdomain(q, basis, case["initial_state"][None], 0, block, readout="transpose")

    shapes = {x.aval.shape for e in equations(jax.make_jaxpr(outputs)(case).jaxpr) for x in e.outvars}
    pairs = [shape for shape in shapes if sum(size in (11, 22) for size in shape) > 1]
    assert bool(pairs) == (c == "full"), pairs


def test_sums_of_products_are_right_on_cpus():
    """What some versions of jaxlib get wrong where the package does not set a flag (jax-ml/jax#39103)."""
    program = """
import idattn
import jax, jax.numpy as jnp
x = jnp.zeros((32769, 3)).at[:, 0].set(jnp.arange(32769.0))
f = lambda x: jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(x)
print(float(jax.jit(f)(x)[-1]))
"""
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert float(result.stdout) == 32768.0**2, result.stderr


def test_the_backward_pass_of_a_preparation_computes_its_parts_once(optimised):
    """XLA for CPUs would compute what follows the convolution again in each of the convolution's own cotangents."""
    rows, channels, width = jnp.ones((B, T, 16)), jnp.ones(16), jnp.ones(8)
    positions = jnp.zeros((B, T), jnp.int32)
    rotary = rotary_table(positions, 8, 1e4)
    inputs = HeadInputs(rows, jnp.ones((4, 16)), channels, None, width, channels, rotary, positions)
    preparation = Preparation(8, activate=True, eps=1e-5)

    def by_jax(inputs, d_y):
        def forward(arrays):
            return compose(preparation, arrays._replace(rotary=inputs.rotary, positions=inputs.positions))

        return jax.vjp(forward, inputs._replace(rotary=None, positions=None))[1](d_y)[0]

    def flops(backward):
        return jax.jit(backward, compiler_options=AS_USERS).lower(inputs, rows).compile().cost_analysis()["flops"]

    assert flops(partial(COMPOSED.backward, preparation)) < 0.8 * flops(by_jax)  # 0.45 with jax 0.10, 0.77 with 0.12
