#!/usr/bin/env python3
"""An f16 GGUF with its matrices in MXFP4, which llama.cpp's quantiser makes of experts only.

    python benchmarks/peers/gguf_mxfp4.py F16.gguf OUT.gguf

Needs the `gguf` package, whose quantiser and writer are used.
"""

import argparse
from pathlib import Path

import gguf

MXFP4 = gguf.GGMLQuantizationType.MXFP4
MADE = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture"}


def convert(source: Path, out: Path) -> None:
    reader = gguf.GGUFReader(source)
    family = reader.fields["general.architecture"].contents()
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, family)
    for field in reader.fields.values():
        if field.name not in MADE:
            kind, *inner = field.types
            writer.add_key_value(field.name, field.contents(), kind, inner[-1] if inner else None)
    for tensor in reader.tensors:
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        blocks = gguf.quants.quantize(tensor.data.astype("float32"), MXFP4)
        writer.add_tensor(tensor.name, blocks, raw_dtype=MXFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write an f16 GGUF again in MXFP4.")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    convert(arguments.source, arguments.out)


if __name__ == "__main__":
    main()
