"""Documents of a source: all of them, or in units that can be read separately; and documents held out by name."""

import difflib
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from idattn.data.sources import LINES, Document, Lines, Rows, Texts
from idattn.files import disk_path

_SUFFIXES = (*LINES, ".parquet", ".txt")
_MIN_UNITS, _MIN_UNIT_BYTES = 16, 1 << 20  # a small source is cut finer, so that several processes share it


logger = logging.getLogger(__name__)


class Unit(NamedTuple):
    """Consecutive documents: those that begin in [start, stop) of the source's part number `part`."""

    part: int
    start: int
    stop: int


class Corpus:
    """The documents of a source in their order.

    Attributes:
      left_out: files of a known kind in the source's folder that are not read, since they are hidden, and links to
        folders.
    """

    def __init__(self, source: str, text_field: str = "text"):
        """Looks at the source, but reads no document.

        Args:
          source: "austen", the corpus inside the package; `hf:NAME[@REVISION][,CONFIG[,SPLIT]]`, a dataset of the
            Hugging Face hub, read as a stream, or a local one by its folder; or a path: `.jsonl` (`.gz`, `.xz`, `.zst`)
            with one object {"id", "text"} a line (without "id" the document is called after the file and the line,
            `file:3`); `.parquet`; `.txt`, one document; or a folder of such files, read by kind (in the order just
            given) and name, without hidden ones (their name or that of a folder in it begins with a dot) and without
            folders that are links. All are UTF-8: what is not is an error.
          text_field: name of the text in objects and rows.

        Raises:
          FileNotFoundError: the path does not exist.
          ImportError: the package that reads this kind of source is missing.
          ConnectionError: the hub is out of reach.
          ValueError: the source is of no known kind, or has no such field.
        """
        self._source = source
        self.left_out: list[Path] = []
        if source.startswith("hf:"):
            self._parts = [Rows.of_dataset(source, text_field)]
            return
        path = _path_of(source)
        files, self.left_out = _files(path) if path.is_dir() else ([path], [])
        self._parts = list(_parts(path, files, text_field))

    @property
    def has_files(self) -> bool:
        """Whether the source is files, which `signature` tells from others."""
        return any(part.paths for part in self._parts)

    def log_left_out(self) -> None:
        """Logs how many files of the source's folder are not read, if any."""
        if self.left_out:
            logger.warning(
                "source=%r: %d hidden files and links to folders are not read, such as %s.",
                self._source,
                len(self.left_out),
                self.left_out[0],
            )

    def signature(self) -> str:
        """Hex digest of the names and sizes of the source's files."""
        files = [[path.name, path.stat().st_size] for part in self._parts for path in part.paths]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def units(self, unit_bytes: int) -> list[Unit]:
        """All documents in units of about `unit_bytes` of text, or less where that makes few units."""
        sizes = [part.size() for part in self._parts]
        target = min(unit_bytes, max(sum(sizes) // _MIN_UNITS, _MIN_UNIT_BYTES))
        return [
            Unit(number, start, stop)
            for number, (part, size) in enumerate(zip(self._parts, sizes, strict=True))
            for start, stop in itertools.pairwise(part.cuts(size, -(-size // target)))
        ]

    def read(self, unit: Unit) -> Iterator[Document]:
        """The documents of a unit. A row of a dataset or of Parquet may have no text; its document is empty.

        Raises:
          ValueError: a document is malformed (the file and line are named).
        """
        return self._parts[unit.part].read(unit.start, unit.stop)

    def __iter__(self) -> Iterator[Document]:
        return itertools.chain.from_iterable(part.read(0) for part in self._parts)


def load_documents(source: str) -> list[Document]:
    """All documents of a source, named as for `Corpus`, that have a text.

    Returns:
      At least one document; ids are unique.

    Raises:
      FileNotFoundError: the path does not exist.
      ValueError: the source holds no document, or a document is malformed (the file and line are named).
    """
    corpus = Corpus(source)
    corpus.log_left_out()
    documents = [document for document in corpus if document.text]
    if not documents:
        raise ValueError(f"source={source!r} holds no documents; it must hold at least one.")
    repeated = [name for name, count in Counter(document.id for document in documents).items() if count > 1]
    if repeated:
        raise ValueError(f"source={source!r} has {len(repeated)} ids more than once, such as {repeated[0]!r}.")
    return documents


def split(documents: Sequence[Document], holdout: tuple[str, ...]) -> tuple[list[Document], list[Document]]:
    """The documents to train on and those to validate on, each in the order of `documents`.

    Args:
      documents: with unique ids.
      holdout: ids of the documents to validate on.

    Returns:
      The training and the validation documents, at least one each.

    Raises:
      ValueError: an id of `holdout` does not exist (the nearest is named), or one side would be empty.
    """
    ids = [document.id for document in documents]
    for name in holdout:
        if name not in ids:
            near = difflib.get_close_matches(name, ids, n=1, cutoff=0.0)
            raise ValueError(
                f"holdout names {name!r}, which is none of the {len(ids)} documents; the nearest is {near[0]!r}."
            )
    train = [document for document in documents if document.id not in holdout]
    validation = [document for document in documents if document.id in holdout]
    if not train or not validation:
        raise ValueError(
            f"holdout={holdout} leaves {len(train)} documents to train on and {len(validation)} to validate on; both "
            "need at least one: name some but not all documents, or cut a single text into several files."
        )
    return train, validation


def _path_of(source: str) -> Path:
    path = Path(__file__).with_name("austen.jsonl.xz") if source == "austen" else disk_path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"source={source!r} does not exist; give 'austen', the path of a file or folder, or hf:NAME for a dataset "
            "of the Hugging Face hub."
        )
    if path.is_file() and not path.name.endswith(_SUFFIXES):
        raise ValueError(f"source={source!r} must be a folder or end in one of {', '.join(_SUFFIXES)}.")
    return path


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of known kinds in a folder, sorted, and what `Corpus.left_out` names."""
    files, left_out = [], []
    for path in sorted(folder.rglob("*")):  # which enters no links; a folder may be named like a file
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_symlink() if path.is_dir() else path.name.endswith(_SUFFIXES):
            (left_out if is_hidden or path.is_dir() else files).append(path)
    return files, left_out


def _parts(path: Path, files: Sequence[Path], text_field: str) -> Iterator[Lines | Rows | Texts]:
    yield from (Lines(file, text_field) for file in files if file.name.endswith(LINES))
    if parquet := [file for file in files if file.suffix == ".parquet"]:
        yield Rows.of_parquet(parquet, text_field)
    if texts := [file for file in files if file.suffix == ".txt"]:
        root = path if path.is_dir() else path.parent
        yield Texts(texts, [file.relative_to(root).with_suffix("").as_posix() for file in texts])
