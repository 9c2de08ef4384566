"""The package that ``storage``, ``pipeline`` and ``flows`` are installed in, as ``softlabel.storage`` and so on.

It holds nothing. It is a package of its own, and not a namespace that any folder could add to, so that a folder named
``softlabel`` in the working folder or elsewhere on the path can't put its modules in the place of ours.
"""
