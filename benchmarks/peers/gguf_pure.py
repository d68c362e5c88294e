#!/usr/bin/env python3
"""An f16 GGUF with its matrices in one type that llama.cpp's own tool does not make of any model.

    python benchmarks/peers/gguf_pure.py F16.gguf OUT.gguf IQ2_S

That tool makes MXFP4 of experts only, and IQ2 only with an importance matrix; here every weight is
as important as any other. Blocks are ggml's, by ggml_quantize_chunk.
"""

import argparse
import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

MADE = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture"}


def quantizer() -> ctypes.CDLL:
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, pointer, pointer),
        *(count, count, count, pointer),
    ]
    return ggml


def blocks(ggml: ctypes.CDLL, weights: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """(rows, bytes of a row) uint8."""
    rows, columns = weights.shape
    weights = np.ascontiguousarray(weights, np.float32)
    in_block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((rows, columns // in_block * nbytes), np.uint8)
    equal = np.ones(columns, np.float32)
    made = ggml.ggml_quantize_chunk(
        kind, weights.ctypes.data, out.ctypes.data, 0, rows, columns, equal.ctypes.data
    )
    assert made == out.nbytes, (made, out.nbytes)
    return out


def convert(source: Path, out: Path, kind: gguf.GGMLQuantizationType) -> None:
    ggml, reader = quantizer(), gguf.GGUFReader(source)
    family = reader.fields["general.architecture"].contents()
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, family)
    for field in reader.fields.values():
        if field.name not in MADE:
            types, *inner = field.types
            writer.add_key_value(field.name, field.contents(), types, inner[-1] if inner else None)
    for tensor in reader.tensors:
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            writer.add_tensor(tensor.name, blocks(ggml, tensor.data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write an f16 GGUF again in one type.")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("type", choices=[t.name for t in gguf.GGMLQuantizationType])
    arguments = parser.parse_args()
    convert(arguments.source, arguments.out, gguf.GGMLQuantizationType[arguments.type])


if __name__ == "__main__":
    main()
