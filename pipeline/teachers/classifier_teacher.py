"""A teacher that gives distributions over classes: a sequence classifier.

The sequences are made by ``sequences.whole_documents``.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from softlabel.pipeline.models.padding import padded, padding_id
from softlabel.pipeline.teachers.teacher import TransformersTeacher


class ClassifierTeacher(TransformersTeacher):
    """A sequence classifier run by transformers. Its logits are over classes, one row per sequence."""

    @torch.inference_mode()
    def logits(
        self, sequences: Sequence[NDArray[np.int32]], positions: Sequence[NDArray[np.int32]]
    ) -> Iterator[torch.Tensor]:
        """See ``Teacher.logits``; each sequence has one position, whose logits depend on the whole sequence."""
        inputs = padded(sequences, padding_id(self._model, self.checkpoint.tokenizer))
        yield self._model(**{name: values.to(self.device) for name, values in inputs.items()}).logits
