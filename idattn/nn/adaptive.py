"""The core of Interdomain Attention with a clock that the tokens set and writes that correct (docs/beyond.md)."""

import jax
import jax.numpy as jnp

from idattn import ops
from idattn.config import ModelConfig
from idattn.nn.documents import Documents
from idattn.nn.ssm import SSMBlockMemory, SSMCore, SSMMemory

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
        if axis is not None:
            raise NotImplementedError(
                f"core={ssm.core!r} with write={ssm.write!r} does not split tokens; use mesh.sequence=1, or "
                "core='fixed' with write='add'."
            )
        assert q is not None and not isinstance(memory, SSMBlockMemory), "queries read it, and blocks are not opened"
        wide = {name: x.astype(jnp.promote_types(x.dtype, jnp.float32)) for name, x in controls.items()}
        clock, gain = wide.get("clock"), wide.get("gain")
        log_steps = None if clock is None else LARGEST_LOG_STEP * jnp.tanh(clock / LARGEST_LOG_STEP)
        gains = None if gain is None else jax.nn.sigmoid(gain)
        write = "delta" if gains is None else ssm.write  # what gains do, if there are any
        state, segments, basis = None if memory is None else memory.state, documents.segments, self.basis()
        if state is not None and segments is None and q.shape[1] == 1:
            steps, b = (None if x is None else x[:, 0] for x in (log_steps, gains))
            o, state = ops.adaptive_step(
                q[:, 0], k[:, 0], v[:, 0], basis, state, log_steps=steps, gains=b, readout=ssm.readout, write=write
            )
            return o[:, None], SSMMemory(state, tails)
        with jax.named_scope("op"):
            o, state = ops.adaptive_attention(
                q, k, v, basis, log_steps=log_steps, gains=gains, backend=compute.backend, readout=ssm.readout,
                chunk_size=compute.chunk_size or None, segment_ids=segments, initial_state=state, write=write,
            )  # fmt: skip
        return o, SSMMemory(state, tails)
