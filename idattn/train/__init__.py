"""Training: `train(config, workdir)`."""

from idattn.train.loop import train

__all__ = ["train"]
