"""Records what other programs make of GGUF files: gguf.json, which tests/test_gguf*.py read.

    python tests/golden/gguf_oracles.py

Needs the packages gguf, sentencepiece and llama-cpp-python, and chalot's own. Recorded are hashes
of blocks decoded by `gguf`, ids of the bundled vocabulary under every pre-tokenizer by llama.cpp,
small vocabularies by sentencepiece with the ids that it and llama.cpp give, and llama.cpp's logits
of tiny models of every architecture.
"""

import hashlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import sentencepiece

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "src")]

from chalot.demo import FOLDER  # noqa: E402
from chalot.formats.gguf.blocks import TYPES  # noqa: E402
from chalot.formats.gguf.splits import SPLITS  # noqa: E402
from gguf_cases import TEXTS, bundled_vocabulary, decoded_hash, random_blocks  # noqa: E402
from gguf_files import model_metadata, pack  # noqa: E402
from gguf_models import CASES, IDS, WORDS, model_file  # noqa: E402

OUT = Path(__file__).with_name("gguf.json")
PIECES = 420


def llama_ids(metadata: dict[str, Any], folder: Path) -> list[list[int]]:
    """llama.cpp's ids of TEXTS, with the beginning of text where the file says so."""
    path = folder / "vocabulary.gguf"
    path.write_bytes(pack(model_metadata() | metadata))
    options = llama_cpp.llama_model_default_params()
    options.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    assert model, path
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    found = []
    for text in TEXTS:
        raw = text.encode()
        room = len(raw) + 16
        buffer = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), buffer, room, True, False)
        found.append(list(buffer[:count]))
    llama_cpp.llama_model_free(model)
    return found


def pieces(kind: str, prefix: bool, folder: Path) -> dict[str, Any]:
    """A small vocabulary trained by sentencepiece, with ids."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        input=str(FOLDER / "calibration.txt"),
        model_writer=model,
        model_type=kind,
        vocab_size=PIECES,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        hard_vocab_limit=False,
        add_dummy_prefix=prefix,
        minloglevel=2,
    )
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    kinds = ("is_unknown", 2), ("is_control", 3), ("is_byte", 6)
    ids = range(trained.vocab_size())
    found = {
        "model": kind,
        "tokenizer.ggml.tokens": [trained.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [trained.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [
            next((n for what, n in kinds if getattr(trained, what)(i)), 1) for i in ids
        ],
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    metadata = {
        **{key: value for key, value in found.items() if key != "model"},
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": np.array(found["tokenizer.ggml.scores"], "<f4"),
        "tokenizer.ggml.token_type": np.array(found["tokenizer.ggml.token_type"], "<i4"),
        "tokenizer.ggml.bos_token_id": 1,
    }
    found["ids"] = [[1, *trained.encode(text)] for text in TEXTS]
    found["llama.cpp"] = llama_ids(metadata, folder)
    return found


def llama_logits(name: str, folder: Path) -> dict[str, Any]:
    """llama.cpp's logits of a tiny model: of the last token, and the likeliest after each."""
    path = folder / "model.gguf"
    path.write_bytes(model_file(name))
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = 256, 1, 1
    options.type_k = options.type_v = gguf.GGMLQuantizationType.F32
    options.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, options)
    assert context, name
    batch = llama_cpp.llama_batch_init(len(IDS), 0, 1)
    batch.n_tokens = len(IDS)
    for i, token in enumerate(IDS):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    assert llama_cpp.llama_decode(context, batch) == 0
    shape = len(IDS), WORDS
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape).copy()
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return {
        "last": [round(float(x), 4) for x in found[-1]],
        "top": found.argmax(axis=1).tolist(),
        "spread": round(float(found.max() - found.min()), 4),
    }


def main() -> None:
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    blocks = {}
    for kind in TYPES.values():
        if kind.decode is not None:
            raw = random_blocks(kind)
            with np.errstate(all="ignore"):
                number = gguf.GGMLQuantizationType(kind.number)
                blocks[kind.name] = decoded_hash(gguf.quants.dequantize(raw, number))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        splits = {name: llama_ids(bundled_vocabulary(name), folder) for name in SPLITS}
        trained = [pieces(k, p, folder) for k in ("bpe", "unigram") for p in (True, False)]
        models = {name: llama_logits(name, folder) for name in CASES}
    found = {"blocks": blocks, "splits": splits, "sentencepiece": trained, "models": models}
    OUT.write_text(json.dumps(found, ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8")
    print(f"{OUT}: {len(OUT.read_bytes()):,} bytes, {hashlib.sha256(OUT.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
