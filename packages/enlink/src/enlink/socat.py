"""Turn socat's spelling of an address into ours, as text. What that means is endpoint's affair.

The grammar, in which the case of keywords and options makes no difference::

    dial    TCP:HOST:PORT  TCP4:… TCP6:…  VSOCK-CONNECT:CID:PORT  UNIX-CONNECT:PATH  ABSTRACT-CONNECT:NAME
    listen  TCP-LISTEN:PORT  TCP4-LISTEN:… TCP6-LISTEN:…  VSOCK-LISTEN:PORT  UNIX-LISTEN:PATH  ABSTRACT-LISTEN:NAME
    each    followed by ,OPTION or ,OPTION=1 for what we do anyhow, such as fork and reuseaddr; ,bind=HOST;
            ,pf=ip4 and ,pf=ip6; socat's own short names for keywords, such as TCP-L

Whatever else socat knows is refused by name.
"""

from __future__ import annotations

import re
from typing import Final

from enlink.errors import UsageError

_DIALLED: Final = {
    **dict.fromkeys(("TCP", "TCP-CONNECT"), "tcp://"),
    **dict.fromkeys(("TCP4", "TCP4-CONNECT"), "tcp4://"),
    **dict.fromkeys(("TCP6", "TCP6-CONNECT"), "tcp6://"),
    **dict.fromkeys(("VSOCK", "VSOCK-CONNECT"), "vsock://"),
    **dict.fromkeys(("UNIX", "UNIX-CONNECT", "UNIX-CLIENT", "LOCAL"), "unix:"),
    **dict.fromkeys(("ABSTRACT", "ABSTRACT-CONNECT", "ABSTRACT-CLIENT"), "unix:@"),
}
_LISTENED_ON: Final = {
    **dict.fromkeys(("TCP-LISTEN", "TCP-L"), "tcp://"),
    **dict.fromkeys(("TCP4-LISTEN", "TCP4-L"), "tcp4://"),
    **dict.fromkeys(("TCP6-LISTEN", "TCP6-L"), "tcp6://"),
    **dict.fromkeys(("VSOCK-LISTEN", "VSOCK-L"), "vsock://"),
    **dict.fromkeys(("UNIX-LISTEN", "UNIX-L"), "unix:"),
    "ABSTRACT-LISTEN": "unix:@",
}
_NOT_OURS: Final = re.compile(
    r"(?:CREATE|EXEC|FD|FILE|GOPEN|INTERFACE|IP[46]?-|OPEN|OPENSSL|PIPE|PROXY|PTY|READLINE|SCTP|SOCKET|SOCKS|SSL"
    r"|STDERR|STDIN|STDIO|STDOUT|SYSTEM|TUN|UDP|UDPLITE|UNIX-|ABSTRACT-)[A-Z0-9-]*(?::.*)?",
    re.DOTALL,
)
# What is done whether or not somebody asks for it.
_DONE_ANYHOW: Final = {
    *("fork", "reuseaddr", "so-reuseaddr", "nodelay", "tcp-nodelay", "keepalive", "so-keepalive"),
    *("unlink", "unlink-early", "unlink-close"),
}
_ABOUT_CLIENTS: Final = {"range", "tcpwrap", "tcpwrappers", "sourceport", "sp", "lowport"}
_FAMILIES: Final = {"ip4": 4, "ipv4": 4, "inet": 4, "ip6": 6, "ipv6": 6, "inet6": 6}
_KEYWORD: Final = re.compile(r"(?P<keyword>[A-Za-z0-9-]+):(?P<rest>.*)", re.DOTALL)
_DIGITS: Final = re.compile(r"[0-9]+")


