"""What the mixers with states of (gated) linear attention share: GLA, Mamba-2, Gated DeltaNet, plain attention."""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from idattn import ops
from idattn.config import ComputeConfig, ModelConfig
from idattn.nn.documents import Documents, arriving_rows, at_last_token, through_matrix
from idattn.nn.layers import CONVOLVED, Linear, RMSNorm, ShortConv, check_convolved
from idattn.nn.mixer import Memory, Mixer
from idattn.ops.prepare import Preparation
from idattn.sharding import on_shards, param_specs, sequence_axis, spec


class GatedMemory(Memory):
    """The states of a layer, and the last inputs of its convolutions."""

    state: jax.Array  # (B, H, E, R)
    conv_tails: dict[str, jax.Array]  # name of the projection -> (B, conv_width - 1, channels)


class Recurrence(NamedTuple):
    """The arguments of `idattn.ops.gated_attention`."""

    q: jax.Array  # (B, T, H, R)
    k: jax.Array  # (B, T, H, R)
    v: jax.Array  # (B, T, H, E)
    log_decays: jax.Array  # (B, T, H, R) or (B, T, H, 1), float32
    gains: jax.Array | None = None  # (B, T, H), float32


class GatedCore(nnx.Module):
    """All that is between a mixer's projections, for any of its heads: convolutions, gates, state, normalisation.

    Attributes:
      feature_map: queries and keys are xi of eq. 10 rather than SiLU.
    """

    feature_map: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs, shared: bool):
        self.config, self.compute = config, compute
        keys, heads = key_width(config), 1 if shared else config.num_heads
        dim, width = None if shared else "H", config.ssm.conv_width
        self.query_conv = ShortConv(heads * keys, width, dim, rngs=rngs)
        self.key_conv = ShortConv(heads * keys, width, dim, rngs=rngs)
        self.value_conv = ShortConv(config.model_dim, width, "H", rngs=rngs)
        self.norm = RMSNorm(config.head_dim, eps=config.norm_eps)

    @abstractmethod
    def recur(self, heads: dict[str, jax.Array], projected: dict[str, jax.Array]) -> Recurrence:
        """What the state is updated with and read by.

        Args:
          heads: "query", "key" and "value" -> (B, T, heads, width), convolved and activated.
          projected: the other projections -> (B, T, channels), float32.
        """

    def finish(self, o: jax.Array, v: jax.Array, gate: jax.Array | None) -> jax.Array:
        """The heads' outputs (B, T, H, E) from what was read, the values and, where there is one, SiLU of the gate."""
        return self.norm(o) if gate is None else self.norm(o) * gate

    def __call__(
        self, projected: dict[str, jax.Array], documents: Documents, memory: GatedMemory | None, axis: str | None
    ) -> tuple[jax.Array, GatedMemory]:
        """The heads' outputs (B, T, channels), and the memory after the tokens; `axis` is what these are split over."""
        heads, tails = {}, {}
        for name in CONVOLVED:
            tail = None if memory is None else memory.conv_tails[name]
            inputs, tails[name] = getattr(self, f"{name}_conv").inputs(projected[name], tail, documents, axis)
            is_mapped = self.feature_map and name != "value"
            width = self.config.head_dim if name == "value" else key_width(self.config)
            y = ops.prepare_heads(inputs, Preparation(width, is_mapped), backend=self.compute.backend)
            y = y.reshape(*y.shape[:2], -1, width)
            heads[name] = y if is_mapped else jax.nn.silu(y)
        dtype = jnp.promote_types(heads["value"].dtype, jnp.float32)
        rest = {name: x.astype(dtype) for name, x in projected.items() if name not in CONVOLVED}
        x = self.recur(heads, rest)
        state, segments = None if memory is None else memory.state, documents.segments
        if state is not None and segments is None and axis is None and x.q.shape[1] == 1:
            q, k, v, log_decays = (y[:, 0] for y in x[:4])
            o, state = ops.gated_step(q, k, v, log_decays, state, gains=None if x.gains is None else x.gains[:, 0])
            o = o[:, None]
        else:
            attend = partial(
                ops.gated_attention, log_decays=x.log_decays, gains=x.gains, backend=self.compute.backend,
                chunk_size=self.compute.chunk_size or None, segment_ids=segments,
            )  # fmt: skip
            with jax.named_scope("op"):
                if axis is not None:
                    state = self._arriving(attend, x, documents, state, axis)
                o, state = attend(x.q, x.k, x.v, initial_state=state)
        gate = jax.nn.silu(projected["gate"]).reshape(o.shape) if self.config.ssm.output_gate else None
        o = self.finish(o, heads["value"], gate).reshape(*o.shape[:2], -1)
        return checkpoint_name(o, "mixer"), at_last_token(GatedMemory(state, tails), documents, axis)

    def _arriving(
        self,
        attend: Callable[..., tuple[jax.Array, jax.Array]],
        x: Recurrence,
        documents: Documents,
        state: jax.Array | None,
        axis: str,
    ) -> jax.Array:
        """The state at the start of a shard; corrections mix its features."""
        (B, _, H, E), R = x.v.shape, x.k.shape[3]
        state = jnp.zeros((B, H, E, R), jnp.promote_types(x.v.dtype, jnp.float32)) if state is None else state
        probe, times = (jnp.ones((1, R)), jnp.multiply) if x.gains is None else (jnp.eye(R), through_matrix)

        def advance(values, rows):
            return attend(x.k, x.k, values, initial_state=rows)[1]

        return arriving_rows(advance, x.v, state, probe, times, documents, axis)


