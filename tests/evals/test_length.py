"""Losses in windows of several lengths against the model's log-probabilities of each window alone."""

import numpy as np
import pytest
from support.helpers import assert_close
from support.models import V, make_model, next_log_probs

from idattn.evals.length import corpus_paths, length_losses, mean_perplexities, plot_lengths
from idattn.evals.scores import score_rows
from idattn.inference import Decoder


@pytest.fixture(scope="module")
def model():
    return make_model("s4d")


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model, chunk_size=16)


def direct_nats(model, row):
    """(T - 1,) -ln p of every token but the first."""
    return -next_log_probs(model, row, 100)[np.arange(len(row) - 1), row[1:]]


def test_score_rows(model, decoder):
    """Rows of every length around the batch come back in their order, each as if alone."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, V, length) for length in (5, 40, 1, 17, 16)]
    for row, (log_probs, is_best) in zip(rows, score_rows(decoder, rows, 2), strict=True):
        assert_close(log_probs[1:], -direct_nats(model, row), "float32", reduction=64)
        best = next_log_probs(model, row, 100).argmax(-1)
        assert log_probs.shape == row.shape and log_probs[0] == 0 and not is_best[0]
        assert is_best[1:].tolist() == (best[:-1] == row[1:]).tolist()


def test_length_losses(model, decoder, tmp_path):
    stream = np.random.default_rng(1).integers(0, V, 200)
    losses = length_losses(decoder, stream, [7, 90], num_tokens=60, batch_tokens=20)
    for length, windows in ((7, stream[:84].reshape(-1, 7)), (90, stream[:90].reshape(-1, 90))):
        nats = np.array([direct_nats(model, window) for window in windows])
        result = losses[length]
        assert result["windows"] == len(windows)
        assert_close(result["loss"], nats.mean(), "float32", reduction=64)
        assert_close(result["perplexity"], np.exp(nats.mean()), "float32", reduction=64 * 9)
        ends = np.array(result["positions"])
        assert len(ends) == min(64, length - 1) and ends[-1] == length - 1
        curve = [part.mean() for part in np.split(nats.mean(0), ends[:-1])]
        assert_close(result["by_position"], curve, "float32", reduction=64)
    other = {length: result | {"perplexity": 2.0} for length, result in losses.items()}
    assert mean_perplexities({"a": losses, "b": other}) == {n: (losses[n]["perplexity"] + 2) / 2 for n in losses}
    plot_lengths({"a": losses, "b": other}, 16, tmp_path / "length.png")
    assert (tmp_path / "length.png").read_bytes().startswith(b"\x89PNG")


def test_errors(decoder):
    for lengths in ([1, 20], [20, 201]):
        with pytest.raises(ValueError, match="at least 2 tokens, and at most the 200 tokens that novels has"):
            length_losses(decoder, np.zeros(200, int), lengths, num_tokens=1, batch_tokens=1, name="novels")


def test_names_of_corpora(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lang=en").mkdir()
    (tmp_path / "lang=en" / "a.txt").touch()
    given = ["/x/lang=de/b.jsonl.gz", "pg19=/x/lang=de/b.jsonl.gz", "lang=en/a.txt", "lang=fr/c.txt", "hf:NAME"]
    assert corpus_paths(given) == {
        "b": "/x/lang=de/b.jsonl.gz", "pg19": "/x/lang=de/b.jsonl.gz", "a": "lang=en/a.txt", "lang": "fr/c.txt",
        "hf:NAME": "hf:NAME",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"corpus de/t\.txt is named 't', as is en/t\.txt; .* as NAME=de/t\.txt"):
        corpus_paths(["en/t.txt", "de/t.txt"])
    for corpus in ("x/mean.txt", "mean=x.txt", "=x.txt", "x/.txt"):
        with pytest.raises(ValueError, match="which no corpus can have"):
            corpus_paths([corpus])
