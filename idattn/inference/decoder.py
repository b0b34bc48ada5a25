"""Reading tokens and writing more, from a context of fixed size: chunks of a prompt, then one token at a time.

    decoder = Decoder(model)
    context = decoder.prefill(tokens, lengths)                    # (B, T) right-padded; any T in constant memory
    tokens, context, active = decoder.decode(context, decoder.sampling(B, temperature=0.8), num_tokens=32)
    log_probs, is_best, context = decoder.score(tokens, lengths)  # of every token given those before it

Everything takes and returns batches of B rows. A `Context` holds all that a row's next token depends on. Pass it to the
next call to read or write more, or `fork` it to continue it in several ways. `idattn.inference.files` stores it on
disk. `prefill`, `score` and `decode` donate the context that they are given: they reuse its memory.

Under `jax.set_mesh` (`idattn.sharding`) rows are split over data and fsdp, heads and vocabulary over tensor.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from idattn.choices import check_choice, find_mixer
from idattn.inference.sampling import Sampling, make_sampling, sample
from idattn.nn import LanguageModel, ModelState, model_specs
from idattn.ops.segments import PADDING, find_segments
from idattn.sharding import current_mesh, is_split, spec

_SCORED_AT_ONCE = 64  # tokens of each row whose logits exist at a time


class Context(NamedTuple):
    """What rows have read so far; its size does not depend on how much, but for the caches of softmax layers.

    Attributes:
      state: as of LanguageModel.init_state.
      hidden: (B, D) of the last token, in the compute dtype, from which the next one is predicted.
      seen: (B, V) bool, tokens that occurred.
      length: (B,) int32, how many there were.
    """

    state: ModelState
    hidden: jax.Array
    seen: jax.Array
    length: jax.Array


class Decoder:
    """A model ready to read and write: weights cast once, each program compiled once.

    Matrices are stored, and products computed, in `model.compute.dtype`; norms, states and logits are float32.

    Args:
      model: the language model; an abstract one (`nnx.eval_shape`) can be lowered, not run.
      chunk_size: tokens of a row that are read at a time, which bounds the memory.
      block_size: tokens of a row that are written in one call of `decode` at most.
      state_dtype: of SSM states between tokens and chunks: "float32", or "bfloat16" for half the memory.
      trained_length: tokens of the longest sequence that the model was trained on, for the warning where softmax layers
        go beyond; 0 for no warning.

    Raises:
      ValueError: a size is below 1.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        chunk_size: int = 512,
        block_size: int = 32,
        state_dtype: str = "float32",
        trained_length: int = 0,
    ):
        if min(chunk_size, block_size) < 1:
            raise ValueError(f"{chunk_size=} and {block_size=} must be at least 1.")
        check_choice("state_dtype", state_dtype, ("float32", "bfloat16"))
        if is_split("T"):
            raise NotImplementedError("a decoder does not split tokens; use mesh.sequence=1 to generate.")
        self.config, self.chunk_size, self.block_size = model.config, chunk_size, block_size
        self.trained_length = trained_length
        self._state_dtype = state_dtype if state_dtype != "float32" else None  # float64 stays what it is
        self._grows = any(find_mixer(name).grows for name in self.config.mixers)
        self._graphdef, params = nnx.split(model)
        rows = spec("B")
        context = Context(model.state_specs(), rows, rows, rows)

        def cast(x: Any) -> Any:
            is_matrix = x.get_metadata().get("group") == "matrix"
            return x.replace(x[...].astype(model.compute.dtype)) if is_matrix else x

        def prepare(params: nnx.State) -> Any:
            return nnx.to_pure_dict(jax.tree.map(cast, params, is_leaf=lambda x: isinstance(x, nnx.Variable)))

        run = jax.eval_shape if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct) else lambda f, x: f(x)
        self.params = run(_jit(prepare, model_specs(model)), params)
        self._start = _jit(self._start_impl, context, static_argnums=(1, 2))
        self._resize = _jit(self._resize_impl, context, static_argnums=1)
        self._take = _jit(self._take_impl, context)
        self._read = _jit(self._read_impl, context, donate_argnums=1)
        self._score = _jit(self._score_impl, (rows, rows, context), donate_argnums=1)
        self._decode = _jit(self._decode_impl, (rows, context, rows), donate_argnums=1)

    def sampling(self, batch_size: int, **settings: Any) -> Sampling:
        """The settings of `idattn.inference.sampling.make_sampling` for this model's vocabulary."""
        return make_sampling(batch_size, self.config.vocab_size, **settings)

    def start(self, batch_size: int, max_tokens: int = 0) -> Context:
        """The context before the first token; softmax layers have room for `max_tokens`, and get more when needed."""
        return self._start(self.params, batch_size, max_tokens if self._grows else 0)

    def prefill(
        self,
        tokens: np.ndarray | jax.Array,
        lengths: np.ndarray | Sequence[int] | None = None,
        context: Context | None = None,
        *,
        max_tokens: int = 0,
    ) -> Context:
        """The context after tokens, read in chunks of `chunk_size`: any number of them in the same memory.

        Args:
          tokens: (B, T) integers in [0, vocab_size), rows padded at the right with anything.
          lengths: (B,) how many tokens of each row count; None for all.
          context: of the tokens before, donated; None for none. Then every row needs a token.
          max_tokens: the caches of softmax layers get room for this many tokens in all, rounded up to a power of two
            (`start` gives room for an exact number); they grow where it is too small.

        Raises:
          ValueError: shapes do not fit, a token is outside the vocabulary, or a row would be empty.
        """
        tokens, lengths, after = self._prepare(tokens, lengths, context, max_tokens)
        for part, ids in self._chunks(tokens, lengths):
            after = self._read(self.params, after, part, ids)
        return after

    def score(
        self,
        tokens: np.ndarray | jax.Array,
        lengths: np.ndarray | Sequence[int] | None = None,
        context: Context | None = None,
    ) -> tuple[np.ndarray, np.ndarray, Context]:
        """The log-probability of every token given those before it, read as in `prefill`, with its arguments.

        Returns:
          log_probs (B, T) float32 in nats, is_best (B, T) bool, whether no token was more likely, and the context.
          Where nothing came before, and in padding, they are 0 and False.
        """
        tokens, lengths, after = self._prepare(tokens, lengths, context, 0)
        results = []
        for part, ids in self._chunks(tokens, lengths):
            *scores, after = self._score(self.params, after, part, ids)
            results.append(jax.device_get(scores))
        log_probs, is_best = (np.concatenate(x, axis=1)[:, : tokens.shape[1]] for x in zip(*results, strict=True))
        return log_probs, is_best, after

    def decode(
        self,
        context: Context,
        sampling: Sampling,
        *,
        num_tokens: int | None = None,
        active: np.ndarray | jax.Array | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> tuple[np.ndarray, Context, np.ndarray]:
        """Write tokens, in one program on the device.

        Args:
          context: of the tokens before, at least one in every row; donated.
          sampling: settings of the rows, from `sampling`.
          num_tokens: at most `block_size`, which None stands for. Writing ends earlier when no row is active.
          active: (B,) bool, rows to write in; None for all.
          stop_tokens: a row ends after the first of these that it writes.

        Returns:
          tokens (B, num_tokens) int32, -1 where a row was not active; the context; active (B,), rows that did not end.
          The context of a row that was not active holds tokens that were not returned: continue active rows only.

        Raises:
          ValueError: `num_tokens` is out of its range.
        """
        num_tokens = self.block_size if num_tokens is None else num_tokens
        if not 1 <= num_tokens <= self.block_size:
            raise ValueError(f"{num_tokens=} must lie in [1, block_size={self.block_size}].")
        rows = context.length.shape[0]
        active = np.ones(rows, bool) if active is None else active
        stops = np.full(-(-max(len(stop_tokens), 1) // 8) * 8, PADDING, np.int32)  # few shapes, few programs
        stops[: len(stop_tokens)] = stop_tokens
        context = self._with_room(context, num_tokens)
        tokens, context, active = self._decode(
            self.params, context, sampling, jnp.asarray(active), jnp.asarray(stops), jnp.int32(num_tokens)
        )
        return np.asarray(tokens)[:, :num_tokens], context, np.asarray(active)

    def fork(self, context: Context, rows: Sequence[int] | np.ndarray) -> Context:
        """A new context of these rows of one, which stays valid: [0] * 8 continues its first row in eight ways."""
        count = context.length.shape[0]
        rows = np.asarray(rows, np.int32)
        if rows.ndim != 1 or rows.size == 0 or rows.min() < 0 or rows.max() >= count:
            raise ValueError(f"rows={rows.tolist()} must be one or more numbers of the {count} rows there are, from 0.")
        return self._take(context, rows)

    def resize(self, context: Context, max_tokens: int) -> Context:
        """The context with room for `max_tokens` in the caches of softmax layers; the one given stays valid."""
        return self._resize(context, max_tokens) if self._grows else context

    def lower(
        self,
        batch_size: int,
        max_tokens: int = 0,
        *,
        device: jax.Device | None = None,  # pyright: ignore[reportInvalidTypeForm]  # as in `make_mesh`
    ) -> dict[str, Any]:
        """The programs of `prefill` (a chunk of it) and `decode` (a block), to be compiled without running anything.

        Args:
          batch_size: B.
          max_tokens: that softmax layers have room for.
          device: to compile for, also one of a topology that need not be there; None for the default.
        """
        context = jax.eval_shape(lambda: self.start(batch_size, max_tokens))
        chunk = jax.ShapeDtypeStruct((batch_size, self.chunk_size), jnp.int32)
        block = jax.eval_shape(lambda: (self.sampling(batch_size), jnp.ones(batch_size, bool), jnp.zeros(8, jnp.int32)))
        arguments = {"prefill": (chunk, chunk), "decode": (*block, jax.ShapeDtypeStruct((), jnp.int32))}
        sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)

        def place(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        programs = {"prefill": self._read, "decode": self._decode}
        return {
            name: program.lower(*jax.tree.map(place, (self.params, context, *arguments[name])))
            for name, program in programs.items()
        }

    def _prepare(
        self,
        tokens: np.ndarray | jax.Array,
        lengths: np.ndarray | Sequence[int] | None,
        context: Context | None,
        max_tokens: int,
    ) -> tuple[np.ndarray, np.ndarray, Context]:
        """Checked tokens and lengths, and a context with room for them."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"tokens of shape {tokens.shape} and dtype {tokens.dtype} must be integers with the axes B T, at least "
                "one row and one token: a prompt cannot be empty; start it with the token that begins a document."
            )
        B, T = tokens.shape
        lengths = np.full(B, T) if lengths is None else np.asarray(lengths)
        least = 1 if context is None else 0
        if lengths.shape != (B,) or lengths.min() < least or lengths.max() > T:
            raise ValueError(f"lengths={lengths.tolist()} must be {B} numbers from {least} to {T}, one for each row.")
        tokens = np.where(np.arange(T) < lengths[:, None], tokens, 0)
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(
                f"tokens from {tokens.min()} to {tokens.max()} must lie in [0, vocab_size={self.config.vocab_size})."
            )
        if context is None:
            context = self.start(B, _bucket(max(max_tokens, T)))
        elif context.length.shape != (B,):
            raise ValueError(f"tokens of {B} rows cannot follow a context of {context.length.shape[0]}; see `fork`.")
        return tokens.astype(np.int32), lengths, self._with_room(context, max(T, max_tokens))

    def _with_room(self, context: Context, more: int) -> Context:
        """The context with room for more tokens; says once where they exceed what softmax was trained on."""
        if not self._grows:
            return context
        longest = int(np.max(np.asarray(context.length))) + more
        if 0 < self.trained_length < longest:
            logging.log_first_n(
                logging.WARNING,
                "%d tokens exceed the %d that softmax attention was trained on; expect it to do worse there.",
                1,
                longest,
                self.trained_length,
            )
        room = min(n for memory in context.state.memories if (n := memory.capacity()) is not None)
        return context if longest <= room else self.resize(context, _bucket(longest))

    def _chunks(self, tokens: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Chunks of tokens and their segment ids: of `chunk_size`, or of the next power of two that holds all."""
        B, T = tokens.shape
        size = min(self.chunk_size, _bucket(T))
        for start in range(0, T, size):
            part = np.zeros((B, size), np.int32)
            part[:, : T - start] = tokens[:, start : start + size]
            yield part, np.where(start + np.arange(size) < lengths[:, None], 0, PADDING).astype(np.int32)

    def _start_impl(self, params, batch_size, max_tokens):
        model = nnx.merge(self._graphdef, params)
        state = model.init_state(batch_size, max_tokens, state_dtype=self._state_dtype)
        hidden = jnp.zeros((batch_size, self.config.model_dim), model.compute.dtype)
        seen = jnp.zeros((batch_size, self.config.vocab_size), bool)
        return Context(state, hidden, seen, jnp.zeros(batch_size, jnp.int32))

    def _resize_impl(self, context, max_tokens):
        memories = [memory.resize(max_tokens) for memory in context.state.memories]
        return context._replace(state=context.state._replace(memories=memories))

    def _take_impl(self, context, rows):
        memories = jax.tree.map(lambda x: x[:, rows], context.state.memories)
        return Context(ModelState(memories, context.state.position[rows]), *(x[rows] for x in context[1:]))

    def _advance(self, params, context, tokens, segment_ids):
        """The hidden vectors (B, T, D) of tokens, and the context after them."""
        model = nnx.merge(self._graphdef, params)
        hidden, state = model.hidden(tokens, segment_ids=segment_ids, state=context.state)
        assert state is not None, "a model that is given a state returns one"
        rows = jnp.arange(tokens.shape[0])
        if segment_ids is None:
            seen, length = context.seen.at[rows[:, None], tokens].set(True), context.length + tokens.shape[1]
            return hidden, Context(state, hidden[:, -1], seen, length)
        last, is_token = find_segments(segment_ids).last, segment_ids != PADDING
        final = jnp.where((last >= 0)[:, None], hidden[rows, last], context.hidden)
        seen = context.seen.at[rows[:, None], tokens].max(is_token)
        return hidden, Context(state, final, seen, context.length + jnp.sum(is_token, axis=1, dtype=jnp.int32))

    def _read_impl(self, params, context, tokens, segment_ids):
        return self._advance(params, context, tokens, segment_ids)[1]

    def _score_impl(self, params, context, tokens, segment_ids):
        hidden, after = self._advance(params, context, tokens, segment_ids)
        previous = jnp.concatenate([context.hidden[:, None], hidden[:, :-1]], axis=1)
        B, T = tokens.shape
        parts = T // math.gcd(T, _SCORED_AT_ONCE)

        def score_part(inputs):
            hidden, tokens = inputs
            log_probs = jax.nn.log_softmax(self._logits(params, hidden), axis=-1)
            token_log_probs = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
            return token_log_probs, token_log_probs >= jnp.max(log_probs, axis=-1)

        split = (jnp.moveaxis(x.reshape(B, parts, -1, *x.shape[2:]), 1, 0) for x in (previous, tokens))
        log_probs, is_best = (jnp.moveaxis(x, 0, 1).reshape(B, T) for x in jax.lax.map(score_part, tuple(split)))
        counts = (segment_ids != PADDING) & ((context.length[:, None] > 0) | (jnp.arange(T)[None] > 0))
        return jnp.where(counts, log_probs, 0), is_best & counts, after

    def _logits(self, params, hidden):
        logits = nnx.merge(self._graphdef, params).head(hidden)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def _decode_impl(self, params, context, sampling, active, stop_tokens, num_tokens):
        def unfinished(carry):
            i, _, active, _ = carry
            return (i < num_tokens) & jnp.any(active)

        def write(carry):
            i, context, active, written = carry
            with jax.named_scope("sample"):
                logits = self._logits(params, context.hidden[:, None])[:, 0]
                tokens = sample(logits, sampling, context.seen, context.length)
            written = written.at[:, i].set(jnp.where(active, tokens, PADDING))
            _, context = self._advance(params, context, tokens[:, None], None)
            return i + 1, context, active & ~jnp.isin(tokens, stop_tokens), written

        model = nnx.merge(self._graphdef, params)
        context = context._replace(state=model.open_block(context.state, self.block_size))
        written = jnp.full((active.shape[0], self.block_size), PADDING, jnp.int32)
        _, context, active, written = jax.lax.while_loop(unfinished, write, (0, context, active, written))
        return written, context._replace(state=model.close_block(context.state)), active


def _bucket(tokens: int) -> int:
    """The least power of two that has room for so many tokens, at least 16: few sizes are few programs."""
    return max(16, 2 ** (tokens - 1).bit_length())


def _jit(function: Any, out_specs: Any, **options: Any) -> Any:
    """The compiled function, its results split as `out_specs` on the current mesh."""
    return (
        jax.jit(function, **options)
        if current_mesh() is None
        else jax.jit(function, out_shardings=out_specs, **options)
    )
