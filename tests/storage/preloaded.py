"""Imported once, by the process from which those of the tests fork: what each of them would have to load again."""

import numpy as np

from softlabel.storage.codec import encode
from tests.numberings import random_numbering
from tests.storage.tables import VOCABULARY, random_labels

encode(random_labels(1), np.array([1]), random_numbering(VOCABULARY))  # loads the compiled kernels
