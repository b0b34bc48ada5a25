"""Tokenizers: text to integer ids and back, as bytes or as the pieces of a SentencePiece model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Maps text to ids in [0, vocab_size); `bos_id` starts a document and stands for no text."""

    vocab_size: int
    bos_id: int

    def encode(self, text: str) -> np.ndarray:
        """(tokens,) int32 ids of a text, without `bos_id`."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of (tokens,) ids, `bos_id` dropped; a ValueError for an id outside the vocabulary."""
        ...


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name.

    Args:
      name: "bytes" (ids 0 to 255 are UTF-8 bytes, 256 starts a document) or the path of a SentencePiece `.model` file.

    Returns:
      The tokenizer, with `vocab_size` and `bos_id`.

    Raises:
      FileNotFoundError: the `.model` file does not exist.
      ImportError: the package sentencepiece is missing.
      ValueError: `name` is neither, or the file is no SentencePiece model with a beginning-of-document piece.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name.endswith(".model"):
        return SentencePieceTokenizer(name)
    raise ValueError(f"tokenizer={name!r} must be 'bytes' or the path of a SentencePiece file that ends in .model.")


class ByteTokenizer:
    """The bytes of UTF-8; incomplete sequences decode to the replacement character."""

    vocab_size = 257
    bos_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(_text_ids(ids, self).astype(np.uint8)).decode(errors="replace")


class SentencePieceTokenizer:
    """The pieces of a SentencePiece model file."""

    def __init__(self, path: str):
        if not Path(path).is_file():
            raise FileNotFoundError(f"tokenizer={path!r} does not exist; give the path of a .model file, or 'bytes'.")
        try:
            import sentencepiece  # optional: byte-level runs do without it
        except ImportError as error:
            raise ImportError(
                f"tokenizer={path!r} needs the package sentencepiece: pip install idattn[data]."
            ) from error
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        except RuntimeError as error:
            raise ValueError(f"tokenizer={path!r} is not a SentencePiece model: {error}") from error
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._model.bos_id()
        if self.bos_id < 0:
            raise ValueError(f"tokenizer={path!r} has no BOS piece, which starts documents; train it with bos_id >= 0.")

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.encode(text), np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode(_text_ids(ids, self).tolist())


def _text_ids(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    array = np.asarray(ids, np.int64)
    outside = array[(array < 0) | (array >= tokenizer.vocab_size)]
    if outside.size:
        raise ValueError(f"id {outside[0]} is outside the vocabulary, 0 to {tokenizer.vocab_size - 1}.")
    return array[array != tokenizer.bos_id]
