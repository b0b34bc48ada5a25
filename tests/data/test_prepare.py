"""Prepared folders: what is in them, the same bytes however they are made, and damage that is named."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import pytest

from idattn.config import DataConfig
from idattn.data import (
    Preparation,
    TokenStream,
    load_data,
    load_documents,
    load_tokenizer,
    preparation,
    prepare,
    read_manifest,
    stream,
    train_tokenizer,
    verify,
)
from idattn.data.loader import TokenWindows, count_epochs, eval_batches, train_iterator
from idattn.files import lock_file

ROOT = Path(__file__).parents[2]
BOS = 256
VALIDATION = 0.25


def make_texts():
    """Random words, with duplicates in one file and over files; one text is longer than a record and than any unit."""
    rng = np.random.default_rng(0)
    lengths = [20_000, *rng.integers(1, 500, 59)]
    texts = ["".join(rng.choice(list("abcdé \n"), length)) for length in lengths]
    texts[7] = texts[3]
    texts[50] = texts[2]
    return texts


def write_jsonl(path, texts):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture(scope="module")
def texts():
    return make_texts()


@pytest.fixture(scope="module")
def source(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_jsonl(folder / "a.jsonl", texts[:30])
    write_jsonl(folder / "b.jsonl.gz", texts[30:])
    return folder


@pytest.fixture(scope="module")
def settings(source):
    return Preparation(source=str(source), tokenizer="bytes", validation=VALIDATION, deduplicate=True, unit_bytes=4000)


@pytest.fixture(scope="module")
def prepared(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(settings, out)
    return out


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / "lock")  # which names a process
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def copy(folder, to):
    for name, data in contents(folder).items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(data)
    return to


def held_out(text, share=VALIDATION):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64 < share


def expected_stream(texts, validation):
    unique = list(dict.fromkeys(texts))
    return np.concatenate([[BOS, *text.encode()] for text in unique if held_out(text) == validation])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_stream_is_the_documents(prepared, texts, split):
    expected = expected_stream(texts, split == "validation")
    tokens = TokenStream(prepared, split)
    assert len(tokens) == len(expected)
    assert tokens.documents == (expected == BOS).sum() == {"train": 43, "validation": 15}[split]
    assert tokens[:].dtype == np.uint16
    np.testing.assert_array_equal(tokens[:], expected)
    rng = np.random.default_rng(1)
    for start, stop in rng.integers(0, len(expected) + 1, (200, 2)):
        np.testing.assert_array_equal(tokens[start:stop], expected[start:stop])


def test_manifest(prepared, texts):
    manifest = read_manifest(prepared)
    splits = manifest["splits"]
    assert sum(split["documents"] for split in splits.values()) == len(set(texts)) == 58
    assert (manifest["duplicates"], manifest["empty"]) == (2, 0)
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in set(texts))
    assert sum(split["tokens"] for split in splits.values()) == manifest["text_bytes"] + 58
    assert manifest["libraries"] == {"array-record": importlib.metadata.version("array-record")}
    named = {"name": "bytes", "file": "tokenizer.bytes", "sha256": "bytes"}
    assert manifest["tokenizer"] == named | {"vocab_size": 257, "bos_id": 256}
    assert load_tokenizer(prepared).fingerprint == "bytes"
    for split in splits.values():
        assert len(split["shards"]) > 3
        for shard in split["shards"]:
            data = (prepared / shard["file"]).read_bytes()
            assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    named = {shard["file"] for split in splits.values() for shard in split["shards"]}
    assert named == {path.name for path in prepared.glob("*.arrayrecord")}
    assert not list(prepared.rglob("*.tmp"))


def test_same_bytes_from_four_workers(settings, tmp_path):
    settings = dataclasses.replace(settings, deduplicate=False)
    for workers in (1, 4):
        prepare(settings, tmp_path / f"{workers}", workers=workers)
    assert len(contents(tmp_path / "1")) > 30
    assert contents(tmp_path / "4") == contents(tmp_path / "1")


def test_same_bytes_from_parts_in_any_order(prepared, settings, tmp_path):
    order = [(2, 3), (0, 3), (0, 3), (1, 3), (2, 3), (0, 3)]  # each part twice: to hash and to write
    results = [prepare(settings, tmp_path / "out", part=part) for part in order]
    assert results[:5] == [None] * 5
    assert results[5] == read_manifest(prepared)
    assert contents(tmp_path / "out") == contents(prepared)


def test_same_bytes_after_faults(prepared, settings, tmp_path, monkeypatch):
    out = tmp_path / "out"
    encode = preparation.encode_document
    for documents in (0, 5, 20, 10):
        left = iter(range(documents))

        def fail(*arguments, left=left):
            if next(left, None) is None:
                raise MemoryError
            return encode(*arguments)

        monkeypatch.setattr(preparation, "encode_document", fail)
        with pytest.raises(MemoryError):
            prepare(settings, out)
        with pytest.raises(FileNotFoundError, match=r"has no manifest\.json.* the same command resumes it"):
            TokenStream(out, "train")
        if documents == 20:
            next(out.glob("train-*.arrayrecord")).unlink()  # what is complete is looked at
    monkeypatch.setattr(preparation, "encode_document", encode)
    prepare(settings, out)
    assert contents(out) == contents(prepared)


def test_split_is_stable_under_resharding(prepared, settings, texts, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number, text in enumerate(texts):
        (source / f"{number:02d}.txt").write_bytes(text.encode())
    out = tmp_path / "out"
    prepare(dataclasses.replace(settings, source=str(source), unit_bytes=1 << 30), out)
    assert len(list(out.glob("*.arrayrecord"))) == 2
    for split in ("train", "validation"):
        np.testing.assert_array_equal(TokenStream(out, split)[:], TokenStream(prepared, split)[:])


def test_duplicates_stay_unless_asked(settings, texts, tmp_path):
    manifest = prepare(dataclasses.replace(settings, deduplicate=False, validation=0.0), tmp_path / "out")
    assert manifest["duplicates"] == 0
    assert manifest["splits"]["train"]["documents"] == len(texts)
    with pytest.raises(ValueError, match=r"has no validation documents: 0\.0 of all were to validate on"):
        TokenStream(tmp_path / "out", "validation")


def test_other_settings_are_refused(prepared, settings, tmp_path):
    out = copy(prepared, tmp_path / "out")
    with pytest.raises(ValueError, match=r"was begun otherwise: settings .*'validation': 0\.25.* there, .*0\.5.* now"):
        prepare(dataclasses.replace(settings, validation=0.5), out)
    source = copy(Path(settings.source), tmp_path / "source")
    same = dataclasses.replace(settings, source=str(source))
    begun = tmp_path / "begun"
    prepare(same, begun, part=(0, 2))
    with (source / "a.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ValueError, match="was begun otherwise: source_files"):
        prepare(same, begun)
    moved = copy(Path(settings.source), tmp_path / "moved")
    prepare(dataclasses.replace(settings, source=f"{moved}/"), begun)
    assert {path: data for path, data in contents(begun).items() if path.endswith(".arrayrecord")} == {
        path: data for path, data in contents(prepared).items() if path.endswith(".arrayrecord")
    }
    assert contents(out) == contents(prepared)


def test_what_comes_before_the_first_unit_is_announced(source, tmp_path, capsys):
    settings = Preparation(source=str(source), train_vocab=300, unit_bytes=1 << 20)
    prepare(settings, tmp_path)
    printed = capsys.readouterr().err
    before = f"dividing {source} into units\ntraining a tokenizer of 300 pieces\n"
    assert printed.startswith(before) and "write:   0%" in printed
    prepare(settings, tmp_path)  # where both are done
    assert before not in capsys.readouterr().err


def test_tokenizer_is_copied(tmp_path, monkeypatch):
    """A preparation resumes without the original, by a path of any name, and not with another tokenizer."""
    first, second, other = (tmp_path / name for name in ("first.model", "second.model", "other.model"))
    texts = [document.text[:20_000] for document in load_documents("austen")]
    for path, size in ((first, 400), (second, 400), (other, 500)):
        train_tokenizer(texts, size, path)
    settings = Preparation(source="austen", tokenizer=str(first), validation=0.3)
    out = tmp_path / "out"
    prepare(settings, out, part=(0, 2))
    assert (out / "tokenizer.model").read_bytes() == first.read_bytes()
    first.unlink()
    manifest = prepare(settings, out)
    assert manifest["libraries"]["sentencepiece"] == importlib.metadata.version("sentencepiece")
    assert prepare(dataclasses.replace(settings, tokenizer=str(second)), out) == manifest
    with pytest.raises(ValueError, match="was begun otherwise: tokenizer .*'sha256'"):
        prepare(dataclasses.replace(settings, tokenizer=str(other)), out)
    first.write_bytes(other.read_bytes())  # another tokenizer at the same path
    with pytest.raises(ValueError, match="was begun otherwise: tokenizer .*'sha256'"):
        prepare(settings, out)
    first.unlink()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
    with pytest.raises(ValueError, match="was begun otherwise: libraries .*'array-record': '0.0'"):
        prepare(settings, out)
    _, [train], _ = load_data(folder_config([out], tokenizer=str(out / "tokenizer.model")))
    tokenizer = load_tokenizer(str(second))
    expected = [[1, *tokenizer.encode(d.text)] for d in load_documents("austen") if not held_out(d.text, 0.3)]
    np.testing.assert_array_equal(train.stream[:], np.concatenate(expected))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": ""}, "tokenizer='' and train_vocab=0: give one of the two"),
        ({"train_vocab": 300}, "tokenizer='bytes' and train_vocab=300: give one of the two"),
        ({"validation": 1.0}, "validation=1.0 must be at least 0 and below 1"),
        ({"unit_bytes": 0}, "unit_bytes=0 at least 1"),
    ],
)
def test_settings_errors(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(settings, **changes)


def test_bad_input(settings, tmp_path):
    for arguments in ({"workers": 0}, {"part": (2, 2)}):
        with pytest.raises(ValueError, match=r"workers=\d must be at least 1, and part="):
            prepare(settings, tmp_path / "out", **arguments)
    with pytest.raises(ValueError, match="'gs://bucket/x' must be a path of a disk"):
        prepare(settings, "gs://bucket/x")
    for name, content, message in (
        ("empty.jsonl", b"", "holds no documents"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"latin\.jsonl, line 2: not valid UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        out = tmp_path / f"{name}.out"
        with pytest.raises(ValueError, match=message):
            prepare(dataclasses.replace(settings, source=str(tmp_path / name)), out)
        assert not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match="holds no documents to train on"):
        (tmp_path / "one.txt").write_text(next(text for text in make_texts() if held_out(text)))
        prepare(dataclasses.replace(settings, source=str(tmp_path / "one.txt")), tmp_path / "one")
    assert not (tmp_path / "one" / "manifest.json").exists()


def test_a_folder_has_one_preparation_at_a_time(prepared, settings, tmp_path):
    """The files that the first has open stay; parts share the folder."""
    out = copy(prepared, tmp_path / "out")
    (out / "train-00000.arrayrecord.here-1.tmp").write_bytes(b"half")
    with lock_file(out / "lock"):
        with pytest.raises(ValueError, match=rf"out is being prepared by process {os.getpid()} on .*--part=i/n"):
            prepare(settings, out)
        assert (out / "train-00000.arrayrecord.here-1.tmp").exists()
        assert prepare(settings, out, part=(0, 2)) == read_manifest(prepared)
    (out / "train-00000.arrayrecord.here-1.tmp").touch()
    prepare(settings, out)
    assert contents(out) == contents(prepared)


def test_full_disk(prepared, settings, tmp_path):
    """Files may not grow past a limit, as on a disk that fills up; then they may."""
    out = tmp_path / "out"
    code = (
        "import resource; from idattn.data import *; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        f"prepare({settings!r}, {str(out)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "OSError" in done.stderr and "could not be written" in done.stderr and "File too large" in done.stderr
    assert not list(out.glob("*.arrayrecord*")) and not (out / "manifest.json").exists()
    prepare(settings, out)
    assert contents(out) == contents(prepared)


def damage(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_damaged_record(prepared, tmp_path):
    out = copy(prepared, tmp_path / "out")
    shards = read_manifest(out)["splits"]["train"]["shards"]
    long = max(shards, key=lambda shard: shard["tokens"])
    path = out / long["file"]
    damage(path, path.read_bytes().index(TokenStream(out, "train")[20:60].tobytes()) if shards[0] == long else 30_000)
    message = rf"{long['file']} is damaged: .*hash mismatch.*at byte \d+"
    tokens = TokenStream(out, "train")
    with pytest.raises(ValueError, match=message):
        tokens[:]
    windows = TokenWindows(tokens, bos_id=BOS, seq_len=1000)
    with pytest.raises(ValueError, match=message):
        take(train_iterator([windows], 1, 0), len(windows))
    problems = [report.problem for report in verify(out) if report.problem]
    assert len(problems) == 1 and long["file"] in problems[0] and "at byte" in problems[0]


def test_damaged_shards(prepared, tmp_path):
    out = copy(prepared, tmp_path / "out")
    shards = read_manifest(out)["splits"]["train"]["shards"]
    first, second = (out / shard["file"] for shard in shards[-2:])
    assert all(report.problem == "" for report in verify(out))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    problems = [report.problem for report in verify(out) if report.problem]
    assert len(problems) == 1 and problems[0].startswith(f"{first} is not the file that was prepared: its SHA-256 is ")
    first.write_bytes(data[:-100])
    with pytest.raises(
        ValueError, match=rf"{first.name} is damaged: it has {len(data) - 100} bytes, and had {len(data)}"
    ):
        TokenStream(out, "train")
    first.unlink()
    with pytest.raises(FileNotFoundError, match=first.name):
        TokenStream(out, "train")
    (out / "manifest.json").write_text((out / "manifest.json").read_text()[:-50])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        TokenStream(out, "train")


def folder_config(folders, **changes):
    source, *more = map(str, folders)
    return DataConfig(**{"source": source, "more_sources": tuple(more), "holdout": (), "seq_len": 48} | changes)


def test_windows_equal_those_of_the_stream_in_memory(prepared, texts):
    tokenizer, [train], [validation] = load_data(folder_config([prepared]))
    assert tokenizer.vocab_size == 257
    for windows, held in ((train, False), (validation, True)):
        in_memory = TokenWindows(expected_stream(texts, held), bos_id=BOS, seq_len=48)
        assert len(windows) == len(in_memory) > 20
        np.testing.assert_equal(list(windows), list(in_memory))
        for batch, expected in zip(eval_batches([windows], 4, 9), eval_batches([in_memory], 4, 9), strict=True):
            np.testing.assert_equal(batch, expected)


def test_position_in_another_folder_is_refused(prepared, settings, tmp_path):
    _, windows, _ = load_data(folder_config([prepared]))
    state = train_iterator(windows, 4, 0).get_state()
    out = copy(prepared, tmp_path / "copy")
    train_iterator(load_data(folder_config([out]))[1], 4, 0).set_state(state)
    prepare(dataclasses.replace(settings, deduplicate=False), tmp_path / "out")
    with pytest.raises(ValueError, match="training text or tokenizer is not what it was"):
        train_iterator(load_data(folder_config([tmp_path / "out"]))[1], 4, 0).set_state(state)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_batches_are_the_same_for_any_number_of_processes(prepared):
    """2 processes read 5 batches and save; 4, 1 and 2 resume, and all see the rows that 1 process sees."""
    _, windows, _ = load_data(folder_config([prepared]))
    whole = take(train_iterator(windows, 8, 3), 11)

    def shares(count):
        return [range(n * 8 // count, (n + 1) * 8 // count) for n in range(count)]

    states = []
    for rows in shares(2):
        iterator = train_iterator(windows, 8, 3, rows)
        np.testing.assert_equal(
            take(iterator, 5), [{name: x[rows] for name, x in batch.items()} for batch in whole[:5]]
        )
        states.append(iterator.get_state())
    assert states[0] == states[1] and states[0]["next_index"] == 5
    for count in (4, 1, 2):
        for rows in shares(count):
            iterator = train_iterator(windows, 8, 3, rows)
            iterator.set_state(states[0])
            expected = [{name: x[rows] for name, x in batch.items()} for batch in whole[5:]]
            np.testing.assert_equal(take(iterator, 6), expected)


@pytest.fixture(scope="module")
def mixture(prepared, settings, tmp_path_factory):
    """Windows of two folders; those of the second hold upper-case x alone."""
    folder = tmp_path_factory.mktemp("second")
    write_jsonl(folder / "x.jsonl", ["X" * length for length in range(200, 230)])
    prepare(dataclasses.replace(settings, source=str(folder)), folder / "out")
    return load_data(folder_config([prepared, folder / "out"], weights=(0.75, 0.25)))


def test_mixture(mixture):
    _, windows, validation = mixture
    assert len(windows) == 2
    batches = take(train_iterator(windows, 4, 0, weights=(0.75, 0.25)), 300)
    rows = np.concatenate([batch["inputs"] for batch in batches])
    second = (rows == ord("X")).any(1)
    assert [second[start : start + 4].sum() for start in range(0, 1200, 4)] == [1] * 300  # interleaved evenly
    counts = [len(np.unique(rows[second == part][: len(w)], axis=0)) for part, w in enumerate(windows)]
    assert counts[0] == len(windows[0])  # an epoch of a source takes each of its windows once
    epochs = count_epochs(windows, 4, 300, (0.75, 0.25))
    assert epochs == {"epoch/0": 900 / len(windows[0]), "epoch/1": 300 / len(windows[1])}
    assert count_epochs(windows[:1], 4, 30) == {"epoch": 120 / len(windows[0])}
    total = sum(batch["loss_mask"].sum() for batch in eval_batches(validation, 4, 10**6))
    assert total == sum(len(w.stream) - w.stream.documents for w in validation)


def test_resume_of_a_mixture_at_every_step(mixture):
    class Endless(grain.IterDataset):
        def __iter__(self):
            return train_iterator(mixture[1], 3, 2, weights=(3.0, 1.0))

    grain.experimental.assert_equal_output_after_checkpoint(grain.experimental.LimitIterDataset(Endless(), 5))


def test_folders_that_do_not_fit(prepared, tmp_path):
    out = copy(prepared, tmp_path / "out")
    for config, message in (
        (folder_config([out], holdout=("x",)), r"holdout=\('x',\) names documents of a text, but .* set holdout=\(\)"),
        (folder_config([out, ROOT], weights=(1.0, 2.0)), r"has no manifest\.json: it is no prepared folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_data(config)
    manifest = read_manifest(out)
    older = manifest["tokenizer"] | {"bos_id": 24}  # a piece "<s>" that was taken for the special token
    (out / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": older}))
    with pytest.raises(ValueError, match=r"start with id 24, but tokenizer='bytes' starts .* 256\. Prepare it anew"):
        load_data(folder_config([out]))
    manifest["tokenizer"] |= {"sha256": "0" * 64, "vocab_size": 32_000, "file": "tokenizer.model"}
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"another tokenizer, of 32000 tokens .* set\s+tokenizer='.*/tokenizer\.model'"
    ):
        load_data(folder_config([out]))


def test_windows_touch_few_records(prepared, monkeypatch):
    read, touched = stream._read_records, []

    def count(path, numbers):
        touched.append(len(numbers))
        return read(path, numbers)

    monkeypatch.setattr(stream, "_read_records", count)
    tokens = TokenStream(prepared, "train")  # begins with the document that is longer than a record
    for start in range(0, 20_000, 500):
        tokens[start : start + 49]
    assert max(touched) <= 2 and 40 <= sum(touched) <= 44


CHILD = """
import sys, time
from idattn.data import Preparation, preparation, prepare

