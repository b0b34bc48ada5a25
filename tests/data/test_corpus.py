"""Reading documents from every kind of source, and holding some out."""

import gzip
import json
import lzma

import pytest

from idattn.data.corpus import Document, load_documents, split

NOVELS = ["emma", "mansfield_park", "northanger_abbey", "persuasion", "pride_and_prejudice", "sense_and_sensibility"]
ROWS = [Document("b", "first\r\nline\u2028 caf\u00e9"), Document("a", "second")]


def jsonl(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def test_embedded_corpus():
    documents = load_documents("austen")
    assert [document.id for document in documents] == NOVELS
    assert sum(len(document.text.encode()) for document in documents) == 4_007_100
    assert documents[4].text.startswith("PRIDE AND PREJUDICE\nBy Jane Austen\nChapter 1\nIt is a truth universally")


@pytest.mark.parametrize(("suffix", "opener"), [(".jsonl", open), (".jsonl.gz", gzip.open), (".jsonl.xz", lzma.open)])
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
        (jsonl({"id": "x", "text": "1"}, {"id": "x", "text": "2"}), "1 ids more than once, such as 'x'"),
    ],
)
def test_malformed_jsonl(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_documents(str(path))


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"plain" + data], ids=["cut", "no_magic"])
def test_damaged_archive(tmp_path, suffix, pack, damage):
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(damage(pack(jsonl({"text": "x" * 1000}))))
    with pytest.raises(ValueError, match=f"rows.jsonl{suffix} is not a complete {suffix} file"):
        load_documents(str(path))


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
    with pytest.raises(ValueError, match="holds no documents"):
        load_documents(str(tmp_path))
    (tmp_path / "rows.csv").touch()
    with pytest.raises(ValueError, match=r"rows\.csv' must be a folder or end in one of \.jsonl, \.jsonl\.gz"):
        load_documents(str(tmp_path / "rows.csv"))


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
