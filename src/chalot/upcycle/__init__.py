"""The verb `upcycle`: a dense checkpoint becomes a mixture of experts, a tensor at a time.

The mixture is a view (view.py) over the source: nothing of it is in memory, and it is converted as
any other checkpoint. What is made is not trained: docs/upcycling.md says what that is worth.
"""

import shlex
from pathlib import Path

from chalot.convert import ConvertReport, check_place
from chalot.convert.conversion import Progress
from chalot.errors import SchemeError
from chalot.export import TARGETS, Options, refuse_useless, target_of
from chalot.formats.checkpoint import open_checkpoint
from chalot.typed import MAY_PATH, MAY_TEXT, PATH, check_types
from chalot.upcycle.settings import Settings, UpcycleError
from chalot.upcycle.view import View

__all__ = ["Settings", "UpcycleError", "upcycle"]


def upcycle(
    source: str | Path,
    out: str | Path,
    asked: Settings | None = None,
    *,
    calibration: str | Path | None = None,
    to: str | None = None,
    scheme: str | None = None,
    type: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> ConvertReport:
    """Write the mixture `asked` for, made of the dense model `source`, to `out`.

    `to` is "myai" (by default, with `scheme` as for `convert`) or "safetensors" (with `type`),
    which slices cannot be. `calibration` is the text that slices are chosen by (default: chalot's
    own). Raises UpcycleError for settings that make no mixture, and any other ChalotError for what
    is wrong with source or place. The file or folder appears whole or not at all.
    """
    from chalot.sources import resolve

    check_types(source=(source, PATH), out=(out, PATH), calibration=(calibration, MAY_PATH))
    check_types(to=(to, MAY_TEXT), scheme=(scheme, MAY_TEXT), type=(type, MAY_TEXT))
    asked = asked or Settings()
    to = checked_target(to, out, asked)
    given = {"type": type, "scheme": scheme}
    refuse_useless(to, lambda setting: bool(given.get(setting)))
    if calibration is not None and not asked.slices:
        raise UpcycleError("--calibration: is the text that slices are chosen by; add --slice")
    watch = progress or (lambda *_: None)
    found = resolve(source, progress)
    check_place(Path(out), found)
    view = opened(found, asked, calibration, threads, watch)
    try:
        said = command or shlex.join(["chalot", "upcycle", str(source), "-o", str(out)])
        options = Options(str(source), type, scheme, command=said, threads=threads, progress=watch)
        return TARGETS[to].write(view, Path(out), options)
    finally:
        view.close()


def checked_target(to: str | None, out: str | Path, asked: Settings) -> str:
    """The target's name. Raises SchemeError for one that holds no such mixture."""
    found = target_of(to, out)
    if found not in ("myai", "safetensors"):
        raise SchemeError(f"--to {found}: mixtures are written as myai or safetensors")
    if asked.slices and found != "myai":
        raise SchemeError(
            "--to safetensors: slices of a feed-forward count whole, which no family of "
            "transformers can say; write a .myai file"
        )
    return found


def opened(
    path: Path,
    asked: Settings,
    calibration: str | Path | None,
    threads: int | None,
    progress: Progress,
) -> View:
    """The view over an opened source, which is closed with it."""
    checkpoint = open_checkpoint(path)
    try:
        if not asked.slices:
            from chalot.upcycle.copies import Copies

            return Copies(checkpoint, asked)
        from chalot.calibration_text import CalibrationText
        from chalot.kernels.backend import open_backend
        from chalot.upcycle.slices import Slices

        text = CalibrationText.of(calibration)
        return Slices(checkpoint, asked, text, open_backend(threads=threads), progress)
    except BaseException:
        checkpoint.close()
        raise
