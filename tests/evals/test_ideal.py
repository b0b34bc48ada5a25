"""The ideal layer's errors: which fall, with what, and which do not."""

import numpy as np

from idattn.evals.ideal import error_by_features, error_by_modes, s4d_residual


def test_modes_converge_for_smooth_signals():
    """By degree, until what a token's finite length leaves: a quarter with twice the tokens."""
    errors, more = (error_by_modes("smooth", (1, 2, 4, 8, 16, 32), T=T) for T in (128, 256))
    assert (np.diff(more) < 0).all()
    assert more[3] > 0.1 and more[5] < 1e-3
    assert 3.5 < errors[5] / more[5] < 4.5


def test_modes_do_not_converge_for_white_noise():
    """A quarter as many modes as tokens still miss most of the numerator, which has no low degrees to speak of."""
    errors = np.array([error_by_modes("noise", (1, 16, 64), seed=seed) for seed in range(3)]).mean(axis=0)
    assert (errors > 0.6).all()
    assert errors[2] > 0.75 * errors[0]


def test_features_converge_to_the_kernel():
    """Positive features by a slower rate than cosines and sines, whose denominators cross zero."""
    counts = (8, 64, 512)
    positive, fourier = (error_by_features(kind, counts, draws=16) for kind in ("positive", "fourier"))
    assert (np.diff(positive.error) < 0).all() and positive.error[2] < 0.5 * positive.error[0]
    assert (positive.not_positive == 0).all()
    assert (fourier.error[:-1] > 2 * fourier.error[1:]).all()
    assert fourier.not_positive[0] > 0.1 > fourier.not_positive[1] > fourier.not_positive[2] > 0


def test_fixed_modes_follow_legs_over_one_range_of_lengths():
    """More modes explain more of it; beyond some 15 / delta tokens none do, which a smaller step size moves out."""
    few, more = (s4d_residual(M, 0.1, (100,)) for M in (8, 32))
    assert more < 0.01 < few
    long, slower = (s4d_residual(32, delta, (1000,)) for delta in (0.1, 0.01))
    assert long > 0.5 and slower < 0.01
    assert s4d_residual(32, 0.01, (50,)) < 1e-2  # fewer tokens than real modes
