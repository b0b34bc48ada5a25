"""Token mixers with a state of fixed size for each head: how its inputs are made, how it evolves, how it is stored.

Two questions span the paper's ablation (section 4). What does the state read: features of keys with values, [xi(k), v],
or two generic inputs, [a, b]? And how is it read (`idattn.nn.readout`)? `idattn.nn.interdomain` names the combinations.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from idattn import ops
from idattn.choices import FEATURES
from idattn.config import ComputeConfig, ModelConfig
from idattn.nn.documents import Documents, arriving, at_last_token
from idattn.nn.layers import Control, HeadNorm, Linear, ShortConv, StateBasis, param, silu_gate
from idattn.nn.mixer import Memory, Mixer
from idattn.nn.readout import Readout
from idattn.ops import Basis, blockwise
from idattn.ops.chunks import decay_state
from idattn.ops.planes import complex_multiply
from idattn.ops.prepare import HeadInputs, Preparation
from idattn.sharding import on_shards, param_specs, sequence_axis, spec

FLOOR = 1e-9  # in place of denominators that are smaller


class SSMMemory(Memory):
    """The states of a layer, and the last inputs of its convolutions."""

    state: jax.Array  # (B, G, R + E, 2M), with a denominator E is a channel more
    conv_tails: dict[str, jax.Array]  # name of the projection -> (B, conv_width - 1, channels)


class SSMBlockMemory(Memory):
    """The same inside a block of tokens (`idattn.ops.blockwise`): the states before the block are only read."""

    states: jax.Array  # (L, B, G, R + E, 2M), of the whole stack
    conv_tails: dict[str, jax.Array]  # as in SSMMemory, of the stack or of one layer
    block: blockwise.Block  # of the stack or of one layer
    layer: jax.Array | None = None  # () int32, the layer that was picked; None for the stack

    def pick(self, layer: jax.Array) -> "SSMBlockMemory":
        """A layer of the stack."""
        tails, block = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), (self.conv_tails, self.block)
        )
        return SSMBlockMemory(self.states, tails, block, layer)

    def put(self, layer: jax.Array, new: "SSMBlockMemory") -> "SSMBlockMemory":
        """The stack with what a token has changed in a layer."""

        def write(x, y):
            return jax.lax.dynamic_update_index_in_dim(x, y, layer, axis=0)

        tails = jax.tree.map(write, self.conv_tails, new.conv_tails)
        newest = jax.lax.dynamic_slice_in_dim(new.block.tokens, new.block.count - 1, 1, axis=1)
        where = (layer, 0, new.block.count - 1, 0, 0)
        tokens = jax.lax.dynamic_update_slice(self.block.tokens, newest[None], where)
        return SSMBlockMemory(
            self.states, tails, self.block._replace(tokens=tokens, count=write(self.block.count, new.block.count))
        )

    def close(self) -> SSMMemory:
        """The stack's states after the block."""
        states = spec("L", "B", "G")
        close = on_shards(blockwise.close_blocks, (states, _block_specs("L")), states)
        return SSMMemory(close(self.states, self.block), self.conv_tails)


def _block_specs(*lead: str) -> blockwise.Block:
    """How a block is split over the mesh, after the axes `lead` of a stack."""
    powers = spec(*lead, None, "G")
    return blockwise.Block(spec(*lead, "B", None, "G"), powers, powers, spec(*lead))


