"""The paper's ideal layer as a token mixer: kernel regression from random features and Legendre polynomials."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from idattn.config import IdealConfig
from idattn.nn.layers import Linear
from idattn.nn.ssm import SSMState
from idattn.ops import IdealState, draw_frequencies, ideal_attention, random_features
from idattn.sharding import is_split, on_shards, spec


class IdealAttention(nnx.Module):
    """x (B, T, D) -> (B, T, D) by `idattn.ops.ideal_attention` with a state of M (R + D / H) numbers for each head.

    The kernel is Gaussian in W_q x and W_k x over the fourth root of the head's width d, exp(-|q - k|^2 / (2 sqrt d)):
    softmax's scores, but for the vectors' lengths. Its frequencies are constants of the program, drawn from
    `ideal.seed`: no parameters, so neither checkpoints nor the optimiser hold them. As in eq. 3-9, there are neither
    convolutions nor positions. A reference to compare with, at a few hundred tokens; features and state are float32 or
    better.

    Args:
      model_dim: D.
      num_heads: H, a divisor of D.
      rngs: the stream `params` is used.
      num_modes: M.
      ideal: the features.
      init_std: standard deviation of the projections at the start.
      residual_std: of the output projection.

    Raises:
      ValueError: sizes do not divide.
    """

    def __init__(
        self,
        model_dim: int,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        num_modes: int = 64,
        ideal: IdealConfig = IdealConfig(),
        init_std: float = 0.02,
        residual_std: float = 0.02,
    ):
        if model_dim % num_heads:
            raise ValueError(f"{num_heads=} must divide {model_dim=}.")
        self.num_heads, self.num_modes, self.ideal = num_heads, num_modes, ideal
        D, self.head_dim = model_dim, model_dim // num_heads
        self.query = Linear(D, D, ("D", "H"), std=init_std, rngs=rngs)
        self.key = Linear(D, D, ("D", "H"), std=init_std, rngs=rngs)
        self.value = Linear(D, D, ("D", "H"), std=init_std, rngs=rngs)
        self.output = Linear(D, D, ("H", "D"), std=residual_std, rngs=rngs)

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: SSMState | None = None
    ) -> tuple[jax.Array, SSMState]:
        """The mixed tokens (B, T, D), and the state after them.

        Args:
          x: (B, T, D) in the dtype to project in.
          segment_ids: (B, T) as in `idattn.ops.ideal_attention`; None for one document a row.
          state: what an earlier call returned, to go on from there; None to start anew.
        """
        if is_split("T"):
            raise NotImplementedError("the ideal mixer does not split tokens; use mesh.sequence=1, or interdomain.")
        frequencies = draw_frequencies(
            self.ideal.seed, self.ideal.features, self.ideal.num_features, (self.num_heads, self.head_dim)
        )
        heads, states = spec("B", "T", "H"), self.state_specs()
        in_specs = ((heads,) * 3, spec("H"), None if segment_ids is None else spec("B", "T"))
        in_specs += (None if state is None else states,)
        projected = self.query(x), self.key(x), self.value(x)
        core = on_shards(self._attend, in_specs, (heads, states))
        o, state = core(projected, jnp.asarray(frequencies), segment_ids, state)
        return self.output(o), state

    def _attend(self, projected, frequencies, segment_ids, state):
        """The heads' outputs (B, T, channels), and the state, for any rows and heads."""
        B, T, _ = projected[0].shape
        q, k, v = (y.reshape(B, T, -1, self.head_dim) for y in projected)
        dtype = jnp.promote_types(v.dtype, jnp.float32)
        q, k = (
            random_features(y.astype(dtype) * self.head_dim**-0.25, frequencies.astype(dtype), self.ideal.features)
            for y in (q, k)
        )
        o, after = ideal_attention(
            q,
            k,
            v,
            self.num_modes,
            segment_ids=segment_ids,
            initial_state=None if state is None else IdealState(state.state, state.position),
            floor=self.ideal.floor,
        )
        return checkpoint_name(o.reshape(B, T, -1), "mixer"), SSMState(after.coefficients, {}, after.position)

    def init_state(
        self, batch_size: int, max_tokens: int, dtype: jnp.dtype, state_dtype: jnp.dtype | None = None
    ) -> SSMState:
        """The state before the first token, as in `SSMMixer.init_state`."""
        shape = (batch_size, self.num_heads, self.num_modes, self.ideal.num_features + self.head_dim)
        state = jnp.zeros(shape, state_dtype or jnp.promote_types(dtype, jnp.float32))
        return SSMState(state, {}, jnp.zeros(batch_size, jnp.int32))

    def state_specs(self, *lead: str) -> SSMState:
        """How a state is split, behind the axes `lead` of a stack."""
        return SSMState(spec(*lead, "B", "H"), {}, spec(*lead, "B"))

    def open_block(self, stack: SSMState, size: int, dtype: jnp.dtype) -> SSMState:
        """The stack itself: every token changes the whole state, with a matrix of its own."""
        return stack
