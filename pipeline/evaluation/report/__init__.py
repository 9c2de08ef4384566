"""The report of an evaluation, in a ``folder``: its ``content``, the ``page`` that shows it, and its ``scores``."""
