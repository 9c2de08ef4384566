"""What is done, as plain Python: capture, train, evaluate, reprocess. Torch, transformers and the table; never Prefect.

``__init__.pyi`` lists the public names, once. Each is loaded when it is first asked for, so that the loss, the
selection and the teacher also work where polars, deltalake or Prefect are absent.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
