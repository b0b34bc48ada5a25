"""Windows of tokens over a stream of documents, and their batches for training and validation."""

import hashlib
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import grain
import numpy as np

from idattn.choices import check_choice
from idattn.config import DataConfig
from idattn.data.batch import ARRAYS, Batch
from idattn.data.corpus import load_documents, split
from idattn.data.recall import mqar_rows
from idattn.data.sources import Document
from idattn.data.stream import SPLITS, TokenStream, is_prepared
from idattn.data.tokenizer import BPE, Tokenizer, encode_document, load_tokenizer, trained_tokenizer

_MQAR, _MQAR_VALIDATION = "mqar:", 1000  # and its rows to validate on


class TokenWindows:
    """Consecutive windows over one stream, in which every document is [BOS] and its tokens: a grain data source.

    Window i reads stream[i T : i T + T] and predicts the tokens one further, so every token but the stream's first is
    a target exactly once. The last window is padded.

    Attributes:
      stream: (tokens,) all documents, an array or a `TokenStream`.
      is_text: it is text in memory, and every token of a document counts.
    """

    def __init__(
        self,
        stream: np.ndarray | TokenStream,
        *,
        bos_id: int,
        seq_len: int,
        documents: str = "reset",
        is_target: np.ndarray | None = None,
    ):
        """Lays windows over a stream.

        Args:
          stream: at least 2 tokens.
          bos_id: begins every document, and occurs nowhere else.
          seq_len: T, tokens in a window, at least 1.
          documents: "reset" separates the documents of a window by segment ids and masks the prediction of the next
            document's BOS; "ignore" treats the stream as one text.
          is_target: (tokens,) bool, the tokens whose prediction counts; None for all.

        Raises:
          ValueError: an argument breaks its rule.
        """
        check_choice("documents", documents, ("reset", "ignore"))
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len} must be at least 1.")
        if len(stream) < 2:
            raise ValueError(f"the documents make {len(stream)} tokens; a window needs at least 2.")
        self.stream = stream
        self._bos_id, self._seq_len, self._reset = bos_id, seq_len, documents == "reset"
        self._is_target = is_target
        self.is_text = is_target is None and not isinstance(stream, TokenStream)

    def __len__(self) -> int:
        return -(-(len(self.stream) - 1) // self._seq_len)

    def __getitem__(self, index: SupportsIndex) -> Batch:
        """Window number `index`.

        Returns:
          Arrays (T,), as `idattn.data.batch.ARRAYS` describes them.

        Raises:
          IndexError: `index` is not in [0, len).
        """
        number = operator.index(index)
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} is outside 0 to {len(self) - 1}.")
        start = number * self._seq_len
        tokens = self.stream[start : start + self._seq_len + 1]
        begins = tokens[1:] == self._bos_id if self._reset else np.zeros(len(tokens) - 1, bool)
        counts = ~begins
        if self._is_target is not None:
            counts &= self._is_target[start + 1 : start + len(tokens)]
        window = {
            "inputs": tokens[:-1],
            "targets": tokens[1:],
            "segment_ids": np.concatenate([[0], np.cumsum(begins[:-1])]),
            "loss_mask": counts,
        }
        missing = (0, self._seq_len - len(begins))
        return {
            name: np.pad(window[name].astype(dtype), missing, constant_values=padding)
            for name, (dtype, padding) in ARRAYS.items()
        }


def load_data(
    config: DataConfig, tokenizer: Tokenizer | None = None
) -> tuple[Tokenizer, list[TokenWindows], list[TokenWindows]]:
    """The tokenizer, and of each source the windows to train on and to validate on.

    Args:
      config: of the data.
      tokenizer: of a checkpoint, instead of `config.tokenizer`.

    Raises:
      FileNotFoundError: a source, a part of a prepared folder or the tokenizer's file does not exist.
      ImportError: the tokenizer's package is missing.
      ValueError: a source, its split or the tokenizer is not usable, or a folder was prepared with another tokenizer.
    """
    sources = (config.source, *config.more_sources)
    is_mqar = config.source.startswith(_MQAR)
    is_text = not is_mqar and len(sources) == 1 and not is_prepared(sources[0])
    if config.holdout and not is_text:
        raise ValueError(
            f"holdout={config.holdout} names documents of a text, but {config.source!r} comes with validation data; "
            "set holdout=()."
        )
    texts = split(load_documents(sources[0]), config.holdout) if is_text else ()
    if tokenizer is None and re.fullmatch(BPE, config.tokenizer):
        if not texts:
            raise ValueError(
                f"tokenizer={config.tokenizer!r} is trained on the text of a run, but source={config.source!r} is "
                "tokens; give their tokenizer."
            )
        tokenizer = trained_tokenizer(config.tokenizer, [document.text for document in texts[0]])
    tokenizer = load_tokenizer(config.tokenizer) if tokenizer is None else tokenizer
    if is_mqar:
        train, validation = _mqar_windows(config, tokenizer)
        return tokenizer, train, validation
    if is_text:
        streams = [[_in_memory(documents, tokenizer)] for documents in texts]
    else:
        streams = [[TokenStream(source, split_name) for source in sources] for split_name in SPLITS]
        for stream, source in zip(streams[0], sources, strict=True):
            _check_tokenizer(stream.manifest["tokenizer"], tokenizer, config.tokenizer, source)
    train, validation = (
        [
            TokenWindows(stream, bos_id=tokenizer.bos_id, seq_len=config.seq_len, documents=config.documents)
            for stream in part
        ]
        for part in streams
    )
    return tokenizer, train, validation


