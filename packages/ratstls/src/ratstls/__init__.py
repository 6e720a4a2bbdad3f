"""RATS-TLS links through librats_tls.so. Not built yet: there is nothing here but the version."""

__version__ = "0.1.0"
