"""Reading documents from every kind of source, whole and in units, and holding some out."""

import gzip
import json
import lzma
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idattn.data.corpus import Corpus, load_documents, split
from idattn.data.sources import Document

NOVELS = ["emma", "mansfield_park", "northanger_abbey", "persuasion", "pride_and_prejudice", "sense_and_sensibility"]
ROWS = [Document("b", "first\r\nline\u2028 caf\u00e9"), Document("a", "second")]


def jsonl(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def test_embedded_corpus():
    documents = load_documents("austen")
    assert [document.id for document in documents] == NOVELS
    assert sum(len(document.text.encode()) for document in documents) == 4_007_100
    assert documents[4].text.startswith("PRIDE AND PREJUDICE\nBy Jane Austen\nChapter 1\nIt is a truth universally")


def open_zst(path, mode):
    return pytest.importorskip("backports.zstd").open(path, mode)


OPENERS = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open, ".jsonl.zst": open_zst}


@pytest.mark.parametrize(("suffix", "opener"), OPENERS.items())
def test_jsonl_keeps_order_and_characters(tmp_path, suffix, opener):
    path = tmp_path / f"rows{suffix}"
    with opener(path, "wb") as file:
        file.write(jsonl(*(document._asdict() for document in ROWS)) + b"\n\n")
    assert load_documents(str(path)) == ROWS


def test_jsonl_without_ids_names_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl({"text": "x"}, {"text": "y", "extra": 1}))
    assert load_documents(str(path)) == [Document("rows.jsonl:1", "x"), Document("rows.jsonl:2", "y")]


def test_text_file_and_folder(tmp_path):
    for document in ROWS:
        (tmp_path / f"{document.id}.txt").write_bytes(document.text.encode())
    (tmp_path / "notes.md").write_text("not a document")
    assert load_documents(str(tmp_path / "b.txt")) == ROWS[:1]
    assert load_documents(str(tmp_path)) == [ROWS[1], ROWS[0]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no documents"),
        (b"\n \n", "holds no documents"),
        (jsonl({"text": "x"}, {"text": ""}), "line 2: the text must be a string that is not empty, not ''"),
        (jsonl({"id": "x"}), "line 1: the text must be a string that is not empty, not None"),
        (jsonl({"text": 3}), "line 1: the text must be a string"),
        (jsonl({"id": 3, "text": "x"}), 'line 1: "id" must be a string, not 3'),
        (jsonl(["x"]), "line 1: must be an object"),
        (b'{"text": "x"}\n{"text": "y"', "rows.jsonl, line 2: not valid JSON"),
        (b'{"text": "x"}\n{"text": "\xff"}', "rows.jsonl, line 2: not valid UTF-8"),
        (b'{"text": "\\ud800"}', "line 1: the text is not valid Unicode"),
        (
            b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
            "line 1: JSON that cannot be read: Exceeds the limit",
        ),
        (b"\n[" + b"[" * 100_000, "rows.jsonl, line 2: JSON that cannot be read: maximum recursion"),
        (b'{"text": NaN}', "line 1: the text must be a string that is not empty, not nan"),
        (b'{"text": ' + b"[9]" * 1 + b"}", r"line 1: the text must be a string that is not empty, not \[9\]"),
        ('\ufeff{"text": "x"}'.encode(), "rows.jsonl, line 1: not valid JSON: Unexpected UTF-8 BOM"),
        (jsonl({"id": "x", "text": "1"}, {"id": "x", "text": "2"}), "1 ids more than once, such as 'x'"),
    ],
)
def test_malformed_jsonl(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_documents(str(path))


@pytest.mark.parametrize(("suffix", "opener"), [item for item in OPENERS.items() if item[0] != ".jsonl"])
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"plain" + data], ids=["cut", "no_magic"])
def test_damaged_archive(tmp_path, suffix, opener, damage):
    path = tmp_path / f"rows{suffix}"
    with opener(path, "wb") as file:
        file.write(jsonl({"text": "x" * 1000}))
    path.write_bytes(damage(path.read_bytes()))
    for read in (load_documents, lambda source: Corpus(source).units(100)):
        with pytest.raises(ValueError, match=rf"rows{suffix} is not a complete {path.suffix} file"):
            read(str(path))


