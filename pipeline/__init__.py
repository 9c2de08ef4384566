"""The pipeline as plain Python: capture, train, evaluate, reprocess. Needs torch and transformers, but not Prefect.

``__init__.pyi`` lists the public names. Each is imported on first use, so that the loss, the selection and the teacher
also work without polars, deltalake or Prefect.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