class GatedMixer(Mixer):
    """x (B, T, D) -> (B, T, D) through a state of real numbers for each head, which decays by what the tokens say.

    Heads have 4M features R in their keys, so that their states R x E have as many numbers as those of the mixers with
    M modes. Queries, keys and values go through short convolutions and SiLU; what is read is normalised, and
    gated, as in the papers, where output_gate says so. Of `config.ssm` they read that, num_modes and conv_width.

    Attributes:
      shared: all heads have one query and one key.
      corrects: values correct what the state answers to their key.
    """

    shared: ClassVar[bool] = False
    corrects: ClassVar[bool] = False
    core_type: ClassVar[type[GatedCore]]

    def __init__(self, config: ModelConfig, *, residual_std: float, compute: ComputeConfig, rngs: nnx.Rngs):
        self.check(config)
        self.config = config
        D, keys = config.model_dim, key_width(config) * (1 if self.shared else config.num_heads)
        self.query = self.projection(keys, rngs, None if self.shared else "H")
        self.key = self.projection(keys, rngs, None if self.shared else "H")
        self.value = self.projection(D, rngs)
        for name, width in self._gates(config).items():
            setattr(self, name, self.projection(width, rngs))
        self.core = self.core_type(config, compute, rngs, self.shared)
        self.output = Linear(D, D, ("H", "D"), std=residual_std, rngs=rngs)

    def projection(self, width: int, rngs: nnx.Rngs, dim: str | None = "H") -> Linear:
        return Linear(self.config.model_dim, width, ("D", dim), std=self.config.init_std, rngs=rngs)

    @classmethod
    @abstractmethod
    def controls(cls, config: ModelConfig) -> dict[str, int]:
        """The names and widths of the projections that the gates of the state are made of."""

    def project(self, x: jax.Array) -> dict[str, jax.Array]:
        """All projections by name."""
        return {name: getattr(self, name)(x) for name in (*CONVOLVED, *self._gates(self.config))}

    @classmethod
    def _gates(cls, config: ModelConfig) -> dict[str, int]:
        """The names and widths of the projections that are not convolved."""
        return ({"gate": config.model_dim} if config.ssm.output_gate else {}) | cls.controls(config)

    def mix(self, x: jax.Array, documents: Documents, memory: GatedMemory | None) -> tuple[jax.Array, GatedMemory]:
        projected = self.project(x)
        graphdef, params = nnx.split(self.core)

        def core(params, projected, documents, memory):
            return nnx.merge(graphdef, params)(projected, documents, memory, sequence_axis())

        heads, memories = spec("B", "T", "H"), self.memory_specs()
        specs = {name: spec("B", "T", self._dim(name)) for name in projected}
        in_specs = (param_specs(params), specs, documents.specs(), None if memory is None else memories)
        o, after = on_shards(core, in_specs, (heads, memories))(params, projected, documents, memory)
        return self.output(o), after

    def _dim(self, name: str) -> str | None:
        return None if self.shared and name in ("query", "key") else "H"

    def init_memory(
        self, batch_size: int, max_tokens: int, dtype: jnp.dtype, state_dtype: jnp.dtype | None = None
    ) -> GatedMemory:
        config = self.config
        shape = (batch_size, config.num_heads, config.head_dim, key_width(config))
        tails = {
            name: jnp.zeros((batch_size, config.ssm.conv_width - 1, getattr(self, name).weight.shape[-1]), dtype)
            for name in CONVOLVED
        }
        return GatedMemory(jnp.zeros(shape, state_dtype or jnp.promote_types(dtype, jnp.float32)), tails)

    def memory_specs(self, *lead: str) -> GatedMemory:
        return GatedMemory(spec(*lead, "B", "H"), {name: spec(*lead, "B", None, self._dim(name)) for name in CONVOLVED})

    @classmethod
    def flops(cls, config: ModelConfig, context: int) -> int:
        """Projections, convolutions, and for a number of the state its decay (1), the input and each readout (2)."""
        D, keys = config.model_dim, key_width(config) * (1 if cls.shared else config.num_heads)
        projections = 2 * D * (2 * D + 2 * keys + sum(cls._gates(config).values()))
        convolutions = 2 * config.ssm.conv_width * (2 * keys + D)
        return projections + convolutions + (7 if cls.corrects else 5) * cls.state_size(config, context)

    @classmethod
    def state_size(cls, config: ModelConfig, context: int) -> int:
        return config.model_dim * key_width(config)

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raise a ValueError where heads share a state, the state has another clock or write, or nothing convolves."""
        check_convolved(config, cls.__name__)
        ssm = config.ssm
        if ssm.heads_per_kv > 1 or (ssm.core, ssm.write) != ("fixed", "add"):
            raise ValueError(
                f"{cls.__name__} has a state for each head, with gates of its own: heads_per_kv={ssm.heads_per_kv}, "
                f"core={ssm.core!r} and write={ssm.write!r} must be 1, 'fixed' and 'add'."
            )


def key_width(config: ModelConfig) -> int:
    """R, features of a head's keys."""
    return 4 * config.ssm.num_modes


def step_bias(rngs: nnx.Rngs, heads: int) -> jax.Array:
    """b with softplus(b) log-uniform in [1e-3, 0.1], for the steps of heads."""
    steps = jnp.exp(jax.random.uniform(rngs.params(), (heads,), minval=jnp.log(1e-3), maxval=jnp.log(0.1)))
    return steps + jnp.log(-jnp.expm1(-steps))
