"""Losses of n-gram models: what counting alone reaches, as a yardstick for a model's validation loss."""

import numpy as np

from idattn.data import Tokenizer, load_tokenizer
from idattn.data.tokenizer import encode_document


def ngram_nats(train: np.ndarray, validation: np.ndarray, vocab_size: int, max_order: int) -> list[float]:
    """Mean validation losses of n-gram models of order 1 to `max_order`, fitted to `train`.

    Order n sees the n - 1 tokens before the one it predicts. Probabilities are interpolated Witten-Bell (Witten and
    Bell 1991, method C; Chen and Goodman 1998, section 2.5): with c(h, w) the count of w after the context h,
    c(h) = sum_w c(h, w), u(h) the number of different tokens seen after h, and h' being h without its oldest token,

        p(w | h) = (c(h, w) + u(h) p(w | h')) / (c(h) + u(h)),

    down to the uniform distribution below order 1; where h never occurred, p(w | h) = p(w | h').

    Args:
      train: (tokens,) integer ids below `vocab_size`, one stream, at least one token.
      validation: (tokens,) likewise, at least two. The first token is context only, as for a language model.
      vocab_size: V, the tokens among which the probabilities sum to 1.
      max_order: the longest n-gram in tokens, at least 1.

    Returns:
      For each order from 1, the mean of -ln p over validation[1:] in nats per token.

    Raises:
      ValueError: a stream is too short or not one-dimensional, an id is outside the vocabulary, or `max_order` < 1.
    """
    if max_order < 1:
        raise ValueError(f"max_order={max_order} must be at least 1.")
    _check_stream("train", train, vocab_size, 1)
    _check_stream("validation", validation, vocab_size, 2)
    probability = np.full(len(validation), 1 / vocab_size)
    # The context of each token: the number of the n-gram before it in `keys`, -1 for one that training lacks.
    # Numbering anew at each order leaves context * V + token within 64 bits, however long the n-grams.
    train_context = np.zeros(len(train), np.int64)
    context = np.zeros(len(validation), np.int64)
    num_contexts = 1
    nats = []
    for order in range(1, max_order + 1):
        # An order beyond the shorter stream has no n-grams: it falls back on the one below.
        if order <= min(len(train), len(validation)):
            keys, ngram, count = np.unique(
                train_context * vocab_size + train[order - 1 :].astype(np.int64),
                return_inverse=True,
                return_counts=True,
            )
            total = np.bincount(keys // vocab_size, count, minlength=num_contexts)  # c(h)
            distinct = np.bincount(keys // vocab_size, minlength=num_contexts)  # u(h)

            # u(h) = 0 happens for training's very last n-gram, which nothing follows.
            known = np.flatnonzero((context >= 0) & (distinct[context] > 0))
            h = context[known]
            position = known + order - 1
            wanted = h * vocab_size + validation[position].astype(np.int64)
            index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            hit = keys[index] == wanted
            probability[position] = (hit * count[index] + distinct[h] * probability[position]) / (
                total[h] + distinct[h]
            )

            context = np.full(len(context), -1)
            context[known[hit]] = index[hit]
            train_context, context = ngram[:-1], context[:-1]
            num_contexts = len(keys)
        nats.append(float(-np.log(probability[1:]).mean()))
    return nats


def ngram_table(
    train: np.ndarray, validation: np.ndarray, tokenizer: Tokenizer, max_order: int, num_bytes: int
) -> dict[str, list[float]]:
    """Losses of n-gram models in nats per byte of the validation text, so that tokens of any size compare.

    Args:
      train: (tokens,) ids of documents, each [BOS] and its text.
      validation: (tokens,) likewise.
      tokenizer: of the ids.
      max_order: as for `ngram_nats`.
      num_bytes: of the validation text, as `count_bytes` counts them.

    Returns:
      By order from 1, of the text's "bytes" and, unless these are the tokens, of its "tokens".

    Raises:
      ValueError: as `ngram_nats`.
    """
    in_bytes = load_tokenizer("bytes")
    is_bytes = tokenizer.fingerprint == in_bytes.fingerprint
    targets = {"bytes": tokenizer} if is_bytes else {"bytes": in_bytes, "tokens": tokenizer}
    tables = {}
    for name, target in targets.items():
        fitted, held_out = (_recode(stream, tokenizer, target) for stream in (train, validation))
        losses = ngram_nats(fitted, held_out, target.vocab_size, max_order)
        tables[name] = [loss * (len(held_out) - 1) / num_bytes for loss in losses]
    return tables


def count_bytes(stream: np.ndarray, tokenizer: Tokenizer) -> int:
    """Bytes of UTF-8 in the texts of (tokens,) ids of documents, each [BOS] and its text."""
    return sum(len(text.encode()) for text in _texts(stream, tokenizer))


def _recode(stream: np.ndarray, tokenizer: Tokenizer, target: Tokenizer) -> np.ndarray:
    """The documents of a stream as those of another tokenizer."""
    if target is tokenizer:
        return stream
    return np.concatenate([encode_document(text, target, target.name) for text in _texts(stream, tokenizer)])


def _texts(stream: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The texts of documents, one by one: of a space before every text, decoding removes only the first."""
    return [tokenizer.decode(ids) for ids in np.split(stream, np.flatnonzero(stream == tokenizer.bos_id)[1:])]


def longest_copy(text: str, source: str) -> str:
    """The longest passage of `text` that `source` has too; of several as long the first."""
    best, start = "", 0
    for end in range(1, len(text) + 1):
        while text[start:end] not in source:
            start += 1
        if end - start > len(best):
            best = text[start:end]
    return best


def _check_stream(name: str, stream: np.ndarray, vocab_size: int, shortest: int) -> None:
    if stream.ndim != 1 or len(stream) < shortest:
        raise ValueError(f"{name} has shape {stream.shape}; it must be one stream of at least {shortest} tokens.")
    if stream.min() < 0 or stream.max() >= vocab_size:
        raise ValueError(
            f"{name} holds ids {stream.min()} to {stream.max()}; with vocab_size={vocab_size} they must be "
            f"0 to {vocab_size - 1}: encode the text with the tokenizer whose vocabulary you name."
        )
