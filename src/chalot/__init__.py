"""chalot: shrink a language model, say what that costs, and run it on the machine you have."""

__version__ = "0.1.0"
