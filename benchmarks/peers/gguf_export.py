#!/usr/bin/env python3
"""A Hugging Face folder as a GGUF file of f16 matrices and f32 vectors, where llama.cpp starts.

    python benchmarks/peers/gguf_export.py FOLDER OUT.gguf

Knows Llama and Qwen2 with one model.safetensors and a byte-level BPE that splits like Qwen2: the
checkpoints of make_models.py and the bundled one. Needs the `gguf` package and no torch, which the
converter inside llama.cpp does need. Keys and names follow that converter, so that the types made
from this file are the ones that anybody would get.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {"qwen2": gguf.MODEL_ARCH.QWEN2, "llama": gguf.MODEL_ARCH.LLAMA}
SUFFIXES = (".weight", ".bias")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view({"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


def read_safetensors(path: Path) -> Iterator[tuple[str, list[int], Any]]:
    """(name, shape, function that reads it as float32) of every tensor, in file order."""
    raw = np.memmap(path, np.uint8, "r")
    start = 8 + int(raw[:8].view("<u8")[0])
    header = json.loads(raw[8:start].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        first, last = (start + offset for offset in entry["data_offsets"])
        shape, dtype = entry["shape"], entry["dtype"]
        yield name, shape, lambda a=first, b=last, s=shape, d=dtype: float32(raw[a:b], d).reshape(s)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from half-split rope to the interleaved rope of llama-family GGUFs."""
    rows, *columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, *columns)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def add_configuration(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_name(Path(writer.path or "model").stem)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    if config["model_type"] == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = read_json(folder / "tokenizer.json")
    size = config["vocab_size"]
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [gguf.TokenType.UNUSED] * size
    for text, i in tokenizer["model"]["vocab"].items():
        tokens[i], kinds[i] = text, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], special
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for name, add in (("eos", writer.add_eos_token_id), ("bos", writer.add_bos_token_id)):
        ids = config.get(f"{name}_token_id")
        if ids is not None:
            add(ids[0] if isinstance(ids, list) else ids)
    writer.add_add_bos_token(False)
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if template:
        writer.add_chat_template(template)


def export(folder: Path, out: Path) -> None:
    config = read_json(folder / "config.json")
    family, layers = config["model_type"], config["num_hidden_layers"]
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, family)
    add_configuration(writer, config)
    add_tokenizer(writer, folder, config)
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], layers)
    heads = {".q_proj.": config["num_attention_heads"], ".k_proj.": config["num_key_value_heads"]}

    def converted(name: str, read: Any) -> np.ndarray:
        weight = read()
        for part, count in heads.items():
            if family == "llama" and part in name:
                weight = interleaved(weight, count)
        return weight.astype(np.float16) if weight.ndim > 1 else weight

    tensors = list(read_safetensors(folder / "model.safetensors"))
    for name, shape, _ in tensors:
        known = names.get_name(name, try_suffixes=SUFFIXES)
        if known is None:
            raise SystemExit(f"{folder}: no GGUF name for tensor {name} in a {family} model")
        kind = np.dtype(np.float16 if len(shape) > 1 else np.float32)
        writer.add_tensor_info(known, shape, kind, int(np.prod(shape)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, _, read in tensors:
        writer.write_tensor_data(converted(name, read))
    writer.close()
    partial.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a Hugging Face folder as an f16 GGUF.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    export(arguments.folder, arguments.out)


if __name__ == "__main__":
    main()
