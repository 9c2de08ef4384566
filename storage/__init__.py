"""The soft-label table, and every error that a user can cause. Never imports torch, transformers or Prefect.

``__init__.pyi`` lists the public names. Each is loaded on first access, so that importing an error class imports only
its own module.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
