"""The adapter through lm-evaluation-harness itself, on local rows, against the model's log-probabilities."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from support.helpers import assert_close
from support.models import make_model, next_log_probs
from tokenizers import Tokenizer, models

from idattn.data import load_tokenizer
from idattn.evals.harness import LISTS, evaluate, local_task, main_metric, make_lm, rolling_windows, task_names
from idattn.inference import Decoder, generate_text

BYTES = load_tokenizer("bytes")
CHOICES = [
    {"query": "one two", "choices": ["three", "4", "five six"], "gold": 0},
    {"query": "a", "choices": ["b", "ccc"], "gold": 1},
    {"query": "up", "choices": ["down", "left"], "gold": 1},
]


@pytest.fixture(scope="module")
def lm(decoder):
    return make_lm(decoder, BYTES, 128)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of two files with rows of the eight tasks."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"task": name, **row} for name in LISTS["commonsense"][1:] for row in CHOICES if name != "winogrande"]
    rows.append({"task": "winogrande", "context_options": ["x", "yy"], "continuation": "z.", "gold": 1})
    (folder / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "lambada.jsonl").write_text(json.dumps({"task": "lambada_openai", "context": "ab", "continuation": "c"}))
    return folder


def direct(model, context, continuation):
    """ln p of a continuation and whether it is what greedy decoding writes, from one pass over both."""
    row = np.array([BYTES.bos_id, *(context + continuation).encode()])
    log_probs, start = next_log_probs(model, row, 64), len(context.rstrip().encode()) + 1
    total = log_probs[np.arange(start - 1, len(row) - 1), row[start:]].sum()
    return float(total), bool((log_probs[start - 1 : -1].argmax(-1) == row[start:]).all())


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def test_requests(model, decoder, lm):
    best = chr(direct_best(model, "ab"))
    pairs = [("one two", " three"), ("", "ab"), ("ab ", "c"), ("ab", best)]
    scored = lm.loglikelihood(requests(*pairs))
    expected = [direct(model, *pair) for pair in pairs]
    assert_close([x for x, _ in scored], [x for x, _ in expected], "float32", reduction=64)
    assert [x for _, x in scored] == [x for _, x in expected] and scored[3][1]
    texts = ["some text", "x"]
    rolling = lm.loglikelihood_rolling(requests(*((text,) for text in texts)))
    assert_close(rolling, [direct(model, "", text)[0] for text in texts], "float32", reduction=64)

    whole = generate_text(decoder, BYTES, ["ab"], 12, temperature=0.0)[0].text
    greedy, cut = {"max_gen_toks": 12, "until": []}, {"max_gen_toks": 12, "until": whole[4:6], "do_sample": False}
    longer = generate_text(decoder, BYTES, ["abcdef"], 12, temperature=0.0)[0].text
    written = lm.generate_until(requests(("ab", greedy), ("ab", cut), ("abcdef", greedy)))
    assert written == [whole, whole[: whole.index(whole[4:6])], longer]
    with pytest.raises(ValueError, match=r"generation settings \['num_beams'\] are not known"):
        lm.generate_until(requests(("ab", {"num_beams": 2})))


def test_long_rows_are_cut(model, decoder):
    """To a window, as lm-eval's own adapters cut them: it says which tokens are read for each that is scored."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    window = 7
    lm = make_lm(decoder, BYTES, 128, window)
    ids = np.arange(2, 22)
    for n in range(1, 21):
        expected = [
            (a + b, len(a))
            for a, b in map(make_disjoint_window, get_rolling_token_windows([*ids[:n]], 1, window, context_len=1))
        ]
        actual = rolling_windows(np.array([1, *ids[:n]]), window)
        assert [(row.tolist()[start:], len(row) - start) for row, start in actual] == [
            (row[start:], len(row) - start) for row, start in expected
        ]
        assert [row.tolist()[: len(row) - 1] for row, _ in actual] == [list(row[:-1]) for row, _ in expected]
    text = "twenty-two characters."
    row = np.array([BYTES.bos_id, *text.encode()])
    by_hand = 0.0  # every token after those of its window, counted one by one
    for t in range(1, len(row)):
        first = (t - 1) // window * window
        begin = max(min(first + window, len(row) - 1) - window, 0)
        by_hand += next_log_probs(model, row[begin:t], 64)[-1][row[t]]
    assert_close(lm.loglikelihood_rolling(requests((text,))), [by_hand], "float32", reduction=64)
    whole = make_lm(decoder, BYTES, 128).loglikelihood_rolling(requests((text,)))
    assert abs(whole[0] - by_hand) > 1e-3

    ((scored, _),) = lm.loglikelihood(requests(("twenty-two", " char")))
    last = np.array([*b"-two char"][-window - 1 :])  # 7 are read, and the last 5 scored
    log_probs = next_log_probs(model, last, 64)
    expected = log_probs[np.arange(2, 7), last[3:]].sum()
    assert_close([scored], [float(expected)], "float32", reduction=64)
    (written,) = lm.generate_until(requests(("twenty-two", {"max_gen_toks": 3, "until": []})))
    assert written == generate_text(decoder, BYTES, ["two"], 3, temperature=0.0)[0].text
    with pytest.raises(ValueError, match="continuation 'eight ch' of 9 tokens is longer than a window of 7"):
        lm.loglikelihood(requests(("a ", "eight ch")))
    with pytest.raises(ValueError, match="6 tokens to write leave no room in a window of 7"):
        lm.generate_until(requests(("abcdef", {"max_gen_toks": 6, "until": []})))


