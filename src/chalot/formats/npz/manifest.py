"""The manifest (JSON, version 2) beside an .npz of quantised weights: what it says, checked.

Two forms are met: `weights` as a list of entries with a "name", or as a map from names to entries;
sizes in `architecture`, in `model`, or whole as `metadata.config`. `format_version` is a number or
a string. Nothing is believed of an array before its own header says the same (npz.py).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from chalot.errors import FormatError, UnsupportedError
from chalot.formats.documents import DOCUMENTS, parse_json
from chalot.formats.files import check_plain_name, open_inside, quoted

VERSION = "2"
MAX_BYTES = 64_000_000
LARGEST = 1 << 24  # of a dimension: numbers of one row fit in memory
FLOATS = (16, 32, 64)  # a width of numbers, not of codes
FILE_KEYS = ("weights_file", "npz_file", "npz")
EPSILON = 1e-5  # where a manifest does not say


class Entry(NamedTuple):
    """A weight: its shape, the bits of a code, and the names of its arrays."""

    name: str
    shape: tuple[int, ...]
    bits: int
    codes: str
    scales: str | None
    zeros: str | None


class Manifest(NamedTuple):
    """A manifest, checked by itself."""

    entries: dict[str, Entry]
    config: dict[str, Any]  # as a Hugging Face config.json
    documents: dict[str, str]  # "tokenizer.json" -> name of an array
    weights_file: str | None
    weights_bytes: int | None


def read_manifest(folder: Path, name: str) -> Manifest:
    """The manifest in a file of a folder. Raises FormatError or UnsupportedError."""
    where = folder / name
    with open_inside(folder, name) as file:
        content = bytearray()
        while len(content) <= MAX_BYTES and (piece := file.read(1 << 22)):
            content += piece
    if len(content) > MAX_BYTES:
        raise FormatError(f"{where}: found more than {MAX_BYTES:,} bytes; no manifest has as many")
    return parse_manifest(parse_json(bytes(content), where), where)


def parse_manifest(found: Any, where: object) -> Manifest:
    """A parsed manifest, checked. Raises FormatError or UnsupportedError."""
    if not isinstance(found, dict) or "weights" not in found:
        raise FormatError(
            f"{where}: has no weights; expected the manifest of an .npz, or a model's folder"
        )
    version = found.get("format_version", VERSION)
    if str(version)[:20] not in ("2", "2.0"):
        raise UnsupportedError(
            f"{where}: format_version {quoted(str(version))}; chalot reads version {VERSION}"
        )
    entries = _entries(found["weights"], where)
    metadata = _mapping(found, "metadata", where)
    config = metadata.get("config")
    if not isinstance(config, dict):
        config = _config(found, entries, where)
    documents = _mapping(metadata, "documents", where)
    for document, array in documents.items():
        if document not in DOCUMENTS or not isinstance(array, str):
            raise FormatError(f"{where}: document {quoted(document)} is not known")
    named = [m[k] for m in (metadata, found) for k in FILE_KEYS if isinstance(m.get(k), str)]
    size = metadata.get("weights_bytes")
    return Manifest(
        entries,
        config,
        documents,
        check_plain_name(named[0], where) if named else None,
        size if type(size) is int else None,
    )


def _mapping(found: Mapping[str, Any], key: str, where: object) -> dict[str, Any]:
    """A part that may be missing."""
    part = found.get(key)
    if part is not None and not isinstance(part, dict):
        raise FormatError(f"{where}: {key} is {quoted(part)}, expected an object")
    return part or {}


def _entries(weights: Any, where: object) -> dict[str, Entry]:
    if isinstance(weights, dict):
        pairs = list(weights.items())
    elif isinstance(weights, list):
        pairs = [(e.get("name") if isinstance(e, dict) else None, e) for e in weights]
    else:
        raise FormatError(f"{where}: weights are {quoted(weights)}, expected a list or an object")
    found: dict[str, Entry] = {}
    for name, entry in pairs:
        if not isinstance(name, str) or not name or not isinstance(entry, dict):
            raise FormatError(f"{where}: an entry of weights is no object with a name")
        if name in found:
            raise FormatError(f"{where}: weight {quoted(name)} is there twice; expected once")
        found[name] = _entry(name, entry, f"{where}: weight {quoted(name)}")
    return found


def _entry(name: str, entry: Mapping[str, Any], where: str) -> Entry:
    shape = entry.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) not in (1, 2)
        or any(type(n) is not int or not 1 <= n <= LARGEST for n in shape)
    ):
        raise FormatError(f"{where}: shape is not one or two dimensions of 1 to {LARGEST:,}")
    quantization = _mapping(entry, "quantization", where)
    bits = entry.get("bit_width", quantization.get("bits", 32))
    if type(bits) is not int or bits not in (1, 2, 4, 8, *FLOATS):
        raise UnsupportedError(f"{where}: {quoted(str(bits))} bits; expected 1, 2, 4, 8 or floats")
    kind = quantization.get("type", "perrow_int")
    if bits < 16 and kind != "perrow_int":
        raise UnsupportedError(f"{where}: quantised as {quoted(kind)}; chalot reads perrow_int")
    axis = _mapping(entry, "scale_axis", where).get("index", 0)
    if bits < 16 and axis != 0:
        raise UnsupportedError(
            f"{where}: scales of axis {quoted(str(axis))}; chalot reads rows', 0"
        )
    arrays = [entry.get(key) for key in ("q", "q_scales", "q_zero_point")]
    if not isinstance(arrays[0], str) or any(not isinstance(a, str | None) for a in arrays):
        raise FormatError(f"{where}: q, q_scales and q_zero_point are not names of arrays")
    return Entry(name, tuple(shape), bits, arrays[0], arrays[1], arrays[2])


def _config(
    found: Mapping[str, Any], entries: Mapping[str, Entry], where: object
) -> dict[str, Any]:
    """A configuration of what the two forms say, and of the shapes where they say nothing."""
    about, model = (
        {} if isinstance(found.get(key), str) else _mapping(found, key, where)  # only its name
        for key in ("architecture", "model")
    )
    attention = _mapping(about, "attention", where)
    rope, norm = about.get("rope"), about.get("norm")

    def shape(name: str) -> tuple[int, ...]:
        entry = entries.get(name)
        return entry.shape if entry is not None else ()

    layer = "model.layers.0."
    embedding, gate = shape("model.embed_tokens.weight"), shape(layer + "mlp.gate_proj.weight")
    query, key = (shape(f"{layer}self_attn.{n}_proj.weight") for n in ("q", "k"))
    heads = attention.get("num_heads", model.get("num_heads"))
    said = {
        "hidden_size": about.get("hidden_size", model.get("hidden_dim")),
        "intermediate_size": about.get("intermediate_size", gate[0] if gate else None),
        "num_hidden_layers": about.get("num_layers", model.get("num_layers")),
        "num_attention_heads": heads,
        "vocab_size": about.get("vocab_size", embedding[0] if embedding else None),
        "max_position_embeddings": about.get("context_length", model.get("context_length", 2048)),
        "head_dim": attention.get("head_dim"),
    }
    config = {name: value for name, value in said.items() if value is not None}
    if "head_dim" not in config and query and type(heads) is int and heads > 0:
        config["head_dim"] = query[0] // heads
    size = config.get("head_dim")
    if (
        key and type(size) is int and size > 0
    ):  # `kv_groups` means heads to some, their share to others
        config["num_key_value_heads"] = key[0] // size
    if isinstance(rope, dict) and "base_theta" in rope:
        config["rope_theta"] = rope["base_theta"]
    stored = norm.get("eps", norm.get("epsilon")) if isinstance(norm, dict) else None
    config["rms_norm_eps"] = EPSILON if stored is None else stored
    config["tie_word_embeddings"] = "lm_head.weight" not in entries
    config["hidden_act"] = _activation(about.get("activation", "silu"))
    biases = [f"{layer}self_attn.{n}_proj.bias" in entries for n in ("q", "o")]
    family = model.get("family", about.get("family"))
    if not isinstance(family, str):
        family = "qwen2" if biases == [True, False] else "llama"
    family = family.lower()
    config["model_type"] = "llama" if family == "tinyllama" else family
    config["attention_bias"] = all(biases)
    return config


def _activation(said: Any) -> Any:
    """The older form's name of the feed-forward's function."""
    return "silu" if isinstance(said, str) and said.lower() in ("swiglu", "swish") else said


def encode(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it is written."""
    return (json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
