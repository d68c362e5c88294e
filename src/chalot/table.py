"""Reports as plain text: columns under their headings, and sizes as people say them."""

import re

# What could steer a terminal or turn a line round, out of names of files and tensors: shown as
# Python would write it. A line's end is one in prose, and none in a cell.
STEERING = [*range(32), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F)]
STEERING += range(0x2066, 0x206A)
ESCAPES = {code: ascii(chr(code))[1:-1] for code in STEERING}
IN_PROSE = {code: text for code, text in ESCAPES.items() if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Text that may hold names, safe for a terminal."""
    return text.translate(IN_PROSE)


def rows(table: list[list[str]]) -> str:
    """Columns under their headings: the first to the left, the others to the right."""
    table = [[cell.translate(ESCAPES) for cell in row] for row in table]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for n, row in enumerate(table):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if n == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def pairs(table: list[tuple[str, str]]) -> str:
    """One fact a line, its name in front."""
    width = max(len(name) for name, _ in table)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in table)


def size(count: int) -> str:
    """Bytes in decimal units: 271,158,379 -> "271.2 MB"."""
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= of:
            return f"{count / of:,.1f} {unit}"
    return f"{count} bytes"


def parse_size(text: str) -> int:
    """The other way: "512MB", "1.5 GB" or "268435456" to bytes. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMG]?)B?", text.strip())
    if not found:
        raise ValueError(f"{text!r} is no size; expected bytes, or a number and kB, MB or GB")
    return int(float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[found[2]])