def translate(text: str, *, is_listening: bool) -> str | None:
    """Return our spelling of a socat address; None, if *text* is none, which is not to say that it is one of ours.

    Raises:
        UsageError: it asks for something that only socat does, for the other direction, or could mean two things.
    """
    if _NOT_OURS.fullmatch(text) and text.partition(":")[0] not in _DIALLED | _LISTENED_ON:
        keyword = text.partition(":")[0]
        raise UsageError(f"{text!r}: socat's {keyword} is not known here: TCP, VSOCK, UNIX and ABSTRACT are")
    match = _KEYWORD.fullmatch(text)
    if match is None or match["keyword"] == "unix":  # which is a scheme of ours, and takes its path as it is
        return None
    keyword, rest = match["keyword"].upper(), match["rest"]
    if rest.startswith("//") or keyword not in _DIALLED | _LISTENED_ON:
        return None
    if keyword in _DIALLED and _DIGITS.fullmatch(rest):
        raise UsageError(
            f"{text!r} has two meanings: write tcp://{text} for the host, or in full {_DIALLED[keyword]}"
            + ("./" if keyword in ("UNIX", "LOCAL") else "" if "@" in _DIALLED[keyword] else "…:")
            + rest
        )
    if is_listening and keyword in _DIALLED:
        raise UsageError(f"{text!r} dials: to listen write {_listening(keyword)}, or {_DIALLED[keyword]}{rest}")
    if not is_listening and keyword in _LISTENED_ON:
        raise UsageError(f"{text!r} listens: to dial write {_dialling(keyword)}")
    if '"' in text or "'" in text or "\\" in text:
        raise UsageError(f"{text!r}: socat's quotes are not understood: write unix:PATH, where nothing needs quotes")
    address, *options = rest.split(",")
    return _with_options(text, keyword, address, options)


def _with_options(text: str, keyword: str, address: str, options: list[str]) -> str:
    scheme = (_DIALLED | _LISTENED_ON)[keyword]
    is_tcp, is_listening = scheme.startswith("tcp"), keyword in _LISTENED_ON
    if is_listening and not scheme.startswith("unix") and not _DIGITS.fullmatch(address):
        raise UsageError(f"{text!r}: {keyword} takes a port: write {keyword}:PORT, or {scheme}HOST:PORT")
    bind, family, is_ipv6_only = "", None, False
    for option in options:
        name, _, value = option.partition("=")
        name = name.lower()
        if name in _DONE_ANYHOW and value in ("", "1"):
            continue
        if name == "bind" and is_tcp and is_listening and value:
            bind = value
        elif name in ("pf", "protocol-family") and scheme == "tcp://" and value.lower() in _FAMILIES:
            family = _FAMILIES[value.lower()]
        elif name in ("ipv6only", "ipv6-v6only") and scheme == "tcp6://" and value in ("", "1"):
            is_ipv6_only = True
        elif name in _ABOUT_CLIENTS:
            raise UsageError(
                f"{text!r}: socat's option {option!r} says who may connect, for which there are no rules here:"
                " leave that to a firewall, or listen with bind= where nobody else comes"
            )
        else:
            raise UsageError(f"{text!r}: socat's option {option!r} is not known here: leave it out")
    if family is not None:
        scheme = f"tcp{family}://"
    elif scheme == "tcp6://" and is_listening and not bind and not is_ipv6_only:
        # Socat listens for both families there, unless the kernel's default has been changed.
        scheme = "tcp://"
    return f"{scheme}{bind}:{address}" if is_listening and not scheme.startswith("unix") else scheme + address


def _listening(keyword: str) -> str:
    family = keyword.partition("-")[0].replace("LOCAL", "UNIX")
    return f"{family}-LISTEN:" + ("PATH" if family in ("UNIX", "ABSTRACT") else "PORT")


def _dialling(keyword: str) -> str:
    family = keyword.partition("-")[0]
    where = {"VSOCK": "CID:PORT", "UNIX": "PATH", "ABSTRACT": "NAME"}.get(family, "HOST:PORT")
    return f"{family}-CONNECT:{where}, or {_DIALLED[family]}{where}"
