"""Rows scored, and texts continued, in batches of one shape, sorted by length; every row is read whole."""

import math
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from idattn.data import Tokenizer
from idattn.inference import Decoder, generate_text, right_pad

Item = TypeVar("Item")


def score_rows(
    decoder: Decoder, rows: Sequence[np.ndarray] | np.ndarray, batch_size: int, name: str = "score"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The log-probability of every token of every row given those before it.

    Args:
      decoder: the model.
      rows: of (T,) integer ids each, of any length from 1; the first token is context only.
      batch_size: rows that are read together, those of like length.
      name: what the progress bar says.

    Returns:
      For each row log_probs (T,) float32 in nats and is_best (T,) bool, as of `Decoder.score`.
    """
    results: list = [None] * len(rows)
    for batch in progress(batches_by_length(rows, batch_size), name):
        filled = _fill(batch, min(batch_size, len(rows)))
        log_probs, is_best, _ = decoder.score(*right_pad([rows[i] for i in filled]))
        for n, i in enumerate(batch):
            results[i] = log_probs[n, : len(rows[i])], is_best[n, : len(rows[i])]
    return results


def continue_texts(
    decoder: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], num_tokens: int, batch_size: int, **options: Any
) -> list[str]:
    """What follows each prompt, from the start of a document, as of `generate_text` with its `options`."""
    written = [""] * len(prompts)
    for batch in progress(batches_by_length(prompts, batch_size), "write"):
        filled = [prompts[i] for i in _fill(batch, min(batch_size, len(prompts)))]
        for i, result in zip(batch, generate_text(decoder, tokenizer, filled, num_tokens, **options), strict=False):
            written[i] = result.text
    return written


def batch_rows(batch_tokens: int, tokens: int) -> int:
    """How many rows of so many tokens make a batch of `batch_tokens`; at least one."""
    return max(1, batch_tokens // tokens)


def share_error(share: float, count: int) -> float:
    """The standard error of a share of `count` answers, at least 2, that are right or wrong."""
    return math.sqrt(share * (1 - share) / (count - 1))


def progress(items: Collection[Item], name: str, unit: str = "batch") -> Iterable[Item]:
    """The items, with a bar on stderr from the start: the first of them waits for programs to be compiled.

    Args:
      items: to go through.
      name: what the bar says.
      unit: of an item.
    """
    terminal = sys.stderr.isatty()
    return tqdm(items, desc=name, unit=unit, leave=not terminal, mininterval=0.1 if terminal else 30)  # few log lines


def batches_by_length(rows: Sequence[np.ndarray | str] | np.ndarray, batch_size: int) -> list[list[int]]:
    """Numbers of rows in batches of like length, the longest first, so that what does not fit fails at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def _fill(batch: list[int], size: int) -> list[int]:
    """The batch with its last row repeated: another number of rows would be another program to compile."""
    return batch + batch[-1:] * (size - len(batch))
