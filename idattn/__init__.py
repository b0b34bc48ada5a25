"""Interdomain Attention in JAX: a token mixer whose queries read a fixed-size state by content."""

__version__ = "0.1.0"
