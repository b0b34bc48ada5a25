"""Files that are replaced are complete and on disk before they have their name; damaged JSON is named; locks."""

import errno
import fcntl
import json
import logging
import lzma
import os
import platform
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from idattn.files import disk_path, lock_file, read_json, read_json_lines, write_atomic, write_figure


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


@pytest.mark.parametrize(("name", "start"), [("x.png", b"\x89PNG"), ("x.svg", b"<?xml"), ("x.tmp", b"\x89PNG")])
def test_figures_are_written_as_files_are(tmp_path, monkeypatch, name, start):
    path = tmp_path / "new" / name
    write_figure(path, Figure(figsize=(1, 1)), dpi=20)
    assert path.read_bytes().startswith(start)
    figure = Figure(figsize=(1, 1))
    monkeypatch.setattr(figure, "savefig", lambda file, format: file.write(b"half"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_figure(path, figure)
    assert path.read_bytes().startswith(start) and os.listdir(path.parent) == [name]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty, as after a crash"),
        (b"\0" * 64, "empty, as after a crash"),
        (b'{"a": ', "not valid JSON: Expecting value"),
        (b"[1]", "it is a list, not a dict"),
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
    with pytest.raises(ValueError, match="it is a dict, not a list"):
        read_json(tmp_path / "x.json", "", list)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "y.json", "")


def test_only_newlines_end_lines_of_json(tmp_path):
    rows = [{"text": "a\u2028b\u0085c\x0b\x0c"}, {"text": "\U0001f600"}]
    text = "\n \r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    (tmp_path / "rows.jsonl").write_bytes(text.encode())
    (tmp_path / "rows.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    for path in (tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.xz"):
        assert [*read_json_lines(path)] == [(f"{path}, line 1", rows[0]), (f"{path}, line 3", rows[1])]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "not valid JSON in UTF-8: Expecting"),
        (b'{"a": "\xff"}', "not valid JSON in UTF-8: .*invalid start byte"),
        (b'{"a": "\\ud83d"}', "not valid JSON in UTF-8: .*surrogates not allowed"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON in UTF-8: Exceeds the limit"),
        (b"[" * 99999, "not valid JSON in UTF-8: maximum recursion depth"),
        (b"[1]", "must be an object, not a list"),
    ],
    ids=["cut short", "not UTF-8", "half a pair", "digits", "nesting", "list"],
)
def test_a_bad_line_of_json_is_named(tmp_path, line, reason):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n\n' + line)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: {reason}"):
        list(read_json_lines(tmp_path / "rows.jsonl"))


def is_free(path):
    with lock_file(path) as lock:
        return lock is not None


def test_a_lock_names_its_process(tmp_path):
    path = tmp_path / "new" / "lock"
    with lock_file(path) as lock:
        assert lock is not None and not is_free(path)
        text = path.read_text()
    assert text.startswith(f"process {os.getpid()} on {platform.node()} since 20") and text.endswith(" UTC")
    assert is_free(path)
    assert path.read_text().count("process") == 1


def test_a_lock_ends_with_the_last_process_that_has_it(tmp_path):
    path = tmp_path / "lock"
    with lock_file(path) as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()])
        other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)  # inherits nothing
    try:
        assert not is_free(path)
        child.kill()
        child.wait()
        assert is_free(path)
    finally:
        for process in (child, other):
            process.kill()
            process.communicate()


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(number):
        def flock(file, how):
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    with caplog.at_level(logging.WARNING, logger="idattn.files"), lock_file(tmp_path / "lock") as lock:
        assert lock is not None
    assert "lock cannot be locked ([Errno 37] No locks available): nothing stops a second process" in caplog.text
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), lock_file(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("path", ["gs://bucket/x", "s3://bucket/x"])
def test_a_bucket_is_no_disk(path):
    with pytest.raises(ValueError, match=rf"{path}' must be a path of a disk(; a bucket does not|, or the string gs)"):
        disk_path(path)
