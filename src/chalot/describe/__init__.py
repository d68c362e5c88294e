"""The verb `describe`: what a model is, what it takes, and whether it fits here.

Takes a `.myai` file, a Hugging Face folder or a hub id, and reads nothing but headers: of a hub id
before any download. What is no `.myai` file yet is judged as it would be in a scheme: the one that
`convert` takes, unless another is asked for.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

import msgspec

from chalot import machine
from chalot.convert.keeping import KEEP, kept, usual_of
from chalot.convert.storing import DEFAULT_SCHEME, parse_schemes, planned_bytes, scheme_of
from chalot.describe.description import Description, Kernels, KindReport, Origin, TensorReport
from chalot.describe.fitting import fit
from chalot.describe.region_bytes import region_reports
from chalot.errors import FormatError, HubBusyError, HubOfflineError, SchemeError, UnsupportedError
from chalot.formats import hub
from chalot.formats.checkpoint import TensorInfo, open_checkpoint
from chalot.formats.documents import DOCUMENTS, parse_json
from chalot.formats.folders import as_computed
from chalot.formats.myai import MyaiFile
from chalot.formats.names import hugging_face
from chalot.formats.text_part import documents
from chalot.kernels.backend import instruction_sets, open_backend
from chalot.library import is_ready
from chalot.mixture import mixture_report
from chalot.model.config import ModelConfig, from_hugging_face
from chalot.model.layers import KINDS, model_tensors
from chalot.quant.packing import stored_bytes
from chalot.quant.scheme import SCHEMES
from chalot.reading import read_model_config
from chalot.sources import as_path, hub_id, on_hub, resolve
from chalot.text.byte_pairs import TABLES
from chalot.typed import MAY_COUNT, MAY_PATH, MAY_TEXT, PATH, check_types

USUAL_CONTEXT = 1000  # tokens of a short conversation
VECTOR = "f32"  # what vectors are stored as


def describe(
    source: str | Path,
    scheme: str | None = None,
    context: int | None = None,
    folder: Path | None = None,
    again: bool = False,
) -> Description:
    """Describe a `.myai` file, a Hugging Face folder, another model's file, or a hub id.

    `scheme` is how a checkpoint is judged ("nl4", "ffn=nl4,attention=int8"; "keep" where weights
    are quantised already); a `.myai` file has its own, unless it is to be converted `again`.
    `memory_at` has 0, 1,000 and all positions, and `context` if it is given; `fit` has every
    scheme, for a file in `folder` (default: the current one). Raises FormatError, UnsupportedError,
    SchemeError, ContextError, HubError.
    """
    check_types(
        source=(source, PATH),
        scheme=(scheme, MAY_TEXT),
        context=(context, MAY_COUNT),
        folder=(folder, MAY_PATH),
    )
    path, place = as_path(source), (context, folder)
    if path.is_file() and is_ready(path) and not again:
        if scheme is not None:
            raise SchemeError(f"{source}: is converted already; --scheme is for checkpoints")
        found = _of_myai(path)
    elif (named := hub_id(source)) is not None:
        try:
            remote = on_hub(source, hub.headers)
        except (HubOfflineError, HubBusyError):
            copy = hub.kept(named)  # downloaded earlier
            if copy is None:
                raise
            return describe(copy, scheme, context, folder)
        sizes = remote.weight_bytes, remote.download_bytes
        origin = Origin("hub", *sizes, document_bytes=remote.document_bytes)
        tensors = as_computed(remote.tensors, remote.document("config.json"), named)
        document = documents(remote.document, named)
        found = _of_checkpoint(named, origin, tensors, document, scheme, place)
    else:
        checkpoint = open_checkpoint(resolve(path))
        try:
            held = sum(info.nbytes for info in checkpoint.tensors.values())
            there = {n: d for n in DOCUMENTS if (d := checkpoint.document(n)) is not None}
            form, length = "folder" if path.is_dir() else "file", sum(map(len, there.values()))
            origin = Origin(form, held, documents=tuple(there), document_bytes=length)
            found = _of_checkpoint(
                str(source),
                origin,
                checkpoint.tensors,
                checkpoint.document,
                scheme,
                (context, folder),
            )
        finally:
            checkpoint.close()
    config = msgspec.convert(found.architecture, ModelConfig)
    found = dataclasses.replace(found, mixture=mixture_report(config, found.tensors))
    full = found.architecture["context"]
    wanted = {0, min(USUAL_CONTEXT, full), full} | (set() if context is None else {context})
    shown = tuple(found.memory(n) for n in sorted(wanted))
    return dataclasses.replace(found, memory_at=shown)


def _of_myai(path: Path) -> Description:
    file = MyaiFile(path)
    try:
        config = read_model_config(file)
        manifest, shared = file.manifest, file.aliases
        tensors = []
        for spec in model_tensors(config):
            e = manifest.tensors[spec.name]
            coded = SCHEMES[e.scheme].is_coded
            here, bits = (e.scheme, e.extent.bytes), e.activation if coded else None
            about = (spec.name, spec.kind, e.shape, *here, *here, bits, e.error)
            tensors.append(TensorReport(*about, shared.get(spec.name)))
        origin = Origin(
            ".myai",
            file.size,
            documents=tuple(manifest.documents),
            tables=manifest.documents[TABLES].bytes if TABLES in manifest.documents else 0,
            unused=tuple(manifest.tensors.keys() - {t.name for t in tensors}),
            made_from=manifest.source.name,
            digest=manifest.source.digest,
            command=manifest.source.command,
            version=manifest.source.version,
            other=manifest.other,
            elsewhere=file.all_bytes - file.size,
        )
        return _description(str(path), origin, config, tensors, file.all_bytes)
    finally:
        file.close()


def _of_checkpoint(
    source: str,
    origin: Origin,
    found: Mapping[str, TensorInfo],
    document: Callable[[str], bytes | None],
    scheme: str | None,
    place: tuple[int | None, Path | None],
) -> Description:
    """A folder, a file or a hub id. Raises FormatError where tensors contradict config.json."""
    scheme = scheme or usual_of(found, DEFAULT_SCHEME)
    schemes = parse_schemes(scheme)
    raw = document("config.json")
    if raw is None:
        raise FormatError(f"{source}: config.json is missing; is this a model's folder?")
    parsed = parse_json(raw, f"{source}: config.json")
    if not isinstance(parsed, dict):
        raise FormatError(f"{source}: config.json: expected an object")
    config = from_hugging_face(parsed)
    if scheme == KEEP:
        schemes |= kept(found, config)
    tensors = []
    for spec in model_tensors(config):
        name = hugging_face(spec.name)
        info = found.get(name)
        if info is None or info.shape != spec.shape:
            has = "is missing" if info is None else f"has shape {info.shape}"
            raise FormatError(f"{source}: tensor {name} {has}; config.json asks for {spec.shape}")
        if info.dtype not in SCHEMES and not info.scheme:
            raise UnsupportedError(
                f"{source}: tensor {name} is {info.dtype}; chalot reads bf16, f16 and f32: "
                "use the model's original, not yet quantised checkpoint"
            )
        here = (spec.name, spec.kind, spec.shape, info.dtype, info.nbytes)
        if spec.kind == "vector":
            tensors.append(TensorReport(*here, VECTOR, spec.shape[0] * 4))
        else:
            s = scheme_of(schemes, spec)
            need = stored_bytes(s, spec.shape[0], spec.shape[1])
            tensors.append(TensorReport(*here, str(s), need, 8 if s.is_coded else None))
    needed = {hugging_face(t.name) for t in tensors}
    origin = dataclasses.replace(origin, unused=tuple(sorted(found.keys() - needed)))
    report = _description(source, origin, config, tensors, planned_bytes(config, schemes))
    is_remote = origin.download_bytes is not None
    judged = fit(
        config,
        found,
        context=place[0],
        folder=place[1],
        documents=origin.document_bytes,
        text=origin.documents is None or "tokenizer.json" in origin.documents,
        hub_id=source if is_remote else None,
        download_bytes=origin.download_bytes or 0,
    )
    return dataclasses.replace(report, scheme=scheme, fit=judged)


def _description(
    source: str, origin: Origin, config: ModelConfig, tensors: list[TensorReport], file_bytes: int
) -> Description:
    parameters = sum(prod(t.shape) for t in tensors)
    held = [t for t in tensors if t.shares is None]
    stored, total = sum(prod(t.shape) for t in held), sum(t.bytes for t in held)
    sets = instruction_sets()
    backend = open_backend()
    kernels = Kernels(
        tuple(name for name, _ in sets),
        tuple(name for name, runs in sets if runs),
        backend.name,
        backend.threads,
    )
    kinds = [_kind(kind, [t for t in tensors if t.kind == kind]) for kind in (*KINDS, "vector")]
    return Description(
        source,
        origin,
        {**msgspec.structs.asdict(config), **msgspec.to_builtins(config)},
        parameters,
        stored,
        total,
        file_bytes,
        total * 8 / stored,
        tuple(k for k in kinds if k.tensors),
        tuple(tensors),
        kernels,
        machine.memory_available(),
        regions=region_reports(config, tensors),
    )


def _kind(kind: str, tensors: list[TensorReport]) -> KindReport:
    return KindReport(
        kind,
        len(tensors),
        sum(prod(t.shape) for t in tensors),
        _names(t.source_type for t in tensors),
        sum(t.source_bytes for t in tensors if t.shares is None),
        _names(t.scheme for t in tensors),
        sum(t.bytes for t in tensors if t.shares is None),
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))
