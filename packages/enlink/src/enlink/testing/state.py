"""Describe all of a host's network configuration as lines of text, to prove that it is as it was. Changes nothing."""

from __future__ import annotations

import re
import time
from collections import Counter

from enlink.testing.hosts import Host

_COMMANDS = (
    *("ip -o link", "ip -o address", "ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all"),
    *("nft --stateless list ruleset", "iptables-legacy-save", "ip6tables-legacy-save"),
    "sysctl --all --ignore --pattern ^net[.]",
)
# What changes by itself: numbers of devices, counters, the time of the listing, how many connections there are.
_RESTLESS = re.compile(r"^\d+: | \[\d+:\d+\]$|^# .*|^net\.netfilter\.nf_conntrack_count = .*")
_FAR_BEYOND_S = 20.0


def network_state(host: Host) -> list[str]:
    """Return devices, addresses, rules, routes, packet filters and settings, in the words of their own tools.

    Two listings are equal as long as nobody has configured anything in between, whatever traffic there was. Waits for
    a second or two while IPv6 makes sure that a new address is unique.

    Raises:
        TimeoutError: it does not come to an end with that.
    """
    script = "".join(f"{command} 2>/dev/null\n" for command in _COMMANDS)
    deadline_s = time.monotonic() + _FAR_BEYOND_S
    while "tentative" in (listing := host.run("sh", input=script)):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"an address of {host.name} stays tentative")
        time.sleep(0.05)
    return [line for line in (_RESTLESS.sub("", line).strip() for line in listing.splitlines()) if line]


def difference(before: list[str], after: list[str]) -> list[str]:
    """Return the lines that went, each after "- ", and those that came, each after "+ "."""
    had, has = Counter(before), Counter(after)
    return [f"- {line}" for line in (had - has).elements()] + [f"+ {line}" for line in (has - had).elements()]
