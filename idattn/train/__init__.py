"""Training: `train(config, workdir)`."""

from idattn.train.loop import train
from idattn.train.trackers import Tracker

__all__ = ["Tracker", "train"]
