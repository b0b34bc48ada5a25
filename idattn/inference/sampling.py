"""Choosing the next token from its logits, with settings for each row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Sampling(NamedTuple):
    """How each of B rows is sampled, arrays (B,): new values need no new program. See `make_sampling`."""

    num_ids: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    seed: jax.Array


def make_sampling(
    batch_size: int,
    vocab_size: int,
    *,
    num_ids: int | np.ndarray | None = None,
    temperature: float | np.ndarray = 1.0,
    top_k: int | np.ndarray = 0,
    top_p: float | np.ndarray = 1.0,
    min_p: float | np.ndarray = 0.0,
    repetition_penalty: float | np.ndarray = 1.0,
    seed: int | np.ndarray = 0,
) -> Sampling:
    """Checked settings, each one number for all rows or (batch_size,) numbers, that apply in the order given here.

    Args:
      batch_size: B.
      vocab_size: V.
      num_ids: ids below it are sampled, 1 to V: the tokenizer's vocabulary, which a model's may exceed; None for V.
      repetition_penalty: logits of tokens that the row has held are divided by it where positive, multiplied where not
        (Keskar et al. 2019); greater than 0, 1 changes nothing.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: sample among this many most likely tokens (and those as likely as the last of them), 0 to V; 0 for all.
      top_p: of those, among the most likely that together have at least this probability; above 0, 1 for all.
      min_p: among tokens that are at least this many times as likely as the most likely one, 0 to 1.
      seed: of each row; one number s means s, s + 1, ... What a row's token is drawn by depends on its seed and on how
        many tokens came before it in the row, on nothing else in the batch.

    Raises:
      ValueError: a setting is out of its range, or not of one of the two shapes.
    """
    values = dict(
        num_ids=(
            vocab_size if num_ids is None else num_ids,
            np.int32,
            lambda x: (x >= 1) & (x <= vocab_size),
            f"in [1, {vocab_size=}]: a tokenizer must not have more ids than its model",
        ),
        temperature=(temperature, np.float32, lambda x: x >= 0, "at least 0 and finite"),
        top_k=(top_k, np.int32, lambda x: (x >= 0) & (x <= vocab_size), f"in [0, {vocab_size=}]"),
        top_p=(top_p, np.float32, lambda x: (x > 0) & (x <= 1), "greater than 0 and at most 1"),
        min_p=(min_p, np.float32, lambda x: (x >= 0) & (x <= 1), "in [0, 1]"),
        repetition_penalty=(repetition_penalty, np.float32, lambda x: x > 0, "greater than 0 and finite"),
        seed=(seed, np.int32, lambda x: (x >= 0) & (x < 2**31), "in [0, 2**31)"),
    )
    arrays = {}
    for name, (value, dtype, rule, range_) in values.items():
        given = np.asarray(value)
        if given.ndim and given.shape != (batch_size,):
            raise ValueError(f"{name} of shape {given.shape} must be one number, or one for each of {batch_size} rows.")
        if given.dtype.kind not in "iuf":
            raise ValueError(f"{name}={value!r} must be a number {range_}.")
        with np.errstate(over="ignore", invalid="ignore"):
            arrays[name] = np.broadcast_to(given, batch_size).astype(dtype)
        whole = dtype is np.float32 or np.all(arrays[name] == given)
        if not (whole and np.all(rule(given) & np.isfinite(arrays[name]))):
            raise ValueError(f"{name}={value} must be {'' if whole else 'a whole number '}{range_}.")
    if np.ndim(seed) == 0:
        arrays["seed"] = ((int(seed) + np.arange(batch_size)) % 2**31).astype(np.int32)
    return Sampling(**jax.tree.map(jnp.asarray, arrays))


def sample(logits: jax.Array, settings: Sampling, seen: jax.Array, length: jax.Array) -> jax.Array:
    """The next tokens (B,) int32.

    Args:
      logits: (B, V) float32, finite.
      settings: of the rows.
      seen: (B, V) bool, the tokens that each row has held.
      length: (B,) int32, how many tokens came before.
    """
    penalty, temperature = settings.repetition_penalty[:, None], settings.temperature[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = jnp.minimum(logits, jnp.finfo(logits.dtype).max)  # a penalty near 0 overflows
    logits = jnp.where(jnp.arange(logits.shape[1])[None] < settings.num_ids[:, None], logits, -jnp.inf)
    greedy = jnp.argmax(logits, axis=-1)
    # The most likely token is at 0 for every temperature: where a quotient overflows, it is another token's, to -inf.
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = jnp.where(below == 0, 0, below / jnp.where(temperature > 0, temperature, 1))
    cut = jnp.any((settings.top_k > 0) | (settings.top_p < 1))
    logits = jax.lax.cond(cut, _mask_unlikely, lambda logits, _: logits, logits, settings)  # to sort takes long
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(settings.min_p)[:, None]
    logits = jnp.where(logits >= least, logits, -jnp.inf)
    keys = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(settings.seed, length)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    return jnp.where(settings.temperature > 0, drawn, greedy).astype(jnp.int32)


def _mask_unlikely(logits: jax.Array, settings: Sampling) -> jax.Array:
    """The logits of the top_k and, of them, top_p tokens; -inf for the others."""
    V = logits.shape[1]
    descending = jnp.sort(logits, axis=-1, descending=True)
    top_k = jnp.where(settings.top_k > 0, settings.top_k, V)[:, None]
    descending = jnp.where(jnp.arange(V)[None] < top_k, descending, -jnp.inf)
    p = jax.nn.softmax(descending, axis=-1)
    allowed = (jnp.cumsum(p, axis=-1) - p < settings.top_p[:, None]) & (descending > -jnp.inf)
    least = jnp.min(jnp.where(allowed, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
