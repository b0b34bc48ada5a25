"""Files that are replaced are complete and on disk before they have their name; damaged JSON is named."""

import os

import pytest

from idattn.files import read_json, write_atomic


def test_write_atomic(tmp_path, monkeypatch):
    path = tmp_path / "new" / "folder" / "file"
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda old, new: events.append("rename") or replace(old, new))
    write_atomic(path, "é\r\n")
    write_atomic(str(path), path.read_bytes() + b"\0")
    assert path.read_bytes() == "é\r\n\0".encode()
    temporary, *rest = events[:3]
    assert temporary.startswith(f"{path}.") and temporary.endswith(".tmp")
    assert rest == ["rename", str(path.parent)]
    assert os.listdir(path.parent) == ["file"]


def test_write_that_fails_keeps_the_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert (os.listdir(tmp_path), path.read_text()) == (["file"], "old")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty, as after a crash"),
        (b"\0" * 64, "empty, as after a crash"),
        (b'{"a": ', "not valid JSON: Expecting value"),
        (b"[1]", "it is a list, not an object"),
        (b'{"a": "\xff"}', "not valid JSON: 'utf-8' codec"),
        (b"[" * 100_000, "not valid JSON: maximum recursion depth"),
    ],
)
def test_damaged_json(tmp_path, data, message):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.json is damaged \(.*{message}.*\)\. Do this\."):
        read_json(path, "Do this.")


def test_json_object(tmp_path):
    write_atomic(tmp_path / "x.json", '{"a": [1, "\u2028"]}')
    assert read_json(tmp_path / "x.json", "") == {"a": [1, "\u2028"]}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "y.json", "")