encode = preparation.encode_document
# In workers, too, which run this file.
preparation.encode_document = lambda *arguments: time.sleep(0.05) or encode(*arguments)

if __name__ == "__main__":
    source, out, workers = sys.argv[1:]
    settings = Preparation(source=source, train_vocab=1000, validation=0.3, deduplicate=True, unit_bytes=40_000)
    prepare(settings, out, workers=int(workers))
"""


def children_of(process):
    """Ids of the workers of a running process; multiprocessing's tracker of resources is none."""
    ids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(number) for number in ids if "spawn_main" in Path(f"/proc/{number}/cmdline").read_text()]


def runs(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_same_bytes_after_kills(tmp_path):
    """SIGKILL at random moments, to the process or to one of its workers: the next run resumes, to the same bytes."""
    script, source = tmp_path / "child.py", tmp_path / "rows.jsonl"
    script.write_text(CHILD)
    text = "".join(document.text for document in load_documents("austen"))
    write_jsonl(source, [text[start : start + 10_000] for start in range(0, len(text), 10_000)])

    def start(out, workers):
        command = [sys.executable, str(script), str(source), str(out), str(workers)]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)

    assert start(tmp_path / "whole", 1).wait() == 0
    rng, out = random.Random(0), tmp_path / "out"
    for kill in range(14):
        process = start(out, 2)
        more = rng.randrange(0, 14)
        goal = len(list(out.rglob("*"))) + more
        while process.poll() is None and len(list(out.rglob("*"))) < goal:
            time.sleep(0.005)
        time.sleep(rng.random() * (0.05 if more else 2))  # within a unit, or within the start
        assert process.poll() is None, "the preparation ended before it was killed often enough; make it longer"
        workers = children_of(process)
        if workers and kill % 4 == 3:
            os.kill(rng.choice(workers), signal.SIGKILL)
            assert process.wait(30) == 1
            assert "A worker was killed" in process.stderr.read()
        else:
            process.kill()
            assert process.wait() == -signal.SIGKILL
        deadline = time.monotonic() + 30
        while any(map(runs, workers)):
            assert time.monotonic() < deadline, "workers live on without the process that they work for"
            time.sleep(0.01)
        assert not (out / "manifest.json").exists()
    assert start(out, 2).wait() == 0
    assert contents(out) == contents(tmp_path / "whole")


