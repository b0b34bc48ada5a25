"""The decoder: a Llama-style backbone around any pattern of token mixers, its layers stacked and scanned."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from idattn.choices import find_mixer
from idattn.config import ComputeConfig, ModelConfig
from idattn.nn.documents import Documents, find_documents
from idattn.nn.layers import Linear, RMSNorm, param, silu_gate
from idattn.sharding import constrain, gathered, param_specs, spec

_POLICIES = {  # for the backward pass, see `idattn.config.REMAT`
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mixer": jax.checkpoint_policies.save_only_these_names("mixer"),
    "block": jax.checkpoint_policies.nothing_saveable,
}


class ModelState(NamedTuple):
    """What a model remembers of the tokens before."""

    memories: list[Any]  # for each mixer of the pattern, the `idattn.nn.Memory` of the stack of its repetitions
    position: jax.Array  # (B,) int32, of the next token in its document


class SwiGLU(nnx.Module):
    """(SiLU(x W_gate) * x W_up) W_down."""

    def __init__(self, config: ModelConfig, *, residual_std: float, rngs: nnx.Rngs):
        D, F = config.model_dim, config.mlp_dim
        self.gate = Linear(D, F, ("D", "F"), std=config.init_std, rngs=rngs)
        self.up = Linear(D, F, ("D", "F"), std=config.init_std, rngs=rngs)
        self.down = Linear(F, D, ("F", "D"), std=residual_std, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(silu_gate(self.gate(x), self.up(x)))


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, mixer: str, compute: ComputeConfig, *, rngs: nnx.Rngs):
        residual_std = config.init_std / math.sqrt(2 * config.num_layers)
        self.mixer_norm = RMSNorm(config.model_dim, eps=config.norm_eps, dtype=compute.dtype)
        self.mlp_norm = RMSNorm(config.model_dim, eps=config.norm_eps, dtype=compute.dtype)
        mixer_class = find_mixer(mixer)
        self.mixer = mixer_class(config, residual_std=residual_std, compute=compute, rngs=rngs)
        self.mlp = SwiGLU(config, residual_std=residual_std, rngs=rngs)

    def __call__(self, x: jax.Array, documents: Documents, memory: Any) -> tuple[jax.Array, Any]:
        normed = self.mixer_norm(x)
        with jax.named_scope("mixer"):
            mixed, memory = self.mixer.mix(normed, documents, memory)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), memory


class Group(nnx.Module):
    """One repetition of the pattern of mixers: as many blocks as the pattern has names."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        for i, mixer in enumerate(config.mixers):  # named, not a list: checkpoints keep string keys
            setattr(self, f"block_{i}", Block(config, mixer, compute, rngs=rngs))
        self.size = len(config.mixers)

    @property
    def blocks(self) -> list[Block]:
        return [getattr(self, f"block_{i}") for i in range(self.size)]

    def __call__(self, x, documents, memories):
        changed = []
        for i, block in enumerate(self.blocks):
            with jax.named_scope(f"block_{i}"):
                x, memory = block(x, documents, None if memories is None else memories[i])
            changed.append(memory)
        return x, changed


