"""Softmax attention with the layer's short convolutions: how much of a gap to softmax is due to them alone."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from idattn.config import ComputeConfig, ModelConfig
from idattn.nn.documents import Documents
from idattn.nn.layers import CONVOLVED, ShortConv, check_convolved
from idattn.nn.mixer import Memory
from idattn.nn.softmax import SoftmaxAttention, refuse_split_cache
from idattn.ops.prepare import HeadInputs
from idattn.sharding import on_shards, param_specs, sequence_axis, spec


class ConvTails(Memory):
    """The last inputs of the convolutions."""

    of: dict[str, jax.Array]  # name of the projection -> (B, conv_width - 1, channels)


class ConvCache(Memory):
    """A cache of convolved keys and values, or a block of them, and the tails of the convolutions."""

    cache: Any  # a KVCache, or in a block of tokens a KVBlock
    tails: ConvTails

    def stack(self, layers: int) -> "ConvCache":
        return ConvCache(self.cache.stack(layers), self.tails.stack(layers))

    def pick(self, layer: jax.Array) -> "ConvCache":
        return ConvCache(self.cache.pick(layer), self.tails.pick(layer))

    def put(self, layer: jax.Array, new: "ConvCache") -> "ConvCache":
        return ConvCache(self.cache.put(layer, new.cache), self.tails.put(layer, new.tails))

    def close(self) -> "ConvCache":
        return ConvCache(self.cache.close(), self.tails)

    def capacity(self) -> int | None:
        return self.cache.capacity()

    def resize(self, max_tokens: int) -> "ConvCache":
        return ConvCache(self.cache.resize(max_tokens), self.tails)


class Convolutions(nnx.Module):
    """The convolutions of queries, keys and values."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        for name in CONVOLVED:
            setattr(self, f"{name}_conv", ShortConv(config.model_dim, config.ssm.conv_width, "H", rngs=rngs))

    def __call__(
        self, projected: dict[str, jax.Array], documents: Documents, tails: ConvTails | None
    ) -> tuple[list[HeadInputs], ConvTails]:
        """The projections as inputs of `prepare_heads`, and the tails after them."""
        axis, inputs, after = sequence_axis(), [], {}
        for name in CONVOLVED:
            conv, tail = getattr(self, f"{name}_conv"), None if tails is None else tails.of[name]
            convolved, after[name] = conv.inputs(projected[name], tail, documents, axis)
            inputs.append(convolved)
        return inputs, ConvTails(after)


class ConvolvedSoftmaxAttention(SoftmaxAttention):
    """`SoftmaxAttention` of convolved queries, keys and values; of `config.ssm` it reads conv_width."""

    def __init__(self, config: ModelConfig, *, residual_std: float, compute: ComputeConfig, rngs: nnx.Rngs):
        super().__init__(config, residual_std=residual_std, compute=compute, rngs=rngs)
        self.core = Convolutions(config, rngs)

    def mix(self, x: jax.Array, documents: Documents, memory: ConvCache | None) -> tuple[jax.Array, ConvCache | None]:
        """As in `Mixer.mix`; a cache must have room for the tokens."""
        refuse_split_cache(memory)
        graphdef, params = nnx.split(self.core)

        def core(params, projected, documents, memory):
            tails, cache = (None, None) if memory is None else (memory.tails, memory.cache)
            inputs, tails = nnx.merge(graphdef, params)(projected, documents, tails)
            o, cache = self._attend(inputs, documents, cache)
            return o, None if cache is None else ConvCache(cache, tails)

        projected = {name: getattr(self, name)(x) for name in CONVOLVED}
        heads, specs = spec("B", "T", "H"), self._specs(memory)
        in_specs = (param_specs(params), dict.fromkeys(projected, heads), documents.specs(), specs)
        o, memory = on_shards(core, in_specs, (heads, specs))(params, projected, documents, memory)
        return self.output(o), memory

    def init_memory(
        self, batch_size: int, max_tokens: int, dtype: jnp.dtype, state_dtype: jnp.dtype | None = None
    ) -> Any:
        tail = jnp.zeros((batch_size, self.config.ssm.conv_width - 1, self.config.model_dim), dtype)
        cache = super().init_memory(batch_size, max_tokens, dtype, state_dtype)
        return ConvCache(cache, ConvTails(dict.fromkeys(CONVOLVED, tail)))

    def memory_specs(self, *lead: str) -> Any:
        tail = spec(*lead, "B", None, "H")
        return ConvCache(super().memory_specs(*lead), ConvTails(dict.fromkeys(CONVOLVED, tail)))

    def _specs(self, memory):
        if memory is None:
            return None
        return ConvCache(super()._specs(memory.cache), self.memory_specs().tails)

    def open_block(self, stack: Any, size: int, dtype: jnp.dtype) -> Any:
        return ConvCache(super().open_block(stack.cache, size, dtype), stack.tails)

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raise a ValueError where rotary positions do not fit the heads, or there are no convolutions."""
        super().check(config)
        check_convolved(config, cls.__name__)

    @classmethod
    def flops(cls, config: ModelConfig, context: int) -> int:
        return super().flops(config, context) + 2 * config.ssm.conv_width * 3 * config.model_dim
