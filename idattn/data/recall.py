"""Multi-query associative recall (MQAR): rows of token ids, made from a seed, to train and to evaluate on."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np


def mqar_rows(
    vocab_size: int,
    bos_id: int,
    length: int,
    pairs: int,
    count: int,
    *,
    power: float = 0.01,
    seed: int | str = 42,
) -> tuple[np.ndarray, np.ndarray]:
    """Multi-query associative recall over token ids (Arora et al. 2023, Zoology).

    BOS, then `pairs` keys and their values, then random tokens among which every key comes once more, its value after
    it; a key is asked for after a gap g with probability in proportion to g^(power - 1). In the original, noise stands
    after a key that is asked for, and its value is only the label; here it is the next token, as in a language model.
    The original has no BOS, leaves id 0 out of the keys, and draws its noise from all ids, keys too.

    Args:
      vocab_size: of the tokenizer; keys are the lower half of the ids that are not BOS, values and noise the upper.
      bos_id: of the tokenizer.
      length: T, tokens of a row.
      pairs: keys of a row.
      count: N, rows.
      power: at most 1; 1 asks at all places alike.
      seed: of the choices.

    Returns:
      tokens (N, T) int32, and is_answer (N, T) bool, the values to be recalled.

    Raises:
      ValueError: the length has no room for the pairs and their questions, or the vocabulary too few ids.
    """
    ids = [i for i in range(vocab_size) if i != bos_id]
    keys, others = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    slots = (length - 1) // 2 - pairs  # of two tokens, after the pairs
    if not 1 <= pairs <= min(slots, len(keys)):
        raise ValueError(
            f"{pairs=} must be 1 to {len(keys)}, the keys of {vocab_size=}, and {length=} at least {4 * pairs + 1}: "
            "BOS, pairs and questions."
        )
    rng = random.Random(f"mqar {seed}")
    tokens, is_answer = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
    weights = np.arange(1, slots + 1) ** (power - 1.0)
    for row, answers in zip(tokens, is_answer, strict=True):
        chosen, values = choose(rng, keys, pairs), choose(rng, others, pairs)
        row[0] = bos_id
        row[1:] = [others[int(rng.random() * len(others))] for _ in range(length - 1)]
        row[1 : 2 * pairs + 1 : 2], row[2 : 2 * pairs + 2 : 2] = chosen, values
        # The smallest of exponential waiting times: a choice without replacement by weight.
        waits = np.array([rng.expovariate(1.0) for _ in range(slots)]) / weights
        places = 2 * pairs + 1 + 2 * np.argsort(waits, kind="stable")[:pairs]
        row[places], row[places + 1] = chosen, values
        answers[places + 1] = True
    return tokens, is_answer


def choose(rng: random.Random, items: Sequence[Any], count: int) -> list[Any]:
    """Different items in random order; by `random()` alone, which is the same in every version of Python."""
    items = list(items)
    return [items.pop(int(rng.random() * len(items))) for _ in range(count)]
