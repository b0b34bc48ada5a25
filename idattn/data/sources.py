"""The kinds of files that documents come from; each can be cut into ranges that are read apart.

A kind has `paths`, its files; `size()`, about its bytes of text; `cuts(size, count)`, the borders of at most `count`
ranges in the kind's own coordinate; and `read(start, stop)`, the documents that begin in [start, stop), without `stop`
all from `start`.
"""

import contextlib
import gzip
import itertools
import json
import lzma
import reprlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from idattn.data import optional

LINES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
_COMPRESSED_CUTS = 16  # ranges of a file: each unpacks all that is before it
_OTHER_COLUMN = "Name a column of strings with --text_field, or write this one as strings."
_LOCAL_SHARDS = 1024  # of a dataset from `save_to_disk`, which has no row groups


class Document(NamedTuple):
    """A text, and the id that errors and `holdout` call it by."""

    id: str
    text: str


class Lines:
    """A JSONL file, plain or compressed; its coordinate is the byte of its text, without compression."""

    def __init__(self, path: Path, text_field: str):
        self.paths = [path]
        self._path, self._text_field = path, text_field
        self._open, self._broken = _opener(path)

    def size(self) -> int:
        if self._open is open:
            return self._path.stat().st_size
        with self._checked() as file:
            return sum(map(len, iter(lambda: file.read(1 << 20), b"")))

    def cuts(self, size: int, count: int) -> list[int]:
        return _even(size, count if self._open is open else min(count, _COMPRESSED_CUTS))

    def read(self, start: int, stop: int | None = None) -> Iterator[Document]:
        with self._checked() as file:
            begin = self._skip(file, start)
            # Binary lines end at "\n" alone; str.splitlines would also cut at characters that JSON allows in strings.
            for number, line in enumerate(file, 1):
                if stop is not None and begin >= stop:
                    return
                begin += len(line)
                if line.strip():
                    yield self._parse(line, f"line {number}" if start == 0 else f"line {number} after byte {start}")

    def _skip(self, file: BinaryIO, start: int) -> int:
        """Moves to the first line that begins at `start` or after it, and returns where that is."""
        if start == 0:
            return 0
        file.seek(start - 1)  # in a compressed file: by reading up to there
        return start - 1 + len(file.readline())

    @contextlib.contextmanager
    def _checked(self) -> Iterator[BinaryIO]:
        try:
            with self._open(self._path, "rb") as file:
                yield file
        except self._broken as error:
            raise ValueError(f"{self._path} is not a complete {self._path.suffix} file: {error}") from error

    def _parse(self, line: bytes, place: str) -> Document:
        where = f"{self._path}, {place}"
        content = _decode(line, where)
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
            raise ValueError(f"{where}: JSON that cannot be read: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f'{where}: must be an object with a field "{self._text_field}", not {type(row).__name__}.')
        name, text = row.get("id", f"{self._path.name}:{place.removeprefix('line ')}"), row.get(self._text_field)
        if not isinstance(name, str):
            raise ValueError(f'{where}: "id" must be a string, not {reprlib.repr(name)}.')
        return Document(name, _checked_text(text, where))


class Texts:
    """Text files, each a document; the coordinate is the number of the file."""

    def __init__(self, paths: Sequence[Path], names: Sequence[str]):
        self.paths, self._names = paths, names

    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def cuts(self, size: int, count: int) -> list[int]:
        begins = itertools.accumulate((path.stat().st_size for path in self.paths), initial=0)
        groups = [begin * count // max(size, 1) for begin in begins]
        return [
            number
            for number in range(len(groups))
            if number in (0, len(groups) - 1) or groups[number - 1] != groups[number]
        ]

    def read(self, start: int, stop: int | None = None) -> Iterator[Document]:
        for path, name in zip(self.paths[start:stop], self._names[start:stop], strict=True):
            yield Document(name, _checked_text(_decode(path.read_bytes(), str(path)), str(path)))


class Rows:
    """A dataset of the Hugging Face hub or a local one, or Parquet files; the coordinate is the dataset's shard.

    A shard is a row group of a Parquet file, or a file of another kind. Rows may have no text; the documents are empty.
    """

    def __init__(
        self, dataset: Any, name: str, text_field: str, paths: Sequence[Path] = (), shards: Sequence[str] = ()
    ):
        self.paths, self._dataset, self._name, self._text_field = paths, dataset, name, text_field
        self._shards = shards  # their names, for messages
        if dataset.column_names is not None and text_field not in dataset.column_names:
            raise ValueError(f"{name} has no column {text_field!r}; text_field must be one of {dataset.column_names}.")

    @classmethod
    def of_parquet(cls, paths: Sequence[Path], text_field: str) -> "Rows":
        """The rows of Parquet files, in their order."""
        datasets, parquet = (optional.load(name, f"{paths[0]}") for name in ("datasets", "pyarrow.parquet"))
        shards = []
        for path in paths:  # the library below takes the first file's columns for those of all, and numbers for text
            try:
                file = parquet.ParquetFile(path)
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} is no complete .parquet file: {error}") from error
            _check_column(path, file.schema_arrow, text_field)
            shards += [f"{path}, row group {group}" for group in range(file.num_row_groups)]
        dataset = datasets.load_dataset("parquet", data_files=list(map(str, paths)), split="train", streaming=True)
        return cls(dataset.reshard(), str(paths[0].parent), text_field, paths, shards)

    @classmethod
    def of_dataset(cls, source: str, text_field: str) -> "Rows":
        """The rows of "hf:NAME[@REVISION][,CONFIG[,SPLIT]]"; NAME may be a folder, of files or of `save_to_disk`."""
        datasets = optional.load("datasets", f"source={source!r}")
        name, config, part = (source.removeprefix("hf:").split(",") + ["", ""])[:3]
        name, _, revision = name.partition("@")
        part = part or "train"
        if any((Path(name) / file).exists() for file in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(name)
            saved = saved[part] if isinstance(saved, dict) else saved
            return cls(saved.to_iterable_dataset(min(len(saved), _LOCAL_SHARDS)), source, text_field)
        try:
            dataset = datasets.load_dataset(name, config or None, split=part, revision=revision or None, streaming=True)
        except ConnectionError as error:
            raise ConnectionError(
                f"source={source!r} is out of reach: {error}. Without a network give local files: --source=FOLDER with "
                "what `hf download NAME --repo-type=dataset --local-dir=FOLDER` copied where there is one, or with any "
                ".parquet, .jsonl or .txt; or 'austen'."
            ) from error
        return cls(dataset.reshard(), source, text_field)

    def size(self) -> int:
        return self._dataset.num_shards * sum(len(document.text.encode()) for document in self.read(0, 1))

    def cuts(self, size: int, count: int) -> list[int]:
        shards = self._dataset.num_shards
        return _even(shards, min(count, shards) or shards)

    def read(self, start: int, stop: int | None = None) -> Iterator[Document]:
        shards = self._dataset.num_shards
        for shard in range(start, shards if stop is None else stop):
            place = self._shards[shard] if len(self._shards) == shards else f"{self._name}, shard {shard}"
            for number, row in enumerate(self._rows(shard, shards, place)):
                name, text = row.get("id"), row[self._text_field]
                text = "" if text is None else text
                if not isinstance(text, str):
                    raise ValueError(
                        f"{place}, row {number}: the text must be a string or nothing, not {type(text).__name__} "
                        f"{reprlib.repr(text)}. {_OTHER_COLUMN}"
                    )
                name = f"{shard}:{number}" if name is None else str(name)
                yield Document(name, _unicode(text, f"{place}, row {number}"))

    def _rows(self, shard: int, shards: int, place: str) -> Iterator[dict[str, Any]]:
        try:
            yield from self._dataset.shard(num_shards=shards, index=shard)
        except ValueError as error:  # damaged pages, bytes that are no UTF-8
            raise ValueError(f"{place} cannot be read: {error}") from error


def _check_column(path: Path, schema: Any, text_field: str) -> None:
    if text_field not in schema.names:
        raise ValueError(f"{path} has no column {text_field!r}; text_field must be one of {schema.names}.")
    kind = schema.field(text_field).type
    content = getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind
    if str(content) not in ("string", "large_string", "string_view", "null"):
        raise ValueError(f"{path}: all rows have a {text_field!r} of type {kind}, not string. {_OTHER_COLUMN}")


def _opener(path: Path) -> tuple[Any, tuple[type[Exception], ...]]:
    """The function that opens a file of this suffix, and what reading raises where the file is broken."""
    if path.suffix == ".gz":
        return gzip.open, (gzip.BadGzipFile, zlib.error, EOFError)
    if path.suffix == ".xz":
        return _open_xz, (lzma.LZMAError, EOFError)
    if path.suffix == ".zst":
        zstd = optional.load("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", str(path))
        return zstd.open, (zstd.ZstdError, EOFError)
    return open, ()


def _open_xz(path: Path, mode: str) -> BinaryIO:
    """Like `lzma.open`, but an error where something else than a stream follows a stream, which that ignores."""
    file: Any = lzma.open(path, mode)  # noqa: SIM115  the caller closes it
    file._buffer.raw._trailing_error = ()
    return file


def _even(length: int, count: int) -> list[int]:
    return [length * number // max(count, 1) for number in range(count + 1)]


def _checked_text(text: object, place: str) -> str:
    if not isinstance(text, str) or not text:
        raise ValueError(f"{place}: the text must be a string that is not empty, not {reprlib.repr(text)}.")
    return _unicode(text, place)


def _unicode(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
        raise ValueError(f"{place}: the text is not valid Unicode: {error}") from error
    return text


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not valid UTF-8: {error}; write it anew, as in `iconv -c -t utf-8`.") from error
