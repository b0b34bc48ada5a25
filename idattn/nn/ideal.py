"""The paper's ideal layer as a token mixer: kernel regression from random features and Legendre polynomials."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from idattn.config import ComputeConfig, ModelConfig
from idattn.nn.documents import Documents
from idattn.nn.layers import Linear
from idattn.nn.mixer import Memory, Mixer
from idattn.ops import IdealState, draw_frequencies, ideal_attention, random_features
from idattn.sharding import is_split, on_shards, spec


class IdealMemory(Memory):
    """The coefficients of a layer's keys and values."""

    coefficients: jax.Array  # (B, H, M, R + E), as of `idattn.ops.IdealState`


class IdealAttention(Mixer):
    """x (B, T, D) -> (B, T, D) by `idattn.ops.ideal_attention` with a state of M (R + D / H) numbers for each head.

    The kernel is exp(-|q - k|^2 / (2 sqrt d)) with q = W_q x, k = W_k x and d the head's width: softmax's scores, but
    for the vectors' lengths; or with features="softmax" exp(q^T k / sqrt d), softmax's own. Its frequencies are
    constants of the program, drawn from `ideal.seed`; neither checkpoints nor the optimiser hold them. As in eq. 3-9,
    there are neither convolutions nor positions. Features and state are float32 or better. The layer is a reference to
    compare with, at a few hundred tokens. Arguments are those of `Mixer`; of `config.ssm` it reads num_modes only.
    """

    def __init__(self, config: ModelConfig, *, residual_std: float, compute: ComputeConfig, rngs: nnx.Rngs):
        D = config.model_dim
        self.config = config
        self.query = Linear(D, D, ("D", "H"), std=config.init_std, rngs=rngs)
        self.key = Linear(D, D, ("D", "H"), std=config.init_std, rngs=rngs)
        self.value = Linear(D, D, ("D", "H"), std=config.init_std, rngs=rngs)
        self.output = Linear(D, D, ("H", "D"), std=residual_std, rngs=rngs)

    def mix(self, x: jax.Array, documents: Documents, memory: IdealMemory | None) -> tuple[jax.Array, IdealMemory]:
        if is_split("T"):
            raise NotImplementedError("the ideal mixer does not split tokens; use mesh.sequence=1, or interdomain.")
        ideal, H, width = self.config.ideal, self.config.num_heads, self.config.head_dim
        frequencies = draw_frequencies(ideal.seed, ideal.features, ideal.num_features, (H, width))
        heads, memories = spec("B", "T", "H"), self.memory_specs()
        in_specs = ((heads,) * 3, spec("H"), documents.specs(), None if memory is None else memories)
        projected = self.query(x), self.key(x), self.value(x)
        core = on_shards(self._attend, in_specs, (heads, memories))
        o, after = core(projected, jnp.asarray(frequencies), documents, memory)
        return self.output(o), after

    def _attend(
        self, projected: tuple[jax.Array, ...], frequencies: jax.Array, documents: Documents, memory: IdealMemory | None
    ) -> tuple[jax.Array, IdealMemory]:
        """The heads' outputs (B, T, channels), and the memory, for any rows and heads."""
        B, T, _ = projected[0].shape
        ideal, width = self.config.ideal, self.config.head_dim
        q, k, v = (y.reshape(B, T, -1, width) for y in projected)
        dtype = jnp.promote_types(v.dtype, jnp.float32)
        q, k = (
            random_features(y.astype(dtype) * width**-0.25, frequencies.astype(dtype), ideal.features) for y in (q, k)
        )
        o, after = ideal_attention(
            q,
            k,
            v,
            self.config.ssm.num_modes,
            segment_ids=documents.segments,
            initial_state=None if memory is None else IdealState(memory.coefficients, documents.positions[:, 0]),
            floor=ideal.floor,
        )
        return checkpoint_name(o.reshape(B, T, -1), "mixer"), IdealMemory(after.coefficients)

    def init_memory(
        self, batch_size: int, max_tokens: int, dtype: jnp.dtype, state_dtype: jnp.dtype | None = None
    ) -> IdealMemory:
        config = self.config
        shape = (batch_size, config.num_heads, config.ssm.num_modes, config.ideal.num_features + config.head_dim)
        return IdealMemory(jnp.zeros(shape, state_dtype or jnp.promote_types(dtype, jnp.float32)))

    def memory_specs(self, *lead: str) -> IdealMemory:
        return IdealMemory(spec(*lead, "B", "H"))

    @classmethod
    def flops(cls, config: ModelConfig, context: int) -> int:
        """Features, update, readout, and the change of the coefficients, which all heads share."""
        R, M, features = config.head_dim, config.ssm.num_modes, config.ideal.num_features
        frequencies = features // 2 if config.ideal.features == "fourier" else features
        core = 4 * R * frequencies + 2 * M**2 * (features + R) + 2 * M * (features + R)
        return 8 * config.model_dim**2 + config.num_heads * core + 2 * M**3

    @classmethod
    def state_size(cls, config: ModelConfig, context: int) -> int:
        return config.num_heads * config.ssm.num_modes * (config.ideal.num_features + config.head_dim)
