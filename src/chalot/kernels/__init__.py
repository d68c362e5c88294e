"""Arithmetic: a handful of fused operations, each with a numpy oracle.

`product` and `attention` take numpy arrays; docs/parts.md has an example of each. Models run as
programs (kernels/program.py) on a `Backend`.
"""

from chalot.kernels.backend import Backend, instruction_sets, open_backend
from chalot.kernels.parts import attention, product

__all__ = ["Backend", "attention", "instruction_sets", "open_backend", "product"]