class SSMCore(nnx.Module):
    """All that is between a mixer's projections, for any of its heads: convolutions, norms, features, state, readout.

    Args:
      config: the options of the state.
      mixer: the class, for its `feature_map` and `readout`.
      rope: rotary positions on the queries and on the first input of the state.
      compute: backend, chunk size.
      **parts: `basis`, and as the mixer and its options have them `key_conv`, `value_conv`, `query_conv`, `key_norm`,
        `value_norm` and `c_out`.
    """

    key_norm: HeadNorm
    value_norm: HeadNorm
    basis: StateBasis
    c_out: nnx.Param

    def __init__(
        self, config: ModelConfig, mixer: "type[SSMMixer]", *, rope: bool, compute: ComputeConfig, **parts: Any
    ):
        self.config, self.compute, self.rope = config, compute, rope
        self.feature_map, self.readout = mixer.feature_map, mixer.readout
        self.conv_names = tuple(name.removesuffix("_conv") for name in parts if name.endswith("_conv"))
        for name, part in parts.items():
            setattr(self, name, part)

    @classmethod
    def controls(cls, config: ModelConfig) -> tuple[str, ...]:
        """The names of further projections that the core reads, of a number for each state."""
        return ()

    @classmethod
    def has_key_norm(cls, config: ModelConfig) -> bool:
        """Whether keys are normalised by eq. 12."""
        return config.ssm.input_norms

    def __call__(
        self,
        projected: dict[str, jax.Array],
        documents: Documents,
        memory: SSMMemory | SSMBlockMemory | None,
        axis: str | None = None,
    ) -> tuple[jax.Array, SSMMemory | SSMBlockMemory]:
        """The heads' outputs (B, T, channels), and the memory after the tokens.

        Args:
          projected: name of the projection ("key", "value", "query") -> (B, T, channels).
          documents, memory: as in `Mixer.mix`.
          axis: the mesh axis that the tokens are split over, or None; then `memory` is what the sequence starts from.
        """
        q, k, v, after = self.heads(projected, documents, memory, axis)
        controls = {name: projected[name] for name in self.controls(self.config)}
        if self.config.ssm.denominator:
            v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        o, after = self._attend(q, k, v, controls, after, documents, memory, axis)  # eq. 11, 13
        if self.config.ssm.denominator:
            wide = o.astype(jnp.promote_types(o.dtype, jnp.float32))
            below = wide[..., -1:]
            o = (wide[..., :-1] / jnp.where(jnp.abs(below) > FLOOR, below, FLOOR)).astype(o.dtype)  # eq. 8
        return checkpoint_name(o.reshape(*projected["key"].shape[:2], -1), "mixer"), after

    def heads(
        self,
        projected: dict[str, jax.Array],
        documents: Documents,
        memory: SSMMemory | SSMBlockMemory | None = None,
        axis: str | None = None,
    ) -> tuple[jax.Array | None, jax.Array, jax.Array, dict[str, jax.Array]]:
        """What reads the state and what it reads; arguments as of the call, without `memory` from a row's first token.

        Returns:
          queries (B, T, H, R), None for a linear readout; keys (B, T, G, R); values (B, T, G, E); and the tails of the
          convolutions that the next tokens need.
        """
        inputs, after = self._inputs(projected, documents, memory, axis)
        norm = self.key_norm if self.has_key_norm(self.config) else None
        k = self._prepare(inputs["key"], documents, rotate=self.rope, mapped=self.feature_map, norm=norm)  # eq. 10, 12
        norm = self.value_norm if self.config.ssm.input_norms else None
        v = self._prepare(inputs["value"], documents, norm=norm)  # eq. 12
        q = None
        if self.readout.by_query:
            q = self._prepare(inputs["query"], documents, rotate=self.rope, mapped=True)  # eq. 10
        return q, k, v, after

    def _inputs(
        self,
        projected: dict[str, jax.Array],
        documents: Documents,
        memory: SSMMemory | SSMBlockMemory | None,
        axis: str | None,
    ) -> tuple[dict[str, HeadInputs], dict[str, jax.Array]]:
        """The projections, convolved where the mixer does that, and the tails that the next tokens need."""
        inputs, after = {name: HeadInputs(x) for name, x in projected.items()}, {}
        for name in self.conv_names:
            tail = None if memory is None else memory.conv_tails[name]
            inputs[name], after[name] = getattr(self, f"{name}_conv").inputs(projected[name], tail, documents, axis)
        return inputs, after

    def _prepare(
        self,
        inputs: HeadInputs,
        documents: Documents,
        *,
        rotate: bool = False,
        mapped: bool = False,
        norm: HeadNorm | None = None,
    ) -> jax.Array:
        """A projection as heads (B, T, heads, width): convolved, rotated, mapped by xi, normalised, as is asked for."""
        ssm, width, backend = self.config.ssm, self.config.head_dim, self.compute.backend
        first = ssm.rope_position == "before"
        inputs = inputs._replace(rotary=documents.rotary if rotate else None)
        if mapped and ssm.feature_map in FEATURES:
            x = inputs if first else inputs._replace(rotary=None)
            x = _random_features(ops.prepare_heads(x, Preparation(width), backend=backend), self.config)
            inputs = HeadInputs(x, rotary=None if first else inputs.rotary)
        if norm is not None:
            inputs = inputs._replace(scale=norm.scale[...], bias=norm.bias[...].reshape(-1))
        activate = mapped and ssm.feature_map == "silu_l2"
        preparation = Preparation(width, activate, first, 0.0 if norm is None else norm.eps)
        y = ops.prepare_heads(inputs, preparation, backend=backend)
        return y.reshape(*y.shape[:2], -1, width)

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
    ) -> tuple[jax.Array, SSMMemory | SSMBlockMemory]:
        """The state's evolution (eq. 11) and readout (eq. 13): in a block, in a sequence or in a shard of one."""
        basis, ssm = self.basis(), self.config.ssm
        c_out = None if self.readout.by_query else self.c_out[...]
        if isinstance(memory, SSMBlockMemory):
            assert memory.layer is not None, "the core reads a layer, not a stack"
            block = blockwise.add_token(memory.block, jnp.concatenate([k, v], axis=-1)[:, 0])
            q = None if q is None else q[:, 0]
            o = self.readout.attend_in_block(q, basis, c_out, memory.states, memory.layer, block, ssm)
            return o.astype(k.dtype), memory.replace(conv_tails=tails, block=block)
        state = None if memory is None else memory.state
        if axis is not None:
            state = self._arriving_state((k, v), basis, documents, state, axis)
        o, state = self.readout.attend(q, k, v, basis, c_out, state, documents.segments, ssm, self.compute)
        return o, at_last_token(SSMMemory(state, tails), documents, axis)

    def _arriving_state(
        self, inputs: tuple[jax.Array, ...], basis: Basis, documents: Documents, state: jax.Array | None, axis: str
    ) -> jax.Array:
        """The inputs' rows of the state at the start of a shard; zero where no document continues from before it."""
        segments, size = documents.segments, self.compute.chunk_size or None
        decay, increment = ops.transfer(inputs, basis, segment_ids=segments, chunk_size=size)
        first = jnp.zeros_like(increment) if state is None else state.astype(increment.dtype)
        return arriving(decay, increment, first, documents, axis, apply=decay_state, compose=complex_multiply)


