"""Windows against a brute-force construction; order, resume and coverage of the batches."""

import dataclasses
import itertools
import json

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idattn.config import DataConfig
from idattn.data import tokenizer as tokenizer_lib
from idattn.data.loader import TokenWindows, digests, eval_batches, load_data, train_iterator
from idattn.data.preparation import Preparation, prepare
from idattn.data.recall import mqar_rows
from idattn.data.tokenizer import load_tokenizer, train_tokenizer

BOS = 9


def make(lengths, seq_len, documents="reset", seed=0):
    rng = np.random.default_rng(seed)
    token_ids = [rng.integers(0, BOS, length) for length in lengths]
    return token_ids, TokenWindows(join(token_ids, BOS), bos_id=BOS, seq_len=seq_len, documents=documents)


def join(token_ids, bos_id):
    return np.concatenate([[bos_id, *ids] for ids in token_ids])


def counting(num_windows, seq_len=2):
    """Windows whose second input tells which one it is."""
    ids = np.arange(num_windows * seq_len)
    return TokenWindows(join([ids], len(ids)), bos_id=len(ids), seq_len=seq_len)


def order(batches, seq_len=2):
    """The numbers of the windows of `counting` in the batches, in order."""
    return [number for batch in batches for number in (batch["inputs"][:, 1] // seq_len).tolist()]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def brute_force(token_ids, seq_len, reset):
    """Windows built token by token from (token, document) pairs."""
    stream = [(int(t), d) for d, ids in enumerate(token_ids) for t in [BOS, *ids]]
    pairs = list(itertools.pairwise(stream))
    windows = []
    for start in range(0, len(pairs), seq_len):
        rows = [
            (token, target, d - pairs[start][0][1] if reset else 0, float(d == e or not reset))
            for (token, d), (target, e) in pairs[start : start + seq_len]
        ]
        rows += [(0, 0, -1, 0.0)] * (seq_len - len(rows))
        windows.append(
            dict(zip(("inputs", "targets", "segment_ids", "loss_mask"), zip(*rows, strict=True), strict=True))
        )
    return windows


@given(st.lists(st.integers(0, 9), min_size=2, max_size=6), st.integers(1, 7), st.sampled_from(["reset", "ignore"]))
def test_windows_equal_brute_force(lengths, seq_len, documents):
    token_ids, windows = make(lengths, seq_len, documents)
    expected = brute_force(token_ids, seq_len, documents == "reset")
    assert len(windows) == len(expected)
    for window, wanted in zip(windows, expected, strict=True):
        assert {name: array.tolist() for name, array in window.items()} == {k: list(v) for k, v in wanted.items()}
        assert [array.dtype for array in window.values()] == [np.int32, np.int32, np.int32, np.float32]


@settings(max_examples=40)
@given(st.lists(st.integers(0, 20), min_size=2, max_size=5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_every_token_is_a_target_once_an_epoch(lengths, seq_len, seed):
    total = len(lengths) + sum(lengths)
    ids = np.split(np.arange(1, total + 1), np.cumsum(lengths)[:-1])  # distinct tokens; what is left over goes unused
    ids = [part[:length] for part, length in zip(ids, lengths, strict=True)]
    windows = TokenWindows(join(ids, 0), bos_id=0, seq_len=seq_len, documents="ignore")
    batches = take(train_iterator([windows], 1, seed), len(windows))
    real = np.concatenate([batch["targets"][batch["loss_mask"] == 1] for batch in batches])
    assert sorted(real.tolist()) == sorted([0] * (len(ids) - 1) + np.concatenate(ids).tolist())


def test_epochs_are_different_permutations():
    windows = counting(12)
    iterator = train_iterator([windows], 4, 7)
    epochs = [order(take(iterator, 3)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(12)) not in epochs


def test_batches_straddle_epochs_without_loss():
    numbers = order(take(train_iterator([counting(5)], 3, 0), 10))
    assert all(sorted(numbers[first : first + 5]) == list(range(5)) for first in range(0, 30, 5))


def test_order_is_a_function_of_the_seed():
    first, again, other = (order(take(train_iterator([counting(11)], 2, seed), 20)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert first[11:22] != other[:11]  # the next seed is not the same run one epoch later


def test_resume_from_state():
    _, windows = make([13, 4, 22], 3)
    iterator = train_iterator([windows], 5, 1)
    take(iterator, 7)
    state = iterator.get_state()
    assert state["next_index"] == 7 and sorted(state) == ["data", "next_index"]
    expected = take(iterator, 9)
    resumed = train_iterator([windows], 5, 1)
    next(resumed)  # what it had read ahead must not leak
    resumed.set_state(state)
    np.testing.assert_equal(take(resumed, 9), expected)


def test_position_in_other_data_is_refused():
    (_, windows), (_, other) = make([13, 4, 22], 3), make([13, 4, 22], 3, seed=1)
    state = train_iterator([windows], 5, 1).get_state()
    train_iterator([make([13, 4, 22], 3)[1]], 5, 1).set_state(state)
    for changed in ([other], [windows, windows]):
        with pytest.raises(ValueError, match="training text or tokenizer is not what it was when"):
            train_iterator(changed, 5, 1, weights=(1, 1)).set_state(state)


class Endless(grain.IterDataset):
    """The training iterator in the form that grain's checkpoint test takes."""

    def __iter__(self):
        return train_iterator([counting(4)], 3, 2)


def test_resume_at_every_step():
    grain.experimental.assert_equal_output_after_checkpoint(grain.experimental.LimitIterDataset(Endless(), 5))


@pytest.mark.parametrize("num_windows", [1, 6, 7])
def test_eval_covers_everything_in_order(num_windows):
    windows = counting(num_windows)
    batches = list(eval_batches([windows], 3, 100))
    assert len(batches) == -(-num_windows // 3)
    assert all(batch["inputs"].shape == (3, 2) for batch in batches)
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    for name, array in joined.items():
        np.testing.assert_array_equal(array[:num_windows], [window[name] for window in windows])
        assert array.dtype == windows[0][name].dtype
    assert (joined["segment_ids"][num_windows:] == -1).all()
    assert not joined["loss_mask"][num_windows:].any()
    assert joined["loss_mask"].sum() == len(windows.stream) - 1


def test_eval_limit_takes_an_even_part():
    batches = list(eval_batches([counting(103)], 4, 5))
    assert [len(batch["inputs"]) for batch in batches] == [4] * 5
    numbers = order(batches)
    assert set(np.diff(numbers)) == {5, 6}
    assert numbers[0] == 0 and numbers[-1] >= 97
    assert order(eval_batches([counting(103)], 4, 5)) == numbers


def test_load_data(tmp_path):
    (tmp_path / "a.txt").write_text("abcd")
    (tmp_path / "b.txt").write_text("efg")
    (tmp_path / "c.txt").write_text("hi")
    tokenizer, [train], [validation] = load_data(DataConfig(source=str(tmp_path), holdout=("b",), seq_len=4))
    assert tokenizer.decode(train.stream) == "abcdhi"
    assert validation.stream.tolist() == [256, *b"efg"]
    assert validation.stream.dtype == np.uint16
    assert train[1]["segment_ids"].tolist() == [0, 1, 1, -1]
    assert train[1]["loss_mask"].tolist() == [0, 1, 1, 0]
    _, [ignoring], _ = load_data(DataConfig(source=str(tmp_path), holdout=("b",), seq_len=4, documents="ignore"))
    assert ignoring[1]["segment_ids"].tolist() == [0, 0, 0, -1]
    assert ignoring[1]["loss_mask"].tolist() == [1, 1, 1, 0]
    assert ignoring[1]["targets"].tolist() == [256, *b"hi", 0]


def test_a_tokenizer_of_much_text(tmp_path, capsys, monkeypatch):
    """It learns from the beginnings of texts, which are the texts where all are not too much."""
    texts = ["the cat sat on the mat. a dog ran.\n" * 40, "zwei hunde jagen quer durch bonn.\n" * 80]
    for most, learnt in ((10**4, texts), (1400, [text[: len(text) * 1400 // 4120] for text in texts])):
        monkeypatch.setattr(tokenizer_lib, "TRAINING_TEXT", most)
        train_tokenizer(learnt, 290, tmp_path / "t.model")
        assert sum(map(len, learnt)) <= most
        (tokenizer,) = tokenizer_lib.trained_tokenizer("bpe:290", texts).files.values()
        assert tokenizer == (tmp_path / "t.model").read_bytes()
    assert capsys.readouterr().err == "training a tokenizer of 290 pieces\n" * 4


def test_a_tokenizer_of_the_text(tmp_path):
    """bpe:N learns from the documents to train on, and only from those; a checkpoint's is taken instead."""
    train_text, held_out = "the cat sat on the mat. a dog ran.\n" * 50, "zwei hunde jagen quer durch bonn.\n" * 50
    rows = [{"id": "a", "text": train_text}, {"id": "b", "text": held_out}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source=str(tmp_path / "x.jsonl"), holdout=("b",), seq_len=8, tokenizer="bpe:290")
    tokenizer, train, validation = load_data(config)
    train_tokenizer([train_text], 290, tmp_path / "t.model")
    assert tokenizer.files["tokenizer.model"] == (tmp_path / "t.model").read_bytes()
    assert tokenizer.vocab_size == 290
    for windows, text in ((train, train_text), (validation, held_out)):
        assert tokenizer.decode(windows[0].stream) == text
    assert load_data(config, load_tokenizer("bytes"))[0].fingerprint == "bytes"
    with pytest.raises(ValueError, match="training a tokenizer of 9000 pieces failed"):
        load_data(dataclasses.replace(config, tokenizer="bpe:9000"))
    mqar = DataConfig(source="mqar:pairs=2,rows=8", holdout=(), seq_len=16, tokenizer="bpe:290")
    with pytest.raises(ValueError, match="'bpe:290' is trained on the text of a run, but source='mqar:pairs=2,rows=8'"):
        load_data(mqar)
    with pytest.raises(ValueError, match="'bpe:290' is trained on the text of a run; name one of its checkpoints"):
        load_tokenizer("bpe:290")


@pytest.mark.parametrize("name", ["a,b", "lang=en", "with space", "a:b,c=d"])
def test_paths_are_paths(tmp_path, name):
    """No character of a path means anything else, in a source as in a mixture of prepared folders."""
    texts = {letter: letter * 40 for letter in "abcdefgh"}
    folders = [tmp_path / name / "one", tmp_path / name / "two"]
    for folder in folders:
        folder.mkdir(parents=True)
        for title, text in texts.items():
            (folder / f"{title}.txt").write_text(text)
        prepare(Preparation(source=str(folder), tokenizer="bytes", validation=0.5), folder / "out")
    _, [train], _ = load_data(DataConfig(source=str(folders[0]), holdout=("b",), seq_len=4))
    assert train.stream[:82].tolist() == [256, *texts["a"].encode(), 256, *texts["c"].encode()]
    source, other = (str(folder / "out") for folder in folders)
    config = DataConfig(source=source, more_sources=(other,), weights=(0.5, 0.5), holdout=(), seq_len=4)
    assert len(load_data(config)[1]) == 2


def test_older_spellings():
    """What the configs of older checkpoints say is the same data today."""
    data = {"seq_len": 4, "holdout": ()}
    old = DataConfig(**data, source="a,b,c", weights=(0.5, 0.25, 0.25))
    assert old == DataConfig(**data, source="a", more_sources=("b", "c"), weights=(0.5, 0.25, 0.25))
    assert DataConfig(**data, source="mqar:8,96000") == DataConfig(**data, source="mqar:pairs=8,rows=96000")
    assert DataConfig(**data, source="a,b").source == "a,b"
    for changes in ({"weights": (1.0, 2.0)}, {"more_sources": ("b",)}, {"more_sources": ("b",), "weights": (1.0,)}):
        with pytest.raises(ValueError, match=r"weights=\(.*\) must be one for each of the [12] sources \('a',"):
            DataConfig(**data, source="a", **changes)


def test_digests_are_of_the_content(tmp_path, monkeypatch):
    """Whatever the spelling of a path: its text and tokenizer name the data, and a change of either renames them."""
    for folder in ("one", "moved"):
        (tmp_path / folder).mkdir()
        for name, text in {"a": "abcd", "b": "efg"}.items():
            (tmp_path / folder / f"{name}.txt").write_text(text)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def named(source, holdout=("b",)):
        return digests(*load_data(DataConfig(source=source, holdout=holdout, seq_len=4)))

    first = named("one")
    for source in ("one/", "./one", str(tmp_path / "one"), "moved", "link", "~/one"):
        assert named(source) == first
    assert sorted(first) == ["tokenizer", "train", "validation"]
    (tmp_path / "moved" / "b.txt").write_text("efh")
    changed = named("moved")
    assert {name for name in first if changed[name] != first[name]} == {"validation"}
    assert named("one", ("a",)) == {"tokenizer": "bytes", "train": first["validation"], "validation": first["train"]}


def test_mqar():
    """A window is a row, and its answers alone count, in all of them: of training other rows than of validation."""
    _, [train], [validation] = load_data(DataConfig(source="mqar:pairs=3,rows=20", holdout=(), seq_len=19))
    assert len(train) == 20 and len(validation) == 1000
    for windows, seed in ((train, "train"), (validation, "validation")):
        tokens, is_answer = mqar_rows(257, 256, 19, 3, len(windows), seed=seed)
        for window, row, answers in zip((windows[i] for i in range(len(windows))), tokens, is_answer, strict=True):
            real = window["segment_ids"] == 0
            assert real.sum() >= 18 and (window["inputs"][real] == row[: real.sum()]).all()
            counts = window["loss_mask"] == 1
            assert (np.flatnonzero(counts) + 1 == np.flatnonzero(answers)).all()
            assert (window["targets"][counts] == row[answers]).all()
    assert not {*map(tuple, train.stream.reshape(20, 19))} & {*map(tuple, validation.stream.reshape(1000, 19))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"holdout": ("a",)},
            r"holdout=\('a',\) names documents of a text, but 'mqar:pairs=3,.* set holdout=\(\)",
        ),
        ({"source": "mqar:3"}, "source='mqar:3' must be mqar:pairs=P,rows=N, whole numbers above 0"),
        ({"source": "mqar:pairs=0,rows=9"}, "source='mqar:pairs=0,rows=9' must be"),
        ({"source": "mqar:rows=9,pairs=1"}, "source='mqar:rows=9,pairs=1' must be"),
        ({"seq_len": 12}, "length=12 at least 13: BOS, pairs and questions"),
    ],
)
def test_mqar_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(**{"source": "mqar:pairs=3,rows=20", "holdout": (), "seq_len": 19} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": "rest"}, "documents='rest' is not known. Did you mean 'reset'"),
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
        ({"stream": np.array([BOS])}, "the documents make 1 tokens; a window needs at least 2"),
    ],
)
def test_window_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenWindows(**{"stream": np.array([BOS, 1, 2]), "bos_id": BOS, "seq_len": 2} | changes)


def test_window_index_errors():
    windows = counting(3)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"window {index} is outside 0 to 2"):
            windows[index]


def test_batch_errors():
    with pytest.raises(ValueError, match="has 3 windows, fewer than batch_size=4"):
        train_iterator([counting(3)], 4, 0)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        train_iterator([counting(3)], 0, 0)
    with pytest.raises(ValueError, match="seed=-1 at least 0"):
        train_iterator([counting(3)], 1, -1)
    with pytest.raises(ValueError, match=r"weights=\(1,\) must be one for each of the 2 sources"):
        train_iterator([counting(3)] * 2, 1, 0, weights=(1,))
    with pytest.raises(ValueError, match="batch_size=0 and limit=1 must be"):
        eval_batches([counting(3)], 0, 1)
    with pytest.raises(ValueError, match="batch_size=1 and limit=0 must be"):
        eval_batches([counting(3)], 1, 0)
