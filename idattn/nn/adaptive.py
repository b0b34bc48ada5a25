"""The core of Interdomain Attention with a clock that the tokens set and writes that correct (docs/beyond.md)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from idattn import ops
from idattn.config import ModelConfig
from idattn.nn.documents import Documents, arriving_rows, at_last_token, through_matrix
from idattn.nn.ssm import SSMBlockMemory, SSMCore, SSMMemory
from idattn.ops import Basis
from idattn.ops.chunks import decay_state
from idattn.ops.planes import to_planes

LARGEST_LOG_STEP = 4.0  # a token's step is within exp(+-4) of Delta


class AdaptiveCore(SSMCore):
    """The state's evolution by `idattn.ops.adaptive_attention`.

    log_steps = 4 tanh(clock / 4) and b = sigmoid(gain). `clock` and `gain` are projections of the token that start at
    0: the paper's clock, and half of a correction.
    """

    @classmethod
    def controls(cls, config: ModelConfig) -> tuple[str, ...]:
        ssm = config.ssm
        return ("clock",) * (ssm.core == "clock") + ("gain",) * (ssm.write != "add")

    @classmethod
    def has_key_norm(cls, config: ModelConfig) -> bool:
        """Keys that correct are xi(k), unit vectors as the queries are, which then read what was written."""
        return config.ssm.write == "add" and super().has_key_norm(config)

    def _attend(
        self,
        q: jax.Array | None,
        k: jax.Array,
        v: jax.Array,
        controls: dict[str, jax.Array],
        tails: dict[str, jax.Array],
        documents: Documents,
        memory: SSMMemory | SSMBlockMemory | None,
        axis: str | None,
    ) -> tuple[jax.Array, SSMMemory]:
        ssm, compute = self.config.ssm, self.compute
        assert q is not None and not isinstance(memory, SSMBlockMemory), "queries read it, and blocks are not opened"
        wide = {name: x.astype(jnp.promote_types(x.dtype, jnp.float32)) for name, x in controls.items()}
        clock, gain = wide.get("clock"), wide.get("gain")
        log_steps = None if clock is None else LARGEST_LOG_STEP * jnp.tanh(clock / LARGEST_LOG_STEP)
        gains = None if gain is None else jax.nn.sigmoid(gain)
        write = "delta" if gains is None else ssm.write  # what gains do, if there are any
        state, segments, basis = None if memory is None else memory.state, documents.segments, self.basis()
        if state is not None and segments is None and axis is None and q.shape[1] == 1:
            steps, b = (None if x is None else x[:, 0] for x in (log_steps, gains))
            o, state = ops.adaptive_step(
                q[:, 0], k[:, 0], v[:, 0], basis, state, log_steps=steps, gains=b, readout=ssm.readout, write=write
            )
            return o[:, None], SSMMemory(state, tails)
        attend = partial(
            ops.adaptive_attention, basis=basis, log_steps=log_steps, backend=compute.backend, readout=ssm.readout,
            chunk_size=compute.chunk_size or None, segment_ids=segments, write=write,
        )  # fmt: skip
        with jax.named_scope("op"):
            if axis is not None:
                state = self._arriving(attend, k, v, basis, gains, documents, state, axis)
            o, state = attend(q, k, v, gains=gains, initial_state=state)
        return o, at_last_token(SSMMemory(state, tails), documents, axis)

    def _arriving(
        self,
        attend: Callable[..., tuple[jax.Array, jax.Array]],
        k: jax.Array,
        v: jax.Array,
        basis: Basis,
        gains: jax.Array | None,
        documents: Documents,
        state: jax.Array | None,
        axis: str,
    ) -> jax.Array:
        """The state at the start of a shard. Corrections mix the modes, and depend on the keys that came before."""
        (B, _, G, R), M = k.shape, self.config.ssm.num_modes
        if state is None:
            state = jnp.zeros((B, G, R + v.shape[3], 2 * M), jnp.promote_types(k.dtype, jnp.float32))
        inputs = (k, v) if gains is None else (k,)
        keys = state[:, :, : sum(x.shape[3] for x in inputs)]
        if self.config.ssm.core == "fixed":
            keys = self._arriving_state(inputs, basis, documents, keys, axis)
        else:
            nothing = jnp.zeros_like(k[..., :1])  # all rows evolve as values do that no key writes to
            start = jnp.concatenate([jnp.ones((1, M)), jnp.zeros((1, M))], axis=1)

            def evolve(values, rows):
                before = jnp.concatenate([jnp.zeros_like(rows[:, :, :1]), rows], axis=2)
                return attend(nothing, nothing, values, gains=None, initial_state=before)[1][:, :, 1:]

            keys = arriving_rows(evolve, jnp.concatenate(inputs, axis=3), keys, start, _decay, documents, axis)
        if gains is None:
            return keys

        def correct(values, rows):
            before = jnp.concatenate([keys, rows], axis=2)
            return attend(k, k, values, gains=gains, initial_state=before)[1][:, :, R:]

        values = arriving_rows(correct, v, state[:, :, R:], jnp.eye(2 * M), through_matrix, documents, axis)
        return jnp.concatenate([keys, values], axis=2)


def _decay(decay: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of modes (..., 2M), each mode times its complex number of decay (..., 1, 2M)."""
    return decay_state(to_planes(decay)[..., 0, :, :], rows)
