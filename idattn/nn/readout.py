"""How the state of an SSM mixer is read: by queries (eq. 13) or by a learned linear readout."""

from typing import Protocol

import jax
import jax.numpy as jnp

from idattn import ops
from idattn.config import ComputeConfig, ModelConfig, SSMConfig
from idattn.ops import Basis, Segments, blockwise


class Readout(Protocol):
    """The contract of readouts. They have no parameters: those of `basis` and c_out (G, M) are handed to them."""

    by_query: bool  # whether it reads by queries, from a projection "query", rather than by c_out

    def attend(
        self,
        q: jax.Array | None,
        k: jax.Array,
        v: jax.Array,
        basis: Basis,
        c_out: jax.Array | None,
        state: jax.Array | None,
        segments: Segments | None,
        ssm: SSMConfig,
        compute: ComputeConfig,
    ) -> tuple[jax.Array, jax.Array]:
        """The outputs (B, T, heads, width) of k (B, T, G, R) and v (B, T, G, E), and the state (B, G, R + E, 2M)."""
        ...

    def attend_in_block(
        self, q, basis: Basis, c_out, states, layer: jax.Array, block: blockwise.Block, ssm: SSMConfig
    ) -> jax.Array:
        """The outputs (B, heads, width) of a block's newest token; see `idattn.ops.blockwise`."""
        ...

    def output_width(self, config: ModelConfig) -> int:
        """Channels of all heads' outputs."""
        ...

    def flops(self, config: ModelConfig) -> int:
        """Operations a token for reading the states."""
        ...


class QueryReadout:
    """o_t = Re(q_t^T U_t^T Gamma_t) with [U_t, Gamma_t] = C X_t (eq. 13)."""

    by_query = True

    def attend(self, q, k, v, basis, c_out, state, segments, ssm, compute):
        if state is not None and segments is None and q.shape[1] == 1:
            o, state = ops.step(q[:, 0], k[:, 0], v[:, 0], basis, state, readout=ssm.readout)
            return o[:, None], state
        with jax.named_scope("op"):  # by which a plan knows it
            return ops.interdomain_attention(
                q, k, v, basis, backend=compute.backend, chunk_size=compute.chunk_size or None, segment_ids=segments,
                initial_state=state, return_state=True, readout=ssm.readout,
            )  # fmt: skip

    def attend_in_block(self, q, basis, c_out, states, layer, block, ssm):
        return blockwise.interdomain(q, basis, states, layer, block, readout=ssm.readout)

    def output_width(self, config):
        return config.model_dim

    def flops(self, config):
        """y = X_k q, w = C^T f(C y) with the product of the two matrices, o = Re(w^T X_v)."""
        H, M = config.num_heads, config.ssm.num_modes
        matrix = {"full": 8 * M**2, "diagonal": 8 * M, "identity": 0}[config.ssm.c]
        return H * (4 * M * config.state_width + matrix)


class LinearReadout:
    """y_t = Re(c_out^T C X_t): learned weights contract the modes of keys and values alike, as in S4D."""

    by_query = False

    def attend(self, q, k, v, basis, c_out, state, segments, ssm, compute):
        z = jnp.concatenate([k, v], axis=-1)
        if state is not None and segments is None and z.shape[1] == 1:
            y, state = ops.linear_step(z[:, 0], basis, c_out, state)
            return y[:, None], state
        with jax.named_scope("op"):
            return ops.linear_readout(
                z, basis, c_out, backend=compute.backend, chunk_size=compute.chunk_size or None, segment_ids=segments,
                initial_state=state, return_state=True,
            )  # fmt: skip

    def attend_in_block(self, q, basis, c_out, states, layer, block, ssm):
        return blockwise.linear(basis, c_out, states, layer, block)

    def output_width(self, config):
        return 2 * config.model_dim

    def flops(self, config):
        return config.num_heads * 4 * config.ssm.num_modes * 2 * config.head_dim
