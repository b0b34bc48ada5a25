"""Tokenizers: text to integer ids and back, by bytes or by a SentencePiece or Hugging Face file; training one."""

import hashlib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import sentencepiece
from etils import epath

from idattn.data import optional
from idattn.files import resolve_path, write_atomic

TRAINING_TEXT = 50_000_000  # characters that a tokenizer learns from
BPE = r"bpe:\d+"  # a number of pieces: a tokenizer that is trained on the text of a run
_HUB_FILES = ("tokenizer.model", "tokenizer.json")
_BYTES_FILE = b"Ids 0 to 255 are the bytes of UTF-8; 256 starts a document.\n"
_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|endoftext|>", "[CLS]")
_MAX_SENTENCE = 4096  # bytes; SentencePiece leaves longer ones out without a word
_SPACE = "\u2581"  # SentencePiece writes a space so, and takes one in a text for a space
_RESERVED, _STAND_IN = "\u2585", "\ufdd0"  # SentencePiece skips lines with the first; the second is no character


class Tokenizer(Protocol):
    """Maps text to ids in [0, vocab_size); `bos_id` starts a document and stands for no text.

    Attributes:
      name: that it was loaded by, for messages.
      files: name -> content; a folder of these files is what `load_tokenizer` takes.
      fingerprint: of what it does: "bytes", or the hex SHA-256 of its file.
      vocab_size: ids.
      bos_id: in [0, vocab_size).
    """

    name: str
    files: dict[str, bytes]
    fingerprint: str
    vocab_size: int
    bos_id: int

    def encode(self, text: str) -> np.ndarray:
        """(tokens,) int32 ids of a text, without `bos_id`."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of (tokens,) ids, `bos_id` dropped; a ValueError for an id outside the vocabulary."""
        ...


def load_tokenizer(name: epath.PathLike) -> Tokenizer:
    """The tokenizer of a name.

    Args:
      name: "bytes" (ids 0 to 255 are UTF-8 bytes, 256 starts a document); the path of a SentencePiece `.model` or of a
        Hugging Face `tokenizers` `.json`; a folder, such as `save_tokenizer` and `prepare` write, with the first of
        tokenizer.model, tokenizer.json and tokenizer.bytes that it holds; or OWNER/NAME, a repository of the hub with
        tokenizer.model or tokenizer.json, such as meta-llama/Llama-2-7b-hf.

    Returns:
      The tokenizer, with `vocab_size` and `bos_id`.

    Raises:
      FileNotFoundError: the file does not exist.
      ImportError: the package that reads it is missing.
      ConnectionError: the hub is out of reach, or does not let you in.
      ValueError: `name` is none of these, or the file is no tokenizer with a beginning-of-document token.
    """
    name = os.fspath(name)
    if name == "bytes":
        return ByteTokenizer()
    if re.fullmatch(BPE, name):
        raise ValueError(f"tokenizer={name!r} is trained on the text of a run; name one of its checkpoints.")
    path = resolve_path(name)
    if path.is_dir():
        files = [path / f"tokenizer{suffix}" for suffix in _KINDS if (path / f"tokenizer{suffix}").exists()]
        if not files:
            raise FileNotFoundError(
                f"tokenizer={name!r} is a folder without {', '.join(f'tokenizer{suffix}' for suffix in _KINDS)}; it "
                "must hold one of them."
            )
        path = files[0]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(tuple(_KINDS)):
        path = epath.Path(_download(name))
    if path.suffix not in _KINDS:
        raise ValueError(
            f"tokenizer={name!r} must be 'bytes', the path of a SentencePiece file that ends in .model or of a Hugging "
            "Face one that ends in .json, a folder with one of them, or OWNER/NAME on the hub."
        )
    if not path.exists():
        raise FileNotFoundError(
            f"tokenizer={name!r} does not exist; give the path of a .model or .json file, of a folder, or 'bytes'."
        )
    return _KINDS[path.suffix](path.read_bytes(), name)


def save_tokenizer(tokenizer: Tokenizer, folder: epath.PathLike) -> None:
    """Write the files of a tokenizer, which `load_tokenizer` reads, to a folder of a disk or bucket."""
    for name, data in tokenizer.files.items():
        write_atomic(resolve_path(folder) / name, data)


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

    def __init__(self, data: bytes = _BYTES_FILE, name: str = "bytes"):
        if data != _BYTES_FILE:
            raise ValueError(f"tokenizer={name!r} is damaged: it must be {_BYTES_FILE!r}. Give 'bytes' itself.")
        self.name, self.files, self.fingerprint = name, {"tokenizer.bytes": data}, "bytes"
        self.vocab_size, self.bos_id = 257, 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(_text_ids(ids, self).astype(np.uint8)).decode(errors="replace")


