"""Measures of trained models, and the baselines next to them."""
