"""The paper's numbers, entered a second time as its tables have them, and what they say of each other."""

import math

import pytest

from idattn.evals.harness import LISTS
from idattn.evals.paper import RESULTS

# Tables 6, 7 and 9 at 1.3B: softmax, interdomain, s4d; in percent where the paper has percent.
PERCENT = """
lambada_openai acc 39.43 44.36 25.64
piqa acc 69.42 71.38 71.00
hellaswag acc_norm 48.53 54.27 49.34
winogrande acc 54.22 57.85 53.83
arc_easy acc 65.87 69.91 60.86
arc_challenge acc_norm 33.02 37.46 33.36
social_iqa acc 40.28 41.45 41.10
boolq acc 61.28 59.63 60.37
commonsense mean 51.51 54.54 49.44
longbench14 mean 12.40 12.29 8.57
swde contains 60.58 17.46 6.57
fda contains 50.45 9.53 0.36
squad_completion contains 11.33 33.78 14.91
passkey 1024 99.5 65.5 0
passkey 2048 100 28 0
passkey 4096 89 9.5 0
passkey 8192 0 3.5 0
phonebook 16 54.5 0 0
phonebook 32 52 0 0
phonebook 64 45.5 0 0
phonebook 128 24 0 0
"""
PLAIN = """
perplexity loss 2.155 2.077 2.212
lambada_openai perplexity 21.03 14.76 41.02
wikitext word_perplexity 20.55 19.77 25.27
wikitext bits_per_byte 0.8156 0.8051 0.8713
"""
# Table 8: softmax, interdomain and s4d, each at 4K, 8K and 14K.
CORPORA = """
pg19 16.34 26.78 70.95 15.86 15.73 15.94 19.96 19.75 19.66
codeparrot 12.13 22.23 74.85 17.62 17.31 17.48 53.10 52.44 52.16
govreport 7.33 12.20 31.76 7.36 7.27 7.29 9.19 9.07 9.01
narrativeqa 21.28 34.36 92.75 22.85 22.67 22.99 36.83 36.42 36.26
qasper 14.43 22.94 60.08 15.75 15.52 15.63 23.53 23.22 23.13
qmsum 13.74 18.57 41.96 15.20 14.88 14.94 30.44 29.97 29.80
mean 12.79 20.54 55.92 14.36 14.14 14.26 27.24 26.89 26.75
"""
# Table 4 at 125M: validation loss, perplexity, percent against softmax.
ABLATION = """
interdomain 2.8020 16.48 -1.02
interdomain_norope 2.8038 16.51 -0.84
softmax 2.8122 16.65 0
single_query 2.8298 16.94 1.78
s4d 2.9561 19.22 15.48
s4d_rope 2.9844 19.77 18.79
dual_linear 3.0048 20.18 21.23
"""
MIXERS = ("softmax", "interdomain", "s4d")
LENGTHS = (4096, 8192, 14336)


def test_every_number_was_entered_twice():
    expected = {}
    for table, scale in ((PERCENT, 100), (PLAIN, 1)):
        for task, metric, *values in (line.split() for line in table.strip().split("\n")):
            expected[task, metric] = ("1.3B", [float(x) / scale for x in values])
    for corpus, *values in (line.split() for line in CORPORA.strip().split("\n")):
        for n, length in enumerate(LENGTHS):
            expected["length", f"{corpus} {length}"] = ("1.3B", [float(x) for x in values[n::3]])
    cells = {name: values for name, *values in (line.split() for line in ABLATION.strip().split("\n"))}
    scale, perplexities = RESULTS["perplexity", "perplexity"]
    assert scale == "125M" and perplexities == {name: float(values[1]) for name, values in cells.items()}
    for loss, perplexity, change in cells.values():
        assert math.exp(float(loss)) == pytest.approx(float(perplexity), abs=0.006)
        assert 100 * (math.exp(float(loss) - 2.8122) - 1) == pytest.approx(float(change), abs=0.02)
    others = {key: result for key, result in RESULTS.items() if key != ("perplexity", "perplexity")}
    assert others.keys() == expected.keys()
    for key, (scale, values) in expected.items():
        assert others[key] == (scale, pytest.approx(dict(zip(MIXERS, values, strict=True)), rel=1e-12)), key


def test_means_are_of_their_tasks():
    for mixer in MIXERS:
        eight = [next(r[1][mixer] for k, r in RESULTS.items() if k[0] == name and k[1] in ("acc", "acc_norm"))
                 for name in LISTS["commonsense"]]  # fmt: skip
        assert sum(eight) / 8 == pytest.approx(RESULTS["commonsense", "mean"][1][mixer], abs=6e-5)
        for length in LENGTHS:  # without NarrativeQA
            five = [RESULTS["length", f"{name} {length}"][1][mixer]
                    for name in ("pg19", "codeparrot", "govreport", "qasper", "qmsum")]  # fmt: skip
            assert sum(five) / 5 == pytest.approx(RESULTS["length", f"mean {length}"][1][mixer], abs=0.011)
        words, bits = (RESULTS["wikitext", name][1][mixer] for name in ("word_perplexity", "bits_per_byte"))
        assert math.log2(words) / bits == pytest.approx(5.347, abs=2e-3)  # bytes of a word
