"""Tokenizers: text to integer ids and back, by bytes or by a SentencePiece or Hugging Face file; training one."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from idattn.data import optional

_HUB_FILES = ("tokenizer.model", "tokenizer.json")
_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|endoftext|>", "[CLS]")
_MAX_SENTENCE = 4096  # bytes; SentencePiece leaves longer ones out without a word


class Tokenizer(Protocol):
    """Maps text to ids in [0, vocab_size); `bos_id` starts a document and stands for no text.

    `path` is the file that defines it, "" where none does.
    """

    path: str
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
      name: "bytes" (ids 0 to 255 are UTF-8 bytes, 256 starts a document); the path of a SentencePiece `.model` or of a
        Hugging Face `tokenizers` `.json`; or OWNER/NAME, a repository of the hub with one of the two, such as
        meta-llama/Llama-2-7b-hf.

    Returns:
      The tokenizer, with `vocab_size` and `bos_id`.

    Raises:
      FileNotFoundError: the file does not exist.
      ImportError: the package that reads it is missing.
      ConnectionError: the hub is out of reach, or does not let you in.
      ValueError: `name` is none of these, or the file is no tokenizer with a beginning-of-document token.
    """
    if name == "bytes":
        return ByteTokenizer()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith((".model", ".json")):
        name = _download(name)
    if name.endswith((".model", ".json")):
        if not Path(name).is_file():
            raise FileNotFoundError(
                f"tokenizer={name!r} does not exist; give the path of a .model or .json file, or 'bytes'."
            )
        return SentencePieceTokenizer(name) if name.endswith(".model") else JsonTokenizer(name)
    raise ValueError(
        f"tokenizer={name!r} must be 'bytes', the path of a SentencePiece file that ends in .model or of a Hugging "
        "Face one that ends in .json, or OWNER/NAME on the hub."
    )


def fingerprint(tokenizer: Tokenizer) -> str:
    """Hex SHA-256 of the file that defines a tokenizer, or "bytes"."""
    return hashlib.sha256(Path(tokenizer.path).read_bytes()).hexdigest() if tokenizer.path else "bytes"


def encode_document(text: str, tokenizer: Tokenizer, name: str) -> np.ndarray:
    """(tokens,) int32 ids of a document: BOS, which occurs nowhere else in it, and its text.

    Raises:
      ValueError: the tokenizer breaks its word; `name` is the document's.
    """
    ids = tokenizer.encode(text)
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        raise ValueError(
            f"document {name!r} has ids {ids.min()} to {ids.max()}; they must be 0 to {tokenizer.vocab_size - 1}, the "
            "vocabulary of the tokenizer that encoded it."
        )
    if (ids == tokenizer.bos_id).any():
        raise ValueError(f"document {name!r} has id {tokenizer.bos_id} inside, which may only start a document.")
    return np.concatenate([np.array([tokenizer.bos_id], np.int32), ids])


class ByteTokenizer:
    """The bytes of UTF-8; incomplete sequences decode to the replacement character."""

    path = ""
    vocab_size = 257
    bos_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(_text_ids(ids, self).astype(np.uint8)).decode(errors="replace")


class SentencePieceTokenizer:
    """The pieces of a SentencePiece model file."""

    def __init__(self, path: str):
        sentencepiece = optional.load("sentencepiece", f"tokenizer={path!r}")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        except RuntimeError as error:
            raise ValueError(f"tokenizer={path!r} is not a SentencePiece model: {error}") from error
        self.path = path
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._model.bos_id()
        if self.bos_id < 0:
            raise ValueError(f"tokenizer={path!r} has no BOS piece, which starts documents; train it with bos_id >= 0.")

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.encode(text), np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode(_text_ids(ids, self).tolist())


class JsonTokenizer:
    """A Hugging Face `tokenizers` file; special tokens that a text spells out are text, and no text is cut short."""

    def __init__(self, path: str):
        tokenizers = optional.load("tokenizers", f"tokenizer={path!r}")
        try:
            self._model = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"tokenizer={path!r} is not a file of the package tokenizers: {error}") from error
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        vocabulary = self._model.get_vocab()
        known = [token for token in _BOS if token in vocabulary]
        if not known:
            raise ValueError(
                f"tokenizer={path!r} has no token to start documents; it must have one of {', '.join(_BOS)}."
            )
        self.path = path
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id = vocabulary[known[0]]

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode(_text_ids(ids, self).tolist(), skip_special_tokens=False)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str]) -> None:
    """Trains a SentencePiece BPE with ids 0 unknown, 1 BOS, 2 EOS and then 256 bytes; equal texts make equal files.

    It gives back any text exactly, but for U+2581, which SentencePiece takes for a space.

    Args:
      texts: to learn from, 50 MB or so.
      vocab_size: pieces.
      path: of the file to write, ending in .model.

    Raises:
      ImportError: the package sentencepiece is missing.
      ValueError: the texts are too few for so many pieces, or the vocabulary too small for their characters.
    """
    sentencepiece = optional.load("sentencepiece", "training a tokenizer")
    with open(path, "wb") as file:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(piece for text in texts for piece in _sentences(text)),
                model_writer=file,
                model_type="bpe",
                vocab_size=vocab_size,
                bos_id=1,
                eos_id=2,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                max_sentence_length=2 * _MAX_SENTENCE,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(f"training a tokenizer of {vocab_size} pieces failed: {error}") from error


def _sentences(text: str) -> Iterator[str]:
    """A text in pieces of at most `_MAX_SENTENCE` bytes, cut at the ends of lines or else anywhere."""
    most = _MAX_SENTENCE // 4  # characters: none takes more bytes in UTF-8
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), most):
            yield line[start : start + most]


def _download(name: str) -> str:
    hub, errors = (
        optional.load(module, f"tokenizer={name!r}") for module in ("huggingface_hub", "huggingface_hub.errors")
    )
    for file in _HUB_FILES:
        try:
            return hub.hf_hub_download(name, file)
        except (errors.HfHubHTTPError, OSError) as error:
            reason = error
            if not isinstance(error, errors.RemoteEntryNotFoundError):
                break
    raise ConnectionError(
        f"tokenizer={name!r} could not be had from the Hugging Face hub: {reason}\nWithout a network, or access to it, "
        f"give the path of a local {' or '.join(_HUB_FILES)}, or 'bytes'."
    ) from reason


def _text_ids(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    array = np.asarray(ids, np.int64)
    outside = array[(array < 0) | (array >= tokenizer.vocab_size)]
    if outside.size:
        raise ValueError(f"id {outside[0]} is outside the vocabulary, 0 to {tokenizer.vocab_size - 1}.")
    return array[array != tokenizer.bos_id]
