"""Compiles the kernels of a capture for this CPU, into the folder that NUMBA_CACHE_DIR names."""

import torch

from softlabel.pipeline.config.capture import SelectionConfig
from softlabel.pipeline.selection.select import select
from softlabel.pipeline.selection.selection import Selection

logits, ids = torch.randn(2, 1000), torch.zeros(2, dtype=torch.int64)
for dtype in (torch.bfloat16, torch.float32):
    select(logits.to(dtype), ids, ids, Selection.of(SelectionConfig()), 1000)
