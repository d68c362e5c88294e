"""Hostile files: named cases, and whole files changed at random, for every reader of chalot.

A module of this folder for each kind of file. `CASES` there are files that must be refused, with a
part of what is said; `Reader` makes a whole file, changes it where its format has structure, and
reads it as the commands do, to the end. `tests/test_attacks.py` runs all of it, bounded, and
`python tests/attack.py --reader gguf --seconds 600 --seed 7` for longer.
"""

READERS = (
    *("safetensors", "shards", "packed", "gguf", "npz", "myai", "older_myai", "config"),
    *("tokenizer", "tables", "plan", "session", "calibration", "transcript", "kept"),
)
