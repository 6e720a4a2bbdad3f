"""A relay between TCP, vsock and unix sockets. Not built yet: there is nothing here but the version."""

__version__ = "0.1.0"
