"""Per-row affine codes beside chalot's own schemes of the same width: relative errors on a model.

    python benchmarks/rows.py [FOLDER]      (default: the bundled model)

|w' - w| / |w| over all matrices, and of the worst of them; schemes that this build has.
"""

import sys
from pathlib import Path

import numpy as np

from chalot.demo import FOLDER
from chalot.formats.checkpoint import open_checkpoint
from chalot.quant import codes
from chalot.quant.rows import dequantize_rows, quantize_rows
from chalot.quant.scheme import SCHEMES

OWN = {8: ("int8",), 4: ("nl4", "int4"), 2: ("nl2",), 1: ("sign", "ternary")}


def main(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    matrices = [t.name for t in checkpoint.tensors.values() if len(t.shape) == 2]
    lost: dict[str, list[float]] = {}
    had = []
    for name in matrices:
        w = checkpoint.float32(name)
        had.append(float(np.vdot(w, w)))
        for bits, own in OWN.items():
            made = {f"{bits} bits a row": dequantize_rows(quantize_rows(w, bits))}
            for scheme in own:
                if scheme in SCHEMES:
                    made[scheme] = codes.dequantize(codes.quantize(w, SCHEMES[scheme]))
            for form, again in made.items():
                lost.setdefault(form, []).append(float(np.vdot(again - w, again - w)))
    checkpoint.close()
    print(f"{len(matrices)} matrices of {folder.name}")
    for form, errors in lost.items():
        worst = max((e / h) ** 0.5 for e, h in zip(errors, had, strict=True))
        print(f"{form:>14}  {(sum(errors) / sum(had)) ** 0.5:7.2%}  worst {worst:7.2%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
