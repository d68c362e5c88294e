"""Options that would be ignored are refused: who gives one expects it to do something."""

from argparse import Namespace as Arguments

Rule = tuple[bool, str, str]  # whether there is a use for them, where there is, the options


def refuse_unused(arguments: Arguments, *rules: Rule) -> None:
    """Usage error for the first option that was given, and has no use here.

    Options are those whose default is None or False.
    """
    for is_used, where, options in rules:
        for option in options.split():
            given = getattr(arguments, option[2:].replace("-", "_"))
            if not is_used and given is not None and given is not False:
                arguments.parser.error(
                    f"found {option}, which is of use with {where} only; leave it out"
                )