def direct_best(model, context):
    return next_log_probs(model, np.array([BYTES.bos_id, *context.encode()]), 64)[-1][:128].argmax()


def test_local_tasks(model, lm, data):
    """All eight, through lm-eval: its metrics are those of the direct log-likelihoods."""
    measured = evaluate(lm, LISTS["commonsense"], data)
    assert {*measured} == {*LISTS["commonsense"]}
    for name, answer in (("hellaswag", ""), ("arc_easy", "\nAnswer:"), ("social_iqa", "")):
        scores = [[direct(model, row["query"] + answer, f" {c}")[0] for c in row["choices"]] for row in CHOICES]
        norms = [
            [s / len(c) for s, c in zip(x, row["choices"], strict=True)] for x, row in zip(scores, CHOICES, strict=True)
        ]
        acc, acc_norm = (
            np.mean([np.argmax(x) == row["gold"] for x, row in zip(each, CHOICES, strict=True)])
            for each in (scores, norms)
        )
        assert measured[name].metrics == {"acc": pytest.approx(acc), "acc_norm": pytest.approx(acc_norm)}
        right = [np.argmax(x) == row["gold"] for x, row in zip(scores, CHOICES, strict=True)]
        assert measured[name].errors["acc"] == pytest.approx(np.std(right, ddof=1) / np.sqrt(len(right)))
        assert measured[name].version is None
        assert main_metric(name, measured[name].metrics) == pytest.approx(acc_norm if name == "hellaswag" else acc)
    total, greedy = direct(model, "ab", " c")
    assert measured["lambada_openai"].metrics["perplexity"] == pytest.approx(np.exp(-total), rel=1e-4)
    assert measured["lambada_openai"].metrics["acc"] == greedy
    contexts = [direct(model, context, " z.")[0] for context in ("x", "yy")]
    assert measured["winogrande"].metrics == {"acc": float(np.argmax(contexts) == 1)}
    first = [direct(model, "one two", f" {c}")[0] for c in CHOICES[0]["choices"]]
    limited = evaluate(lm, ["hellaswag"], data, limit=1)["hellaswag"]
    assert limited.metrics["acc"] == float(np.argmax(first) == 0) and limited != measured["hellaswag"]
    assert not limited.errors  # of a single row


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """A tokenizer whose tokens join letters over what would be the end of a context, and the adapter of a model."""
    path = tmp_path_factory.mktemp("joined") / "tokenizer.json"
    pieces = ["<s>", *"Answer ,中文国(x)", "An", "Ans", "we", "wer", "Answer", "中文", "中文国", "(x", "(x)"]
    merges = [
        *zip("AwA中(", "nen文x", strict=True),
        ("An", "s"),
        ("we", "r"),
        ("Ans", "wer"),
        ("中文", "国"),
        ("(x", ")"),
    ]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.BPE(vocabulary, [*dict.fromkeys(merges)]))
    made.add_special_tokens(["<s>"])
    made.save(str(path))
    tokenizer = load_tokenizer(str(path))
    model = make_model("s4d", vocab_size=64)
    return tokenizer, model, make_lm(Decoder(model, chunk_size=16), tokenizer, 128)


@pytest.mark.parametrize(
    ("context", "continuation", "scored"),
    [
        ("Ans", "wer", ["Answer"]),  # one token is the end of the context and all of the continuation
        ("Ans", "n", ["n"]),
        ("Ans,An", "swer,n", ["Answer", ",", "n"]),
        ("n中文", "国", ["中文国"]),
        ("中文", "n国", ["n", "国"]),
        ("n(", "x)", ["(x)"]),
        ("", "Answer", ["Answer"]),
        ("  ", "Ans", [" ", " ", "Ans"]),
        ("n ", "An", [" ", "An"]),
        ("n, ", "w", [" ", "w"]),
    ],
)
def test_no_continuation_is_scored_by_nothing(joined, context, continuation, scored):
    """What is scored is every token that has text of the continuation, however it joins the context."""
    tokenizer, model, lm = joined
    row = np.array([tokenizer.bos_id, *tokenizer.encode(context + continuation)])
    tokens = [tokenizer.decode([i]) for i in row[len(row) - len(scored) :]]
    assert tokens == scored
    log_probs = next_log_probs(model, row, 64)
    places = np.arange(len(row) - len(scored), len(row))
    total = log_probs[places - 1, row[places]].sum()
    ((log_prob, is_greedy),) = lm.loglikelihood(requests((context, continuation)))
    assert log_prob == pytest.approx(total, rel=1e-4) and log_prob < 0
    assert is_greedy == (log_probs[places - 1].argmax(-1) == row[places]).all()


def test_a_continuation_without_tokens_is_refused(joined):
    tokenizer, _, lm = joined
    with pytest.raises(ValueError, match="continuation '漢' of 'Ans' has no token to score"):
        lm.loglikelihood(requests(("Ans", "漢")))


@pytest.mark.slow
def test_lists_are_of_tasks_that_lm_eval_has():
    assert {name for tasks in LISTS.values() for name in tasks} <= {*task_names()}
    assert [len(tasks) for tasks in LISTS.values()] == [8, 3, 14]


def test_errors(data, tmp_path):
    with pytest.raises(ValueError, match="task='wikitext' is not read from local data"):
        local_task("wikitext", data)
    (tmp_path / "other.jsonl").write_text('{"task": "copa"}\n')
    with pytest.raises(ValueError, match="has no rows of task 'piqa'"):
        local_task("piqa", tmp_path)
