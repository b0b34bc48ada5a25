"""Preparing text once for many runs: documents to shards of tokens, in parallel, with the same bytes however it is run.

The source is cut into units that depend on nothing but the source. A unit makes a shard of each split and then
`units/NUMBER.json`; whatever is on disk under its final name is complete, so that a run that was stopped resumes with
the units that are missing. The manifest comes last: a folder without one is not complete.
"""

import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from idattn.data.corpus import Corpus, Unit
from idattn.data.stream import FORMAT, MANIFEST, PLAN, REMEDY, SPLITS, ShardWriter
from idattn.data.tokenizer import TRAINING_TEXT, encode_document, load_tokenizer, save_tokenizer, train_tokenizer
from idattn.files import disk_path, lock_file, read_json, write_atomic

_SPLIT_RULE = (
    "validation: first 8 bytes of the text's SHA-256, little-endian, below validation * 2^64; train: the others"
)
_LIBRARIES = {".model": ("sentencepiece",), ".json": ("tokenizers",)}  # by a tokenizer's file: what makes its ids


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is prepared, and how; with equal settings, sources and library versions the bytes are equal."""

    source: str  # of `Corpus`; when a preparation is resumed, its files are compared, not their place
    tokenizer: str = ""  # of `load_tokenizer`; empty: the one that `train_vocab` trains
    train_vocab: int = 0  # pieces of a SentencePiece BPE to train on the source; 0: none
    text_field: str = "text"  # name of the text in objects and rows
    validation: float = 0.001  # share of the documents to validate on, by the hash of their text
    deduplicate: bool = False  # leave out documents whose text occurred before
    unit_bytes: int = 64 << 20  # of text in a unit, about; less for small sources

    def __post_init__(self):
        if bool(self.tokenizer) == bool(self.train_vocab):
            raise ValueError(
                f"tokenizer={self.tokenizer!r} and train_vocab={self.train_vocab}: give one of the two, a tokenizer or "
                "the size of one to train."
            )
        if not 0 <= self.validation < 1 or self.unit_bytes < 1 or self.train_vocab < 0:
            raise ValueError(
                f"validation={self.validation} must be at least 0 and below 1, unit_bytes={self.unit_bytes} at least 1 "
                f"and train_vocab={self.train_vocab} at least 0."
            )


def prepare(
    settings: Preparation, out: str | os.PathLike[str], *, workers: int = 1, part: tuple[int, int] = (0, 1)
) -> dict[str, Any] | None:
    """Prepare a source, or resume a preparation that was stopped.

    Several machines share the work by `part`, in one folder that all of them see; which of them runs when, and how
    often, changes no byte. To deduplicate, every part has to run twice, since all texts must have been seen.

    Args:
      settings: of the preparation.
      out: folder, made if it does not exist.
      workers: processes, at least 1.
      part: (i, n), to do the units i, i + n, i + 2n, ... alone.

    Returns:
      The manifest, or None while units of other parts are missing.

    Raises:
      ValueError: a setting or document breaks a rule, the source holds no document, `out` was begun with other
        settings, another source or other libraries, or another process does all of its units.
      OSError: the disk is full, say. What is complete stays; the same call resumes.
      RuntimeError: a worker was killed; likewise.
    """
    if workers < 1 or not 0 <= part[0] < part[1]:
        raise ValueError(f"workers={workers} must be at least 1, and part={part} (i, n) with i from 0 to n - 1.")
    out = disk_path(out)
    with _exclusive(out) if part[1] == 1 else nullcontext():
        plan = begin(settings, out)
        if part[1] == 1:
            _clean(out)
        run = functools.partial(
            _run, functools.partial(_Worker, settings, plan, out), out, len(plan["units"]), workers, part
        )
        if settings.deduplicate:
            if not run(_Worker.hash, "hashes"):
                return None
            _find_duplicates(out, len(plan["units"]))
        return _finish(plan, out) if run(_Worker.write, "json") else None


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """Keep a second preparation of all units out of a folder, which would remove the files that the first writes."""
    with lock_file(out / "lock") as lock:
        if lock is None:
            raise ValueError(
                f"{out} is being prepared by {(out / 'lock').read_text() or 'a process that has just started'}. Wait "
                "until it ends, or stop it; to share the work, start all of them with --part=i/n."
            )
        yield


class _Worker:
    """Does units one after another."""

    def __init__(self, settings: Preparation, plan: dict[str, Any], out: Path):
        self._settings, self._plan, self._out = settings, plan, out
        self._corpus = Corpus(settings.source, settings.text_field)
        file = plan["tokenizer"]["file"]
        self._tokenizer = load_tokenizer(str(out / file) if file else "bytes")

    def hash(self, number: int) -> int:
        """Writes 16 bytes of the hash of each document; returns 0."""
        digests = b"".join(digest[:16] for _, _, digest in self._documents(number))
        write_atomic(_unit_file(self._out, number, "hashes"), digests)
        return 0

    def write(self, number: int) -> int:
        """Writes the shards of a unit and then its entry; returns its tokens."""
        drop = np.fromfile(_unit_file(self._out, number, "dropped"), bool) if self._settings.deduplicate else None
        shards: dict[str, ShardWriter] = {}
        counts = {"empty": 0, "duplicates": 0, "text_bytes": 0}
        for index, (name, text, digest) in enumerate(self._documents(number)):
            if not text:
                counts["empty"] += 1
            elif drop is not None and drop[index]:
                counts["duplicates"] += 1
            else:
                counts["text_bytes"] += len(text.encode())
                held_out = int.from_bytes(digest[:8], "little") < self._settings.validation * 2**64
                split = "validation" if held_out else "train"
                if split not in shards:
                    path = self._out / f"{split}-{number:05d}.arrayrecord"
                    shards[split] = ShardWriter(path, self._plan["dtype"])
                shards[split].add(encode_document(text, self._tokenizer, name))
        entry: dict[str, Any] = counts | {"shards": {split: shard.close() for split, shard in sorted(shards.items())}}
        write_atomic(_unit_file(self._out, number, "json"), _json(entry))
        return sum(shard["tokens"] for shard in entry["shards"].values())

    def _documents(self, number: int) -> Iterator[tuple[str, str, bytes]]:
        """Name, text and hash of the documents of a unit."""
        for document in self._corpus.read(Unit(*self._plan["units"][number])):
            yield document.id, document.text, hashlib.sha256(document.text.encode()).digest()


def begin(settings: Preparation, out: str | os.PathLike[str]) -> dict[str, Any]:
    """What all units have in common, and the units: from the folder if it was begun, which must agree."""
    out = disk_path(out)
    corpus = Corpus(settings.source, settings.text_field)
    plan = {
        "format": FORMAT,
        "settings": {name: value for name, value in asdict(settings).items() if name != "tokenizer"},
        "source_files": corpus.signature(),
    }
    path = out / PLAN
    if path.exists():
        begun = read_json(path, REMEDY)
        if corpus.has_files:  # which tell a source, wherever they are
            plan["settings"]["source"] = begun["settings"]["source"]
        given = settings.tokenizer  # the folder has a copy, so that a machine without the original can resume
        if given and (given != begun["tokenizer"]["name"] or Path(given).expanduser().is_file()):
            plan["tokenizer"] = begun["tokenizer"] | {"sha256": load_tokenizer(given).fingerprint}
        plan["libraries"] = {name: _version(name) for name in begun["libraries"]}
        if changed := [name for name in plan if plan[name] != begun[name]]:
            differences = "; ".join(f"{name} {begun[name]} there, {plan[name]} now" for name in changed)
            raise ValueError(f"{out} was begun otherwise: {differences}. Give what was given then, or another folder.")
        return begun
    corpus.log_left_out()
    print(f"dividing {settings.source} into units", file=sys.stderr, flush=True)  # reads compressed files
    units = corpus.units(settings.unit_bytes)
    if not units:
        raise ValueError(f"source={settings.source!r} holds no documents; it must hold at least one.")
    (out / "units").mkdir(parents=True, exist_ok=True)
    if settings.train_vocab:
        train_tokenizer(_beginnings(corpus, units), settings.train_vocab, out / "tokenizer.model")
        tokenizer = load_tokenizer(out / "tokenizer.model")
    else:
        tokenizer = load_tokenizer(settings.tokenizer)
        save_tokenizer(tokenizer, out)  # the folder needs nothing else from here on
    (file,) = tokenizer.files
    plan["tokenizer"] = {
        "name": settings.tokenizer,
        "file": file,
        "sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
    }
    plan["libraries"] = {name: _version(name) for name in ("array-record", *_LIBRARIES.get(Path(file).suffix, ()))}
    plan["dtype"] = np.min_scalar_type(tokenizer.vocab_size - 1).newbyteorder("<").str
    plan["units"] = units
    write_atomic(path, _json(plan))
    return plan


def _beginnings(corpus: Corpus, units: Sequence[Unit]) -> Iterator[str]:
    """Texts from the beginning of every unit: what a tokenizer learns from."""
    for unit in units:
        left = TRAINING_TEXT // len(units)
        for document in corpus.read(unit):
            yield document.text[:left]
            left -= len(document.text)
            if left <= 0:
                break


def _run(
    make: Callable[[], _Worker], out: Path, count: int, workers: int, part: tuple[int, int],
    do: Callable[[_Worker, int], int], suffix: str,
) -> bool:  # fmt: skip
    """Does what is missing of a part of the units; returns whether all `count` units are done."""
    mine = range(count)[part[0] :: part[1]]
    missing = [number for number in mine if not _is_done(out, number, suffix)]
    began, tokens = time.perf_counter(), 0
    with tqdm(
        total=len(mine), initial=len(mine) - len(missing), desc=do.__name__, unit="unit", dynamic_ncols=True
    ) as bar:
        for new in _results(make, do, missing, workers):
            tokens += new
            bar.set_postfix(tokens=f"{tokens:,}", tokens_per_s=f"{tokens / (time.perf_counter() - began):,.0f}")
            bar.update()
    return all(_is_done(out, number, suffix) for number in range(count))


def _results(
    make: Callable[[], _Worker], do: Callable[[_Worker, int], int], numbers: Sequence[int], workers: int
) -> Iterator[int]:
    """What `do` returns for the numbers, as they are done."""
    workers = min(workers, len(numbers))
    if workers <= 1:
        if numbers:
            worker = make()
            yield from (do(worker, number) for number in numbers)
        return
    # Not forked: the process may have threads, of jax for one.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (make,)) as pool:
        try:
            for done in as_completed([pool.submit(_call, do, number) for number in numbers]):
                yield done.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "A worker was killed, by the system for its memory perhaps. What is complete stays: the same command "
                "resumes, with fewer --workers if need be."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start(make: Callable[[], _Worker]) -> None:
    global _worker
    _worker = functools.cache(make)  # made by the first unit, which can say what fails
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _call(do: Callable[[_Worker, int], int], number: int) -> int:
    return do(_worker(), number)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent, "runs in workers alone"
    parent.join()
    os._exit(1)


def _find_duplicates(out: Path, count: int) -> None:
    """Writes for every unit which of its documents occur earlier, in it or in a unit before it."""
    if all(_is_done(out, number, "dropped") for number in range(count)):
        return
    hashes = [np.fromfile(_unit_file(out, number, "hashes"), "<u8").reshape(-1, 2) for number in range(count)]
    joined = np.concatenate(hashes)
    order = np.lexsort(joined.T)  # stable: equal hashes stay in the source's order
    repeated = np.zeros(len(joined), bool)
    repeated[order[1:]] = (joined[order[1:]] == joined[order[:-1]]).all(1)
    borders = np.cumsum([len(part) for part in hashes])[:-1]
    for number, part in enumerate(np.split(repeated, borders)):
        write_atomic(_unit_file(out, number, "dropped"), part.tobytes())


def _finish(plan: dict[str, Any], out: Path) -> dict[str, Any]:
    """Writes and returns the manifest."""
    entries = [read_json(_unit_file(out, number, "json"), REMEDY) for number in range(len(plan["units"]))]
    manifest = {name: value for name, value in plan.items() if name != "units"} | {
        "split_rule": _SPLIT_RULE,
        **{name: sum(entry[name] for entry in entries) for name in ("empty", "duplicates", "text_bytes")},
        "splits": {},
    }
    for split in SPLITS:
        shards = [entry["shards"][split] for entry in entries if split in entry["shards"]]
        totals = {name: sum(shard[name] for shard in shards) for name in ("documents", "tokens")}
        manifest["splits"][split] = totals | {"shards": shards}
    if not manifest["splits"]["train"]["shards"]:
        raise ValueError(
            f"source={plan['settings']['source']!r} holds no documents to train on; it must hold at least one."
        )
    _clean(out, but=MANIFEST)  # which another part may be writing, too
    write_atomic(out / MANIFEST, _json(manifest))
    return manifest


def _clean(out: Path, but: str = " ") -> None:
    """Removes what killed runs were writing, but for files of one name."""
    for path in (*out.glob("*.tmp"), *out.glob("units/*.tmp")):
        if not path.name.startswith(but):
            path.unlink()


def _is_done(out: Path, number: int, suffix: str) -> bool:
    path = _unit_file(out, number, suffix)
    if suffix != "json" or not path.exists():
        return path.exists()
    shards = read_json(path, REMEDY)["shards"].values()
    return all((out / s["file"]).exists() and (out / s["file"]).stat().st_size == s["bytes"] for s in shards)


def _unit_file(out: Path, number: int, suffix: str) -> Path:
    return out / "units" / f"{number:05d}.{suffix}"


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
