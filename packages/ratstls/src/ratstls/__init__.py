"""Attested links through librats_tls.so. Importing this loads no library."""

__version__ = "0.1.0"