class SSMMixer(Mixer):
    """x (B, T, D) -> (B, T, D) through one state for each head; a subclass says which cell of the ablation it is.

    Attributes:
      feature_map: the state reads [xi(k), v] rather than two generic inputs [a, b], which are then "key" and "value".
      readout: how the state is read.
      rope: rotary positions on the queries and on the first input of the state.
    """

    feature_map: ClassVar[bool]
    readout: ClassVar[Readout]
    rope: ClassVar[bool]

    def __init__(self, config: ModelConfig, *, residual_std: float, compute: ComputeConfig, rngs: nnx.Rngs):
        self.check(config)
        self._build(config, self.rope, residual_std, compute, rngs)

    def _build(self, config: ModelConfig, rope: bool, residual_std: float, compute: ComputeConfig, rngs: nnx.Rngs):
        self.config = config
        D, G, R, ssm = config.model_dim, config.num_kv_heads, config.head_dim, config.ssm

        def projection(width: int, dim: str) -> Linear:
            return Linear(D, width, ("D", dim), std=config.init_std, rngs=rngs)

        def norm() -> HeadNorm:
            return HeadNorm(G, R, eps=config.norm_eps, bias_init=ssm.norm_bias_init)

        parts: dict[str, Any] = {}

        def convolve(name: str, width: int, dim: str) -> None:
            if ssm.conv_width:
                parts[f"{name}_conv"] = ShortConv(width, ssm.conv_width, dim, rngs=rngs)

        # The order matters, since each part takes random numbers from the same stream.
        self.key = projection(G * R, "G")  # k, or a
        convolve("key", G * R, "G")
        self.value = projection(G * R, "G")  # v, or b
        if not self.feature_map:
            convolve("value", G * R, "G")
        core = self.core_type(config)
        parts |= {"key_norm": norm()} if core.has_key_norm(config) else {}
        parts |= {"value_norm": norm()} if ssm.input_norms else {}
        parts["basis"] = StateBasis(G, ssm, rngs=rngs)
        if self.readout.by_query:
            self.query = projection(D, "H")
            convolve("query", D, "H")
        else:
            c_out = ssm.num_modes**-0.5 * jax.random.normal(rngs.params(), (G, ssm.num_modes))
            parts["c_out"] = param(c_out, "G", "M", group="ssm")
        for name in core.controls(config):
            setattr(self, name, Control(D, G))
        self.core = core(config, type(self), rope=rope, compute=compute, **parts)
        width = self.readout.output_width(config)
        self.gate = projection(width, "H") if ssm.output_gate else None
        self.output = Linear(width, D, ("H", "D"), std=residual_std, rngs=rngs)

    @classmethod
    def core_type(cls, config: ModelConfig) -> type[SSMCore]:
        """The class of the core."""
        return SSMCore

    def mix(self, x: jax.Array, documents: Documents, memory: Any) -> tuple[jax.Array, Any]:
        projected = {name: getattr(self, name)(x) for name in self._widths()}
        graphdef, params = nnx.split(self.core)

        def core(params, projected, documents, memory):
            return nnx.merge(graphdef, params)(projected, documents, memory, sequence_axis())

        heads, memories = spec("B", "T", "H"), self.memory_specs()
        if isinstance(memory, SSMBlockMemory):
            memories = SSMBlockMemory(spec("L", "B", "G"), memories.conv_tails, _block_specs(), spec())
        in_specs = (param_specs(params), dict.fromkeys(projected, heads), documents.specs())
        in_specs += (None if memory is None else memories,)
        o, memory = on_shards(core, in_specs, (heads, memories))(params, projected, documents, memory)
        if self.gate is not None:
            o = silu_gate(self.gate(x), o)
        return self.output(o), memory

    def init_memory(
        self, batch_size: int, max_tokens: int, dtype: jnp.dtype, state_dtype: jnp.dtype | None = None
    ) -> SSMMemory:
        G, M = self.config.num_kv_heads, self.config.ssm.num_modes
        before, widths = self.config.ssm.conv_width - 1, self._widths()
        tails = {name: jnp.zeros((batch_size, before, widths[name]), dtype) for name in self.core.conv_names}
        state = jnp.zeros(
            (batch_size, G, self.config.state_width, 2 * M), state_dtype or jnp.promote_types(dtype, jnp.float32)
        )
        return SSMMemory(state, tails)

    def memory_specs(self, *lead: str) -> SSMMemory:
        tails = {name: spec(*lead, "B", None, "G") for name in self.core.conv_names}
        return SSMMemory(spec(*lead, "B", "G"), tails)

    def open_block(self, stack: SSMMemory, size: int, dtype: jnp.dtype) -> SSMMemory | SSMBlockMemory:
        if self.core.controls(self.config):  # blocks are for states whose steps and writes do not depend on the tokens
            return stack
        _, B, _, width, _ = stack.state.shape
        graphdef, params = nnx.split(self.core.basis)
        blocks = jax.vmap(lambda x: blockwise.open_block(nnx.merge(graphdef, x)(), B, size, width, dtype))(params)
        return SSMBlockMemory(stack.state, stack.conv_tails, blocks)

    @classmethod
    def flops(cls, config: ModelConfig, context: int) -> int:
        D, G, R, M, ssm = config.model_dim, config.num_kv_heads, config.head_dim, config.ssm.num_modes, config.ssm
        width, queries = cls.readout.output_width(config), D if cls.readout.by_query else 0
        narrow = G * R  # channels of each input of the state
        projections = 2 * D * (2 * narrow + width + queries + (width if ssm.output_gate else 0))
        projections += 2 * D * G * len(cls.core_type(config).controls(config))
        convolved = narrow * (1 if cls.feature_map else 2) + queries
        if ssm.feature_map in FEATURES:
            projections += 2 * R * (queries + (narrow if cls.feature_map else 0))  # of a head's channels on frequencies
        # Complex decay of the state and input of [k, v]: 6 + 4 real operations for each of M (R + E) numbers.
        core = G * 10 * M * config.state_width + cls.readout.flops(config)
        return projections + 2 * ssm.conv_width * convolved + core

    @classmethod
    def state_size(cls, config: ModelConfig, context: int) -> int:
        return config.num_kv_heads * 2 * config.ssm.num_modes * config.state_width

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raise a ValueError where rotary positions, a linear readout or an option do not fit the mixer."""
        check_rope(config, cls.rope)
        ssm = config.ssm
        if cls.core_type(config) is SSMCore and (ssm.core, ssm.write) != ("fixed", "add"):
            raise ValueError(
                f"core={ssm.core!r} and write={ssm.write!r} are for the mixers interdomain and interdomain_norope; use "
                f"core='fixed' and write='add' with {cls.__name__}."
            )
        if ssm.feature_map != "silu_l2" and not (cls.feature_map or cls.readout.by_query):
            raise ValueError(f"feature_map={ssm.feature_map!r} changes nothing in {cls.__name__}, which maps no input.")
        if not cls.readout.by_query and ssm.denominator:
            raise ValueError("denominator needs a readout by queries: a linear one has no scores to divide by.")
        if not cls.readout.by_query and config.ssm.heads_per_kv > 1:
            raise ValueError(
                f"heads_per_kv={config.ssm.heads_per_kv} needs a readout by queries: a linear one has none."
            )

    def _widths(self) -> dict[str, int]:
        """The channels of every projection that the core reads; right for stacked layers too."""
        names = ("key", "value", "query") if self.readout.by_query else ("key", "value")
        names += self.core.controls(self.config)
        return {name: getattr(self, name).weight.shape[-1] for name in names}


def _random_features(x: jax.Array, config: ModelConfig) -> jax.Array:
    """Heads (B, T, C) as random features, as many as channels; all heads have the same frequencies."""
    kind, width = config.ssm.feature_map, config.head_dim
    heads = x.reshape(*x.shape[:2], -1, width).astype(jnp.promote_types(x.dtype, jnp.float32)) * width**-0.25
    frequencies = ops.draw_frequencies(config.ideal.seed, kind, width, (width,))
    return ops.random_features(heads, jnp.asarray(frequencies, heads.dtype), kind).reshape(x.shape).astype(x.dtype)


def check_rope(config: ModelConfig, rope: bool) -> None:
    """Raise a ValueError where heads have no pairs of channels for rotary positions."""
    if rope and config.head_dim % 2:
        raise ValueError(f"head_dim={config.head_dim} (model_dim / num_heads) must be even for rotary positions.")
