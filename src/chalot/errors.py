"""Every error chalot raises on purpose; each says what was found, expected, and what helps.

ChalotError
|- FormatError        a file or a message is not what it claims to be
|- UnsupportedError   well formed, but not something chalot can run
|- SchemeError        a scheme that does not exist or does not fit a tensor
|- WeightError        NaN or Inf among weights, named by tensor
|- TokenizerError     a tokenizer or chat template that is missing, broken or changed by conversion
|- ContextError       more tokens than the context holds
|- RegionError        a region of layers that the model does not have
|- LimitError         memory, disk or time would not suffice
|- WrongTypeError     an argument of another Python type than a function takes
|- ClosedError        a model is used that was closed
|- OutputError        the output cannot be written, or another process is writing it
|- KernelError        no kernel can run here, or a computation went wrong
`- HubError           the model hub refused or did not answer
   |- HubAccessError     401, 403: a licence to accept, a token to set
   |- HubNotFoundError   404: no such repository, revision or file
   |- HubBusyError       429: too many requests
   `- HubOfflineError    no network, or offline mode
"""

import errno


class ChalotError(Exception):
    """Base of all errors of this package; commands print it in one line and exit with 1."""


def one_line(said: object, most: int = 300) -> str:
    """What a library says of a file, which may have that file's texts in it: escaped and cut."""
    text = str(said)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:most]) + (
        "..." if len(text) > most else ""
    )


class FormatError(ChalotError):
    """A file or a message is not what it claims to be."""


class UnsupportedError(ChalotError):
    """Well formed, but not something chalot can run."""


class SchemeError(ChalotError, ValueError):
    """A scheme that does not exist or does not fit a tensor."""


class WeightError(ChalotError):
    """NaN or Inf among weights, named by tensor."""


class TokenizerError(ChalotError):
    """A tokenizer or chat template that is missing, broken or changed by conversion."""


class ContextError(ChalotError, ValueError):
    """More tokens than the context holds."""


class RegionError(ChalotError, ValueError):
    """A region of layers that the model does not have, or that does not fit it."""


class LimitError(ChalotError):
    """Memory, disk or time would not suffice."""


class WrongTypeError(ChalotError, TypeError):
    """An argument of another Python type than a function takes."""


class ClosedError(ChalotError, ValueError):
    """A model is used that was closed."""


class OutputError(ChalotError):
    """The output cannot be written, or another process is writing it."""


class KernelError(ChalotError):
    """No kernel can run here, or a computation went wrong."""


class HubError(ChalotError):
    """The model hub refused or did not answer."""


class HubAccessError(HubError):
    """The hub refuses this user: a licence to accept, or a token to set."""


class HubNotFoundError(HubError):
    """The hub has no such repository, revision or file, or does not show it to this user."""


class HubBusyError(HubError):
    """The hub asks for fewer requests; the message says when to try again, if the hub does."""


class HubOfflineError(HubError):
    """No connection to the hub, or none wanted (HF_HUB_OFFLINE)."""


REFUSED = (  # what others say where the system refused memory, or a thread for want of it
    "can't start new thread",
    "Resource temporarily unavailable",
    "failed to map segment",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, of whatever type, says that the system refused memory."""
    if isinstance(error, (RuntimeError, ImportError)):
        return any(text in str(error) for text in REFUSED)
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


def told(error: BaseException) -> str:
    """What an error says, with the notes that were added on its way."""
    return "; ".join(filter(None, (str(error), *getattr(error, "__notes__", ()))))
