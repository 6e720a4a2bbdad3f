"""What two ENG programs must agree on byte for byte, or would otherwise copy from each other."""

__version__ = "0.1.0"