class LanguageModel(nnx.Module):
    """Tokens to logits.

    Args:
      config: the model.
      compute: dtype, backend and rematerialisation.
      rngs: the stream `params` is used.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        embedding = config.init_std * jax.random.normal(rngs.params(), (config.vocab_size, config.model_dim))
        self.embedding = param(embedding, "V", "D", group="matrix")

        @nnx.split_rngs(splits=self.repeats)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Group(config, compute, rngs=rngs)

        self.groups = stack(rngs)  # every parameter with a leading axis of repetitions
        self.final_norm = RMSNorm(config.model_dim, eps=config.norm_eps, dtype=compute.dtype)
        self.head = Linear(config.model_dim, config.vocab_size, ("D", "V"), std=config.init_std, rngs=rngs)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """The vectors (B, T, D) of tokens (B, T) that the first layer reads, in the dtype of the residual stream."""
        embedding = gathered(self.embedding[...].astype(self.compute.dtype), ("V", "D"))
        # Its gradient is summed before it is split. Otherwise the partitioner gathers every token's part of the sum.
        embedding = constrain(embedding, "V", None)  # pyright: ignore[reportArgumentType]  # as in Linear
        x = embedding[tokens]
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32)) if self.compute.residual_in_float32 else x
        return constrain(x, "B", "T", None)

    def hidden(
        self, tokens: jax.Array, *, segment_ids: jax.Array | None = None, state: ModelState | None = None
    ) -> tuple[jax.Array, ModelState | None]:
        """The normalised last hidden vectors (B, T, D) in the compute dtype, and the state if one was given.

        Args:
          tokens: (B, T) integers in [0, vocab_size).
          segment_ids: (B, T) as in `idattn.ops.interdomain_attention`; None for one document a row.
          state: as returned by `init_state` or an earlier call, to resume from there; None to start anew.
        """
        x = self.embed(tokens)
        start = jnp.zeros(tokens.shape[0], jnp.int32) if state is None else state.position
        documents, end = find_documents(segment_ids, start, tokens.shape, self.config)
        graphdef, params = nnx.split(self.groups)

        def apply(carry, params_and_layer):
            (x, memories), (params, layer) = carry, params_and_layer
            picked = None if memories is None else [memory.pick(layer) for memory in memories]
            x, changed = nnx.merge(graphdef, params)(x, documents, picked)
            if memories is not None:
                memories = [memory.put(layer, new) for memory, new in zip(memories, changed, strict=True)]
            return (x, memories), None

        memories = None if state is None else state.memories
        # A loop stacks what its backward pass needs, copy by copy; layers that are written out need not.
        unroll = memories is None and not self.compute.scan_layers
        if self.compute.remat != "none":
            # Without a loop between them, the compiler would recognise what is recomputed, and keep it.
            apply = jax.checkpoint(apply, prevent_cse=unroll, policy=_POLICIES[self.compute.remat])
        # Memories are the scan's carry rather than its inputs, so that every layer changes its part in place.
        (x, memories), _ = jax.lax.scan(apply, (x, memories), (params, jnp.arange(self.repeats)), unroll=unroll)
        return self.final_norm(x), None if memories is None else ModelState(memories, end)

    def __call__(
        self, tokens: jax.Array, *, segment_ids: jax.Array | None = None, state: ModelState | None = None
    ) -> tuple[jax.Array, ModelState | None]:
        """The logits (B, T, V) in float32 of every next token, and the state; arguments as in `hidden`."""
        x, state = self.hidden(tokens, segment_ids=segment_ids, state=state)
        return self.head(x).astype(jnp.promote_types(x.dtype, jnp.float32)), state

    def init_state(self, batch_size: int, max_tokens: int, *, state_dtype: str | None = None) -> ModelState:
        """The state before the first token of `batch_size` rows.

        Args:
          batch_size: B.
          max_tokens: tokens that memories which grow have room for.
          state_dtype: dtype in which states of fixed size are stored between calls; None for float32 or better.
        """
        dtype = jnp.dtype(self.compute.dtype)
        memories = [b.mixer.init_memory(batch_size, max_tokens, dtype, state_dtype) for b in self.groups.blocks]
        return ModelState([memory.stack(self.repeats) for memory in memories], jnp.zeros(batch_size, jnp.int32))

    def state_specs(self) -> ModelState:
        """How a state is split over the mesh: PartitionSpecs in its structure."""
        return ModelState([b.mixer.memory_specs("L") for b in self.groups.blocks], spec("B"))

    def open_block(self, state: ModelState, size: int) -> ModelState:
        """The state for a block of up to `size` tokens, which are read one by one; see `idattn.ops.blockwise`."""
        blocks = zip(self.groups.blocks, state.memories, strict=True)
        return state._replace(memories=[b.mixer.open_block(stack, size, self.compute.dtype) for b, stack in blocks])

    def close_block(self, state: ModelState) -> ModelState:
        """The state after the tokens of a block."""
        return state._replace(memories=[stack.close() for stack in state.memories])

    @property
    def repeats(self) -> int:
        """How often the pattern of mixers is repeated."""
        return self.config.num_layers // len(self.config.mixers)

    @classmethod
    def abstract(cls, config: ModelConfig, compute: ComputeConfig | None = None) -> "LanguageModel":
        """A model of shapes and dtypes without arrays: to count, to compile, or to merge parameters into.

        Args:
          config: the model.
          compute: None for the default.
        """
        return nnx.eval_shape(lambda: cls(config, compute or ComputeConfig(), rngs=nnx.Rngs(0)))


def model_specs(model: LanguageModel) -> dict[str, Any]:
    """How the parameters of a model, abstract or real, are split: PartitionSpecs in their nested dicts."""
    specs = param_specs(nnx.state(model, nnx.Param))
    groups = param_specs(nnx.state(model.groups, nnx.Param), stacked=True)
    return nnx.to_pure_dict(specs) | {"groups": nnx.to_pure_dict(groups)}
