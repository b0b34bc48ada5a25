"""The small model that reads bytes in the evaluations' tests."""

import pytest
from support.models import make_model

from idattn.inference import Decoder


@pytest.fixture(scope="module")
def model():
    return make_model("s4d", vocab_size=257)


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model, chunk_size=16, block_size=8)
