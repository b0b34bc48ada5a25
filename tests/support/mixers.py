"""The mixers that a test takes one by one."""

import pytest

from idattn.choices import MIXERS

# Made of what the others are made of; they are with the slow tests.
ALIKE = ("interdomain_norope", "s4d_rope", "dual_linear", "dual_linear_norope", "single_query_norope")
EACH = [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in MIXERS]
