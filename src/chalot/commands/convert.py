"""chalot convert SOURCE -o OUT"""

import sys
from argparse import ArgumentParser
from argparse import Namespace as Arguments

from chalot.commands.output import as_json, progress, say
from chalot.table import rows


def arguments(parser: ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("source", help="a Hugging Face folder, a model's file, or a hub id")
    parser.add_argument("-o", "--out", required=True, help="the file or folder to write")
    parser.add_argument(
        "--to", help="myai (default), gguf or safetensors; or by the ending of OUT, if it is .gguf"
    )
    parser.add_argument("--type", help="for gguf and safetensors: f16, bf16, f32, q8_0, ...")
    parser.add_argument(
        "--scheme",
        default="nl4",
        help="f32, bf16, f16, int8, nl4 (default), or KIND=SCHEME,... "
        "with kinds attention, ffn, embedding, head",
    )


def main(arguments: Arguments) -> int:
    """The exit code."""
    from chalot.export import export as run_it

    to = arguments.to or ("gguf" if arguments.out.endswith(".gguf") else "myai")
    command = "chalot " + " ".join(sys.argv[1:])
    with progress(arguments, "converting") as advance:
        report = run_it(
            arguments.source,
            arguments.out,
            to,
            arguments.type,
            scheme=arguments.scheme,
            threads=arguments.threads,
            progress=advance,
            command=command,
        )
    if arguments.json:
        print(as_json(report))
        return 0
    if not arguments.quiet:
        for note in report.notes:
            say(note)
        table = [["kind", "scheme", "tensors", "weights", "bytes", "error", "16-bit", "folded"]]
        again = any(k.source_error is not None for k in report.kinds)
        for k in report.kinds:
            cells = (k.scheme, k.tensors, f"{k.weights:,}", f"{k.bytes:,}", f"{k.error:.2g}")
            table.append([k.kind, *map(str, cells), str(k.wide), str(k.folded)])
            if again:
                table[-1].append("" if k.source_error is None else f"{k.source_error:.2g}")
        if again:
            table[0].append("source's")
        say(rows(table))
        if again:
            say("source's: the error that the source has already; error: what came on top")
        say("error: relative squared error of the weights; 16-bit: tensors that ask for 16-bit")
        say("activations; folded: tensors whose columns were balanced by powers of two")
    print(f"{report.path}: {report.bytes:,} bytes, {report.bits_per_weight:.2f} bits a weight")
    return 0
