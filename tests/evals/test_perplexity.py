"""Losses of tokens against the model's log-probabilities, and their sums by document."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from support.helpers import assert_close
from support.models import run_of

from idattn.config import ComputeConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from idattn.data import TokenWindows, eval_batches, load_tokenizer, train_tokenizer
from idattn.evals import tasks
from idattn.evals.perplexity import document_losses, token_losses
from idattn.nn import LanguageModel

BOS, T = 36, 9
CONFIG = Config(
    model=ModelConfig.tiny("softmax"),
    data=DataConfig(seq_len=T),
    optim=OptimConfig(peak_lr=1e-3, warmup_steps=0),
    train=TrainConfig(steps=1, batch_size=2),
    compute=ComputeConfig(dtype="float32", loss_chunk=5),
)


def make_batches(lengths):
    """A stream of documents, and batches of 2 of its windows; the last window, and row, are padding in part."""
    rng = np.random.default_rng(0)
    stream = np.concatenate([[BOS, *rng.integers(0, BOS, length)] for length in lengths])
    return stream, list(eval_batches([TokenWindows(stream, bos_id=BOS, seq_len=T)], 2, 100))


def test_token_losses():
    model = nnx.jit(lambda: LanguageModel(CONFIG.model, CONFIG.compute, rngs=nnx.Rngs(0)))()
    graphdef, params = nnx.split(model)
    batch = make_batches([3, 4, 25])[1][0]
    losses = jax.jit(lambda batch: token_losses(graphdef, params, batch, CONFIG))(batch)
    logits = np.asarray(nnx.jit(lambda m, b: m(b["inputs"], segment_ids=b["segment_ids"])[0])(model, batch), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0] * batch["loss_mask"]
    assert 0 < (expected == 0).sum() < 5
    assert_close(losses, expected, "float32", reduction=CONFIG.model.model_dim)


def test_document_losses():
    lengths = [3, 0, 20, 40, 1, 12]  # over borders of windows and batches; one document is empty
    stream, batches = make_batches(lengths)
    sums = document_losses(lambda batch: batch["targets"] * batch["loss_mask"], batches, BOS)
    documents = np.split(stream, np.flatnonzero(stream == BOS))[1:]
    assert sums.tolist() == [[document[1:].sum(), len(document) - 1] for document in documents]


def test_task_reads_batch_tokens_at_a_time(model, tmp_path, monkeypatch):
    """Whatever the batch of the run was; with the same losses."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"id": "{name}", "text": "{name * 70}"}}\n' for name in "ab"))
    run = run_of(model.config)
    data = dataclasses.replace(run.data, source=str(tmp_path / "a.jsonl"), holdout=("b",), tokenizer="bytes")
    subject = tasks.Subject(dataclasses.replace(run, data=data), nnx.split(model)[1], None, load_tokenizer("bytes"))
    shapes, sums = [], tasks.document_losses

    def seen(losses, batches, bos_id):
        batches = list(batches)
        shapes.append({batch["inputs"].shape for batch in batches})
        return sums(losses, batches, bos_id)

    monkeypatch.setattr(tasks, "document_losses", seen)
    few, all_at_once = (
        tasks.run_task("perplexity", subject, tasks.Settings(batch_tokens=batch_tokens))["metrics"]
        for batch_tokens in (2 * 16 + 1, 2**14)
    )
    assert run.train.batch_size not in (2, 5) and shapes == [{(2, 16)}, {(5, 16)}]  # a window is not filled with others
    assert all_at_once == pytest.approx(few, rel=1e-5)


def test_bits_per_byte_of_tokens_that_are_no_bytes(tmp_path, monkeypatch):
    """Where the loss of a target is its id, their sum over the bytes of each document and of all."""
    held_out = ["the café opened", "漢 été, again the café", "was closed"]
    train_tokenizer(["the café, the café opened again " * 90], 290, tmp_path / "t.model")
    rows = [{"id": text, "text": text} for text in (*held_out, "other text " * 9)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = run_of(dataclasses.replace(CONFIG.model, vocab_size=290))
    data = dataclasses.replace(config.data, source=str(tmp_path / "corpus.jsonl"), holdout=tuple(held_out))
    tokenizer = load_tokenizer(tmp_path / "t.model")
    monkeypatch.setattr(tasks, "token_losses", lambda graphdef, params, batch, _: batch["targets"] * batch["loss_mask"])
    subject = tasks.Subject(dataclasses.replace(config, data=data), None, None, tokenizer)
    result = tasks.run_task("perplexity", subject, tasks.Settings())
    bits = np.array([tokenizer.encode(text).sum() for text in held_out]) / np.log(2)
    sizes = [len(text.encode()) for text in held_out]
    assert [x["bits_per_byte"] for x in result["documents"]] == pytest.approx((bits / sizes).tolist(), rel=1e-6)
    assert result["metrics"]["bits_per_byte"] == pytest.approx(sum(bits) / sum(sizes), rel=1e-6)
