"""The end of a block of decoded tokens on TPUs: every state is read once, changed and written once, in its place.

XLA moves about four times the bytes: it lays the states out anew for products, or takes a pass for each term.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
ROWS = 16  # of a register of bfloat16
MOST = 2**19  # numbers of the states worked on together


def fits(states: jax.Array) -> bool:
    """Whether the kernel closes blocks of states (L, B, G, W, 2M): in whole registers, and in the memory it has.

    It takes eight rows of the batch at a time. With fewer, weights are most of what a token reads.
    """
    _, B, _, W, planes = states.shape
    whole = B % SUBLANES == 0 and planes % LANES == 0 and W % ROWS == 0
    return whole and SUBLANES * W * planes <= MOST and states.dtype in (jnp.float32, jnp.bfloat16)


def close(states: jax.Array, tokens: jax.Array, decay: jax.Array, lags: jax.Array, interpret: bool = False):
    """decay X + sum_s lags_s z_s^T for all layers.

    Args:
      states: (L, B, G, W, 2M) float32 or bfloat16, donated.
      tokens: (L, B, K, G, W) z.
      decay: (L, G, 2, M) float32.
      lags: (L, K, G, 2M) float32.
      interpret: run on any platform, slowly.
    """
    L, B, G, W, planes = states.shape
    K, rows = tokens.shape[2], SUBLANES
    re, im = decay[:, :, 0], decay[:, :, 1]
    # X lambda = X [re, re] + (X with its planes exchanged) [-im, im]
    factors = jnp.stack([jnp.concatenate([re, re], axis=-1), jnp.concatenate([-im, im], axis=-1)], axis=2)

    def kernel(states_ref, tokens_ref, factors_ref, lags_ref, out_ref, wide):
        # The tokens of row b are the rows b, b + 8, ... of each tile of lanes, which a load with a stride takes.
        z = tokens_ref[...].astype(jnp.float32)
        starts = range(0, wide.shape[0], K * rows)
        for tile, start in enumerate(starts):
            part = z[..., tile * LANES : (tile + 1) * LANES]
            wide[start : start + K * rows, : part.shape[-1]] = part.reshape(K * rows, -1)
        for b in range(rows):
            x = states_ref[b].astype(jnp.float32)
            tiles = [wide[pl.ds(start + b, K, stride=rows), :] for start in starts]
            added = _product(jnp.concatenate(tiles, axis=1)[:, :W], lags_ref[...], tokens.dtype)
            turned = pltpu.roll(x, planes // 2, 1)
            out_ref[b] = (x * factors_ref[0:1] + turned * factors_ref[1:2] + added).astype(out_ref.dtype)

    states_spec = pl.BlockSpec((None, rows, None, W, planes), lambda layer, g, b: (layer, b, g, 0, 0))
    with jax.named_scope("close_block"):
        return pl.pallas_call(
            kernel,
            grid=(L, G, B // rows),
            in_specs=[
                states_spec,
                pl.BlockSpec((None, K, None, rows, W), lambda layer, g, b: (layer, 0, g, b, 0)),
                pl.BlockSpec((None, None, 2, planes), lambda layer, g, b: (layer, g, 0, 0)),
                pl.BlockSpec((None, None, K, planes), lambda layer, g, b: (layer, g, 0, 0)),
            ],
            out_specs=states_spec,
            out_shape=jax.ShapeDtypeStruct(states.shape, states.dtype),
            scratch_shapes=[pltpu.VMEM((-(-W // LANES) * K * rows, LANES), jnp.float32)],
            input_output_aliases={0: 0},
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
            interpret=interpret,
            name="close_block",
        )(states, tokens.transpose(0, 2, 3, 1, 4), factors, lags.swapaxes(1, 2))  # as XLA lays tokens out: not a copy


def _product(z: jax.Array, lag: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """z^T lag in float32, for z whose numbers are of `dtype`."""
    over_tokens = (((0,), (0,)), ((), ()))
    if dtype != jnp.bfloat16:
        return jax.lax.dot_general(z, lag, over_tokens, precision="highest", preferred_element_type=jnp.float32)
    # z is exact in bfloat16, so three parts of the other factor take half the passes of the general product.
    parts = []
    for _ in range(3):
        parts.append(lag.astype(jnp.bfloat16))
        lag = lag - parts[-1].astype(jnp.float32)
    z = jnp.concatenate([z.astype(jnp.bfloat16)] * 3)
    return jax.lax.dot_general(z, jnp.concatenate(parts), over_tokens, preferred_element_type=jnp.float32)
