"""ENTA, the agent that takes an unmodified program's packets to a gateway and back."""

__version__ = "0.1.0"
