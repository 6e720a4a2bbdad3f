"""ENTA, the agent that captures what ordinary programs send, and replays it to ordinary servers."""

__version__ = "0.1.0"