SBATCH = """#!{python}
import os, pathlib, re, subprocess, sys
jobs = pathlib.Path({jobs!r})
jobs.write_text(jobs.read_text() + " ".join(sys.argv[1:-1]) + "\\n")
last = re.search("--array=0-([0-9]+)", pathlib.Path(sys.argv[-1]).read_text())[1]
for task in reversed(range(int(last) + 1)):
    environment = os.environ | {{"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "localhost"}}
    subprocess.run(["bash", sys.argv[-1]], env=environment, check=True, stdout=sys.stderr)
print("Submitted batch job", len(jobs.read_text().splitlines()))
"""


@pytest.mark.slow
def test_same_bytes_from_slurm(prepared, settings, tmp_path):
    """datatrove submits two array jobs, here to a stand-in for sbatch that runs their tasks from last to first."""
    pytest.importorskip("datatrove")
    sbatch, jobs = tmp_path / "bin" / "sbatch", tmp_path / "jobs"
    sbatch.parent.mkdir()
    jobs.touch()
    sbatch.write_text(SBATCH.format(python=sys.executable, jobs=str(jobs)))
    sbatch.with_name("scontrol").write_text("#!/bin/sh\necho localhost\n")
    for program in sbatch.parent.iterdir():
        program.chmod(0o755)
    command = [
        *(sys.executable, "-m", "launch.prepare_data", f"--source={settings.source}", "--tokenizer=bytes"),
        *(f"--validation={VALIDATION}", "--deduplicate", "--unit_mb=1", f"--out={tmp_path / 'out'}", "--engine=slurm"),
        *("--tasks=2", '--engine_options={"partition": "cpu", "time": "1:00", "with_srun": false}'),
    ]
    path = f"{sbatch.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in jobs.read_text().splitlines() if "--dependency=afterok:" in line]
    prepare(dataclasses.replace(settings, unit_bytes=1 << 20), tmp_path / "here")
    assert contents(tmp_path / "out") == contents(tmp_path / "here")


@pytest.mark.parametrize("name", ["plan.json", "units/00000.json", "manifest.json"])
@pytest.mark.parametrize(
    ("data", "problem"), [(b"", "empty"), (b'{"format": 1, "sh', "not valid JSON"), (b"[]", "list")]
)
def test_damaged_json_is_named_and_made_again(prepared, settings, tmp_path, name, data, problem):
    out = copy(prepared, tmp_path / "out")
    (out / name).write_bytes(data)
    read = (lambda: load_data(folder_config([out]))) if name == "manifest.json" else (lambda: prepare(settings, out))
    with pytest.raises(ValueError, match=rf"{name} is damaged \(.*{problem}.*Delete the file, and give the command"):
        read()
    (out / name).unlink()
    prepare(settings, out)
    assert contents(out) == contents(prepared)
