"""Files: written whole or not at all, on disks and in buckets, and JSON that says which file is not complete."""

import json
import os
import platform
from pathlib import Path
from typing import Any

from etils import epath


def write_atomic(path: epath.PathLike, data: bytes | str) -> None:
    """Write a file that appears under its name, in place of the one before, when it is complete and on disk.

    Args:
      path: of a disk, whose missing folders are made; or gs://BUCKET/FILE, where every write is atomic.
      data: text is written as UTF-8.

    Raises:
      OSError: the file cannot be written; the one before stays.
    """
    data = data.encode() if isinstance(data, str) else data
    if "://" in os.fspath(path):
        epath.Path(path).write_bytes(data)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(data)
        commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Where this process writes a file before it is complete: a name that ends in `.tmp`."""
    return path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")


def commit(temporary: Path, path: Path) -> None:
    """Give a complete file its name, after its data are on disk."""
    _sync(temporary)
    temporary.replace(path)
    if os.name != "nt":  # Windows opens no folders
        _sync(path.parent)


def read_json(path: epath.PathLike, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
      path: of a disk or gs://BUCKET/FILE.
      remedy: a sentence that says what to do if the file is damaged.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: the file is empty, cut short, not JSON or no object.
    """
    text = epath.Path(path).read_bytes()
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"it is a {type(value).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        problem = (
            f"not valid JSON: {error}" if text.strip(b"\0 \t\r\n") else "empty, as after a crash or on a full disk"
        )
        raise ValueError(f"{path} is damaged ({problem}). {remedy}") from error
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
