"""Documents: reading them from the embedded corpus or from files, and holding some of them out."""

import difflib
import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".txt")


class Document(NamedTuple):
    """A text, and the id that errors and `holdout` call it by."""

    id: str
    text: str


def load_documents(source: str) -> list[Document]:
    """All documents of a source, in its order.

    Args:
      source: "austen", the corpus inside the package; or a path: `.jsonl`, `.jsonl.gz` or `.jsonl.xz` with one object
        {"id", "text"} a line (without "id" the document is called after the file and the line, `file:3`); a `.txt`
        file, one document; or a folder, whose `.txt` files are the documents, sorted by name. All are UTF-8.

    Returns:
      At least one document; ids are unique and texts not empty.

    Raises:
      FileNotFoundError: the path does not exist.
      ValueError: the source holds no document, or a document is malformed (the file and line are named).
    """
    if source == "austen":
        with (resources.files("idattn.data") / "austen.jsonl.xz").open("rb") as packed, lzma.open(packed) as lines:
            documents = list(_parse_lines(lines, "austen.jsonl.xz"))
    else:
        documents = list(_read_path(Path(source)))
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


def _read_path(path: Path) -> Iterator[Document]:
    if not path.exists():
        raise FileNotFoundError(f"source={str(path)!r} does not exist; give 'austen' or the path of a file or folder.")
    if path.is_dir():
        for member in sorted(path.glob("*.txt")):
            yield _read_text(member)
    elif path.name.endswith(".txt"):
        yield _read_text(path)
    elif path.name.endswith(_SUFFIXES):
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        with opener(path, "rb") as lines:
            try:
                yield from _parse_lines(lines, str(path))
            except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
                raise ValueError(f"{path} is not a complete {path.suffix} file: {error}") from error
    else:
        raise ValueError(f"source={str(path)!r} must be a folder or end in one of {', '.join(_SUFFIXES)}.")


def _read_text(path: Path) -> Document:
    return _document(path.stem, _decode(path.read_bytes(), str(path)), str(path))


def _parse_lines(lines: Iterable[bytes], name: str) -> Iterator[Document]:
    # Binary lines end at "\n" alone; str.splitlines would also cut at characters that JSON allows inside strings.
    for number, line in enumerate(lines, 1):
        place = f"{name}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(_decode(line, place))
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f'{place}: must be an object with a field "text", not {type(row).__name__}.')
        yield _document(row.get("id", f"{Path(name).name}:{number}"), row.get("text"), place)


def _document(name: object, text: object, place: str) -> Document:
    if not isinstance(name, str):
        raise ValueError(f'{place}: "id" must be a string, not {name!r}.')
    if not isinstance(text, str) or not text:
        raise ValueError(f"{place}: the text must be a string that is not empty, not {text!r}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
        raise ValueError(f"{place}: the text is not valid Unicode: {error}") from error
    return Document(name, text)


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not valid UTF-8: {error}") from error
