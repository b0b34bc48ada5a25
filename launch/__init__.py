"""Thin entry points: `python -m launch.NAME`."""