class SentencePieceTokenizer:
    """The pieces of a SentencePiece file; U+2581 stays itself where the model spells it in bytes, else a space."""

    def __init__(self, data: bytes, name: str):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ValueError(f"tokenizer={name!r} is not a SentencePiece model: {error}") from error
        self.name, self.files = name, {"tokenizer.model": data}
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._model.bos_id()
        if self.bos_id < 0:
            raise ValueError(f"tokenizer={name!r} has no BOS piece, which starts documents; train it with bos_id >= 0.")
        self._space_bytes = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        probe = f"a{_SPACE}b"  # fails where there are no pieces for bytes, or where every text gets a space in front
        self._spells_space = self._model.decode(self._encode_apart(probe)) == probe

    def encode(self, text: str) -> np.ndarray:
        spelt = self._spells_space and _SPACE in text
        return np.asarray(self._encode_apart(text) if spelt else self._model.encode(text), np.int32)

    def _encode_apart(self, text: str) -> list[int]:
        """Ids of a text whose U+2581 are spelt in bytes, which SentencePiece would take for spaces."""
        first, *others = map(self._model.encode, text.split(_SPACE))
        return first + [id for ids in others for id in (*self._space_bytes, *ids)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode(_text_ids(ids, self).tolist())


class JsonTokenizer:
    """A Hugging Face `tokenizers` file; special tokens that a text spells out are text, and no text is cut short."""

    def __init__(self, data: bytes, name: str):
        tokenizers = optional.load("tokenizers", f"tokenizer={name!r}")
        try:
            self._model = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"tokenizer={name!r} is not a file of the package tokenizers: {error}") from error
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        # An ordinary piece may be spelt like a special token: text that holds "<s>" can teach it.
        special = {token.content: id for id, token in self._model.get_added_tokens_decoder().items() if token.special}
        bos_ids = [special[token] for token in _BOS if token in special]
        if not bos_ids:
            raise ValueError(
                f"tokenizer={name!r} has no special token to start documents; its special tokens are "
                f"{', '.join(special) or 'none'}, and one of them must be {', '.join(_BOS)}."
            )
        self.name, self.files = name, {"tokenizer.json": data}
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.vocab_size = max(self._model.get_vocab().values()) + 1
        self.bos_id = bos_ids[0]

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode(_text_ids(ids, self).tolist(), skip_special_tokens=False)


_KINDS = {".model": SentencePieceTokenizer, ".json": JsonTokenizer, ".bytes": ByteTokenizer}  # by a file's suffix


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: epath.PathLike) -> None:
    """Trains a SentencePiece BPE with ids 0 unknown, 1 BOS, 2 EOS and then 256 bytes; equal texts make equal files.

    It gives back any text exactly.

    Args:
      texts: to learn from, 50 MB or so.
      vocab_size: pieces.
      path: of the file to write, ending in .model.

    Raises:
      ValueError: the texts are too few for so many pieces, or the vocabulary too small for their characters.
    """
    write_atomic(path, _train_pieces(texts, vocab_size))


def trained_tokenizer(name: str, texts: Sequence[str]) -> Tokenizer:
    """The tokenizer "bpe:N": N pieces, trained as by `train_tokenizer`, but not in a file. Raises likewise.

    It learns from the beginning of each text, the same share of all, such that they have 50M characters at most.
    """
    total = sum(map(len, texts))
    beginnings = (text[: len(text) * TRAINING_TEXT // total] for text in texts)
    return SentencePieceTokenizer(_train_pieces(beginnings, int(name.split(":")[1])), name)


def _train_pieces(texts: Iterable[str], vocab_size: int) -> bytes:
    """The content of a file of `train_tokenizer`."""
    print(f"training a tokenizer of {vocab_size:,} pieces", file=sys.stderr, flush=True)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(piece for text in texts for piece in _sentences(text)),
            model_writer=model,
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
    # Both take three bytes, so that the lengths in the file stay true.
    return model.getvalue().replace(_STAND_IN.encode(), _RESERVED.encode())


def _sentences(text: str) -> Iterator[str]:
    """What SentencePiece learns from a text: pieces of at most `_MAX_SENTENCE` bytes without characters it reserves.

    A text is cut at the ends of lines, at characters that are always spelt in bytes, or else anywhere.
    """
    most = _MAX_SENTENCE // 4  # characters: none takes more bytes in UTF-8
    for line in text.splitlines(keepends=True):
        for part in re.split(f"[{_SPACE}{_STAND_IN}]", line):
            for start in range(0, len(part), most):
                yield part[start : start + most].replace(_RESERVED, _STAND_IN)


def _download(name: str) -> str:
    hub, errors = (
        optional.load(module, f"tokenizer={name!r}") for module in ("huggingface_hub", "huggingface_hub.errors")
    )
    reason: Exception | None = None
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
