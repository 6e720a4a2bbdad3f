"""What ``entg --occlum`` does before it is a gateway: prove that it is in an enclave, take its terms from the image.

What the image demands, and what a command line may add, is in measured.py; how an image is made, in occlum_image.py.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import trio
from enlink.attestation import Side
from enlink.attested import Image, allows_debug
from enlink.endpoint import Tcp
from enlink.errors import ConfigError
from enlink.program import log_event

from entg.config import GatewayConfig
from entg.measured import Terms, attestation_of, is_attesting, is_judging, parse_terms, refuse_loosening
from entg.sgx import DEVICE, Ioctl, read_report, require_quotes

LIBRARY: Final = Path("/usr/local/lib/rats-tls/librats_tls.so.0")
POLICY: Final = Path("/etc/entg/policy.toml")
SETTINGS: Final = Path("/etc/entg/gateway.toml")

# Choices of ours. An enclave has as many threads as its image says, and each costs memory even when it is idle.
HANDSHAKE_THREADS: Final = 48
OTHER_THREADS: Final = 4  # trio's own, for names that are looked up and for what is checked at start
THREADS: Final = 1 + 1 + HANDSHAKE_THREADS + OTHER_THREADS  # with the main one, and that of the log
THREAD_STACK_BYTES: Final = 1 << 20

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inside:
    """The inside of an image: where things are, and how the process was started. Only tests have another."""

    device: Path = DEVICE
    ioctl: Ioctl = fcntl.ioctl
    library: Path = LIBRARY
    policy: Path = POLICY
    settings: Path = SETTINGS
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    is_isolated: bool = bool(sys.flags.isolated)


@dataclass(frozen=True, slots=True)
class Enclave:
    """An enclave that this process was found to be in; made by `enter`."""

    inside: Inside
    terms: Terms

    @property
    def image(self) -> Image:
        """What binds those who make attested links."""
        return Image(self.inside.library, self.inside.policy, HANDSHAKE_THREADS)

    def configure(self, options: argparse.Namespace, entg_listen: Tcp | None, entg_side: Side) -> GatewayConfig:
        """Return the gateway that parsed *options* ask for, with links at least as safe as the image demands.

        Raises:
            ConfigError: options that do nothing, or the image lacks a policy that is needed.
            Unavailable: this enclave is to attest, and its host makes no quotes.
        """
        ask = partial(attestation_of, is_mutual=options.mutual, policy=options.policy)
        enta = ask(self.terms.enta, "server", is_asked=options.enta_rats_tls)
        entg = ask(self.terms.entg, entg_side, is_asked=options.entg_rats_tls)
        judges = is_judging(enta, "server") or is_judging(entg, entg_side)
        if judges and not self.inside.policy.exists():
            raise ConfigError(
                f"links are to judge their peers, and the image has no {self.inside.policy}, which says whom to accept:"
                " make one with `entg occlum-image --policy FILE`"
            )
        if options.policy is not None and not judges:
            raise ConfigError(f"--policy {options.policy}: this gateway judges nobody: add --mutual, or leave it out")
        if options.mutual and enta is None and entg is None:
            raise ConfigError("--mutual is for attested links, and none is: add --enta-rats-tls or --entg-rats-tls")
        if is_attesting(enta, "server") or is_attesting(entg, entg_side):
            require_quotes(self.inside.device, self.inside.ioctl)
        return GatewayConfig(
            options.enta_listen,
            entg_listen,
            options.entg_connect,
            grace_s=options.grace,
            spin_s=options.spin,
            enta_attestation=enta,
            entg_attestation=entg,
        )


def enter(options: Mapping[str, object], defaults: Mapping[str, object], inside: Inside | None = None) -> Enclave:
    """Make sure that this process is in an enclave, started as its image says, and that *options* loosen nothing.

    Args:
        options: as they are parsed; defaults: as they would be without a command line.

    Raises:
        ConfigError: one of these is not so; or the host can debug this enclave, and the image's policy does not
            allow that.
    """
    inside = Inside() if inside is None else inside
    report = read_report(inside.device, inside.ioctl)
    if not inside.is_isolated or inside.environment:
        how = f"with {next(iter(inside.environment))} in its environment" if inside.environment else "without -I"
        raise ConfigError(f"an image starts entg by /bin/entg, alone and with nothing from the host: not {how}")
    refuse_loosening(options, defaults)
    is_debug_allowed = inside.policy.exists() and allows_debug(inside.policy)
    if report.can_be_debugged and not is_debug_allowed:
        raise ConfigError(
            "the host can debug this enclave: make an image that is not debuggable; or, to try things out, one whose"
            " policy says allow_debug = true"
        )
    log_event(
        _logger,
        "enclave",
        logging.WARNING if report.can_be_debugged else logging.INFO,
        mr_enclave=report.mr_enclave.hex(),
        mr_signer=report.mr_signer.hex(),
        product_id=report.product_id,
        security_version=report.security_version,
        debug=report.can_be_debugged,
    )
    return Enclave(inside, _read_terms(inside.settings))


def _read_terms(path: Path) -> Terms:
    try:
        return parse_terms(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Terms()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read the settings {path}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"settings {path}: {error}") from error


def keep_few_threads() -> None:
    """Bound the threads that this process starts from here on, and their stacks. To be called under trio."""
    threading.stack_size(THREAD_STACK_BYTES)
    trio.to_thread.current_default_thread_limiter().total_tokens = OTHER_THREADS
