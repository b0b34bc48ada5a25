"""The shapes in the annotations of the public functions are those of their arguments and results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped
from support import helpers

from idattn import ops
from idattn.ops import Basis


def arguments(R=4, E=3):
    case = helpers.random_case(np.random.default_rng(0), B=2, T=5, H=4, G=2, R=R, E=E, M=3, c="identity")
    case = {name: jnp.asarray(x, jnp.float32) for name, x in case.items()}
    return case, Basis(case["log_delta"], case["a_log"], case["a_imag"], None)


def typed(function):
    return jaxtyped(function, typechecker=beartype)


def test_annotations_hold():
    case, basis = arguments()

    def call_all(case, basis):
        options = dict(segment_ids=jnp.zeros((2, 5), jnp.int32), initial_state=case["initial_state"], return_state=True)
        o, state = typed(ops.interdomain_attention)(case["q"], case["k"], case["v"], basis, **options)
        token = (case[name][:, 0] for name in ("q", "k", "v"))
        typed(ops.step)(*token, basis, state)
        z, c_out = jnp.concatenate([case["k"], case["v"]], axis=-1), jnp.ones((2, 3))
        y, state = typed(ops.linear_readout)(z, basis, c_out, **options)
        typed(ops.linear_step)(z[:, 0], basis, c_out, state)
        return o, y, state, *typed(ops.transfer)((case["k"], case["v"]), basis)

    o, y, state, decay, increment = jax.eval_shape(call_all, case, basis)
    assert (o.shape, y.shape, decay.shape, increment.shape) == ((2, 5, 4, 3), (2, 5, 2, 7), (2, 2, 2, 3), state.shape)


def test_annotations_are_checked():
    """As the test above would notice: letters stand for one size each."""
    case, basis = arguments()
    with pytest.raises(TypeCheckError):
        typed(ops.interdomain_attention)(case["q"], case["k"][:, :3], case["v"], basis)