def _mqar_windows(config: DataConfig, tokenizer: Tokenizer) -> list[list[TokenWindows]]:
    """Windows of a row each, to train and to validate on, in which only the answers count."""
    match = re.fullmatch(r"mqar:pairs=(\d+),rows=(\d+)", config.source)
    pairs, rows = map(int, match.groups()) if match else (0, 0)
    if not pairs or not rows:
        raise ValueError(f"source={config.source!r} must be {_MQAR}pairs=P,rows=N, whole numbers above 0.")
    parts = []
    for count, seed in ((rows, "train"), (_MQAR_VALIDATION, "validation")):
        tokens, is_answer = mqar_rows(tokenizer.vocab_size, tokenizer.bos_id, config.seq_len, pairs, count, seed=seed)
        windows = TokenWindows(
            tokens.reshape(-1), bos_id=tokenizer.bos_id, seq_len=config.seq_len, is_target=is_answer.reshape(-1)
        )
        parts.append([windows])
    return parts


def load_stream(source: str, tokenizer: Tokenizer) -> np.ndarray | TokenStream:
    """(tokens,) all documents of a text, or the validation split of a prepared folder; raises as `load_data`."""
    if not is_prepared(source):
        return _in_memory(load_documents(source), tokenizer)
    stream = TokenStream(source, "validation")
    _check_tokenizer(stream.manifest["tokenizer"], tokenizer, tokenizer.name, source)
    return stream


