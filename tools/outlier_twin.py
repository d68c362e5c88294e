"""Writes the outlier twin of a Hugging Face folder.

    python tools/outlier_twin.py SOURCE_FOLDER OUT_FOLDER

The same function with the outliers of large models; what it does and why is in
`chalot.demo.twin`. Weights are stored as bfloat16, so the twin of a bfloat16 checkpoint is exact.
"""

import argparse
from pathlib import Path

from chalot.demo import write_twin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder with config.json and *.safetensors")
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    write_twin(arguments.source, arguments.out)


if __name__ == "__main__":
    main()
