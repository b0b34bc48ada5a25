"""Windows of tokens over a stream of documents, and their batches for training and validation."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import SupportsIndex

import grain
import numpy as np

from idattn.choices import check_choice
from idattn.config import DataConfig
from idattn.data.corpus import load_documents, split
from idattn.data.tokenizer import Tokenizer, load_tokenizer

Batch = dict[str, np.ndarray]
_PADDING = {"inputs": 0, "targets": 0, "segment_ids": -1, "loss_mask": 0}


class TokenWindows:
    """Consecutive windows over one stream, in which every document is [BOS] and its tokens: a grain data source.

    Window i reads stream[i T : i T + T] and predicts the tokens one further, so every token but the stream's first is
    a target exactly once. The last window is padded.

    Attributes:
      stream: (tokens,) all documents, in the smallest unsigned type that holds the vocabulary.
    """

    def __init__(
        self, token_ids: Iterable[np.ndarray], *, bos_id: int, vocab_size: int, seq_len: int, documents: str = "reset"
    ):
        """Joins the documents.

        Args:
          token_ids: (tokens,) integer ids of each document, without BOS.
          bos_id: put before every document; below `vocab_size`.
          vocab_size: V, above every id.
          seq_len: T, tokens in a window, at least 1.
          documents: "reset" separates the documents of a window by segment ids and masks the prediction of the next
            document's BOS; "ignore" treats the stream as one text.

        Raises:
          ValueError: an argument breaks its rule, an id is outside the vocabulary, or the stream has no target.
        """
        check_choice("documents", documents, ("reset", "ignore"))
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len} must be at least 1.")
        if not 0 <= bos_id < vocab_size:
            raise ValueError(f"bos_id={bos_id} must be at least 0 and below vocab_size={vocab_size}.")
        dtype = np.min_scalar_type(vocab_size - 1)
        parts = []
        for number, ids in enumerate(token_ids):
            if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise ValueError(
                    f"document {number} has ids {ids.min()} to {ids.max()}; they must be 0 to {vocab_size - 1}, the "
                    "vocabulary of the tokenizer that encoded it."
                )
            parts.append(np.concatenate([[bos_id], ids]).astype(dtype))
        if sum(map(len, parts)) < 2:
            raise ValueError(f"{len(parts)} documents make {sum(map(len, parts))} tokens; a window needs at least 2.")
        self.stream = np.concatenate(parts)
        self._starts = np.cumsum([0] + [len(part) for part in parts[:-1]])
        self._seq_len = seq_len
        self._reset = documents == "reset"

    def __len__(self) -> int:
        return -(-(len(self.stream) - 1) // self._seq_len)

    def __getitem__(self, index: SupportsIndex) -> Batch:
        """Window number `index`.

        Returns:
          inputs: (T,) int32, 0 on padding.
          targets: (T,) int32, the token after each input, 0 on padding.
          segment_ids: (T,) int32, the document of each input, counted from 0 in the window; -1 on padding.
          loss_mask: (T,) float32, 1 where the target counts.

        Raises:
          IndexError: `index` is not in [0, len).
        """
        number = operator.index(index)
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} is outside 0 to {len(self) - 1}.")
        start = number * self._seq_len
        tokens = self.stream[start : start + self._seq_len + 1]
        if self._reset:
            document = np.searchsorted(self._starts, np.arange(start, start + len(tokens)), side="right")
        else:
            document = np.zeros(len(tokens), np.int64)
        window = {
            "inputs": tokens[:-1].astype(np.int32),
            "targets": tokens[1:].astype(np.int32),
            "segment_ids": (document[:-1] - document[0]).astype(np.int32),
            "loss_mask": (document[1:] == document[:-1]).astype(np.float32),
        }
        return _pad(window, self._seq_len)


def load_data(config: DataConfig) -> tuple[Tokenizer, TokenWindows, TokenWindows]:
    """The tokenizer, and the windows to train on and to validate on.

    Raises:
      FileNotFoundError: the corpus or the tokenizer's file does not exist.
      ImportError: the tokenizer's package is missing.
      ValueError: the corpus, its split or the tokenizer is not usable.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    train, validation = (
        TokenWindows(
            (tokenizer.encode(document.text) for document in documents),
            bos_id=tokenizer.bos_id,
            vocab_size=tokenizer.vocab_size,
            seq_len=config.seq_len,
            documents=config.documents,
        )
        for documents in split(load_documents(config.source), config.holdout)
    )
    return tokenizer, train, validation


