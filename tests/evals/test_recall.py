"""Recall questions: what they hold, that they are the same everywhere, and scores against the model's choices."""

import numpy as np
import pytest
from support.models import next_log_probs

from idattn.config import quickstart
from idattn.data import load_tokenizer, mqar_rows
from idattn.evals import recall, tasks
from idattn.evals.recall import Question, ask, fingerprint, mqar_accuracy, passkey, phonebook
from idattn.evals.scores import progress
from idattn.inference import generate_text

BYTES = load_tokenizer("bytes")


def test_passkey():
    questions = passkey(BYTES, 1000, 20, answer_tokens=16)
    for prompt, answer in questions:
        head, *text, question = prompt.split("\n")
        key = question.split()[7]
        (needle,) = (line for line in text if "grass" not in line)
        assert needle == f"One of the special magic numbers for {key} is: {answer}." and len(answer) == 7
        assert question.endswith(f" The special magic number for {key} mentioned in the provided text is")
        line = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
        assert {*text} == {needle, line}
        assert len(prompt) + 17 <= 1000 < len(prompt) + 17 + len(line) + 1
    assert len({prompt.index("One of") for prompt, _ in questions}) > 3 and len({*questions}) == 20
    with pytest.raises(ValueError, match=r"length=300 must be at least \d+ tokens"):
        passkey(BYTES, 300, 1, answer_tokens=16)


def test_phonebook():
    for prompt, answer in phonebook(8, 20):
        book, instruction, *people = prompt.split("\n\n")
        numbers = dict(line.split(": ") for line in book.split("\n"))
        shown = [person.split("\nNumber:") for person in people]
        names = [name.removeprefix("Person: ") for name, _ in shown]
        assert len(numbers) == 8 and len({*names}) == 3 and instruction.endswith("phonebook above.")
        assert [number for _, number in shown] == [f" {numbers[names[0]]}", f" {numbers[names[1]]}", ""]
        assert numbers[names[2]] == answer
    with pytest.raises(ValueError, match="entries=2 must be 3"):
        phonebook(2, 1)


def test_mqar():
    tokens, is_answer = mqar_rows(65, 64, 61, 8, 30)
    assert tokens.dtype == np.int32 and (is_answer.sum(1) == 8).all() and not is_answer[:, :17].any()
    assert (tokens[:, 0] == 64).all() and (tokens[:, 1:] < 64).all()
    for row, answers in zip(tokens, is_answer, strict=True):
        values = dict(zip(row[1:17:2], row[2:18:2], strict=True))
        (places,) = np.nonzero(answers)
        assert {*row[places - 1]} == {*values} and all(values[row[i - 1]] == row[i] for i in places)
        assert (row < 32).sum() == 16 and len({*row[2:18:2]}) == 8
    near, even = (np.nonzero(mqar_rows(65, 64, 401, 8, 30, power=power)[1])[1].mean() for power in (0.01, 1))
    assert near < 0.7 * even  # soon after the pairs, unless told otherwise
    for length, pairs in ((33, 9), (200, 33)):
        with pytest.raises(ValueError, match=rf"pairs={pairs} must be 1 to 32.*{length=} at least {4 * pairs + 1}:"):
            mqar_rows(65, 64, length, pairs, 1)


def test_prompts_are_the_same_everywhere():
    made = passkey(BYTES, 900, 3), phonebook(5, 3), mqar_rows(65, 64, 33, 4, 3)[0]
    assert [fingerprint(questions) for questions in made] == [
        "a53d4c5393ddc390dea3fde113d6e5c277c606a3ec7ac9ab3943aa8b2d961ad7",
        "d3d2996176f31252f2fcf8c0e15d8c3661a21a91732fdb4374fa36ebc7e0ccc0",
        "d0589a24fa17ffa55b6dc3201459b01ec1c26dd17801cae2e0797748c86b2091",
    ]


def test_long_work_is_announced(decoder, capsys):
    """Before the first prompt is made and before the first batch compiles, also where stderr is a file."""
    passkey(BYTES, 600, 2, answer_tokens=16)
    assert "passkey, prompts of 600:   0%" in capsys.readouterr().err
    for batch in progress([1, 2], "write"):
        assert ("write:   0%" in capsys.readouterr().err) == (batch == 1)


def test_ask(decoder):
    prompts = ["ab", "a longer one", "xyz"]
    alone = [generate_text(decoder, BYTES, [prompt], 20, temperature=0.0)[0].text for prompt in prompts]
    questions = [Question(prompt, text[3:6]) for prompt, text in zip(prompts, alone, strict=True)]
    questions[2] = Question("xyz", "\0 never")
    assert ask(decoder, BYTES, questions, num_tokens=20, batch_size=2) == (2 / 3, alone)
    first = [text.split("\n")[0] for text in alone]
    questions = [Question("ab", first[0].strip()), Question("a longer one", first[1].strip() + "x")]
    assert ask(decoder, BYTES, questions, num_tokens=20, batch_size=2, whole=True) == (0.5, first[:2])


def test_mqar_accuracy(model, decoder):
    rng = np.random.default_rng(0)
    tokens, is_answer = rng.integers(0, 256, (3, 20)), rng.random((3, 20)) < 0.5
    is_answer[:, 0] = False
    for row in tokens:
        for i in (5, 9, 13):
            row[i] = next_log_probs(model, row[:i])[-1].argmax()
    best = np.array([next_log_probs(model, row)[:-1].argmax(-1) == row[1:] for row in tokens])
    expected = best[is_answer[:, 1:]].mean()
    assert 0 < expected < 1
    assert mqar_accuracy(decoder, tokens, is_answer, batch_size=2) == pytest.approx(expected, abs=1e-12)


def test_mqar_task_asks_for_what_training_has(monkeypatch):
    """The ids of the tokenizer, where the model has more: of the others nothing was learnt."""
    monkeypatch.setattr(recall, "mqar_accuracy", lambda *_, **__: 1.0)
    config = quickstart()
    assert config.model.vocab_size > BYTES.vocab_size
    settings = tasks.Settings(lengths=(33,), entries=(4,), limit=3)
    result = tasks.run_task("mqar", tasks.Subject(config, None, None, BYTES), settings)
    assert result["sha256"] == {"4 pairs in 33": fingerprint(mqar_rows(257, 256, 33, 4, 3)[0])}
