"""The project's operators: importing this package registers all of them with ``torch.library``.

One file per operator: how it computes, what it means to autograd and in plain operations, and a typed view of its nodes.
:mod:`aqnfx.ops.table` lists those that passes insert. ``aqnfx.ops.inductor``, which loads Inductor, is imported where it is used.
"""

from aqnfx.ops import row_keys, table  # noqa: F401  (registers them)
