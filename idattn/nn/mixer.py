"""The contract of token mixers: what a class defines to work in a model, a decoder, a mesh and a count of costs."""

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx, struct

from idattn.config import ComputeConfig, ModelConfig
from idattn.nn.documents import Documents, find_documents


class Memory(struct.PyTreeNode):
    """What a mixer remembers of the tokens before, a pytree of arrays: of one layer, or of a stack of layers.

    The defaults suit arrays (B, ...), which a stack holds as (L, B, ...), of a size that does not depend on how many
    tokens came. `stack`, `pick` and `put` are called inside a loop over layers; a subclass whose arrays are large may
    override them, so that a layer reads and writes its part of the stack in place.
    """

    def stack(self, layers: int) -> Self:
        """A stack of `layers` layers, all with this memory."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), self)

    def pick(self, layer: jax.Array) -> Self:
        """The memory of one layer of the stack; `layer` is its index, () int32."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), self)

    def put(self, layer: jax.Array, new: Self) -> Self:
        """The stack in which a layer has the memory `new`, cast to the dtypes of the stack."""
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), layer, axis=0), self, new
        )

    def close(self) -> Any:
        """The stack after a block of tokens that `Mixer.open_block` began."""
        return self

    def capacity(self) -> int | None:
        """How many tokens there is room for; None for any number."""
        return None

    def resize(self, max_tokens: int) -> Self:
        """The memory with room for `max_tokens` tokens, which must not be fewer than it holds."""
        return self


class LayerState(NamedTuple):
    """The state of a mixer that is used by itself."""

    memory: Any  # a `Memory`
    position: jax.Array  # (B,) int32, of the next token in its document


class Mixer(nnx.Module):
    """x (B, T, D) -> (B, T, D), causally: the base class of all token mixers.

    A model builds `cls(config, residual_std=..., compute=..., rngs=...)` and calls `mix`; the abstract methods are what
    a new mixer has to define. By itself a mixer is called as `y, state = mixer(x, segment_ids=..., state=...)`.

    Attributes:
      config: of the model; a mixer that sets it finds `documents.rotary` made for its heads also when called by itself.
      grows: whether the memory grows with the tokens (a cache, in the compute dtype, which a new token reads and adds
        to) rather than being of fixed size (which a new token reads and writes).
    """

    config: ModelConfig
    grows: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, config: ModelConfig, *, residual_std: float, compute: ComputeConfig, rngs: nnx.Rngs):
        """Make the parameters, each with `dims` that name its axes (see `idattn.sharding`).

        Args:
          config: of the model.
          residual_std: standard deviation of the output projection at the start.
          compute: backend, chunk size.
          rngs: the stream `params` is used.
        """

    @abstractmethod
    def mix(self, x: jax.Array, documents: Documents, memory: Any) -> tuple[jax.Array, Any]:
        """The mixed tokens (B, T, D) in the dtype of x, and the memory after them.

        Padding (`documents.run` is -1) changes no memory; a token whose run differs from its predecessor's starts from
        an empty one.

        Args:
          x: (B, T, D) in the dtype to compute in.
          documents: of the tokens.
          memory: of the tokens before; None for none, in training, where the memory returned is not used.
        """

    @abstractmethod
    def init_memory(
        self, batch_size: int, max_tokens: int, dtype: jnp.dtype, state_dtype: jnp.dtype | None = None
    ) -> Memory:
        """The memory before the first token.

        Args:
          batch_size: B.
          max_tokens: tokens that a memory which grows has room for.
          dtype: of the computation.
          state_dtype: dtype in which a state of fixed size is stored between calls; None for float32 or better.
        """

    @abstractmethod
    def memory_specs(self, *lead: str) -> Any:
        """How a memory is split over the mesh: PartitionSpecs in its structure, after the axes `lead` of a stack."""

    def open_block(self, stack: Any, size: int, dtype: jnp.dtype) -> Any:
        """The memory of a stack of layers for a block of up to `size` tokens, which are decoded one by one.

        It may collect the tokens of the block and write them in `close`, so that no token writes the whole memory.
        """
        return stack

    @classmethod
    @abstractmethod
    def flops(cls, config: ModelConfig, context: int) -> int:
        """Operations of a forward pass for each token of sequences of `context` tokens; see `idattn.costs`."""

    @classmethod
    @abstractmethod
    def state_size(cls, config: ModelConfig, context: int) -> int:
        """Real numbers in the memory of a sequence after `context` tokens, without convolution tails (table 5)."""

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raise a ValueError where the mixer cannot be built of a config."""

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: LayerState | None = None
    ) -> tuple[jax.Array, LayerState]:
        """The mixed tokens (B, T, D), and the state after them.

        Args:
          x: (B, T, D) in the dtype to compute in.
          segment_ids: (B, T) as in `idattn.ops.interdomain_attention`; None for one document a row.
          state: as returned by an earlier call or by `init_state`, to resume from there; None to start anew. A memory
            that grows has to come from `init_state`.

        Outside of `jax.jit` the call is compiled as a whole, once for each shape. A mixer with variables other than
        nnx.Param, which a call may change, is not.
        """
        graphdef, params, others = nnx.split(self, nnx.Param, ...)
        if jax.tree.leaves(others):
            return self._call(x, segment_ids, state)
        return _compiled_call(graphdef, params, x, segment_ids, state)

    def _call(
        self, x: jax.Array, segment_ids: jax.Array | None, state: LayerState | None
    ) -> tuple[jax.Array, LayerState]:
        """`__call__`, operation by operation."""
        if self.grows and state is not None and state.memory is None:
            raise ValueError(
                f"the state has no tokens to resume from: {type(self).__name__} keeps them where a sequence starts "
                "from `init_state(batch_size, max_tokens)`, with room for all that is to come."
            )
        start = jnp.zeros(x.shape[0], jnp.int32) if state is None else state.position
        documents, end = find_documents(segment_ids, start, x.shape[:2], getattr(self, "config", None))
        y, memory = self.mix(x, documents, None if state is None else state.memory)
        if state is not None:
            memory = jax.tree.map(lambda old, new: new.astype(old.dtype), state.memory, memory)
        return y, LayerState(memory, end)

    def init_state(
        self,
        batch_size: int,
        max_tokens: int = 0,
        dtype: jnp.dtype = jnp.dtype("float32"),
        state_dtype: jnp.dtype | None = None,
    ) -> LayerState:
        """The state before the first token; arguments as in `init_memory`, `max_tokens` being those of all calls."""
        memory = self.init_memory(batch_size, max_tokens, dtype, state_dtype)
        return LayerState(memory, jnp.zeros(batch_size, jnp.int32))


@partial(jax.jit, static_argnames="graphdef")  # not inlined, which would take eager gradients apart again
def _compiled_call(
    graphdef: nnx.GraphDef, params: Any, x: jax.Array, segment_ids: jax.Array | None, state: LayerState | None
) -> tuple[jax.Array, LayerState]:
    return nnx.merge(graphdef, params)._call(x, segment_ids, state)
