"""Using a trained model."""

from idattn.inference.generate import generate

__all__ = ["generate"]
