"""Measures of trained models, and the baselines beside them."""
