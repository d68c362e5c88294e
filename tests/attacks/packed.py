"""Folders that others quantised: what config.json says of the codes, and the codes' tensors."""

import json
from pathlib import Path
from random import Random

from attacks.changes import as_json, changed_bytes, changed_json
from attacks.reader import Reader as Base
from chalot.formats.checkpoint import open_checkpoint
from test_packed import Made, compressed, folder_of, gptq

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MADE = Made(16, 64, 4, 32, zeros=True, seed=1)
KINDS = (
    (gptq(4, 32), MADE.gptq()),
    (gptq(4, 32, desc_act=True, sym=False), MADE.gptq()),
    ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, MADE.awq()),
    (compressed("pack-quantized", 4, 32), MADE.packed()),
    (compressed("int-quantized", 8, 32), Made(16, 64, 8, 32, zeros=True, seed=2).plain()),
)


class Reader(Base):
    """A matrix of each kind."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.wholes = []
        for quantization, parts in KINDS:
            folder_of(folder, quantization, parts)
            self.wholes.append([(folder / name).read_bytes() for name in (CONFIG, WEIGHTS)])

    def write(self, rng: Random | None) -> None:
        """See Base."""
        config, weights = self.wholes[0] if rng is None else rng.choice(self.wholes)
        begin = 8 + int.from_bytes(weights[:8], "little")
        chosen = 1.0 if rng is None else rng.random()
        if rng is not None and chosen < 0.5:
            config = as_json(changed_json(json.loads(config), rng))
        elif rng is not None and chosen < 0.8:
            header = as_json(changed_json(json.loads(weights[8:begin]), rng, 1))
            weights = len(header).to_bytes(8, "little") + header + weights[begin:]
        elif rng is not None:
            weights = weights[:begin] + changed_bytes(weights[begin:], rng)
        (self.folder / CONFIG).write_bytes(config)
        (self.folder / WEIGHTS).write_bytes(weights)

    def read(self) -> None:
        """See Base."""
        source = open_checkpoint(self.folder)
        try:
            for name, info in source.tensors.items():
                source.float32(name, 0, min(3, info.shape[0]) if info.shape else 1)
        finally:
            source.close()