def test_text_comes_back_exactly(tmp_path):
    """Line ends of Windows, blank lines and unusual characters change no text."""
    texts = ["a\r\nb", "a\0b", "  \t ", "\U0001f469\u200d\U0001f4bb", "\ufeffa", "a\ufffeb", "a\u2028b\x85c"]
    rows = [json.dumps({"id": str(n), "text": text}, ensure_ascii=False) for n, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_bytes("\r\n".join([*rows, "", ""]).encode())
    assert [document.text for document in load_documents(str(tmp_path / "rows.jsonl"))] == texts


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.xz", ".jsonl.zst"])
def test_compressed_in_parts(tmp_path, suffix):
    """Parts that were joined are all read; a file that is cut short, or has something else after its end, is named."""
    path, parts = tmp_path / f"rows{suffix}", []
    for texts in (("1", "2"), ("3",)):
        with OPENERS[suffix](path, "wb") as file:
            file.write(jsonl(*({"text": text} for text in texts)) + b"\n")
        parts.append(path.read_bytes())
    first, second = parts
    path.write_bytes(first + second)
    assert [document.text for document in load_documents(str(path))] == ["1", "2", "3"]
    cuts = [(first + second)[:length] for length in range(1, len(first + second)) if length != len(first)]
    for damaged in (*cuts, first + b"other", first + b"other" + second, first + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"rows{suffix} is not a complete {path.suffix} file"):
            load_documents(str(path))


def test_hidden_files_are_no_data(tmp_path, caplog):
    """Copies of notebooks, resource forks and folders of tools are left out, and so are links, which is said."""
    folder = tmp_path / ".cache" / "data"  # a hidden folder is data where it was asked for
    for name in ("a.txt", "deep/b.txt", ".ipynb_checkpoints/b-checkpoint.txt", "deep/.git/c.txt", ".hidden.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "._a.txt").write_bytes(b"\x00\x05\x16\x07Mac OS X\xff\xfe")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    expected = [Document("a", "a.txt"), Document("deep/b", "deep/b.txt")]
    assert load_documents(str(folder)) == expected
    assert "4 hidden files and links to folders are not read, such as" in caplog.text
    (folder / "link").symlink_to(folder / "deep")
    assert [path.name for path in Corpus(str(folder)).left_out][-1] == "link"
    assert load_documents(str(folder / "._a.txt").replace("._a", "a")) == expected[:1]
    caplog.clear()
    load_documents(str(folder / "deep" / "b.txt"))
    assert not caplog.text


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
def test_folders_named_like_files(tmp_path, suffix):
    """Spark writes a folder t.parquet of parts with a file _SUCCESS."""
    part = tmp_path / f"t{suffix}" / f"part-0{suffix}"
    part.parent.mkdir()
    (part.parent / "_SUCCESS").touch()
    if suffix == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"text": ["hello"]}), part)
    else:
        part.write_text({".jsonl": '{"text": "hello"}', ".txt": "hello"}[suffix])
    for source in (tmp_path, part.parent):
        assert [document.text for document in load_documents(str(source))] == ["hello"]
        assert len(Corpus(str(source)).units(100)) == 1 and Corpus(str(source)).left_out == []


