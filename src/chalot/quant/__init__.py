"""Numbers to codes: schemes, grids, packing. Knows no files and no models; numpy only.

    codes = quantize(weights, Scheme.parse("nl4"))      # float32 (rows, columns)
    matrix = as_matrix(weights, Scheme.parse("nl4"))    # as kernels read it
    again = dequantize(unpack(matrix.data, matrix.scheme, matrix.shape))

docs/parts.md has an example of each.
"""

from chalot.quant.coarse import absmean
from chalot.quant.codes import Codes, dequantize, quantize, values
from chalot.quant.grids import tables_of
from chalot.quant.packing import Matrix, as_matrix, pack, stored_bytes, unpack
from chalot.quant.scheme import SCHEMES, Scheme

__all__ = [
    "SCHEMES",
    "Codes",
    "Matrix",
    "Scheme",
    "absmean",
    "as_matrix",
    "dequantize",
    "pack",
    "quantize",
    "stored_bytes",
    "tables_of",
    "unpack",
    "values",
]
