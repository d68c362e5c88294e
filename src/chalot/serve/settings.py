"""What the operator of a server chose, and what it bears. Seconds are of the wall clock."""

from dataclasses import dataclass

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MOST_CHOICES = 16  # n
MOST_PROMPTS = 64  # in one request of /v1/completions or /v1/embeddings
MOST_STOPS = 16
MOST_STOP = 1000  # characters of a stop string
MOST_TOP = 20  # logprobs beside the token's own


@dataclass(frozen=True)
class Settings:
    """See `chalot serve --help`."""

    host: str = "127.0.0.1"
    port: int = 8080
    name: str = "chalot"  # what clients call the model
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()  # that browsers may call from; CORS is off without
    hosts: tuple[str, ...] = ()  # more names in the header Host that are served on loopback
    slots: int = 16  # answers that are computed together
    queue: int = 128  # answers that wait for a slot
    drain_seconds: float = 30.0  # for answers that run when the server is told to stop
    header_seconds: float = 10.0  # to send a request's head
    body_seconds: float = 30.0  # to send its body
    stall_seconds: float = 30.0  # a reader takes nothing: its connection is closed
    idle_seconds: float = 15.0  # an open connection between two requests
    quiet_seconds: float = 15.0  # a stream without a token gets a comment, for proxies
    body_bytes: int = 8 << 20
    connections: int = 1024

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOOPBACK
