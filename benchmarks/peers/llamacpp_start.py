"""llama.cpp from process start to a first token, for startup.py; stock settings but for threads.

    python peers/llamacpp_start.py MODEL.gguf PROMPT THREADS CONTEXT FILL

Says on stdout, in JSON, as soon as it has the first token, how long the imports took; then, if FILL
is not 0, what is resident after so many tokens.
"""

import time

BEGIN = time.perf_counter()
import ctypes  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import llama_cpp as llama  # noqa: E402

IMPORTED = time.perf_counter()
STEP = 512  # tokens of one call


def tokens_of(vocabulary: ctypes.c_void_p, text: bytes) -> ctypes.Array[ctypes.c_int32]:
    room = (llama.llama_token * (len(text) + 8))()
    count = llama.llama_tokenize(vocabulary, text, len(text), room, len(room), True, False)
    return (llama.llama_token * count)(*room[:count])


def resident() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) * 1024


def main() -> None:
    path, prompt, threads, size, fill = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    options = llama.llama_context_default_params()
    options.n_ctx = size
    options.n_threads = options.n_threads_batch = threads
    context = llama.llama_init_from_model(model, options)
    vocabulary = llama.llama_model_get_vocab(model)

    def decode(ids: ctypes.Array[ctypes.c_int32]) -> None:
        if llama.llama_decode(context, llama.llama_batch_get_one(ids, len(ids))):
            raise SystemExit("llama_decode failed")

    decode(tokens_of(vocabulary, prompt.encode()))
    sampler = llama.llama_sampler_init_greedy()
    token = llama.llama_sampler_sample(sampler, context, -1)
    piece = ctypes.create_string_buffer(64)
    llama.llama_token_to_piece(vocabulary, token, piece, len(piece), 0, True)
    ended = time.perf_counter()
    print(json.dumps({"imports": IMPORTED - BEGIN, "after_imports": ended - IMPORTED}), flush=True)
    if fill:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        for at in range(0, fill, STEP):
            count = min(STEP, fill - at)
            decode((llama.llama_token * count)(*(n * 7919 % 1000 for n in range(at, at + count))))
        print(json.dumps({"resident": resident()}), flush=True)


if __name__ == "__main__":
    main()
