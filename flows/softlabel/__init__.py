"""The package that contains ``storage``, ``pipeline`` and ``flows`` when they are installed.

It has no code of its own. It is a regular package, not a namespace package, so that another folder named ``softlabel``
on the import path can't replace our modules with its own.
"""
