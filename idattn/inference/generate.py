"""Sampling continuations: one pass over the prompt, then one token at a time from the carried state."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from idattn.nn import LanguageModel


def generate(
    model: LanguageModel,
    prompt: jax.Array,
    num_tokens: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
) -> jax.Array:
    """Continuations of a batch of prompts of one length.

    Args:
      model: the language model.
      prompt: (B, T) integers in [0, vocab_size), T at least 1.
      num_tokens: tokens to add, at least 1.
      seed: of the samples.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: sample among this many most likely tokens only; 0: among all.

    Returns:
      The added tokens, (B, num_tokens) int32.

    Raises:
      ValueError: an argument is out of its range.
    """
    vocab_size = model.config.vocab_size
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt of shape {prompt.shape} must have the axes B T and at least one token.")
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(f"tokens from {prompt.min()} to {prompt.max()} must lie in [0, {vocab_size=}).")
    if num_tokens < 1:
        raise ValueError(f"{num_tokens=} must be at least 1.")
    if not temperature >= 0:
        raise ValueError(f"{temperature=} must be at least 0.")
    if not 0 <= top_k <= vocab_size:
        raise ValueError(f"{top_k=} must lie in [0, {vocab_size=}].")
    graphdef, params = nnx.split(model)
    return _generate(
        graphdef,
        params,
        prompt,
        jax.random.key(seed),
        num_tokens=num_tokens,
        temperature=float(temperature),
        top_k=top_k,
    )


@partial(jax.jit, static_argnames=("graphdef", "num_tokens", "temperature", "top_k"))
def _generate(graphdef, params, prompt, key, *, num_tokens: int, temperature: float, top_k: int) -> jax.Array:
    model = nnx.merge(graphdef, params)
    B, T = prompt.shape
    logits, state = model(prompt, state=model.init_state(B, T + num_tokens))

    def sample(logits, key):
        if temperature == 0:
            return jnp.argmax(logits, axis=-1)
        if top_k:
            least = jax.lax.top_k(logits, top_k)[0][:, -1:]
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        return jax.random.categorical(key, logits / temperature)

    def advance(carry, key):
        token, state = carry
        logits, state = nnx.merge(graphdef, params)(token[:, None], state=state)
        token = sample(logits[:, 0], key)
        return (token, state), token

    keys = jax.random.split(key, num_tokens)
    first = sample(logits[:, -1], keys[0])
    _, rest = jax.lax.scan(advance, (first, state), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1).astype(jnp.int32)
