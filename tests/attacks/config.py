"""A config.json of each family, in the folder of a model."""

import json
import math
from pathlib import Path
from random import Random

from attacks.changes import BOMBS, as_json, changed_bytes, changed_json
from attacks.reader import Reader as Base
from chalot.checking import read_config
from chalot.formats.checkpoint import open_checkpoint
from chalot.formats.documents import DOCUMENTS
from chalot.model.config import inverse_frequencies
from chalot.model.layers import model_tensors
from chalot.model.rope import LEAST_FACTOR
from myai_files import checkpoint
from test_hostile_configs import BASES

FILE = "config.json"

CASES = {  # name -> (the file, part of the message)
    **{f"bomb: {name}": (bomb, "found more than") for name, bomb in BOMBS.items()},
    "list": (b"[]", "expected an object"),
    "deep": (b'{"a":' * 100_000, "nested too deeply"),
    "too long": (b" " * (DOCUMENTS[FILE] + 1), "found more than 4,000,000 bytes"),
    "twice": (b'{"model_type": "llama", "model_type": "qwen2"}', "is there twice"),
    "surrogate": (b'{"model_type": "\\udc00"}', "is not JSON"),
    "2^24 layers": (as_json(BASES["qwen3"] | {"num_hidden_layers": 1 << 24}), "from 1 to 4,096"),
    "digits": (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not JSON"),
}


class Reader(Base):
    """Every family's, beside weights that are not looked at."""

    file = FILE

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        checkpoint(folder)

    def write(self, rng: Random | None) -> None:
        """See Base."""
        base = BASES["llama" if rng is None else rng.choice(list(BASES))]
        text = json.dumps(base).encode()
        if rng is not None:
            few = rng.random() < 0.2
            text = changed_bytes(text, rng) if few else as_json(changed_json(base, rng, 2))
        (self.folder / FILE).write_bytes(text)

    def read(self) -> None:
        """See Base."""
        source = open_checkpoint(self.folder)
        try:
            config = read_config(source)
            assert all(math.isfinite(s := config.scale(i)) and s > 0 for i in range(config.layers))
            assert all(n >= 1 for spec in model_tensors(config) for n in spec.shape)
            frequencies = inverse_frequencies(config)
            assert frequencies.shape == config.rope_shape
            assert ((frequencies >= 0) & (frequencies <= 1 / LEAST_FACTOR)).all()
        finally:
            source.close()
