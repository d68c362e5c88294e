"""A folder with two safetensors files and their index, which is changed."""

import json
from pathlib import Path
from random import Random

from attacks.changes import changed_text
from attacks.reader import Reader as Base
from attacks.safetensors import read_folder
from chalot.formats import safetensors
from myai_files import checkpoint
from safetensors_files import INDEX

A, B = "one.safetensors", "two.safetensors"
NAMES = ("../one.safetensors", "/etc/one.safetensors", "sub/one.safetensors", "..\\one.safetensors")
NAMES += ("C:one.safetensors", "..", "", "a\0.safetensors", "x" * 300 + ".safetensors")
MAPS: dict[str, tuple[object, str]] = {  # name -> (the index, part of the message)
    **{f"name {n!r:.30}": ({"weight_map": {"a": n}}, "expected the plain name") for n in NAMES},
    "name 7": ({"weight_map": {"a": 7}}, "expected the plain name"),
    "name list": ({"weight_map": {"a": [A]}}, "expected the plain name"),
    "empty": ({}, "has no weight_map"),
    "map list": ({"weight_map": []}, "has no weight_map"),
    "map empty": ({"weight_map": {}}, "has no weight_map"),
    "list": ([], "has no weight_map"),
    "pickle": ({"weight_map": {"a": "pytorch_model.bin"}}, "expected *.safetensors"),
    "another shard": ({"weight_map": {"lm_head.weight": A, "model.norm.weight": A}}, "does not"),
    "no such tensor": ({"weight_map": {"c": A}}, "does not"),
    "many": ({"weight_map": {str(i): f"{i}.safetensors" for i in range(501)}}, "names 501 files"),
}
CASES = {name: (json.dumps(found).encode(), said) for name, (found, said) in MAPS.items()}


class Reader(Base):
    """A Qwen2 of 2 layers in two files."""

    file = INDEX

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        checkpoint(folder)
        whole = folder / "model.safetensors"
        with safetensors.SafetensorsFolder(folder) as source:
            tensors = [
                (name, info.dtype, info.shape, source.raw(name).copy())
                for name, info in source.tensors.items()
            ]
        whole.unlink()
        half = len(tensors) // 2
        files = {A: tensors[:half], B: tensors[half:]}
        self.places = {"metadata": {"total_size": 1}, "weight_map": {}}
        for file, held in files.items():
            safetensors.write(folder / file, held)
            self.places["weight_map"] |= dict.fromkeys([name for name, *_ in held], file)

    def write(self, rng: Random | None) -> None:
        """See Base."""
        text = json.dumps(self.places).encode() if rng is None else changed_text(self.places, rng)
        (self.folder / INDEX).write_bytes(text)

    def read(self) -> None:
        """See Base."""
        read_folder(self.folder)
