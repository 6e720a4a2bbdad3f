"""What a gateway learns from the CPU about its enclave: all of it right, or a refusal."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import pytest
from enlink.errors import ConfigError, Unavailable
from entg.sgx import Ioctl, read_report, require_quotes
from fake_sgx import CREATE_REPORT, DETECT_DCAP, QUOTE_SIZE, TARGET_INFO, FakeSgx
from hypothesis import given
from hypothesis import strategies as st

HASHES = st.binary(min_size=32, max_size=32).filter(any)
WORDS = st.integers(0, 0xFFFF)
SOME_FILE = Path(__file__)


@given(HASHES, HASHES, st.integers(0, 2**64 - 1), WORDS, WORDS)
def test_a_report_is_read_as_the_cpu_lays_it_out(
    enclave: bytes, signer: bytes, flags: int, product: int, version: int
) -> None:
    sgx = FakeSgx(enclave, signer, flags, product, version)
    report = read_report(SOME_FILE, sgx.ioctl)
    assert (report.mr_enclave, report.mr_signer) == (enclave, signer)
    assert (report.product_id, report.security_version) == (product, version)
    assert report.can_be_debugged == (flags // 2 % 2 == 1)
    assert sgx.asked == [TARGET_INFO, CREATE_REPORT]


def test_where_there_is_no_device_nobody_is_in_an_enclave(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none \(.*/sgx: No such file or directory\).*occlum-image.*occlum run") as e:
        read_report(tmp_path / "sgx")
    assert e.value.exit_code == 78


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("path", ["/dev/null", "/dev", __file__])
def test_what_is_another_file_is_no_enclave_to_the_real_kernel_either(path: str) -> None:
    before = open_descriptors()
    with pytest.raises(ConfigError, match=r"this is none \(/.*: Inappropriate ioctl for device\)"):
        read_report(Path(path))
    assert open_descriptors() == before


def replaying(sgx: FakeSgx) -> Ioctl:
    """A device that gives an old report, whatever it is asked."""
    recorded = sgx.report(bytes(64))

    def ioctl(descriptor: int, request: int, argument: memoryview) -> int:
        result = sgx.ioctl(descriptor, request, argument)
        if request == CREATE_REPORT:
            ctypes.memmove(struct.unpack_from("<3Q", argument)[2], recorded, len(recorded))
        return result

    return ioctl


@pytest.mark.proves("D25")
@pytest.mark.parametrize(
    "ioctl",
    [lambda *_: 0, replaying(FakeSgx()), FakeSgx(mr_enclave=bytes(32)).ioctl],
    ids=["says-nothing", "answers-another-challenge", "has-no-measurement"],
)
def test_a_report_of_nobody_or_of_another_time_is_refused(ioctl: Ioctl) -> None:
    with pytest.raises(ConfigError, match="made a report that is none of this enclave"):
        read_report(SOME_FILE, ioctl)


def test_a_host_that_makes_quotes_will_do() -> None:
    sgx = FakeSgx()
    require_quotes(SOME_FILE, sgx.ioctl)
    assert sgx.asked == [DETECT_DCAP, QUOTE_SIZE]


@pytest.mark.parametrize(
    ("sgx", "says"),
    [
        (FakeSgx(has_driver=False), "no DCAP driver"),
        (FakeSgx(quote_size=None), "the host makes no quotes.*Input/output error.*check aesmd, and PCCS"),
        (FakeSgx(quote_size=0), "quotes of 0 bytes"),
    ],
    ids=["no-driver", "no-service", "nothing"],
)
def test_a_host_that_makes_none_is_found_out_at_start(sgx: FakeSgx, says: str) -> None:
    with pytest.raises(Unavailable, match=says):
        require_quotes(SOME_FILE, sgx.ioctl)
