"""The token mixers that keep a fixed-size state: Interdomain Attention and the cells of the paper's ablation.

Two questions span the ablation (section 4). What does the state read: features of keys with values, [xi(k), v], or
two generic inputs, [a, b]? And how is it read: by queries (eq. 13) or by a learned linear readout?

    mixer          input of the state   readout   RoPE on
    interdomain    [xi(k), v]           queries   q, k
    single_query   [a, b]               queries   q, a
    dual_linear    [xi(k), v]           linear    k
    s4d            [a, b]               linear    - (s4d_rope: a)
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from idattn import ops
from idattn.config import MIXERS, ComputeConfig, MixerKind, ModelConfig, SSMConfig
from idattn.nn import carry
from idattn.nn.layers import HeadNorm, Linear, ShortConv, SSMParam, StateBasis, feature_map, rotate_positions
from idattn.ops import blockwise
from idattn.ops.discretize import multiply
from idattn.ops.segments import document_positions
from idattn.sharding import is_split, on_shards, param_specs, spec


class SSMState(NamedTuple):
    """What an SSM mixer carries from token to token; its size does not depend on how many came before."""

    state: jax.Array  # (B, G, R + E, 2M), see `blockwise.to_rows`; of the ideal mixer (B, H, M, R + E)
    conv_tails: dict[str, jax.Array]  # name of the projection -> (B, conv_width - 1, channels)
    position: jax.Array  # (B,) int32, of the next token in its document

    def stack(self, layers: int) -> "SSMState":
        """As many layers behind one another, all with this state."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), self)

    def pick(self, layer: jax.Array) -> "SSMState":
        """The state of a layer of the stack."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), self)

    def put(self, layer: jax.Array, new: "SSMState") -> "SSMState":
        """The stack with another state of a layer, in the dtype that the stack is kept in."""
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), layer, axis=0), self, new
        )

    def close(self) -> "SSMState":
        """Itself, for a mixer whose every token of a block changes the state."""
        return self


class BlockState(NamedTuple):
    """What an SSM mixer carries inside a block of tokens (`idattn.ops.blockwise`): the state before it is only read."""

    states: jax.Array  # (layers, B, G, R + E, 2M), of the whole stack
    conv_tails: dict[str, jax.Array]  # this and the next two as in SSMState, of one layer or a stack
    position: jax.Array
    block: blockwise.Block
    layer: jax.Array | None = None  # () int32, whose turn it is; None for the stack

    def pick(self, layer: jax.Array) -> "BlockState":
        """A layer of the stack."""
        own = (self.conv_tails, self.position, self.block)
        own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), own)
        return BlockState(self.states, *own, layer)

    def put(self, layer: jax.Array, new: "BlockState") -> "BlockState":
        """The stack with what a token has changed of a layer."""

        def write(x, y):
            return jax.lax.dynamic_update_index_in_dim(x, y, layer, axis=0)

        tails = jax.tree.map(write, self.conv_tails, new.conv_tails)
        newest = jax.lax.dynamic_slice_in_dim(new.block.tokens, new.block.count - 1, 1, axis=1)
        where = (layer, 0, new.block.count - 1, 0, 0)
        tokens = jax.lax.dynamic_update_slice(self.block.tokens, newest[None], where)
        block = self.block._replace(tokens=tokens, count=write(self.block.count, new.block.count))
        return BlockState(self.states, tails, write(self.position, new.position), block)

    def close(self) -> SSMState:
        """The stack's states after the block."""

        def close(states, layer):
            state = jax.lax.dynamic_index_in_dim(states, layer, keepdims=False)
            state = blockwise.close_block(state, self.pick(layer).block)
            return jax.lax.dynamic_update_index_in_dim(states, state, layer, axis=0), None

        states, _ = jax.lax.scan(close, self.states, jnp.arange(self.states.shape[0]))
        return SSMState(states, self.conv_tails, self.position)


