"""Verbs: a file each, with `arguments(parser)` and `main(arguments)`, its exit code."""

VERBS = {  # in the order of `chalot --help`
    "convert": "convert a checkpoint to a .myai file, GGUF, NPZ or safetensors",
    "run": "generate text after a prompt",
    "chat": "talk to a model by its own chat template",
    "serve": "serve a model over HTTP, as OpenAI's API",
    "replay": "whether the answers of a saved transcript come out again",
    "describe": "what a model is, and whether it fits here",
    "bench": "how fast a model runs here, beside what memory allows",
    "eval": "what a model costs in quality: perplexity, KL to its source, tasks",
    "calibrate": "what a model's first layers know: for drafts and early exit",
    "plan": "which scheme for which tensor, by measured loss or by entropy",
    "upcycle": "make a mixture of experts of a dense model: copies, or slices of it",
    "compare": "a model and its smaller forms in one table and one page",
    "verify": "check every extent and checksum of a .myai file",
    "models": "short names, what is converted, what was downloaded",
    "merge": "two checkpoints of one shape into one",
    "rm": "remove a converted model",
    "validate": "how far a model's weights and answers are from its source",
    "tensor": "one weight of a model times one input",
    "tokenizer": "train a tokenizer, use any model's, compare two",
    "doctor": "what this machine has, and what chalot makes of it",
    "demo": "convert, measure and run the bundled model",
}
TALKS = {"chat", "serve"}  # and so has no --json
