"""The probes of a frozen backbone: arrays in, numbers out."""

from fastrot.probes.lowshot import drawn_targets, low_shot
from fastrot.probes.neighbours import knn
from fastrot.probes.svm import voc_svm

__all__ = ["drawn_targets", "knn", "low_shot", "voc_svm"]