class SSMCore(nnx.Module):
    """What lies between a mixer's projections: convolutions, norms, features, the op; for any heads of it.

    Args:
      config: the options of the state.
      kind: the cell of the ablation.
      compute: backend, chunk size.
      **parts: `first_conv`, `first_norm`, `second_norm`, `basis`, and as the cell has them `second_conv`, `query_conv`,
        `c_out`.
    """

    def __init__(self, config: ModelConfig, kind: MixerKind, *, compute: ComputeConfig, **parts: Any):
        self.config, self.kind, self.compute = config, kind, compute
        self.conv_names = tuple(name.removesuffix("_conv") for name in parts if name.endswith("_conv"))
        for name, part in parts.items():
            setattr(self, name, part)

    def __call__(
        self,
        projected: dict[str, jax.Array],
        segment_ids: jax.Array | None,
        state: SSMState | BlockState | None,
        axis: str | None = None,
    ) -> tuple[jax.Array, SSMState | BlockState]:
        """The heads' outputs (B, T, channels), and the state after the tokens.

        Args:
          projected: name of the projection -> (B, T, channels).
          segment_ids, state: as in `SSMMixer`.
          axis: the mesh axis that the tokens are split over, or None; then `state` is what the sequence goes on from.
        """
        B, T, _ = projected["first"].shape
        one_token = state is not None and T == 1 and segment_ids is None and axis is None
        same = carry.continues(segment_ids, axis)
        tails = {}

        def convolve(name):
            y, conv = projected[name], getattr(self, f"{name}_conv")
            tail = None if state is None else state.conv_tails[name]
            if axis is not None:
                tail = carry.neighbour(conv.next_tail(y, None, segment_ids), tail, same, axis)
            y, tails[name] = conv(y, tail, segment_ids)
            return self._heads(y)

        start = jnp.zeros(B, jnp.int32) if state is None else state.position
        start = carry.positions(segment_ids, T, start, axis)
        if segment_ids is None:
            positions, end = start[:, None] + jnp.arange(T, dtype=jnp.int32), start + T
        else:
            positions, end = document_positions(segment_ids, start)
        second = self._heads(projected["second"]) if self.kind.feature_map else convolve("second")
        k = self.first_norm(self._features(convolve("first"), positions, self.kind.feature_map))
        v = self.second_norm(second)

        ssm, basis = self.config.ssm, self.basis()
        q = self._features(convolve("query"), positions, True) if self.kind.query_readout else None
        if isinstance(state, BlockState):
            block = blockwise.add(state.block, jnp.concatenate([k, v], axis=-1)[:, 0])
            if q is not None:
                o = blockwise.interdomain(q[:, 0], basis, state.states, state.layer, block, readout=ssm.readout)
            else:
                o = blockwise.linear(basis, self.c_out[...], state.states, state.layer, block)
            return o.astype(k.dtype).reshape(B, T, -1), BlockState(state.states, tails, end, block, state.layer)
        ssm_state = None if state is None else blockwise.to_planes(state.state)
        if axis is not None:
            decay, own = ops.transfer((k, v), basis, segment_ids=segment_ids, chunk_size=self.compute.chunk_size)
            ssm_state = jnp.zeros_like(own) if ssm_state is None else ssm_state
            if same is not None:
                same = same.reshape(-1, 1, 1, 1, 1)
                decay = jnp.where(same, decay, 0)
            ssm_state = carry.arriving(decay, own, ssm_state, axis, product=partial(multiply, axis=-3))
            ssm_state = ssm_state if same is None else jnp.where(same, ssm_state, 0)
        options: dict[str, Any] = dict(segment_ids=segment_ids, return_state=True)
        options |= dict(backend=self.compute.backend, chunk_size=self.compute.chunk_size)
        if q is not None:
            if one_token:
                o, ssm_state = ops.step(q[:, 0], k[:, 0], v[:, 0], basis, ssm_state, readout=ssm.readout)
            else:
                o, ssm_state = ops.interdomain_attention(
                    q, k, v, basis, initial_state=ssm_state, readout=ssm.readout, **options
                )
        else:
            z = jnp.concatenate([k, v], axis=-1)
            if one_token:
                o, ssm_state = ops.linear_step(z[:, 0], basis, self.c_out[...], ssm_state)
            else:
                o, ssm_state = ops.linear_readout(z, basis, self.c_out[...], initial_state=ssm_state, **options)
        state = carry.at_the_end(SSMState(blockwise.to_rows(ssm_state), tails, end), segment_ids, axis)
        return checkpoint_name(o.reshape(B, T, -1), "mixer"), state

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
        self.config = config

        def projection(width, dim):
            return Linear(D, width, ("D", dim), std=config.init_std, rngs=rngs)

        def norm():
            return HeadNorm(G, R, eps=config.norm_eps, bias_init=ssm.norm_bias_init)

        parts = {}
        self.first = projection(G * R, "G")  # k, or a
        parts["first_conv"] = ShortConv(G * R, ssm.conv_width, "G", rngs=rngs)
        self.second = projection(G * R, "G")  # v, or b
        if not kind.feature_map:
            parts["second_conv"] = ShortConv(G * R, ssm.conv_width, "G", rngs=rngs)
        parts |= {"first_norm": norm(), "second_norm": norm(), "basis": StateBasis(G, ssm, rngs=rngs)}
        if kind.query_readout:
            self.query = projection(D, "H")
            parts["query_conv"] = ShortConv(D, ssm.conv_width, "H", rngs=rngs)
            width = D
        else:
            std = ssm.num_modes**-0.5
            parts["c_out"] = SSMParam(std * jax.random.normal(rngs.params(), (G, ssm.num_modes)), dims=("G", "M"))
            width = 2 * D
        self.core = SSMCore(config, kind, compute=compute, **parts)
        self.gate = projection(width, "H") if ssm.output_gate else None
        self.output = Linear(width, D, ("H", "D"), std=residual_std, rngs=rngs)

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: SSMState | None = None
    ) -> tuple[jax.Array, SSMState]:
        """The mixed tokens (B, T, D), and the state after them.

        Args:
          x: (B, T, D) in the dtype to compute in.
          segment_ids: (B, T) as in `idattn.ops.interdomain_attention`; None for one document a row.
          state: what an earlier call returned, to go on from there; None to start anew.
        """
        projected = {name: getattr(self, name)(x) for name in self._widths()}
        graphdef, params = nnx.split(self.core)

        def core(params, projected, segment_ids, state):
            axis = "sequence" if is_split("T") else None
            return nnx.merge(graphdef, params)(projected, segment_ids, state, axis)

        tokens, heads = spec("B", "T"), spec("B", "T", "H")
        states = self.state_specs()
        if isinstance(state, BlockState):
            block = blockwise.Block(spec("B", None, "G"), spec(None, "G"), spec(None, "G"), spec())
            states = BlockState(spec("L", "B", "G"), *states[1:], block, spec())
        in_specs = (param_specs(params), dict.fromkeys(projected, heads))
        in_specs += (None if segment_ids is None else tokens, None if state is None else states)
        o, state = on_shards(core, in_specs, (heads, states))(params, projected, segment_ids, state)
        if self.gate is not None:
            o = jax.nn.silu(self.gate(x)) * o
        return self.output(o), state

    def init_state(
        self, batch_size: int, max_tokens: int, dtype: jnp.dtype, state_dtype: jnp.dtype | None = None
    ) -> SSMState:
        """The state before the first token, for `batch_size` rows computed in `dtype`; `max_tokens` does not matter.

        `state_dtype` is what the state itself is kept in between calls, None for float32 or better.
        """
        G, R, M = self.config.num_kv_heads, self.config.head_dim, self.config.ssm.num_modes
        before, widths = self.config.ssm.conv_width - 1, self._widths()
        tails = {name: jnp.zeros((batch_size, before, widths[name]), dtype) for name in self.core.conv_names}
        state = jnp.zeros((batch_size, G, 2 * R, 2 * M), state_dtype or jnp.promote_types(dtype, jnp.float32))
        return SSMState(state, tails, jnp.zeros(batch_size, jnp.int32))

    def state_specs(self, *lead: str) -> SSMState:
        """How a state is split, behind the axes `lead` of a stack."""
        tails = {name: spec(*lead, "B", None, "G") for name in self.core.conv_names}
        return SSMState(spec(*lead, "B", "G"), tails, spec(*lead, "B"))

    def open_block(self, stack: SSMState, size: int, dtype: jnp.dtype) -> BlockState:
        """The states of a stack of layers, as this is one, as of a block of up to `size` tokens in `dtype`."""
        _, B, _, width, _ = stack.state.shape
        graphdef, params = nnx.split(self.core.basis)
        blocks = jax.vmap(lambda x: blockwise.open_block(nnx.merge(graphdef, x)(), B, size, width, dtype))(params)
        return BlockState(*stack, blocks)

    def _widths(self) -> dict[str, int]:
        """The channels of every projection that the core reads, also where layers are stacked."""
        names = ("first", "second", "query") if hasattr(self, "query") else ("first", "second")
        return {name: getattr(self, name).weight.shape[-1] for name in names}


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
