"""The sizes that the paper publishes, from the shapes of the real module: exact, or the model is another one."""

import dataclasses
import math

import pytest

from configs.paper import get_config
from idattn.choices import CELLS, CONTROLS, MIXERS, PEERS
from idattn.config import Config, SSMConfig, from_config_dict
from idattn.costs import count_parameters, describe, forward_flops_per_token, state_size, training_flops_per_token

# Table 3, and the two ends of the range that section 4 states at 125M.
PARAMETERS = {
    ("125M", "softmax"): 134_105_856,
    ("350M", "softmax"): 373_867_520,
    ("760M", "softmax"): 777_856_512,
    ("1.3B", "softmax"): 1_345_423_360,
    ("125M", "interdomain"): 135_416_208,
    ("350M", "interdomain"): 377_360_768,
    ("760M", "interdomain"): 781_498_752,
    ("1.3B", "interdomain"): 1_352_406_784,
    ("125M", "s4d"): 135_425_424,
    ("350M", "s4d"): 377_385_344,
    ("760M", "s4d"): 781_523_328,
    ("1.3B", "s4d"): 1_352_455_936,
    ("125M", "dual_linear"): 135_379_344,
    ("125M", "single_query"): 135_462_288,
}


def config_of(scale: str, mixer: str) -> Config:
    return from_config_dict(get_config(f"{scale},{mixer}"))


@pytest.mark.parametrize(("scale", "mixer"), PARAMETERS)
def test_published_parameter_counts(scale, mixer):
    counts = count_parameters(config_of(scale, mixer).model)
    assert counts["total"] == PARAMETERS[scale, mixer]
    assert set(counts) == {"total", "embedding", "head", "mixer", "mlp", "norms"}
    assert sum(counts.values()) == 2 * counts["total"]
    assert counts["embedding"] == counts["head"]


@pytest.mark.parametrize("mixer", ["interdomain_norope", "s4d_rope", "dual_linear_norope", "single_query_norope"])
def test_rope_has_no_parameters(mixer):
    assert (
        count_parameters(config_of("125M", mixer).model)["total"]
        == PARAMETERS["125M", mixer.removesuffix("_norope").removesuffix("_rope")]
    )


def test_parts_at_125m():
    assert count_parameters(config_of("125M", "softmax").model) == {
        "total": 134_105_856,
        "embedding": 32_000 * 768,
        "head": 32_000 * 768,
        "mixer": 12 * 4 * 768**2,
        "mlp": 12 * 3 * 768 * 2048,
        "norms": 12 * 2 * 768 + 768,
    }


def test_state_sizes_of_table_5():
    model = config_of("1.3B", "interdomain").model
    for context in (1, 4096, 1_000_000):
        assert state_size(model, "interdomain", context) == 32 * 16_384 == 524_288
        assert state_size(model, "s4d", context) == 524_288
        assert state_size(model, "softmax", context) == 4096 * context


# The 1.3B layer: D = 2048, F = 5504, 24 layers, 32 heads with R = E = M = 64, 4,096 tokens, V = 32,000.
# A multiplication with its addition is 2, a complex one of a real 4, of a complex 8.
UPDATE = 64 * (64 + 64) * (6 + 4)  # X <- Lambda X + B z^T: complex times complex and add; complex times real and add
READ_KEYS = 64 * 64 * 4  # X_k q: complex by real, summed over R
MIX = 2 * 64 * 64 * 4  # C y and C^T of the result: in the op's accounting 8 M^2, one product with both
READ_VALUES = 64 * 64 * 4  # the real part of w^T X_v, summed over M
CORE = 147_456
BACKBONE = 24 * 3 * 2 * 2048 * 5504 + 2 * 2048 * 32_000  # SwiGLU and the output matrix


def test_flops_of_interdomain_by_hand():
    assert UPDATE + READ_KEYS + MIX + READ_VALUES == CORE == 64 * 14 * (64 + 64) + 8 * 64**2
    projections = 2 * 4 * 2048 * 2048  # q, k, v, o
    convolutions = 2 * 2 * 4 * 2048  # four taps on q and on k
    layer = projections + convolutions + 32 * CORE
    model = config_of("1.3B", "interdomain").model
    expected = 24 * layer + BACKBONE
    assert expected == 2_673_606_656
    for context in (1, 4096, 16_384):  # does not depend on the context
        assert forward_flops_per_token(model, context) == expected
    assert training_flops_per_token(model, 4096) == 3 * expected


def test_flops_of_softmax_and_s4d_by_hand():
    # Four projections; scores and weighted values over 2,048 tokens on average, 2,048 channels each.
    softmax = 2 * 4 * 2048 * 2048 + 2 * 2 * 2048 * 2048
    assert forward_flops_per_token(config_of("1.3B", "softmax").model, 4096) == 24 * softmax + BACKBONE
    # a, b, and twice the width at the output; convolutions of a and b; the same state, read by c_out: 4 a number.
    s4d = 2 * 4 * 2048 * 2048 + 2 * 2 * 4 * 2048 + 32 * (UPDATE + 64 * 128 * 4)
    assert forward_flops_per_token(config_of("1.3B", "s4d").model, 4096) == 24 * s4d + BACKBONE


