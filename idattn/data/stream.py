"""Prepared folders: blocks of tokens in ArrayRecord shards with a manifest, read anywhere and verified.

A document is its tokens with BOS, which occurs nowhere else, before them: BOS is the border. The stream of a split is
all its documents, unit after unit. A shard is the documents of one unit and split, in records of BLOCK tokens, the last
of fewer, in the manifest's dtype.
"""

import bisect
import functools
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from idattn.data import optional
from idattn.files import commit, read_json, temporary_name

BLOCK = 8192  # tokens: a window touches one or two records, which are checked by their own hash when they are read
MANIFEST, PLAN = "manifest.json", "plan.json"
SPLITS = ("train", "validation")
FORMAT = 1  # of the folder, BLOCK included
REMEDY = "Delete the file, and give the command that prepared the folder again: it makes what is missing."
_OPEN_FILES = 256  # at most, far below the usual limit of 1024


class ShardWriter:
    """Writes the documents of one unit and split; the file appears under its name when it is complete and on disk."""

    def __init__(self, path: Path, dtype: str):
        self._path, self._temporary = path, temporary_name(path)
        self._writer = _array_record().ArrayRecordWriter(str(self._temporary), "group_size:1,uncompressed")
        self._pending, self._tokens, self._documents = np.zeros(0, dtype), 0, 0

    def add(self, document: np.ndarray) -> None:
        """Appends a document, (tokens,) with BOS first."""
        self._documents += 1
        self._tokens += len(document)
        self._pending = np.concatenate([self._pending, document.astype(self._pending.dtype)])
        whole = len(self._pending) // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            self._writer.write(self._pending[start : start + BLOCK].tobytes())
        self._pending = self._pending[whole:]

    def close(self) -> dict[str, Any]:
        """Finishes the file, and returns its entry in the manifest."""
        if len(self._pending):
            self._writer.write(self._pending.tobytes())
        try:
            self._writer.close()
        except RuntimeError as error:  # a full disk, say
            self._temporary.unlink()
            raise OSError(f"{self._temporary} could not be written: {error}") from error
        commit(self._temporary, self._path)
        return {
            "file": self._path.name,
            "tokens": self._tokens,
            "documents": self._documents,
            "bytes": self._path.stat().st_size,
            "sha256": sha256_of(self._path),
        }


class TokenStream:
    """The tokens of one split of a prepared folder; slices are read where they are needed.

    Attributes:
      manifest: of the folder.
      documents: number of documents.
      digest: SHA-256 over the checksums of the split's shards.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str):
        """Opens a split.

        Args:
          folder: that `prepare` has completed.
          split: "train" or "validation".

        Raises:
          FileNotFoundError: the folder is not prepared, or a shard is missing.
          ValueError: the manifest is broken, a shard has another size than it says, or the split is empty.
        """
        folder = Path(folder).expanduser()
        self.manifest = read_manifest(folder)
        shards = self.manifest["splits"][split]["shards"]
        self._paths = [Path(folder) / shard["file"] for shard in shards]
        for path, shard in zip(self._paths, shards, strict=True):
            if path.stat().st_size != shard["bytes"]:
                raise ValueError(
                    f"{path} is damaged: it has {path.stat().st_size} bytes, and had {shard['bytes']} when it was "
                    "prepared."
                )
        self._ends = list(itertools.accumulate(shard["tokens"] for shard in shards))
        if not shards:
            raise ValueError(
                f"{folder} has no {split} documents: {self.manifest['settings']['validation']} of all were to validate "
                "on, chosen by their hash. Prepare it anew with another --validation."
            )
        self.documents = sum(shard["documents"] for shard in shards)
        self.digest = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).digest()
        self._dtype = np.dtype(self.manifest["dtype"])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, part: slice) -> np.ndarray:
        """(tokens,) the slice, whose step must be 1; a ValueError names the file and offset of a damaged record."""
        start, stop, step = part.indices(len(self))
        assert step == 1, part
        pieces = [np.zeros(0, self._dtype)]
        shard = bisect.bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[shard - 1] if shard else 0
            end = min(stop, self._ends[shard])
            first, last = (start - begin) // BLOCK, (end - begin - 1) // BLOCK
            blocks = _read_records(self._paths[shard], range(first, last + 1))
            tokens = np.frombuffer(b"".join(blocks), self._dtype)
            pieces.append(tokens[start - begin - first * BLOCK : end - begin - first * BLOCK])
            start, shard = end, shard + 1
        return np.concatenate(pieces)


class Report(NamedTuple):
    """What `verify` saw of a shard."""

    file: str
    split: str
    problem: str  # "" where there is none
    lengths: np.ndarray  # (documents,) tokens of each document, with BOS


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder is one of `prepare`, complete or not."""
    return any((Path(folder).expanduser() / name).exists() for name in (PLAN, MANIFEST))


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is broken.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: it is no prepared folder, or its preparation has not come to its end; "
            "the same command resumes it."
        )
    manifest = read_json(path, REMEDY)
    splits = manifest.get("splits")
    if manifest.get("format") != FORMAT or not isinstance(splits, dict) or set(splits) != set(SPLITS):
        raise ValueError(
            f"{path} is damaged: it is of format {manifest.get('format')}, not {FORMAT}, or without splits. {REMEDY}"
        )
    return manifest


def verify(folder: str | os.PathLike[str]) -> Iterator[Report]:
    """Reads every shard of a prepared folder: its checksum, each record's, and the counts that the manifest states."""
    manifest = read_manifest(folder)
    for split in SPLITS:
        for shard in manifest["splits"][split]["shards"]:
            yield Report(shard["file"], split, *_check_shard(Path(folder) / shard["file"], shard, manifest))


def _check_shard(path: Path, shard: dict[str, Any], manifest: dict[str, Any]) -> tuple[str, np.ndarray]:
    none = np.zeros(0, np.int64)
    try:
        _open.cache_clear()  # of the file as it was
        blocks = _read_records(path, range(-(-shard["tokens"] // BLOCK)))
    except (OSError, ValueError) as error:
        return str(error), none
    tokens = np.frombuffer(b"".join(blocks), manifest["dtype"])
    starts = np.flatnonzero(tokens == manifest["tokenizer"]["bos_id"])
    lengths = np.diff(np.append(starts, len(tokens)))
    if sha256_of(path) != shard["sha256"]:
        return (
            f"{path} is not the file that was prepared: its SHA-256 is {sha256_of(path)}, not {shard['sha256']}.",
            none,
        )
    if (len(tokens), len(starts)) != (shard["tokens"], shard["documents"]):
        return f"{path} has {len(tokens)} tokens in {len(starts)} documents, unlike its entry {shard}.", none
    return "", lengths


def _read_records(path: Path, numbers: range) -> list[bytes]:
    """Records of a shard; a ValueError names the file and the byte offset where a record is damaged."""
    try:
        reader = _open(str(path))
        if numbers.stop > reader.num_records():
            raise ValueError(f"{path} is damaged: it has {reader.num_records()} records, not {numbers.stop}.")
        return reader.read(list(numbers))
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


@functools.lru_cache(_OPEN_FILES)
def _open(path: str) -> Any:
    random_access = "readahead_buffer_size:0,max_parallelism:0"
    return _array_record().ArrayRecordReader(path, random_access, file_reader_buffer_size=32768)


def _array_record() -> ModuleType:
    return optional.load("array_record.python.array_record_module", "a prepared folder")  # no wheels for Windows


def sha256_of(path: Path | epath.Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        # What etils says that `open` returns has no `readinto`.
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
