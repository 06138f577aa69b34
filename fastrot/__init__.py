"""fastrot: pretrain ResNets by predicting image rotations, fast and exactly."""

__version__ = "0.1.0"
