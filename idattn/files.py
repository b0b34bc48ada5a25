"""Files: written whole or not at all, on disks and in buckets, JSON that names a damaged file, and locks."""

import errno
import io
import json
import logging
import lzma
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from etils import epath
from etils.epath.backend import fsspec_backend

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


def resolve_path(path: epath.PathLike) -> epath.Path:
    """The path of a file or folder that a user names, for use on disks and in buckets alike; `~` is the home folder.

    Args:
      path: of a disk, or gs://BUCKET/PATH.

    Raises:
      ImportError: the path is in a bucket and the package gcsfs is missing.
      ValueError: the path is of another kind of storage, or of a bucket without a path in it.
    """
    text = os.fspath(path)
    if not re.match(r"[A-Za-z][\w+.-]+:/", text):  # one letter is a drive of Windows
        return epath.Path(path).expanduser()
    if not re.match("gs://[^/]+/.", text):
        raise ValueError(f"{text!r} must be a path of a disk, or the string gs://BUCKET/PATH.")
    try:
        import gcsfs  # noqa: F401  optional: runs on disks do without it
    except ImportError as error:
        raise ImportError(f"{path} needs the package gcsfs: pip install idattn[gcs].") from error
    # Else what TensorStore and other processes write would be missing in the listings of this one.
    listings = fsspec_backend.fs(path).dircache
    listings.use_listings_cache = False
    listings.clear()
    return epath.Path(path)


def disk_path(path: epath.PathLike) -> Path:
    """As `resolve_path`, for a file or folder that must be on a disk.

    Raises:
      ValueError: it is not.
    """
    if in_bucket(path):
        raise ValueError(f"{os.fspath(path)!r} must be a path of a disk; a bucket does not serve here.")
    return Path(resolve_path(path))


def in_bucket(path: epath.PathLike) -> bool:
    """Whether a path that `resolve_path` took is in a bucket."""
    return os.fspath(path).startswith("gs://")


def write_atomic(path: epath.PathLike, data: bytes | str) -> None:
    """Write a file that appears under its name, in place of the one before, when it is complete and on disk.

    Args:
      path: of a disk, whose missing folders are made; or gs://BUCKET/FILE, where every write is atomic.
      data: text is written as UTF-8.

    Raises:
      OSError: the file cannot be written; the one before stays.
      ValueError: the path is of another kind of storage.
    """
    data = data.encode() if isinstance(data, str) else data
    path = resolve_path(path)
    if in_bucket(path):
        path.write_bytes(data)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(data)
        commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_figure(path: epath.PathLike, figure: Any, **options: Any) -> None:
    """As `write_atomic`, for a figure of matplotlib; a PNG where the name ends otherwise than in .pdf or .svg.

    Args:
      path: of a disk or gs://BUCKET/FILE.
      figure: a matplotlib.figure.Figure.
      **options: of its method `savefig`.
    """
    suffix = os.path.splitext(os.fspath(path))[1][1:]
    data = io.BytesIO()
    figure.savefig(data, format=suffix if suffix in ("pdf", "svg") else "png", **options)
    write_atomic(path, data.getvalue())


def temporary_name(path: Path) -> Path:
    """Where this process writes a file before it is complete: a name that ends in `.tmp`."""
    return path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")


def commit(temporary: Path, path: Path) -> None:
    """Give a complete file its name, after its data are on disk."""
    _sync(temporary)
    temporary.replace(path)
    if os.name != "nt":  # Windows opens no folders
        _sync(path.parent)


def read_json(path: epath.PathLike, remedy: str, kind: type = dict) -> Any:
    """The JSON object, or value of another kind, in a file.

    Args:
      path: of a disk or gs://BUCKET/FILE.
      remedy: a sentence that says what to do if the file is damaged.
      kind: dict or list.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: the file is empty, cut short, not JSON or of another kind.
    """
    text = resolve_path(path).read_bytes()
    try:
        value = json.loads(text)
        if not isinstance(value, kind):
            raise ValueError(f"it is a {type(value).__name__}, not a {kind.__name__}")
    except (ValueError, RecursionError) as error:
        problem = (
            f"not valid JSON: {error}" if text.strip(b"\0 \t\r\n") else "empty, as after a crash or on a full disk"
        )
        raise ValueError(f"{path} is damaged ({problem}). {remedy}") from error
    return value


def read_json_lines(path: epath.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects in the lines of a file, each with its place in words for messages; empty lines are skipped.

    Args:
      path: of a disk or gs://BUCKET/FILE; it is decompressed if it ends in .xz. Only "\\n" ends a line.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: a line is not UTF-8 or JSON, is no object, or holds half a surrogate pair, which is no text.
    """
    file = resolve_path(path)
    with file.open("rb") as raw, lzma.open(raw) if file.suffix == ".xz" else nullcontext(raw) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line.decode())
                json.dumps(row, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: not valid JSON in UTF-8: {error}. Write the line anew.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: must be an object, not a {type(row).__name__}.")
            yield place, row


@contextmanager
def lock_file(path: epath.PathLike) -> Iterator[IO[str] | None]:
    """Lock a file, which then says which process locked it, on which host and since when.

    The operating system unlocks it when this process and all that inherit the open file have closed it or died.

    Args:
      path: of a disk; the file and its missing folders are made, and stay.

    Yields:
      The open file; None if another process, or another call in this one, has the lock. On Windows, and with a warning
      on a file system without locks, nothing is locked.

    Raises:
      OSError: the file cannot be written.
    """
    path = disk_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("%s cannot be locked (%s): nothing stops a second process from working here.", path, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
        file.flush()
        yield file


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
