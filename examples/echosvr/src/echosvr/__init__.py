"""An ordinary echo server and client. They know nothing of ENG, and must not."""

__version__ = "0.1.0"