def test_ideal_by_hand():
    """At 125M with 64 modes and features: softmax's parameters; a state for every head; one matrix for all heads."""
    model = config_of("125M", "ideal").model
    assert count_parameters(model)["total"] == PARAMETERS["125M", "softmax"]
    assert state_size(model, "ideal", 4096) == 12 * 64 * (64 + 64)
    features, update, read = 2 * 2 * 64 * 64, 2 * 64**2 * 128, 2 * 64 * 128  # of a head
    layer = 2 * 4 * 768**2 + 12 * (features + update + read) + 2 * 64**3
    assert forward_flops_per_token(model, 4096) == 12 * (layer + 6 * 768 * 2048) + 2 * 768 * 32_000
    cells = {"interdomain", "interdomain_norope", "softmax", "single_query", "s4d", "s4d_rope", "dual_linear"}
    assert set(CELLS) == cells == set(MIXERS) - {"ideal", *PEERS, *CONTROLS}  # which are none of the study's seven


def test_less_of_the_layer_by_hand():
    """No convolutions: neither taps nor biases; no input norms: neither their scales nor their biases."""
    model = config_of("125M", "interdomain").model
    less = dataclasses.replace(model, ssm=SSMConfig(conv_width=0, input_norms=False))
    convolutions, norms = 2 * 5 * 768, 2 * 64 + 2 * 768
    assert count_parameters(less)["total"] == PARAMETERS["125M", "interdomain"] - 12 * (convolutions + norms)
    assert state_size(less, "interdomain", 1) == state_size(model, "interdomain", 1)
    taps = 12 * 2 * 2 * 4 * 768
    assert forward_flops_per_token(less, 1) == forward_flops_per_token(model, 1) - taps


def test_a_denominator_by_hand():
    """A channel more in every state, of which the update takes 10 operations a mode, and the readout 4."""
    model = config_of("125M", "interdomain").model
    divided = dataclasses.replace(model, ssm=SSMConfig(denominator=True))
    assert count_parameters(divided) == count_parameters(model)
    assert state_size(divided, "interdomain", 1) == 12 * 2 * 64 * (64 + 64 + 1)
    more = 12 * 12 * 14 * 64
    assert forward_flops_per_token(divided, 1) == forward_flops_per_token(model, 1) + more


def test_random_features_by_hand():
    """Constants, no parameters; every head of queries and of keys is multiplied by a matrix of 64 frequencies."""
    model = config_of("125M", "interdomain").model
    random = dataclasses.replace(model, ssm=SSMConfig(feature_map="softmax"))
    assert count_parameters(random) == count_parameters(model)
    assert state_size(random, "interdomain", 1) == state_size(model, "interdomain", 1)
    more = 12 * 2 * 12 * 2 * 64 * 64
    assert forward_flops_per_token(random, 1) == forward_flops_per_token(model, 1) + more


def test_softmax_with_convolutions_by_hand():
    """Softmax and three convolutions: four taps and a bias for each channel; the cache, without the tails."""
    model = config_of("125M", "softmax_conv").model
    assert count_parameters(model)["total"] == PARAMETERS["125M", "softmax"] + 12 * 3 * 5 * 768
    assert state_size(model, "softmax_conv", 4096) == 2 * 768 * 4096
    more = 12 * 3 * 2 * 4 * 768
    plain = config_of("125M", "softmax").model
    assert forward_flops_per_token(model, 4096) == forward_flops_per_token(plain, 4096) + more


def test_describe():
    config = config_of("1.3B", "interdomain")
    costs = describe(config)
    assert costs == {
        "parameters": 1_352_406_784,
        "parameters_by_part": {
            "embedding": 65_536_000,
            "head": 65_536_000,
            "mixer": 24 * (4 * 2048**2 + 32 * (2 * 64**2 + 2 * 64 + 1) + 2 * 64 + 2 * 32 * 64 + 2 * 5 * 2048),
            "mlp": 24 * 3 * 2048 * 5504,
            "norms": 49 * 2048,
        },
        "context": 4096,
        "state_size_per_layer": {"interdomain": 524_288},
        "forward_flops_per_token": 2_673_606_656,
        "training_flops_per_token": 8_020_819_968,
        "training_tokens": 49_591 * 524_288,
        "bytes": {
            "parameters": 4 * 1_352_406_784,
            "optimiser": 8 * 1_352_406_784,
            "state_per_sequence": 24 * 524_288 * 4,
        },
    }
    assert math.isclose(costs["training_tokens"], 26e9, rel_tol=1e-4)
    # The softmax cache is in bfloat16.
    assert describe(config_of("1.3B", "softmax"))["bytes"]["state_per_sequence"] == 24 * 4096 * 4096 * 2
