"""ENTG, the gateway between ENTAs and other ENTGs."""

__version__ = "0.1.0"
