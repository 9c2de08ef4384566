"""Compiles the kernels of a capture for this CPU, into the folder that NUMBA_CACHE_DIR names."""

import numpy as np
import torch

from softlabel.pipeline.config.capture import SelectionConfig
from softlabel.pipeline.selection.select import select
from softlabel.pipeline.selection.selection import Selection
from softlabel.storage.codec import encode
from softlabel.storage.numbering import Numbering

logits, ids = torch.randn(2, 1000), torch.zeros(2, dtype=torch.int64)
lists = np.array([[0], [1]], np.int32)  # only with several clusters are there all kernels of the table
numbering = Numbering(np.arange(1000, dtype=np.int32), lists, np.arange(1001, dtype=np.int32))
for dtype in (torch.bfloat16, torch.float32):
    labels = select(logits.to(dtype), ids, ids, Selection.of(SelectionConfig()), 1000)
    encode(labels, np.array([2]), numbering)
