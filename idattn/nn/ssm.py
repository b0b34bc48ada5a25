"""The token mixers that keep a fixed-size state: Interdomain Attention and the cells of the paper's ablation.

Two questions span the ablation (section 4). What does the state read: features of keys with values, [xi(k), v], or
two generic inputs, [a, b]? And how is it read: by queries (eq. 13) or by a learned linear readout?

    mixer          input of the state   readout   RoPE on
    interdomain    [xi(k), v]           queries   q, k
    single_query   [a, b]               queries   q, a
    dual_linear    [xi(k), v]           linear    k
    s4d            [a, b]               linear    - (s4d_rope: a)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from idattn import ops
from idattn.config import MIXERS, ComputeConfig, MixerKind, ModelConfig, SSMConfig
from idattn.nn.layers import HeadNorm, Linear, ShortConv, SSMParam, StateBasis, feature_map, rotate_positions
from idattn.ops.segments import document_positions


class SSMState(NamedTuple):
    """What an SSM mixer carries from token to token; its size does not depend on how many came before."""

    state: jax.Array  # (B, G, 2, M, R + E), float32
    conv_tails: dict[str, jax.Array]  # name of the projection -> (B, conv_width - 1, channels)
    position: jax.Array  # (B,) int32, of the next token in its document


class SSMMixer(nnx.Module):
    """x (B, T, D) -> (B, T, D) through one state for each head; see the module's docstring for the variants.

    Args:
      config: widths and the options of the state.
      kind: the cell of the ablation.
      residual_std: standard deviation of the output projection at the start.
      compute: backend, chunk size.
      rngs: the stream `params` is used.
    """

    def __init__(
        self, config: ModelConfig, kind: MixerKind, *, residual_std: float, compute: ComputeConfig, rngs: nnx.Rngs
    ):
        D, G, R = config.model_dim, config.num_kv_heads, config.head_dim
        ssm = config.ssm
        if not kind.query_readout and ssm.heads_per_kv > 1:
            raise ValueError(f"heads_per_kv={ssm.heads_per_kv} needs a readout by queries: a linear one has none.")
        self.config, self.kind, self.compute = config, kind, compute

        def projection(width):
            return Linear(D, width, std=config.init_std, rngs=rngs)

        def convolution(width):
            return ShortConv(width, ssm.conv_width, rngs=rngs)

        self.first, self.first_conv = projection(G * R), convolution(G * R)  # k, or a
        self.second = projection(G * R)  # v, or b
        self.second_conv = None if kind.feature_map else convolution(G * R)
        self.first_norm = HeadNorm(G, R, eps=config.norm_eps, bias_init=ssm.norm_bias_init)
        self.second_norm = HeadNorm(G, R, eps=config.norm_eps, bias_init=ssm.norm_bias_init)
        self.basis = StateBasis(G, ssm, rngs=rngs)
        if kind.query_readout:
            self.query, self.query_conv = projection(D), convolution(D)
            width = D
        else:
            std = ssm.num_modes**-0.5
            self.c_out = SSMParam(std * jax.random.normal(rngs.params(), (G, ssm.num_modes)))
            width = 2 * D
        self.gate = projection(width) if ssm.output_gate else None
        self.output = Linear(width, D, std=residual_std, rngs=rngs)

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: SSMState | None = None
    ) -> tuple[jax.Array, SSMState]:
        """The mixed tokens (B, T, D), and the state after them.

        Args:
          x: (B, T, D) in the dtype to compute in.
          segment_ids: (B, T) as in `idattn.ops.interdomain_attention`; None for one document a row.
          state: what an earlier call returned, to go on from there; None to start anew.
        """
        B, T, _ = x.shape
        one_token = state is not None and T == 1 and segment_ids is None
        start = jnp.zeros(B, jnp.int32) if state is None else state.position
        if segment_ids is None:
            positions, end = start[:, None] + jnp.arange(T, dtype=jnp.int32), start + T
        else:
            positions, end = document_positions(segment_ids, start)
        tails = {}

        def convolve(name, y):
            tail = None if state is None else state.conv_tails[name]
            y, tails[name] = getattr(self, f"{name}_conv")(y, tail, segment_ids)
            return y

        ssm = self.config.ssm
        first = self._heads(convolve("first", self.first(x)))
        second = self.second(x) if self.kind.feature_map else convolve("second", self.second(x))
        k = self.first_norm(self._features(first, positions, self.kind.feature_map))
        v = self.second_norm(self._heads(second))
        options: dict[str, Any] = dict(segment_ids=segment_ids, return_state=True)
        options |= dict(backend=self.compute.backend, chunk_size=self.compute.chunk_size)
        ssm_state = None if state is None else state.state

        if self.kind.query_readout:
            q = self._features(self._heads(convolve("query", self.query(x))), positions, True)
            if one_token:
                o, ssm_state = ops.step(q[:, 0], k[:, 0], v[:, 0], self.basis(), ssm_state, readout=ssm.readout)
            else:
                o, ssm_state = ops.interdomain_attention(
                    q, k, v, self.basis(), initial_state=ssm_state, readout=ssm.readout, **options
                )
        else:
            z = jnp.concatenate([k, v], axis=-1)
            if one_token:
                o, ssm_state = ops.linear_step(z[:, 0], self.basis(), self.c_out[...], ssm_state)
            else:
                o, ssm_state = ops.linear_readout(z, self.basis(), self.c_out[...], initial_state=ssm_state, **options)
        o = o.reshape(B, T, -1)
        if self.gate is not None:
            o = jax.nn.silu(self.gate(x)) * o
        return self.output(o), SSMState(ssm_state, tails, end)

    def init_state(self, batch_size: int, max_tokens: int, dtype: jnp.dtype) -> SSMState:
        """The state before the first token, for `batch_size` rows computed in `dtype`; `max_tokens` does not matter."""
        G, R, M = self.config.num_kv_heads, self.config.head_dim, self.config.ssm.num_modes
        before = self.config.ssm.conv_width - 1
        names = [n for n in ("first", "second", "query") if getattr(self, f"{n}_conv", None) is not None]
        widths = {n: getattr(self, n).weight.shape[1] for n in names}
        tails = {name: jnp.zeros((batch_size, before, width), dtype) for name, width in widths.items()}
        state = jnp.zeros((batch_size, G, 2, M, 2 * R), jnp.promote_types(dtype, jnp.float32))
        return SSMState(state, tails, jnp.zeros(batch_size, jnp.int32))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.config.head_dim)

    def _features(self, x: jax.Array, positions: jax.Array, mapped: bool) -> jax.Array:
        """Heads with rotary positions and, if `mapped`, the feature map xi, in the configured order."""
        after = mapped and self.config.ssm.rope_position == "after"
        if after:
            x = feature_map(x)
        if self.kind.rope:
            x = rotate_positions(x, positions, self.config.rope_base)
        return feature_map(x) if mapped and not after else x


class InterdomainAttention(SSMMixer):
    """The paper's layer by itself, for use in any model: `y, state = layer(x)` with x and y (B, T, D).

    Args:
      model_dim: D.
      num_heads: H, a divisor of D; heads are D / H wide.
      rngs: the stream `params` is used.
      rope: rotary positions on queries and keys.
      compute: backend and chunk size; the dtype is that of the input.
      **ssm: fields of `idattn.config.SSMConfig`: num_modes, readout, heads_per_kv, output_gate, ...

    Raises:
      ValueError: sizes do not divide, or an option is unknown.
    """

    def __init__(
        self,
        model_dim: int,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        rope: bool = True,
        compute: ComputeConfig = ComputeConfig(),
        **ssm: Any,
    ):
        name = "interdomain" if rope else "interdomain_norope"
        config = ModelConfig(
            vocab_size=1,
            model_dim=model_dim,
            num_layers=1,
            num_heads=num_heads,
            mlp_dim=1,
            mixers=(name,),
            ssm=SSMConfig(**ssm),
        )
        super().__init__(config, MIXERS[name], residual_std=config.init_std, compute=compute, rngs=rngs)