def test_parquet_text_of_other_types(tmp_path):
    """The library would turn numbers into text, and read one file by the columns of another."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["first"]}), tmp_path / "a.parquet")
    others = {"int64": [1, 2], "binary": [b"a"], "list<.*>": [["a"]], "struct<.*>": [{"x": "a"}], "double": [1.5]}
    for kind, values in others.items():
        pq.write_table(pa.table({"text": values}), tmp_path / "b.parquet")
        with pytest.raises(ValueError, match=rf"b\.parquet: all rows have a 'text' of type {kind}, not string"):
            load_documents(str(tmp_path))
    pq.write_table(pa.table({"other": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet has no column 'text'; text_field must be one of \['other'\]"):
        load_documents(str(tmp_path))
    strings = pa.array(["x", None])
    for values in (strings, strings.dictionary_encode(), strings.cast("large_string"), pa.nulls(2)):
        pq.write_table(pa.table({"text": values}), tmp_path / "b.parquet")
        texts = [text or "" for text in values.to_pylist()]
        assert [document.text for document in Corpus(str(tmp_path))] == ["first", *texts]


def test_dataset_rows_of_other_types(tmp_path):
    datasets = pytest.importorskip("datasets")
    for values, kind in (([["a"]], "list"), ([3], "int"), ([b"x"], "bytes")):
        datasets.Dataset.from_dict({"text": values}).save_to_disk(tmp_path / kind)
        with pytest.raises(ValueError, match=rf"{kind}, shard 0, row 0: the text must be a string or nothing"):
            list(Corpus(f"hf:{tmp_path / kind}"))


def test_malformed_text(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt: the text must be a string that is not empty"):
        load_documents(str(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt: not valid UTF-8"):
        load_documents(str(tmp_path / "latin.txt"))


def test_unusable_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="'austin' does not exist; give 'austen'"):
        load_documents("austin")
    with pytest.raises(ValueError, match="'gs://bucket/x.jsonl' must be a path of a disk; a bucket does not serve"):
        load_documents("gs://bucket/x.jsonl")
    with pytest.raises(ValueError, match="holds no documents"):
        load_documents(str(tmp_path))
    (tmp_path / "rows.csv").touch()
    with pytest.raises(ValueError, match=r"rows\.csv' must be a folder or end in one of \.jsonl, \.jsonl\.gz"):
        load_documents(str(tmp_path / "rows.csv"))


def cut(corpus, unit_bytes):
    """The documents of every unit."""
    return [list(corpus.read(unit)) for unit in corpus.units(unit_bytes)]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 60), max_size=12), st.integers(1, 200), st.sampled_from(list(OPENERS)))
def test_units_of_lines(tmp_path_factory, lengths, unit_bytes, suffix):
    path = tmp_path_factory.mktemp("lines") / f"rows{suffix}"
    lines = [json.dumps({"text": "é" * length}, ensure_ascii=False).encode() + b"\n" for length in lengths]

    def units_of(content):
        with OPENERS[suffix](path, "wb") as file:
            file.write(content)
        corpus = Corpus(str(path))
        return [list(corpus.read(unit)) for unit in corpus.units(unit_bytes)]

    units = units_of(b"".join(lines))
    assert [document.text for unit in units for document in unit] == ["é" * length for length in lengths]
    size = sum(map(len, lines))
    target = unit_bytes if suffix == ".jsonl" else max(unit_bytes, size / 16)
    for unit in units:
        assert sum(2 * len(document.text) for document in unit) <= target + 1 + max(map(len, lines))
    assert len(units) <= -(-size // target)
    with pytest.raises(ValueError, match=r"line \d+( after byte \d+)?: not valid JSON"):
        units_of(b"".join(lines) + b"{")


def test_units_of_a_folder(tmp_path):
    """Files of all kinds: JSONL by name, then Parquet by row groups, then texts."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "deep").mkdir()
    for name in ("z", "deep/y", "a"):
        (tmp_path / f"{name}.txt").write_text(name * 30)
    (tmp_path / "b.jsonl").write_bytes(jsonl({"text": "of b"}))
    (tmp_path / "deep" / "c.jsonl").write_bytes(jsonl({"text": "of c"}))
    rows = {"id": ["one", "two", "three"], "text": ["1" * 90, None, "3"], "other": [0, 0, 0]}
    pq.write_table(pa.table(rows), tmp_path / "d.parquet", row_group_size=2)
    corpus = Corpus(str(tmp_path))
    expected = [
        *(("b.jsonl:1", "of b"), ("c.jsonl:1", "of c"), ("one", "1" * 90), ("two", ""), ("three", "3")),
        *(("a", "a" * 30), ("deep/y", "deep/y" * 30), ("z", "z" * 30)),
    ]
    assert list(corpus) == expected
    assert [document.id for document in load_documents(str(tmp_path))] == [name for name, text in expected if text]
    units = cut(corpus, 100)
    assert [document for unit in units for document in unit] == expected
    assert [len(unit) for unit in units] == [1, 1, 2, 1, 2, 1]
    assert [document for unit in cut(corpus, 1) for document in unit] == expected
    with pytest.raises(ValueError, match=r"no column 'txt'; text_field must be one of \['id', 'text', 'other'\]"):
        Corpus(str(tmp_path), "txt")
    other = Corpus(str(tmp_path / "b.jsonl"), "body")
    with pytest.raises(ValueError, match="the text must be a string that is not empty, not None"):
        list(other)
    (tmp_path / "d.parquet").write_bytes((tmp_path / "d.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"d\.parquet is no complete \.parquet file"):
        Corpus(str(tmp_path)).units(100)


def test_local_datasets(tmp_path):
    """What the hub's library reads of a folder, as a stream, and of one that it saved."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": [f"text {number}" for number in range(20)]})
    rows.to_parquet(tmp_path / "hub" / "train.parquet", batch_size=5)
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "both")
    for source in (f"hf:{tmp_path / 'hub'}", f"hf:{tmp_path / 'saved'}", f"hf:{tmp_path / 'both'},,test"):
        corpus = Corpus(source, "body")
        assert [document.text for document in corpus] == rows["body"]
        assert [document.text for unit in cut(corpus, 50) for document in unit] == rows["body"]
        assert len(corpus.units(50)) > 2


def test_without_a_network():
    """The error where the hub is out of reach, here because its library is told so."""
    code = """
from idattn.data import Corpus, load_tokenizer
for load, name in (Corpus, "hf:HuggingFaceFW/fineweb-edu,sample-10BT"), (load_tokenizer, "meta-llama/Llama-2-7b-hf"):
    try:
        load(name)
    except ConnectionError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "source='hf:HuggingFaceFW/fineweb-edu,sample-10BT' is out of reach" in done.stdout
    assert "Without a network give local files: --source=FOLDER with what `hf download" in done.stdout
    assert "tokenizer='meta-llama/Llama-2-7b-hf' could not be had from the Hugging Face hub" in done.stdout
    assert "give the path of a local tokenizer.model or tokenizer.json, or 'bytes'" in done.stdout


def test_split_keeps_order():
    documents = [Document(name, name) for name in "dcba"]
    train, validation = split(documents, ("a", "c"))
    assert [document.id for document in train] == ["d", "b"]
    assert [document.id for document in validation] == ["c", "a"]


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        (("emma", "persuation"), "'persuation', which is none of the 2 documents; the nearest is 'persuasion'"),
        ((), "leaves 2 documents to train on and 0 to validate on"),
        (("emma", "persuasion"), "leaves 0 documents to train on and 2 to validate on"),
    ],
)
def test_split_errors(holdout, message):
    with pytest.raises(ValueError, match=message):
        split([Document("emma", "x"), Document("persuasion", "y")], holdout)