def train_iterator(
    windows: TokenWindows, batch_size: int, seed: int, rows: Sequence[int] | None = None
) -> grain.DatasetIterator[Batch]:
    """Endless batches of shuffled windows; every epoch has an order of its own, and batches may straddle epochs.

    Batch number n is a function of `seed`, n, `batch_size` and the windows alone, so the iterator's state is n, for any
    number of processes: save what `get_state` returns, and give it to `set_state`.

    Args:
      windows: at least `batch_size`.
      batch_size: B, at least 1.
      seed: at least 0.
      rows: the rows of every batch to read, ascending; None for all.

    Returns:
      A checkpointable iterator over dicts of (rows, T) arrays, the keys those of `TokenWindows`.

    Raises:
      ValueError: an argument breaks its rule.
    """
    if batch_size < 1 or seed < 0:
        raise ValueError(f"batch_size={batch_size} must be at least 1 and seed={seed} at least 0.")
    if len(windows) < batch_size:
        raise ValueError(
            f"the training text has {len(windows)} windows, fewer than batch_size={batch_size}; use a smaller batch, "
            "shorter windows or more text."
        )
    shuffled = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    batches = grain.MapDataset.source(_Batches(shuffled, batch_size, range(batch_size) if rows is None else rows))
    # The stream is in memory: one thread that stays a few batches ahead is enough, where the default keeps 500.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


class _Batches:
    """Some rows of the batches that consecutive windows make: a grain data source."""

    def __init__(self, windows: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        self._windows, self._batch_size, self._rows = windows, batch_size, rows

    def __len__(self) -> int:
        return len(self._windows) // self._batch_size

    def __getitem__(self, index: SupportsIndex) -> Batch:
        first = operator.index(index) * self._batch_size
        return _stack([self._windows[first + row] for row in self._rows])


def eval_batches(
    windows: TokenWindows, batch_size: int, limit: int, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """One pass over the windows in order, or over an evenly spaced part of them; the same at every call.

    Args:
      windows: when they fill more than `limit` batches, limit * batch_size of them are taken, spread evenly.
      batch_size: B, at least 1.
      limit: batches at most, at least 1.
      rows: the rows of every batch to read, ascending; None for all.

    Returns:
      An iterator over dicts of (rows, T) arrays, the keys those of `TokenWindows`. Rows that are missing in the last
      batch have segment id -1 and loss mask 0.

    Raises:
      ValueError: `batch_size` or `limit` is less than 1.
    """
    if batch_size < 1 or limit < 1:
        raise ValueError(f"batch_size={batch_size} and limit={limit} must be at least 1.")
    count = min(len(windows), limit * batch_size)
    chosen = [number * len(windows) // count for number in range(count)]
    rows = range(batch_size) if rows is None else rows
    missing = {name: np.full_like(array, _PADDING[name]) for name, array in windows[0].items()}

    def batch(first: int) -> Batch:
        return _stack([windows[chosen[first + row]] if first + row < count else missing for row in rows])

    return (batch(first) for first in range(0, count, batch_size))


def _stack(rows: Sequence[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _pad(arrays: Batch, length: int) -> Batch:
    """Lengthens the first axis of every array to `length`."""
    return {
        name: np.pad(array, (0, length - len(array)), constant_values=_PADDING[name]) for name, array in arrays.items()
    }