def _in_memory(documents: Sequence[Document], tokenizer: Tokenizer) -> np.ndarray:
    """(tokens,) the stream of documents, in the smallest unsigned type that holds the vocabulary."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    return np.concatenate([encode_document(text, tokenizer, name).astype(dtype) for name, text in documents])


def _check_tokenizer(stored: Mapping[str, Any], tokenizer: Tokenizer, name: str, folder: str) -> None:
    if tokenizer.fingerprint != stored["sha256"]:
        wanted = str(Path(folder) / stored["file"]) if stored["file"] else "bytes"
        raise ValueError(
            f"{folder} was prepared with another tokenizer, of {stored['vocab_size']} tokens (SHA-256 "
            f"{stored['sha256']}), than tokenizer={name!r}, of {tokenizer.vocab_size} ({tokenizer.fingerprint}); set "
            f"tokenizer={wanted!r}."
        )
    if tokenizer.bos_id != stored["bos_id"]:
        raise ValueError(
            f"{folder} was prepared with documents that start with id {stored['bos_id']}, but tokenizer={name!r} "
            f"starts them with its special token {tokenizer.bos_id}. Prepare it anew."
        )


def train_iterator(
    windows: Sequence[TokenWindows],
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    weights: Sequence[float] = (),
) -> grain.DatasetIterator[Batch]:
    """Endless batches of shuffled windows; every epoch has another order, and batches may straddle epochs.

    Batch number n is a function of `seed`, n, `batch_size`, `weights` and the windows alone, so the iterator's state is
    n, for any number of processes, and a digest of the data: save what `get_state` returns, and give it to `set_state`,
    which raises a ValueError if the data have changed.

    Args:
      windows: of one source or more, at least `batch_size` in all.
      batch_size: B, at least 1.
      seed: at least 0.
      rows: the rows of every batch to read, ascending; None for all.
      weights: the share of windows from each of several sources, to 1 %; interleaved evenly; each has separate epochs.

    Returns:
      A checkpointable iterator over dicts of (rows, T) arrays, the keys those of `TokenWindows`.

    Raises:
      ValueError: an argument breaks its rule.
    """
    if batch_size < 1 or seed < 0:
        raise ValueError(f"batch_size={batch_size} must be at least 1 and seed={seed} at least 0.")
    if len(windows) > 1 and len(weights) != len(windows):
        raise ValueError(f"weights={weights} must be one for each of the {len(windows)} sources.")
    total = sum(map(len, windows))
    if total < batch_size:
        raise ValueError(
            f"the training text has {total} windows, fewer than batch_size={batch_size}; use a smaller batch, "
            "shorter windows or more text."
        )
    # For every source another keyed permutation in each epoch, computed index by index: no memory, any index at once.
    shuffled = [grain.MapDataset.source(part).seed(seed + n).shuffle().repeat() for n, part in enumerate(windows)]
    mixed = grain.MapDataset.mix(shuffled, weights) if len(shuffled) > 1 else shuffled[0]
    batches = grain.MapDataset.source(_Batches(mixed, batch_size, range(batch_size) if rows is None else rows))
    # A few threads read a few batches ahead, and wait for the disk outside of Python; grain's default is 500.
    ahead = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
    return _TrainIterator(iter(batches.to_iter_dataset(ahead)), windows)


class _TrainIterator(grain.DatasetIterator[Batch]):
    """Batches whose position can only be restored over the data that it was a position in."""

    def __init__(self, batches: grain.DatasetIterator[Batch], windows: Sequence[TokenWindows]):
        super().__init__(batches)
        self._batches, self._digest = batches, _digest(windows)

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return self._batches.get_state() | {"data": self._digest}

    def set_state(self, state: dict[str, Any]) -> None:
        if state.get("data", self._digest) != self._digest:
            raise ValueError(
                "The training text or tokenizer is not what it was when this position was saved: the run cannot resume "
                "with what it has not seen. Restore them, or start a new run, from the weights if you like."
            )
        self._batches.set_state({"next_index": state["next_index"]})


def digests(tokenizer: Tokenizer, train: Sequence[TokenWindows], validation: Sequence[TokenWindows]) -> dict[str, str]:
    """Names of what `load_data` returned that depend on its content alone: "tokenizer", "train" and "validation"."""
    return {"tokenizer": tokenizer.fingerprint, "train": _digest(train), "validation": _digest(validation)}


def _digest(windows: Sequence[TokenWindows]) -> str:
    digest = hashlib.sha256()
    for part in windows:
        digest.update(part.stream.digest if isinstance(part.stream, TokenStream) else part.stream.data)
    return digest.hexdigest()


def count_epochs(
    windows: Sequence[TokenWindows], batch_size: int, step: int, weights: Sequence[float] = ()
) -> dict[str, float]:
    """How often each source's windows were read in `step` batches: as "epoch", or as "epoch/0", "epoch/1" and so on."""
    if len(windows) == 1:
        return {"epoch": step * batch_size / len(windows[0])}
    shares = np.asarray(weights) / sum(weights)
    return {f"epoch/{n}": float(step * batch_size * shares[n] / len(part)) for n, part in enumerate(windows)}


class _Batches:
    """The given rows of the batches that consecutive windows make: a grain data source."""

    def __init__(self, windows: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        self._windows, self._batch_size, self._rows = windows, batch_size, rows

    def __len__(self) -> int:
        return len(self._windows) // self._batch_size

    def __getitem__(self, index: SupportsIndex) -> Batch:
        first = operator.index(index) * self._batch_size
        return _stack([self._windows[first + row] for row in self._rows])


def eval_batches(
    windows: Sequence[TokenWindows | Sequence[Batch]],
    batch_size: int,
    limit: int,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """One pass over the windows in order, or over an evenly spaced part of them; the same at every call.

    Args:
      windows: of one source or more, one after another; when they fill more than `limit` batches, limit * batch_size
        of them are taken, spread evenly.
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
    joined = grain.MapDataset.concatenate([grain.MapDataset.source(part) for part in windows])
    count = min(len(joined), limit * batch_size)
    chosen = [number * len(joined) // count for number in range(count)]
    rows = range(batch_size) if rows is None else rows
    length = len(windows[0][0]["inputs"])
    missing = {name: np.full(length, padding, dtype) for name, (dtype, padding) in ARRAYS.items()}

    def batch(first: int) -> Batch:
        return _stack([joined[chosen[first + row]] if first + row < count else missing for row in rows])

    return (batch(first) for first in range(0, count, batch_size))


def _stack(rows: Sequence[Any]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
