"""The soft-label table, and every error that a user can cause. Never torch, transformers or Prefect.

``__init__.pyi`` lists the public names, once. Each is loaded when it is first asked for, so that an error costs no more
than its own module.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
