"""Write docs/commands.md from the commands' own help: `python tools/command_reference.py`.

tests/test_docs.py holds the page to what this makes.
"""

import os
import sys
from pathlib import Path

WIDTH = "100"
PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """\
# Commands

What `chalot COMMAND --help` says, for all of them; made by `tools/command_reference.py`.

Exit codes: 0 done, 1 an error that was explained, 2 wrong usage, 130 interrupted. Answers go to
stdout, everything else to stderr.
"""


def reference() -> str:
    """The page. Help is as wide here as in a terminal of 100 columns."""
    os.environ["COLUMNS"] = WIDTH
    from chalot.cli import VERBS, build_parser

    parts = [HEAD]
    for verb in VERBS:
        parser = build_parser(verb)
        subparsers = next(a for a in parser._actions if a.dest == "verb")
        text = subparsers.choices[verb].format_help().rstrip()  # type: ignore[index,union-attr]
        parts.append(f"## chalot {verb}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(reference(), "utf-8")
    sys.stderr.write(f"{PAGE}\n")
