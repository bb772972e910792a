"""Data sets: which exist and how they are read and prepared, and how they become batches.

`stream` (Grain, Pillow) is imported by name: not everybody who trains on digits needs it.
"""

from resvariants.data.augmentation import Augmentation, normalisation, register_augmentation
from resvariants.data.batches import TrainingBatches, evaluation_batches, split_validation
from resvariants.data.preparation import prepare
from resvariants.data.sets import DATA_SETS, find, load, register_dataset
from resvariants.data.splits import DataSet, Source, Split, Stream

__all__ = [
    "DATA_SETS",
    "Augmentation",
    "DataSet",
    "Source",
    "Split",
    "Stream",
    "TrainingBatches",
    "evaluation_batches",
    "find",
    "load",
    "normalisation",
    "prepare",
    "register_augmentation",
    "register_dataset",
    "split_validation",
]
