"""The decoder: a Llama-style backbone around any pattern of token mixers, its layers stacked and scanned."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from idattn.config import MIXERS, ComputeConfig, ModelConfig
from idattn.nn.ideal import IdealAttention
from idattn.nn.layers import Linear, MatrixParam, RMSNorm
from idattn.nn.softmax import SoftmaxAttention
from idattn.nn.ssm import SSMMixer
from idattn.sharding import constrain, gathered, param_specs

_KEPT = {  # for the backward pass, see `idattn.config.REMAT`
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mixer": jax.checkpoint_policies.save_only_these_names("mixer"),
    "block": jax.checkpoint_policies.nothing_saveable,
}


class SwiGLU(nnx.Module):
    """(SiLU(x W_gate) * x W_up) W_down."""

    def __init__(self, config: ModelConfig, *, residual_std: float, rngs: nnx.Rngs):
        D, F = config.model_dim, config.mlp_dim
        self.gate = Linear(D, F, ("D", "F"), std=config.init_std, rngs=rngs)
        self.up = Linear(D, F, ("D", "F"), std=config.init_std, rngs=rngs)
        self.down = Linear(F, D, ("F", "D"), std=residual_std, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, mixer: str, compute: ComputeConfig, *, rngs: nnx.Rngs):
        residual_std = config.init_std / math.sqrt(2 * config.num_layers)
        self.mixer_norm = RMSNorm(config.model_dim, eps=config.norm_eps)
        self.mlp_norm = RMSNorm(config.model_dim, eps=config.norm_eps)
        kind = MIXERS[mixer]
        if kind.softmax:
            self.mixer = SoftmaxAttention(config, residual_std=residual_std, rngs=rngs)
        elif kind.ideal:
            self.mixer = IdealAttention(
                config.model_dim,
                config.num_heads,
                num_modes=config.ssm.num_modes,
                ideal=config.ideal,
                init_std=config.init_std,
                residual_std=residual_std,
                rngs=rngs,
            )
        else:
            self.mixer = SSMMixer(config, kind, residual_std=residual_std, compute=compute, rngs=rngs)
        self.mlp = SwiGLU(config, residual_std=residual_std, rngs=rngs)

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None, state: Any) -> tuple[jax.Array, Any]:
        mixed, state = self.mixer(self.mixer_norm(x), segment_ids=segment_ids, state=state)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state


class Group(nnx.Module):
    """One repetition of the pattern of mixers: as many blocks as the pattern has names."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        for i, mixer in enumerate(config.mixers):  # named, not a list: checkpoints keep string keys
            setattr(self, f"block_{i}", Block(config, mixer, compute, rngs=rngs))
        self.size = len(config.mixers)

    @property
    def blocks(self) -> list[Block]:
        return [getattr(self, f"block_{i}") for i in range(self.size)]

    def __call__(self, x, segment_ids, states):
        new_states = []
        for i, block in enumerate(self.blocks):
            with jax.named_scope(f"block_{i}"):
                x, state = block(x, segment_ids, None if states is None else states[i])
            new_states.append(state)
        return x, new_states


class LanguageModel(nnx.Module):
    """Tokens to logits.

    Args:
      config: the model.
      compute: dtype, backend and rematerialisation.
      rngs: the stream `params` is used.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        self.embedding = MatrixParam(
            config.init_std * jax.random.normal(rngs.params(), (config.vocab_size, config.model_dim)), dims=("V", "D")
        )

        @nnx.split_rngs(splits=self.repeats)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Group(config, compute, rngs=rngs)

        self.groups = stack(rngs)  # every parameter with a leading axis of repetitions
        self.final_norm = RMSNorm(config.model_dim, eps=config.norm_eps)
        self.head = Linear(config.model_dim, config.vocab_size, ("D", "V"), std=config.init_std, rngs=rngs)

    def hidden(
        self, tokens: jax.Array, *, segment_ids: jax.Array | None = None, state: Any = None
    ) -> tuple[jax.Array, Any]:
        """The normalised last hidden vectors (B, T, D) in the compute dtype, and the state if one was given.

        Args:
          tokens: (B, T) integers in [0, vocab_size).
          segment_ids: (B, T) as in `idattn.ops.interdomain_attention`; None for one document a row.
          state: from `init_state` or an earlier call, to go on from there; None to start anew and keep none.
        """
        embedding = gathered(self.embedding[...].astype(self.compute.dtype), ("V", "D"))
        # Its gradient is whole before it is split: else the partitioner gathers what all tokens add to it.
        embedding = constrain(embedding, "V", None)
        x = constrain(embedding[tokens], "B", "T", None)
        graphdef, params = nnx.split(self.groups)

        def apply(carried, params_and_layer):
            (x, states), (params, layer) = carried, params_and_layer
            picked = None if states is None else [s.pick(layer) for s in states]
            x, new_states = nnx.merge(graphdef, params)(x, segment_ids, picked)
            if states is not None:
                states = [s.put(layer, new) for s, new in zip(states, new_states, strict=True)]
            return (x, states), None

        if self.compute.remat != "none":
            apply = jax.checkpoint(apply, prevent_cse=False, policy=_KEPT[self.compute.remat])
        # States are carried rather than scanned over, so that every layer changes its own in place.
        (x, state), _ = jax.lax.scan(apply, (x, state), (params, jnp.arange(self.repeats)))
        return self.final_norm(x), state

    def __call__(
        self, tokens: jax.Array, *, segment_ids: jax.Array | None = None, state: Any = None
    ) -> tuple[jax.Array, Any]:
        """The logits (B, T, V) in float32 of every next token, and the state; arguments as in `hidden`."""
        x, state = self.hidden(tokens, segment_ids=segment_ids, state=state)
        return self.head(x).astype(jnp.promote_types(x.dtype, jnp.float32)), state

    def init_state(self, batch_size: int, max_tokens: int, *, state_dtype: str | None = None) -> Any:
        """The state before the first token of `batch_size` rows.

        Args:
          batch_size: B.
          max_tokens: that softmax layers have room for.
          state_dtype: what SSM states are kept in between calls; None for float32 or better.
        """
        dtype = jnp.dtype(self.compute.dtype)
        states = [b.mixer.init_state(batch_size, max_tokens, dtype, state_dtype) for b in self.groups.blocks]
        return [state.stack(self.repeats) for state in states]

    def state_specs(self) -> Any:
        """How such a state is split: PartitionSpecs in its structure."""
        return [b.mixer.state_specs("L") for b in self.groups.blocks]

    def open_block(self, state: Any, size: int) -> Any:
        """A state as of a block of up to `size` tokens, to be read one by one; see `idattn.ops.blockwise`."""
        blocks = zip(self.groups.blocks, state, strict=True)
        return [block.mixer.open_block(stack, size, self.compute.dtype) for block, stack in blocks]

    def close_block(self, state: Any) -> Any:
        """The state after the tokens of a block."""
        return [stack.close() for stack in state]

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
