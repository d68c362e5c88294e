"""The verb `eval`: what a model's form costs, on a text, on prompts, on known tasks.

`quality.compare` is the measurement of it all; `protocols` says which tokens of a text are scored.
"""

from chalot.evaluate.protocols import PROTOCOL, PROTOCOLS, Protocol
from chalot.evaluate.quality import Quality, compare, log_softmax, standard_error

__all__ = [
    "PROTOCOL",
    "PROTOCOLS",
    "Protocol",
    "Quality",
    "compare",
    "log_softmax",
    "standard_error",
]
