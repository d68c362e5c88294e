"""chalot serve MODEL"""

from argparse import ArgumentParser
from argparse import Namespace as Arguments
from pathlib import Path

from chalot.commands.opening import MODEL, cache_type, converted, say_context, size
from chalot.commands.output import speaker
from chalot.errors import FormatError, UnsupportedError
from chalot.serve.settings import LOOPBACK

RANGES = (("port", 0, 65535), ("slots", 1, 1024), ("queue", 0, 65536), ("drain", 0, 86400))


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--host", default="127.0.0.1", help="address (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8080, help="default: 8080")
    parser.add_argument("--name", help="what clients call the model (default: the file's name)")
    parser.add_argument(
        "--api-key", action="append", default=[], metavar="KEY", help="may be given several times"
    )
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="a key a line; `ps` does not show it"
    )
    text = "ask for no key, at an address that others can reach too"
    parser.add_argument("--no-key", action="store_true", help=text)
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web page's origin that may call (default: none but the server's own page)",
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a further Host to serve"
    )
    parser.add_argument("--context", type=int, help="most tokens of one prompt and answer")
    parser.add_argument("--slots", type=int, default=16, help="answers at once (default: 16)")
    parser.add_argument("--queue", type=int, default=128, help="answers that wait (default: 128)")
    parser.add_argument(
        "--drain", type=int, default=30, metavar="SECONDS", help="to end answers when stopped"
    )
    parser.add_argument("--mlock", action="store_true", help="keep the model's file in memory")
    parser.add_argument(
        "--no-mmap", dest="mmap", action="store_false", help="read it into memory, in huge pages"
    )
    text = "guess nothing ahead from the texts so far; answers are the same"
    parser.add_argument("--no-draft", dest="draft", action="store_false", help=text)
    cache_type(parser, "int8")
    parser.add_argument(
        "--kv-budget", type=size, metavar="SIZE", help="most bytes of the cache, as 2GB"
    )


def keys_of(arguments: Arguments) -> tuple[str, ...]:
    """Keys of the command line and of the file. Raises FormatError."""
    keys = list(arguments.api_key)
    if arguments.api_key_file:
        path = Path(arguments.api_key_file).expanduser()
        try:
            found = path.read_text("utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"{path}: cannot be read as a file of keys ({error})") from None
        if not found:
            raise FormatError(f"{path}: holds no key; expected one a line")
        keys += found
    if any(len(key) < 8 or not key.isascii() or not key.isprintable() for key in keys):
        raise FormatError("--api-key: expected 8 or more printable ASCII characters")
    return tuple(keys)


def check_reach(host: str, keys: tuple[str, ...], no_key: bool) -> None:
    """Raise FormatError where others could ask without a key and nobody has said they may."""
    if no_key and keys:
        raise FormatError("--no-key: found keys too; leave one of them out")
    if not keys and not no_key and host not in LOOPBACK:
        raise FormatError(
            f"--host {host}: others can reach this server, and it has no key; expected "
            "--api-key-file or --api-key, or --no-key if anybody may ask"
        )


def main(arguments: Arguments) -> int:
    """The exit code."""
    try:
        from chalot.serve.app import run
    except ImportError as error:
        raise UnsupportedError(
            f'serving needs {error.name}; install it: pip install "chalot[serve]"'
        ) from None
    from chalot.load import load
    from chalot.serve.settings import Settings

    for name, low, high in RANGES:
        if not low <= getattr(arguments, name) <= high:
            found = getattr(arguments, name)
            arguments.parser.error(f"--{name}: found {found}, expected {low} to {high}")
    keys = keys_of(arguments)
    check_reach(arguments.host, keys, arguments.no_key)
    path = converted(arguments.model, arguments)
    settings = Settings(
        host=arguments.host,
        port=arguments.port,
        name=arguments.name or path.stem,
        keys=keys,
        origins=tuple(arguments.allow_origin),
        hosts=tuple(arguments.allow_host),
        slots=arguments.slots,
        queue=arguments.queue,
        drain_seconds=arguments.drain,
    )
    options = ("threads", "context", "kv", "kv_budget", "mmap", "mlock", "draft")
    given = {name: getattr(arguments, name) for name in options}
    with load(path, **given) as model:
        say_context(model, arguments)
        run(model, settings, speaker(arguments), arguments.verbose)
    return 0
