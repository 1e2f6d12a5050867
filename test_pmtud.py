#!/usr/bin/env python3
"""Everything that proves pmtud.py, on real kernel traffic in network namespaces.

    sudo python3 test_pmtud.py               all tests (arguments are pytest's: -k udp, -x, -v)
    sudo python3 test_pmtud.py quick         the units and a cluster, before each commit
    python3 test_pmtud.py unit               those that need no cluster (with another Python: PMTUD_VENV=DIR)
    sudo python3 test_pmtud.py lab           the MTU lab, told step by step (--keep, --only 2.4, --no-color)
    sudo python3 test_pmtud.py bench         how fast, against a C floor in the same run (--only fanout)

The first run makes a virtual environment beside this file (.venv) with what the tests need. The namespace
tests need root and what the README says to install.
Nothing outside the namespaces it makes is touched: no sysctl, no rule, no route of this machine.

The tools come first, then the tests in the order of pmtud.py, then what concerns all of it.
Sections: builders, namespaces, errors, options, packets, netlink codec, rules, policy, counters,
peers, forwarder, daemon, doctor, command line, properties, structure, trust, documentation, lab
network, lab screen, lab exercises, lab command, lab tests, bench, test command.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "pmtud.py"
VENV = Path(os.environ.get("PMTUD_VENV", HERE / ".venv"))
REQUIREMENTS = [
    "pytest>=8,<10",
    "pytest-xdist>=3.5,<4",
    "pytest-rerunfailures>=14,<17",
    "hypothesis>=6,<7",
    "scapy>=2.5,<3",
    "prometheus-client>=0.16,<1",
    "kubernetes-validate==1.37.0",
    "PyYAML>=6,<7",
    # The Python versions it has; without an upper bound 1769699998!10.1.0, of an older Grafana, wins
    'grafana-foundation-sdk>=0.0.21,<1; python_version >= "3.11"',
    # It has wheels for these
    'atheris>=2.3,<4; platform_machine == "x86_64" and python_version >= "3.11"'
    ' and python_version < "3.14"',
]
if os.environ.get("PMTUD_TEST_PICTURES") != "0":  # 170 MB that unit tests have no use for
    REQUIREMENTS.append("matplotlib>=3.7,<4")

# The programs that are started here, and Debian's packages with them.
PACKAGES = {
    "ip": "iproute2",
    "nstat": "iproute2",
    "ss": "iproute2",
    "nft": "nftables",
    "iptables-nft": "iptables",
    "iptables-legacy": "iptables",
    "tcpdump": "tcpdump",
    "conntrack": "conntrack",
    "ping": "iputils-ping",
    "curl": "curl",
    "openssl": "openssl",
    "sysctl": "procps",
    "setpriv": "util-linux",
    "taskset": "util-linux",
    "unshare": "util-linux",
    "dnsmasq": "dnsmasq-base",
    "systemd-analyze": "systemd",
    "promtool": "prometheus",
}
# Where not all of them are needed.
PROGRAMS = {
    "unit": (),
    "lab": ("ip", "nstat", "nft", "tcpdump", "curl", "ping", "openssl", "sysctl"),
    "bench": ("ip", "nft", "taskset"),
}


def look_for_programs(command: str) -> None:
    """End with the one line that installs all that is missing."""
    programs = PROGRAMS.get(command, tuple(PACKAGES))
    missing = {PACKAGES[program] for program in programs if not shutil.which(program)}
    if Path(sys.prefix) != VENV and not importlib.util.find_spec("ensurepip"):
        missing.add("python3-venv")
    if missing:
        sys.exit(
            f"test_pmtud.py: programs are missing: apt-get install {' '.join(sorted(missing))}"
        )


def prepare() -> None:
    """Make the virtual environment if need be, and go on in it."""
    python = VENV / "bin" / "python"
    stamp = VENV / "requirements.txt"
    wanted = "\n".join((sys.version, *REQUIREMENTS))
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"preparing {VENV} ...", flush=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(VENV)],
            [*pip, *REQUIREMENTS],
        ):
            if subprocess.run(command, check=False).returncode:
                sys.exit(f"test_pmtud.py: {' '.join(command)} failed")
        stamp.write_text(wanted)
    os.execv(python, [str(python), *sys.argv])


if __name__ == "__main__":
    look_for_programs("".join(sys.argv[1:2]))
    if Path(sys.prefix) != VENV:
        prepare()

import argparse
import ast
import atexit
import contextlib
import ctypes
import enum
import errno
import fcntl
import inspect
import json
import logging
import math
import pty
import re
import resource
import shlex
import signal
import socket
import ssl
import struct
import sysconfig
import tempfile
import textwrap
import threading
import time
import typing
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cached_property, partial
from ipaddress import ip_address, ip_network
from random import Random
from types import TracebackType
from typing import Any, Callable, ClassVar, NamedTuple, Optional, TypeVar, Union

import http.server
import urllib.parse

import hypothesis.strategies as st
import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from prometheus_client.parser import text_string_to_metric_families
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6, in6_chksum
from scapy.utils import checksum as scapy_checksum
from xdist.scheduler import LoadGroupScheduling
from xdist.workermanage import WorkerController

sys.path.insert(0, str(HERE))
os.umask(0o022)  # what is made here is read by other users and by root without its privileges
# What this machine's own pmtud, service manager or cluster say is not for these
for variable in list(os.environ):
    if re.match(
        "PMTUD_(?!VENV|SCRIPT|PATIENCE|TEST_|FUZZ_|SOAK_)|NOTIFY_|WATCHDOG_|KUBERNETES_|PYTHON|"
        "NO_COLOR|RES_OPTIONS",
        variable,
    ):
        del os.environ[variable]
import pmtud

Reason = pmtud.Reason
README = (HERE / "README.md").read_text()
ENVIRONMENT = dict(os.environ)  # with the tests' own settings, for other runs of this file


def hide_settings() -> None:
    """Take them out of the environment: the daemon would warn of options that do not exist."""
    for name in ENVIRONMENT:
        if name.startswith("PMTUD_"):
            os.environ.pop(name, None)


if __name__ != "__main__":  # there pytest.main() has yet to import this file once more
    hide_settings()
SCRIPT = ENVIRONMENT.get("PMTUD_SCRIPT", str(PROGRAM))  # the daemon that the lab runs
OF_EACH_PROPERTY = int(ENVIRONMENT.get("PMTUD_TEST_EXAMPLES", "200"))
settings.register_profile("pmtud", max_examples=OF_EACH_PROPERTY, deadline=None, database=None)
settings.load_profile("pmtud")

unit = pytest.mark.unit  # needs neither root nor a namespace
quick = pytest.mark.quick  # what is most likely to notice a mistake, on one cluster
# With several workers each test goes to whoever is free, but for these groups.
# On one worker: each exercise goes on where the last ended
in_order = pytest.mark.xdist_group("lab")
with_wheel = pytest.mark.xdist_group("wheel")  # on one worker: it is fetched once
alone = pytest.mark.xdist_group("alone")  # at the end, while no other test runs: they measure time


@pytest.fixture(autouse=True)
def turn(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """A test of the group `alone` waits until the other workers' tests are over, and they for it."""
    if not hasattr(request.config, "workerinput"):
        yield
        return
    shared = alone.mark not in request.node.iter_markers()
    with open(tmp_path_factory.getbasetemp().parent / "turn", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


# -----------------------------------------------------------------------------
# Section: builders -- packets made from the RFCs, every field can be broken

TCP_PROTOCOL = 6
UDP_PROTOCOL = 17
HOP_BY_HOP = 0
ROUTING = 43
FRAGMENT = 44
AUTHENTICATION = 51
DESTINATION_OPTIONS = 60
DF = 0x4000
MF = 0x2000
Extension = tuple[int, bytes]  # its number, and its bytes with any value in the next-header byte


def packed(address: str) -> bytes:
    """An address in network byte order."""
    return ip_address(address).packed


def source_of(packet: bytes) -> bytes:
    """The packed source address of an IP packet."""
    if packet[0] >> 4 == 4:
        return packet[12:16]
    return packet[8:24]


def destination_of(packet: bytes) -> bytes:
    """The packed destination address of an IP packet."""
    if packet[0] >> 4 == 4:
        return packet[16:20]
    return packet[24:40]


def internet_checksum(data: bytes) -> int:
    """RFC 1071 section 1, the slow and obvious way."""
    words = struct.iter_unpack("!H", data + bytes(len(data) % 2))
    total = sum(int(word) for (word,) in words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(
    src: str,
    dst: str,
    protocol: int,
    payload: bytes,
    *,
    options: bytes = b"",
    length: Optional[int] = None,
    fragment: int = DF,
    first: Optional[int] = None,
    ttl: int = 64,
) -> bytes:
    """RFC 791 section 3.1; `first` is the byte of version and header length, `length` the total
    length.
    """
    size = 20 + len(options)
    total = size + len(payload) if length is None else length
    version_ihl = 0x40 | size // 4 if first is None else first
    start = struct.pack("!BBHHHBB", version_ihl, 0, total, 0x1234, fragment, ttl, protocol)
    end = packed(src) + packed(dst) + options
    return start + struct.pack("!H", internet_checksum(start + bytes(2) + end)) + end + payload


def ipv6(
    src: str,
    dst: str,
    protocol: int,
    payload: bytes,
    *,
    extensions: Sequence[Extension] = (),
    length: Optional[int] = None,
    first: int = 0x60,
    ttl: int = 64,
) -> bytes:
    """RFC 8200 section 3; `length` is what IPv4 calls total length, the header included."""
    kinds = [kind for kind, _ in extensions] + [protocol]
    chain = b""
    for (_, data), following in zip(extensions, kinds[1:]):
        chain += bytes([following]) + data[1:]
    chain += payload
    size = len(chain) if length is None else length - 40
    start = struct.pack("!B3xHBB", first, size, kinds[0], ttl)
    return start + packed(src) + packed(dst) + chain


def fragment_header(offset: int, more: bool) -> Extension:
    """RFC 8200 section 4.5; `offset` in units of eight bytes."""
    return FRAGMENT, struct.pack("!BBHI", 0, 0, offset << 3 | more, 0xCAFE)


PADDED_OPTIONS = bytes([0, 0, 1, 4, 0, 0, 0, 0])  # PadN fills the eight bytes
ROUTE = (ROUTING, bytes([0, 2, 4, 0]) + bytes(20))  # length 2: 24 bytes
# Length 4: (4 + 2) * 4 bytes, RFC 4302 section 2.2
AUTHENTICATED = (
    AUTHENTICATION,
    bytes([0, 4, 0, 0]) + bytes(20),
)
ROUTER_ALERT = bytes([0x94, 4, 0, 0])  # IPv4 option, RFC 2113


def tcp_start(sport: int = 443, dport: int = 40000, size: int = 20) -> bytes:
    """The first bytes of a TCP header (RFC 9293 section 3.1)."""
    return struct.pack("!HHIIBBHHH", sport, dport, 0x01020304, 0x05060708, 0x50, 0x10, 512, 0, 0)[
        :size
    ]


class Plan(NamedTuple):
    """One family's address plan of the cluster in these tests."""

    family: pmtud.Family
    wrap: Callable[..., bytes]
    error: tuple[int, int]  # type and code
    router: str
    vip: str
    client: str
    node: str  # this node as peers know it
    peer: str
    inside: str  # in --ignore-networks
    group: str  # broadcast or multicast
    inside_network: str


V4 = Plan(
    pmtud.IPV4,
    ipv4,
    (3, 4),
    "198.51.100.1",
    "203.0.113.10",
    "192.0.2.77",
    "10.0.0.11",
    "10.0.0.12",
    "10.9.0.1",
    "10.0.0.255",
    "10.9.0.0/16",
)
V6 = Plan(
    pmtud.IPV6,
    ipv6,
    (2, 0),
    "2001:db8:1::1",
    "2001:db8:2::10",
    "2001:db8:3::77",
    "fd00::11",
    "fd00::12",
    "fd09::1",
    "ff02::114",
    "fd09::/64",
)
NETS = {"ipv4": V4, "ipv6": V6}
PLANS = {4: V4, 6: V6}
both_families = pytest.mark.parametrize("net", [V4, V6], ids=lambda net: str(net.family.name))


def icmp_error(
    net: Plan,
    src: str,
    dst: str,
    quoted: bytes,
    *,
    mtu: int,
    kind: Optional[int] = None,
    code: Optional[int] = None,
    checksum: Optional[int] = None,
) -> bytes:
    """RFC 1191 section 4 and RFC 4443 section 3.2.

    The checksum of section 2.3 covers a pseudo-header.
    """
    usual_kind, usual_code = net.error
    start = bytes(
        [
            usual_kind if kind is None else kind,
            usual_code if code is None else code,
        ]
    )
    end = struct.pack("!I", mtu) + quoted  # IPv4: 16 bits unused, and the MTU
    size = len(start) + 2 + len(end)
    pseudo = b""
    if net is V6:
        pseudo = packed(src) + packed(dst) + struct.pack("!I3xB", size, 58)
    if checksum is None:
        checksum = internet_checksum(pseudo + start + bytes(2) + end)
    return start + struct.pack("!H", checksum) + end


def mtu_error(
    net: Plan,
    *,
    src: str = "",
    dst: str = "",
    quoted_src: str = "",
    quoted_dst: str = "",
    mtu: int = 1400,
    protocol: int = TCP_PROTOCOL,
    transport: Optional[bytes] = None,
    quoted_length: int = 1500,
    quoted: Optional[bytes] = None,
    inner: Any = (),
    outer: Any = (),
    outer_protocol: Optional[int] = None,
    payload: Optional[bytes] = None,
    **icmp: Any,
) -> bytes:
    """A whole error, valid by default: the router tells the VIP about its packet to the client.

    `quoted` replaces the quoted packet, `payload` the ICMP message; `inner` and `outer` are more
    arguments of the quoted and outer header's builder, `icmp` of icmp_error().
    """
    src = src or net.router
    dst = dst or net.vip
    quoted_src = quoted_src or net.vip
    if quoted is None:
        start = tcp_start() if transport is None else transport
        fields = {"length": quoted_length, **dict(inner)}
        quoted = net.wrap(quoted_src, quoted_dst or net.client, protocol, start, **fields)
    if payload is None:
        payload = icmp_error(net, src, dst, quoted, mtu=mtu, **icmp)
    if outer_protocol is None:
        outer_protocol = net.family.icmp_protocol
    return net.wrap(src, dst, outer_protocol, payload, **dict(outer))


def error4(**fields: Any) -> bytes:
    """An IPv4 "fragmentation needed"."""
    return mtu_error(V4, **fields)


def error6(**fields: Any) -> bytes:
    """An IPv6 "packet too big"."""
    return mtu_error(V6, **fields)


def parsed(net: Plan, **fields: Any) -> pmtud.MtuError:
    """What parse() makes of a valid error."""
    found = pmtud.parse(mtu_error(net, **fields))
    assert isinstance(found, pmtud.MtuError)
    return found


def run_program(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The program as a user starts it."""
    command = [sys.executable, str(PROGRAM), *argv]
    return subprocess.run(
        command,
        env={**os.environ, **environ},
        text=True,
        capture_output=True,
        check=False,
        timeout=80,
    )


# -----------------------------------------------------------------------------
# Section: namespaces -- hosts and links, processes, captures, and an ECMP cluster with a black hole in it

T = TypeVar("T")
N = TypeVar("N", bound="Net")

CLONE_NEWNET = 0x40000000  # <linux/sched.h>
ETH_P_ALL = 0x0003  # <linux/if_ether.h>
SO_ATTACH_FILTER = 26  # <asm-generic/socket.h>
SO_RCVBUFFORCE = 33
SOL_PACKET = 263  # <linux/if_packet.h>
PACKET_STATISTICS = 6
NETLINK_NETFILTER = 12  # <linux/netfilter/nfnetlink*.h>
NFNL_SUBSYS_CTNETLINK = 1
IPCTNL_MSG_CT_DELETE = 2
NLM_F_REQUEST = 1  # <linux/netlink.h>
NLM_F_ACK = 4

libc = ctypes.CDLL(None, use_errno=True)
libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
libc.setns.restype = ctypes.c_int
libc.bind.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
libc.bind.restype = ctypes.c_int


# How many times as slow as the machine on which these tests were written another one may be.
PATIENCE = float(ENVIRONMENT.get("PMTUD_PATIENCE", "4"))


def poll(condition: Callable[[], T], timeout: float) -> T:
    """The first true value of condition(), or its last value once PATIENCE times the timeout
    (seconds) has passed.
    """
    deadline = time.monotonic() + PATIENCE * timeout
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


def openssl(words: str) -> None:
    """One command of openssl."""
    execute("openssl", *words.split())


def becomes(read: Callable[[], Any], wanted: Any, seconds: float) -> bool:
    """Wait until what is read is what is wanted; whether it is."""
    return bool(poll(lambda: read() == wanted, seconds))


class CommandFailed(RuntimeError):
    """A command ended with an error; the text carries the command, its input and all it printed."""


def execute(*argv: str, check: bool = True, timeout: float = 20, input: str | None = None) -> str:
    """What the command wrote to its standard output."""
    try:
        done = subprocess.run(
            argv,
            input=input or "",
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PATIENCE * timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"") + (error.stderr or b"")
        raise CommandFailed(
            f"{' '.join(argv)}: not finished after {timeout} s\n{printed!r}"
        ) from None
    if check and done.returncode:
        raise CommandFailed(
            f"{' '.join(argv)}: exit status "
            f"{done.returncode}\n{input or ''}{done.stdout}{done.stderr}"
        )
    return done.stdout


class Process:
    """A background process; what it prints (both streams) collects in an unnamed file."""

    def __init__(self, argv: list[str], env: dict[str, str] | None) -> None:
        self._file = tempfile.TemporaryFile()
        self._final = ""
        self._name = " ".join(argv)[:200]
        # A session of its own: Ctrl-C in a terminal reaches the tests only, and they stop what they
        # started.
        self._popen = subprocess.Popen(
            argv,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._popen.pid

    def output(self) -> str:
        """All it has printed so far."""
        if self._file.closed:
            return self._final
        # pread, because the file offset is shared with the process
        return os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0).decode(
            errors="replace"
        )

    def returncode(self) -> int | None:
        """None while it runs."""
        return self._popen.poll()

    def wait_for(self, text: str, timeout: float = 10) -> str:
        """The output, as soon as text is in it.

        TimeoutError if the process ends or time runs out first.
        """
        poll(lambda: text in self.output() or self.returncode() is not None, timeout)
        if text not in (output := self.output()):
            state = "running" if self.returncode() is None else f"ended with {self.returncode()}"
            raise TimeoutError(f"{self._name} ({state}) did not print {text!r} but:\n{output}")
        return output

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 10) -> int:
        """Its exit status after sig.

        TimeoutError if it outlives timeout; it has been killed by then.
        """
        if self._popen.poll() is None:
            self._popen.send_signal(sig)
        try:
            return self._popen.wait(PATIENCE * timeout)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
            raise TimeoutError(
                f"{self._name} outlived signal {sig} by {timeout} s:\n{self.output()}"
            ) from None

    def close(self) -> None:
        """Kill it if need be; output() keeps working."""
        self.stop(signal.SIGKILL)
        if not self._file.closed:
            self._final = self.output()
            self._file.close()


class Host:
    """One network namespace. Made by Net.host()."""

    def __init__(self, net: Net, name: str) -> None:
        self.net = net
        self.name = name
        self.namespace = f"pm{os.getpid()}-{net.serial}-{name}"

    def __repr__(self) -> str:
        return self.namespace

    def run(
        self, *argv: str, check: bool = True, timeout: float = 20, input: str | None = None
    ) -> str:
        """What the command, run in here, wrote to its standard output."""
        return execute(
            "ip", "netns", "exec", self.namespace, *argv, check=check, timeout=timeout, input=input
        )

    def ip(self, *commands: str) -> None:
        """Each string is an `ip` command line without the word ip; one process runs them all."""
        execute("ip", "-n", self.namespace, "-batch", "-", input="\n".join(commands) + "\n")

    def start(self, *argv: str, env: dict[str, str] | None = None) -> Process:
        """`ip netns exec` becomes the program, so Process.pid is the program's own."""
        process = Process(["ip", "netns", "exec", self.namespace, *argv], env)
        self.net.processes.append(process)
        return process

    def inside(self, function: Callable[[], T]) -> T:
        """function() called by a thread in this namespace; a socket opened there stays in it."""

        def task() -> T:
            with open(f"/run/netns/{self.namespace}", "rb") as handle:
                if libc.setns(handle.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"setns {self.namespace}")
            return function()

        with ThreadPoolExecutor(
            1
        ) as pool:  # the thread ends with the block; it never serves another namespace
            return pool.submit(task).result()

    def sysctl(self, key: str, value: object) -> None:
        """Dots or slashes in key; slashes where an interface name has dots."""
        self.sysctls({key: value})

    def sysctls(self, values: dict[str, object]) -> None:
        """/proc/sys/net belongs to the namespace of the task that opens it, hence inside()."""

        def write() -> None:
            for key, value in values.items():
                with open(f"/proc/sys/{key if '/' in key else key.replace('.', '/')}", "w") as file:
                    file.write(f"{value}\n")

        self.inside(write)

    def read(self, path: str) -> str:
        """The file as a process in here sees it (/proc/net is a process's, not a thread's)."""
        return self.run("cat", path)


class Net:
    """Owns hosts and processes.

    Removes them on leaving the `with` block or the interpreter. May close twice.
    """

    made = 0
    host_class: ClassVar[type[Host]] = Host

    def __init__(self) -> None:
        Net.made += 1
        self.serial = Net.made  # several may stand at a time
        self.hosts: list[Host] = []
        self.processes: list[Process] = []

    def __enter__(self: N) -> N:
        atexit.register(self.close)  # for an interrupt that hits build() or close() itself
        try:
            self.build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def build(self) -> None:
        """For subclasses: what to make on entering."""

    def close(self) -> None:
        for process in self.processes:
            process.close()
        # Whoever is left in our namespaces is a child of ours, or one that an interrupt kept off
        # the list.
        for pid in self._for_each_host("netns pids").split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self._for_each_host("netns delete")
        self.hosts.clear()
        atexit.unregister(self.close)

    def _for_each_host(self, command: str) -> str:
        # -force: some may not exist
        lines = "".join(f"{command} {host.namespace}\n" for host in self.hosts)
        return execute("ip", "-force", "-batch", "-", check=False, input=lines)

    def host(self, name: str, forward: bool = False) -> Host:
        """A new namespace: loopback up, no reverse path filter, no duplicate address detection, no
        redirects.
        """
        host = self.host_class(self, name)
        self.hosts.append(host)  # before it is made, so that an interrupt cannot lose it
        execute("ip", "netns", "add", host.namespace)
        settings: dict[str, object] = {
            f"net.ipv4.conf.{scope}.{key}": 0  # a new namespace inherits these
            for scope in ("all", "default")
            for key in ("rp_filter", "send_redirects")
        }
        settings.update({f"net.ipv6.conf.{scope}.accept_dad": 0 for scope in ("all", "default")})
        settings.update(
            {"net.ipv4.ip_forward": int(forward), "net.ipv6.conf.all.forwarding": int(forward)}
        )
        settings["net.ipv4.tcp_no_metrics_save"] = (
            1  # or the last test's hung flows slow the next test's
        )
        host.sysctls(settings)
        host.ip("link set lo up")
        return host

    def link(self, a: Host, b: Host, mtu: int = 1500, names: tuple[str, str] = ("", "")) -> None:
        """A veth pair, up; the interfaces are called to-PEER unless named (a's name first).

        gso_max_segs 1: each TCP segment is a packet and gets its own ICMP error, as on a wire.
        """
        name_a = names[0] or f"to-{b.name}"
        name_b = names[1] or f"to-{a.name}"
        settings = f"mtu {mtu} gso_max_segs 1"
        a.ip(
            f"link add {name_a} {settings} type veth peer name {name_b} {settings} netns "
            f"{b.namespace}",
            f"link set {name_a} up",
        )
        b.ip(f"link set {name_b} up")


class Seen(NamedTuple):
    """One captured packet."""

    interface: str
    kind: int  # socket.PACKET_HOST, PACKET_BROADCAST, PACKET_OTHERHOST, PACKET_OUTGOING
    packet: bytes  # from the IP header on


# Classic BPF (code, jump if true, jump if false, operand): IPv4 ICMP 3/4 and ICMPv6 2, so data
# cannot fill the buffer.
ICMP_ERRORS = (
    (0x30, 0, 0, 0),
    (0x54, 0, 0, 0xF0),
    (0x15, 0, 6, 0x40),  # 0: A = version; not 4: go to 9
    (0x30, 0, 0, 9),
    (0x15, 0, 10, 1),  # 3: protocol is ICMP
    (0xB1, 0, 0, 0),
    (0x48, 0, 0, 0),
    (0x15, 0, 7, 0x0304),
    (0x06, 0, 0, 0xFFFF),  # 5: X = header length; type, code
    (0x15, 0, 5, 0x60),
    (0x30, 0, 0, 6),
    (0x15, 0, 3, 58),  # 9: version 6, next header ICMPv6
    (0x30, 0, 0, 40),
    (0x15, 0, 1, 2),
    (0x06, 0, 0, 0xFFFF),  # 12: type
    (0x06, 0, 0, 0),  # 15: not wanted
)


class Capture:
    """Every ICMP "packet too big" error on one interface, or on all ("".

    A forwarded packet then counts on each).
    """

    def __init__(self, host: Host, interface: str = "") -> None:
        self._host = host
        self._interface = interface
        self._seen: list[Seen] = []
        self._lost = 0
        self._stop = threading.Event()

    def __enter__(self) -> Capture:
        self._socket = self._host.inside(self._open)
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._lost += self._dropped()
        self._socket.close()

    def _open(self) -> socket.socket:
        # Protocol 0: nothing arrives before bind()
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        code = ctypes.create_string_buffer(
            b"".join(struct.pack("=HBBI", *line) for line in ICMP_ERRORS)
        )
        program = struct.pack("@HP", len(ICMP_ERRORS), ctypes.addressof(code))
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
        # 0: Python's bind() cannot say "all"
        index = socket.if_nametoindex(self._interface) if self._interface else 0
        address = struct.pack(
            "=HHiHBB8s", socket.AF_PACKET, socket.htons(ETH_P_ALL), index, 0, 0, 0, b""
        )
        if libc.bind(sock.fileno(), address, len(address)):
            raise OSError(ctypes.get_errno(), f"capture on {self._host} {self._interface}")
        sock.settimeout(0.05)
        return sock

    def _collect(self) -> None:
        while True:
            try:
                packet, (interface, _, kind, *_) = self._socket.recvfrom(65536)
                self._seen.append(Seen(interface, kind, packet))
            except socket.timeout:
                if self._stop.is_set():  # only once the socket is empty
                    return
            except OSError as error:
                if error.errno != errno.ENETDOWN:  # said once when the interface goes down
                    raise

    def _dropped(self) -> int:
        """Packets the kernel had no room for since the last call."""
        return int(
            struct.unpack("=II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[1]
        )

    def packets(self) -> list[Seen]:
        """All so far, also after the `with` block. RuntimeError if any was lost."""
        if self._socket.fileno() >= 0:
            self._lost += self._dropped()
        if self._lost or not (self._thread.is_alive() or self._stop.is_set()):
            raise RuntimeError(
                f"capture on {self._host} {self._interface} lost {self._lost} packets or its thread"
            )
        return list(self._seen)

    def settle(self, quiet: float = 0.3, timeout: float = 10) -> list[Seen]:
        """All packets, once none has come for quiet seconds. TimeoutError if they keep coming."""
        count = len(self._seen)
        since = time.monotonic()

        def is_quiet() -> bool:
            nonlocal count, since
            if len(self._seen) != count:
                count = len(self._seen)
                since = time.monotonic()
            return time.monotonic() - since >= quiet

        if not poll(is_quiet, timeout):
            raise TimeoutError(f"{count} packets and more on {self._host} after {timeout} s")
        return self.packets()


PORT = 80
DOWNLOAD_BYTES = 200_000

SERVER = """
import socket, sys, threading
port, size = map(int, sys.argv[1:])
def serve(connection):
    with connection:
        try:
            connection.sendall(bytes(size))
        except OSError:
            pass  # the client gave up and reset the connection
listener = socket.create_server(("::", port), family=socket.AF_INET6, backlog=512, dualstack_ipv6=True)
print("listening", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""

# A refused, reset or never opened connection is a broken test bed, not a black hole: it ends the
# program.
CLIENT = """
import json, selectors, socket, struct, sys, time
target, (port, size), deadline = sys.argv[1], map(int, sys.argv[2:4]), float(sys.argv[4])
waiting, seconds, start = selectors.DefaultSelector(), [], time.monotonic()
for source in sys.argv[5:]:
    client = socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets: servers stop
    client.setblocking(False)
    client.bind((source, 0))
    client.connect_ex((target, port))
    waiting.register(client, selectors.EVENT_READ, [size])
while waiting.get_map() and (left := start + deadline - time.monotonic()) > 0:
    for key, _ in waiting.select(left):
        try:
            data = key.fileobj.recv(1 << 18)
        except BlockingIOError:
            continue  # readable for a packet that then failed its checks
        assert data, "closed early"
        key.data[0] -= len(data)
        if not key.data[0]:
            seconds.append(round(time.monotonic() - start, 6))
            waiting.unregister(key.fileobj)
            key.fileobj.close()
for key in list(waiting.get_map().values()):
    key.fileobj.getpeername()
    key.fileobj.close()
print(json.dumps(seconds))
"""

# {i} this node, {j} the next one; clients reach `cross` through one node and are served by the pod
# of the next.
NAT_RULES = """
table ip nat {{
  chain prerouting {{ type nat hook prerouting priority dstnat;
    ip daddr 10.96.0.2 dnat to 10.244.{i}.2
    ip daddr 10.96.0.3 dnat to 10.244.{j}.2
  }}
  chain postrouting {{ type nat hook postrouting priority srcnat; ct original ip daddr 10.96.0.3 masquerade; }}
}}
table ip6 nat {{
  chain prerouting {{ type nat hook prerouting priority dstnat;
    ip6 daddr fd96::2 dnat to fd44:{i}::2
    ip6 daddr fd96::3 dnat to fd44:{j}::2
  }}
  chain postrouting {{ type nat hook postrouting priority srcnat; ct original ip6 daddr fd96::3 masquerade; }}
}}
"""
INVALID_DROP_RULES = (
    "table inet invalid {\n"
    + "".join(
        f"chain {hook} {{ type filter hook {hook} priority filter; ct state invalid drop; }}\n"
        for hook in ("input", "forward", "output")
    )
    + "}\n"
)


def start_server(host: Host, size: int) -> Process:
    """A server on PORT that sends so many bytes to everybody; it says when it listens."""
    return host.start(sys.executable, "-ISc", SERVER, str(PORT), str(size))


class Cluster(Net):
    """An ECMP cluster whose clients sit behind a thin link.

    client --1500/1400-- router --1500-- fabric --+-- node1 -- pod1      fabric hashes on addresses
    and ports 10.9.0.1..23   10.8.0.1     10.8.0.2 10.0.0.1 +-- node2 -- pod2      node i: eth0
    10.0.0.1i, mgmt 172.20.20.1i (router .254)  172.20.20.2 on mgmt            +-- node3 -- pod3
    pod i: 10.244.i.2 IPv6: fd09::k, fd08::1 and ::2, fd00::1 and ::1i, fd20::2 and ::1i, fd44:i::2.

    The router's interface towards the client has MTU 1400, the client's own 1500 (its SYN says mss
    1460), so the router sends errors to the service's address, and the fabric takes all those of
    one service to one node. Services, routed to every node: `host` (a socket of the node), `pod`
    (DNAT to the node's own pod), `cross` (DNAT to the next node's pod and masquerade). A `cross`
    pod learns the path MTU of the *node's* address, once for all clients that come through that
    node. An error about a pod's flow that lands on a wrong node is routed back to the fabric, and
    from there to the same node, until its TTL ends (unless invalid_drop).
    """

    SERVICES: ClassVar[dict[str, int]] = {"host": 1, "pod": 2, "cross": 3}

    def __init__(self, nodes: int = 3, invalid_drop: bool = False, conntrack: bool = True) -> None:
        """Without conntrack: the `host` service only, and no rule that tracks connections on any
        node.
        """
        super().__init__()
        self.size = nodes
        self.invalid_drop = invalid_drop
        self.conntrack = conntrack

    @staticmethod
    def vip(service: str, family: int = 4) -> str:
        return f"{'10.96.0.' if family == 4 else 'fd96::'}{Cluster.SERVICES[service]}"

    @staticmethod
    def client_address(number: int, family: int = 4) -> str:
        return f"{'10.9.0.' if family == 4 else 'fd09::'}{number}"

    @staticmethod
    def node_address(number: int, family: int = 4) -> str:
        """number counts from 1, as in the names node1 and pod1."""
        return f"{'10.0.0.' if family == 4 else 'fd00::'}{10 + number}"

    @staticmethod
    def node_addresses(*families: int) -> list[str]:
        """Those of the three nodes that most clusters have."""
        addresses = []
        for family in families:
            addresses += [Cluster.node_address(number, family) for number in (1, 2, 3)]
        return addresses

    def build(self) -> None:
        self.client = self.host("client")
        self.mgmt = self.host("mgmt")
        self.router = self.host("router", forward=True)
        self.fabric = self.host("fabric", forward=True)
        numbers = range(1, self.size + 1)
        self.nodes = [self.host(f"node{i}", forward=True) for i in numbers]
        self.pods = [self.host(f"pod{i}") for i in numbers if self.conntrack]
        self._build_outside()
        self._build_fabric()
        for i in numbers:
            self._build_node(i)
        servers = [start_server(host, DOWNLOAD_BYTES) for host in self.nodes + self.pods]
        for server in servers:
            server.wait_for("listening")

    def _build_outside(self) -> None:
        for bridge, host in (("mgmt", self.mgmt), ("nodes", self.fabric)):
            host.ip(f"link add {bridge} type bridge mcast_snooping 0", f"link set {bridge} up")
        self.link(self.client, self.router)
        self.link(self.router, self.fabric)
        self.link(self.mgmt, self.router, names=("to-router", "mgmt"))
        self.mgmt.ip("link set to-router master mgmt")
        self.client.ip(
            *(f"addr add {self.client_address(k)}/24 dev to-router" for k in range(1, 24)),
            *(f"addr add {self.client_address(k, 6)}/64 dev to-router" for k in range(1, 24)),
            "route add default via 10.9.0.254",
            "route add ::/0 via fd09::fe",
        )
        self.router.ip(
            "addr add 10.9.0.254/24 dev to-client",
            "addr add fd09::fe/64 dev to-client",
            "addr add 10.8.0.1/24 dev to-fabric",
            "addr add fd08::1/64 dev to-fabric",
            "addr add 172.20.20.2/24 dev mgmt",
            "addr add fd20::2/64 dev mgmt",
            "route add default via 10.8.0.2",
            "route add ::/0 via fd08::2",
        )
        self.router_mtu(1400)
        # Older kernels: global, not in here
        known = self.router.inside(lambda: os.listdir("/proc/sys/net/ipv4"))
        budget = [key for key in ("icmp_msgs_per_sec", "icmp_msgs_burst") if key in known]
        self.router.sysctls(
            {
                "net.ipv4.icmp_ratelimit": 0,
                "net.ipv6.icmp.ratelimit": 0,
                **{f"net.ipv4.{key}": 1_000_000 for key in budget},
            }
        )

    def _build_fabric(self) -> None:
        self.fabric.sysctls({f"net.{ip}.fib_multipath_hash_policy": 1 for ip in ("ipv4", "ipv6")})
        hops = [
            " ".join(f"nexthop via {self.node_address(i, family)}" for i in range(1, self.size + 1))
            for family in (4, 6)
        ]
        self.fabric.ip(
            "addr add 10.8.0.2/24 dev to-router",
            "addr add fd08::2/64 dev to-router",
            "addr add 10.0.0.1/24 dev nodes",
            "addr add fd00::1/64 dev nodes",
            "route add default via 10.8.0.1",
            "route add ::/0 via fd08::1",
            f"route add 10.96.0.0/24 {hops[0]}",
            f"route add fd96::/64 {hops[1]}",
        )

    def _build_node(self, i: int) -> None:
        node = self.nodes[i - 1]
        self.link(self.fabric, node, names=("", "eth0"))
        self.link(self.mgmt, node, names=("", "mgmt"))
        self.fabric.ip(f"link set to-{node.name} master nodes")
        self.mgmt.ip(f"link set to-{node.name} master mgmt")
        node.ip(
            f"addr add {self.node_address(i)}/24 brd + dev eth0",
            f"addr add {self.node_address(i, 6)}/64 dev eth0",
            f"addr add 172.20.20.{10 + i}/24 dev mgmt",
            f"addr add fd20::{10 + i}/64 dev mgmt",
            f"addr add {self.vip('host')}/32 dev lo",
            f"addr add {self.vip('host', 6)}/128 dev lo",
            "route add default via 10.0.0.1",
            "route add ::/0 via fd00::1",
        )
        if self.conntrack:
            self._build_pod(i)

    def _build_pod(self, i: int) -> None:
        node = self.nodes[i - 1]
        pod = self.pods[i - 1]
        self.link(node, pod, names=("to-pod", "eth0"))
        pod.ip(
            f"addr add 10.244.{i}.2/24 dev eth0",
            f"addr add fd44:{i}::2/64 dev eth0",
            f"route add default via 10.244.{i}.1",
            f"route add ::/0 via fd44:{i}::1",
        )
        others = [j for j in range(1, self.size + 1) if j != i]
        node.ip(
            f"addr add 10.244.{i}.1/24 dev to-pod",
            f"addr add fd44:{i}::1/64 dev to-pod",
            *(f"route add 10.244.{j}.0/24 via {self.node_address(j)}" for j in others),
            *(f"route add fd44:{j}::/64 via {self.node_address(j, 6)}" for j in others),
        )
        self.build_services(node, i)

    def build_services(self, node: Host, i: int) -> None:
        """What makes the services' addresses lead to pods."""
        rules = NAT_RULES.format(i=i, j=i % self.size + 1)
        node.run("nft", "-f", "-", input=rules + (INVALID_DROP_RULES if self.invalid_drop else ""))

    def router_mtu(self, mtu: int) -> None:
        """On the router's link to the client.

        1400 makes the black hole, 1500 removes it, below 1280 ends IPv6.
        """
        self.router.ip(f"link set to-client mtu {mtu}")

    def error_from_management(self, on: bool = True) -> None:
        """The router's errors then come from 172.20.20.2, which nodes reach over mgmt, but still
        arrive on eth0.
        """
        for service, via, source in (
            ("10.96.0.0/24", "10.8.0.2", "172.20.20.2"),
            ("fd96::/64", "fd08::2", "fd20::2"),
        ):
            self.router.ip(f"route replace {service} via {via}" + (f" src {source}" if on else ""))

    def strict_rpf(self, on: bool = True) -> None:
        """rp_filter 1 (or 0) for all, default and each interface of each node."""
        for node in self.nodes:
            scopes = node.inside(lambda: os.listdir("/proc/sys/net/ipv4/conf"))
            node.sysctls({f"net/ipv4/conf/{scope}/rp_filter": int(on) for scope in scopes})

    def download(
        self, service: str, family: int = 4, count: int = 23, deadline: float = 10
    ) -> list[float]:
        """The seconds each completed transfer took, of count started at once, each from an address
        of its own.

        Where all of them complete, as with the daemon they must, it is over long before the
        deadline.
        """
        sources = [self.client_address(k, family) for k in range(1, count + 1)]
        options = [self.vip(service, family), str(PORT), str(DOWNLOAD_BYTES), str(deadline)]
        printed = self.client.run(
            sys.executable, "-ISc", CLIENT, *options, *sources, timeout=deadline + 20
        )
        return [float(seconds) for seconds in json.loads(printed)]

    def flush(self) -> None:
        """Forget every learned path MTU and every tracked connection in nodes and pods."""
        for host in self.nodes + self.pods:
            host.sysctl("net.ipv4.route.flush", 1)
            execute("ip", "-6", "-n", host.namespace, "route", "flush", "cache")
        for node in self.nodes if self.conntrack else ():
            node.inside(flush_conntrack)

    def learned(self, host: Host, address: str) -> int | None:
        """The path MTU that host has learned for address."""
        return self.learned_each(host, [address])[0]

    def learned_each(self, host: Host, addresses: Sequence[str]) -> list[int | None]:
        """The path MTUs that host has learned for these addresses."""
        commands = "".join(f"route get {address}\n" for address in addresses)
        printed = execute("ip", "-j", "-n", host.namespace, "-batch", "-", input=commands)
        found: list[int | None] = []
        for line in printed.splitlines():
            [route] = json.loads(line)
            mtu = None
            for metric in route.get("metrics", ()):
                mtu = metric.get("mtu", mtu)
            found.append(mtu)
        assert len(found) == len(addresses), printed
        return found


def flush_conntrack() -> None:
    """What `conntrack -F` does.

    IPCTNL_MSG_CT_DELETE without a tuple, in the namespace of the calling thread.
    """
    header = struct.pack(
        "=IHHIIBBH",
        20,
        NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE,
        NLM_F_REQUEST | NLM_F_ACK,
        1,
        0,
        socket.AF_UNSPEC,
        0,
        0,
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
        netlink.send(header)
        (code,) = struct.unpack_from("=i", netlink.recv(4096), 16)
    if code:
        raise OSError(-code, "flush conntrack")


PEER_LISTS = {
    4: ",".join(Cluster.node_addresses(4)),
    6: ",".join(Cluster.node_addresses(6)),
}
ALL_PEERS = ",".join(PEER_LISTS.values())


def peers_of(family: int) -> tuple[str, str]:
    """The option that names the cluster's nodes."""
    return "--peers", PEER_LISTS[family]


CASES = [(family, service) for family in (4, 6) for service in Cluster.SERVICES]
ERRORS = 23


def start_daemon(host: Host, *options: str) -> Process:
    """pmtud.py in a host, not waited for."""
    return host.start(sys.executable, "-Werror", str(PROGRAM), *options)


def daemon(host: Host, *options: str) -> Process:
    """pmtud.py running in a host; errors are handled from when this returns."""
    process = start_daemon(host, *options)
    process.wait_for("limits:")
    return process


def patched_daemon(
    host: Host,
    patch: str,
    *options: str,
    env: Optional[dict[str, str]] = None,
    start: Sequence[str] = (),
) -> Process:
    """pmtud with these lines of Python before main(), not waited for.

    `start` stands before the command, like ulimit in a shell.
    """
    script = f"import pmtud, sys\n{patch}\nsys.exit(pmtud.main(sys.argv[1:]))"
    argv = [*start, sys.executable, "-Werror", "-c", script, *options]
    return host.start(*argv, env={"PYTHONPATH": str(HERE), **(env or {})})


@contextlib.contextmanager
def daemons(
    hosts: Sequence[Host], *options: str, patch: str = "", start: Sequence[str] = ()
) -> Iterator[list[Process]]:
    """A daemon in each host, patched or started in another way if so said.

    On the way out each must stop cleanly and leave no table behind.
    """
    if patch or start:
        processes = [patched_daemon(host, patch, *options, start=start) for host in hosts]
    else:
        processes = [start_daemon(host, *options) for host in hosts]
    try:
        for host, process in zip(hosts, processes):
            if patch or start:  # its log may go anywhere
                assert poll(partial(is_ready, host), 10), "not ready"
            else:
                process.wait_for("limits:")
        yield processes
    except BaseException:
        for process in processes:
            print(process.output()[-4000:])
        raise
    finally:
        with ThreadPoolExecutor() as pool:
            codes = list(pool.map(Process.stop, processes))
    assert codes == [0] * len(processes), processes[0].output()
    for host, process in zip(hosts, processes):
        assert "Traceback" not in process.output()
        assert "pmtud" not in host.run("nft", "list", "tables")


QUICK = "pmtud.Daemon.TICK, pmtud.Daemon.SLOW_TICKS = 0.2, 2"  # housekeeping every 0.2 s
SHORT_MINUTE = "pmtud.MinuteReport.SECONDS = 1.0"
# What kernels before 5.12 do
UNOWNED = """
opened = pmtud.Firewall.__init__
def open_unowned(self, config, ifaces, **more):
    opened(self, config, ifaces, owned=False, **more)
pmtud.Firewall.__init__ = open_unowned
"""


def is_ready(host: Host) -> bool:
    """Whether the host's daemon says so."""
    return get(host, "/readyz")[0] == "200"


def metrics(host: Host, port: int = 30040) -> dict[str, float]:
    """Every sample of a host's /metrics, by `name{labels}`."""
    text = host.run("curl", "-sS", "--max-time", "20", f"http://127.0.0.1:{port}/metrics")
    samples = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
    return samples


def total(samples: dict[str, float], name: str) -> int:
    """The sum of a counter over its labels."""
    found = 0.0
    for key, value in samples.items():
        if key.partition("{")[0] == name:
            found += value
    return int(found)


def total_of(hosts: Sequence[Host], name: str) -> int:
    """The same over all hosts."""
    return sum(total(metrics(host), name) for host in hosts)


def metric_becomes(host: Host, name: str, value: float, seconds: float = 5) -> bool:
    """Whether a sample has this value soon."""
    return bool(poll(lambda: metrics(host).get(name) == value, seconds))


def received(host: Host, at_least: int) -> dict[str, float]:
    """The metrics once the daemon has received this many errors, and has counted what became of
    them.
    """

    def arrived() -> Optional[dict[str, float]]:
        now = metrics(host)
        got, judged = account(now)
        return now if got == judged >= at_least else None

    found = poll(arrived, 5)
    assert found is not None, metrics(host)
    return found


def drops(samples: dict[str, float]) -> dict[str, int]:
    """The reasons with a count, without their metric's name."""
    found = {}
    for reason in pmtud.Reason:
        count = samples.get(f'pmtud_dropped_total{{reason="{reason.value}"}}', 0)
        if count:
            found[reason.value] = int(count)
    return found


def inject(host: Host, family: int, packets: Sequence[bytes], gap: float = 0.002) -> None:
    """Send raw IP packets from a host, as they are, one after the other."""

    def send() -> None:
        af = socket.AF_INET if family == 4 else socket.AF_INET6
        with socket.socket(af, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender:
            for packet in packets:
                destination = socket.inet_ntop(af, destination_of(packet))
                sender.sendto(packet, (destination, 0))
                time.sleep(gap)

    host.inside(send)


def flow_errors(
    family: int, service: str = "host", count: int = ERRORS, **fields: Any
) -> list[bytes]:
    """Errors of the cluster's router about `count` flows from a service's address."""
    net = PLANS[family]
    vip = Cluster.vip(service, family)
    fields = {
        "src": {4: "10.8.0.1", 6: "fd08::1"}[family],
        "dst": vip,
        "quoted_src": vip,
        "mtu": 1400,
        **fields,
    }
    return [
        mtu_error(
            net,
            quoted_dst=Cluster.client_address(1 + n % 23, family),
            transport=tcp_start(80, 40000 + n),
            **fields,
        )
        for n in range(count)
    ]


def rulesets(cluster: Cluster) -> list[str]:
    """Each node's nftables rules."""
    return [node.run("nft", "-s", "list", "ruleset") for node in cluster.nodes]


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[tuple[Cluster, list[str]]]:
    """Three nodes behind an ECMP fabric, and their rules as built.

    Shared, because every test starts with flush().
    """
    with Cluster() as cluster:
        yield cluster, rulesets(cluster)


@pytest.fixture
def cluster(shared_cluster: tuple[Cluster, list[str]]) -> Iterator[Cluster]:
    """The shared cluster, as if nothing had happened yet.

    What a test starts ends with it, and its rules must too.
    """
    cluster, rules = shared_cluster
    cluster.strict_rpf(False)
    cluster.error_from_management(False)
    cluster.flush()
    before = len(cluster.processes)
    yield cluster
    for process in cluster.processes[before:]:
        process.close()
    del cluster.processes[before:]
    assert poll(lambda: rulesets(cluster) == rules, 2), f"left behind: {rulesets(cluster)}"


def learners(cluster: Cluster, service: str, family: int) -> list[Host]:
    """The hosts whose stacks own a service's flows."""
    return cluster.nodes if service == "host" else cluster.pods


def assert_learned(cluster: Cluster, service: str, family: int, mtu: int = 1400) -> None:
    """`ip route get` in the owners' namespaces shows the MTU the router reported, for each client."""
    if service == "cross":  # a masqueraded pod knows its clients by their node's address
        clients = Cluster.node_addresses(family)
        needed = 1
    else:
        clients = [Cluster.client_address(k, family) for k in range(1, 24)]
        needed = 23
    owners = learners(cluster, service, family)
    tables = [cluster.learned_each(host, clients) for host in owners]
    learned = sum(mtu in mtus for mtus in zip(*tables))
    assert learned >= needed, f"{learned} of {len(clients)} learned"


# -----------------------------------------------------------------------------
# Section: errors -- what ends the program says what failed


@unit
@pytest.mark.parametrize(
    ("problem", "text", "code"),
    [
        (
            pmtud.NetlinkError("bind NFLOG group 33", 1),
            "bind NFLOG group 33: Operation not permitted (errno 1)",
            1,
        ),
        (pmtud.UsageError("give --peers"), "give --peers", 2),
        (pmtud.PeerSourceError("file:x: gone"), "file:x: gone", 1),
    ],
)
def test_errors_are_one_line_with_an_exit_code(
    problem: pmtud.PmtudError, text: str, code: int
) -> None:
    assert str(problem) == text
    assert problem.exit_code == code


# -----------------------------------------------------------------------------
# Section: options -- each parser, its good values and its messages

NETWORK_HINT = "; networks are written like 10.0.0.0/8 or fd00::/64"
PORT_HINT = " is not a port or a range of ports; write them like 443,8000-8100"
PEER_HINT = " cannot be a peer; list node addresses or a subnet broadcast address"
BROADCAST = " is a network, no peer; to reach all of it name its broadcast address, "
ONE_NODE = " is a network, no peer; name the node: "
KINDS = "an address, a host name, dns:NAME, file:PATH or kube:nodes[?SELECTOR]"
LABEL = "a" * 63
LONG_NAME = ".".join((LABEL, LABEL, LABEL, "b" * 61))  # 253 characters, the most that DNS carries


@unit
@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (pmtud.split_list, " a, b,,c ,", ["a", "b", "c"]),
        (pmtud.number_between(1, 255), "1", 1),
        (pmtud.number_between(1, 255), "255", 255),
        (pmtud.number_between(0, 3600, float), "0.25", 0.25),
        (
            pmtud.parse_networks,
            "10.0.0.0/8, fd00::/64",
            (ip_network("10.0.0.0/8"), ip_network("fd00::/64")),
        ),
        (pmtud.parse_networks, "10.1.2.3", (ip_network("10.1.2.3/32"),)),
        (pmtud.parse_ports, "443,8000-8002, 65535", frozenset({443, 8000, 8001, 8002, 65535})),
        (pmtud.parse_min_mtu, "1000", (1000, 1280)),
        (pmtud.parse_min_mtu, "68, 1400", (68, 1400)),
        (
            pmtud.parse_iface,
            "eth0,bond0.100, abcdefghijklmno",
            ("eth0", "bond0.100", "abcdefghijklmno"),
        ),
        (pmtud.parse_peer, "10.0.0.12", pmtud.PeerAddress(bytes([10, 0, 0, 12]))),
        (pmtud.parse_peer, "10.0.0.255", pmtud.PeerAddress(bytes([10, 0, 0, 255]))),
        (pmtud.parse_peer, "240.0.0.12", pmtud.PeerAddress(bytes([240, 0, 0, 12]))),
        (pmtud.parse_peer, "fd00::12", pmtud.PeerAddress(b"\xfd" + bytes(14) + b"\x12")),
        (
            pmtud.parse_peer,
            "fe80::1%eth0",
            pmtud.PeerAddress(b"\xfe\x80" + bytes(13) + b"\1", "eth0"),
        ),
        (
            pmtud.parse_peer,
            "ff02::114%eth0",
            pmtud.PeerAddress(b"\xff\x02" + bytes(12) + b"\1\x14", "eth0"),
        ),
        (pmtud.parse_peer, "::ffff:10.0.0.12", pmtud.PeerAddress(bytes([10, 0, 0, 12]))),
        (
            pmtud.parse_peer_items,
            "10.0.0.12,file:/a:b",
            [pmtud.PeerAddress(bytes([10, 0, 0, 12])), "file:/a:b"],
        ),
        (
            pmtud.parse_peer_items,
            "node-1, pmtud.kube-system.svc,dns:X-1.example.,dns:1.2.3.4e",
            ["dns:node-1", "dns:pmtud.kube-system.svc", "dns:X-1.example.", "dns:1.2.3.4e"],
        ),
        (
            pmtud.parse_peer_items,
            "kube:nodes,kube:nodes?a=b%2Cc",
            ["kube:nodes", "kube:nodes?a=b%2Cc"],
        ),
        (pmtud.parse_peer_items, LONG_NAME, [f"dns:{LONG_NAME}"]),
        (
            pmtud.parse_peer_lines,
            "# all\n10.0.0.12 # one\n\n fd00::12, 10.0.0.13\r\n",
            tuple(pmtud.PeerAddress(packed(a)) for a in ("10.0.0.12", "fd00::12", "10.0.0.13")),
        ),
    ],
)
def test_parsers_accept(parse: Callable[[str], object], text: str, value: object) -> None:
    assert parse(text) == value


@unit
@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (pmtud.number_between(1, 255), "ten", "'ten' is not a whole number"),
        (pmtud.number_between(1, 255), "", "'' is not a whole number"),
        (pmtud.number_between(1, 255), "0", "0 is not between 1 and 255"),
        (pmtud.number_between(1, 255), "256", "256 is not between 1 and 255"),
        (pmtud.number_between(0, 3600, float), "nan", "'nan' is not a number"),
        (pmtud.number_between(0, 3600, float), "-1", "-1 is not between 0 and 3600"),
        (pmtud.number_between(0, 1e9, float), "-1", "-1 is not between 0 and 1000000000"),
        (pmtud.number_between(0, 3600, float), "inf", "'inf' is not a number"),
        (pmtud.parse_networks, "10.0.0.1/8", "10.0.0.1/8 has host bits set" + NETWORK_HINT),
        (
            pmtud.parse_networks,
            "x",
            "'x' does not appear to be an IPv4 or IPv6 network" + NETWORK_HINT,
        ),
        (pmtud.parse_ports, "0", "'0'" + PORT_HINT),
        (pmtud.parse_ports, "443,65536", "'65536'" + PORT_HINT),
        (pmtud.parse_ports, "20-10", "'20-10'" + PORT_HINT),
        (pmtud.parse_ports, "https", "'https'" + PORT_HINT),
        (pmtud.parse_min_mtu, "1,2,3", "'1,2,3' is not one MTU (IPv4) or two (IPv4,IPv6)"),
        (pmtud.parse_min_mtu, "", "'' is not one MTU (IPv4) or two (IPv4,IPv6)"),
        (pmtud.parse_min_mtu, "67", "67 is not between 68 and 65535"),
        (pmtud.parse_min_mtu, "576,1279", "1279 is not between 1280 and 65535"),
        (pmtud.parse_iface, "abcdefghijklmnop", "'abcdefghijklmnop' is not an interface name"),
        (pmtud.parse_iface, "a/b", "'a/b' is not an interface name"),
        (pmtud.parse_iface, 'a"b', "'a\"b' is not an interface name"),
        (pmtud.parse_iface, "a b", "'a b' is not an interface name"),
        # the kernel refuses `:` in names (dev_valid_name), eth0:1 labels an address
        (pmtud.parse_iface, "eth0:1", "'eth0:1' is not an interface name"),
        (pmtud.parse_peer, "node-1", "'node-1' is not an IP address"),
        (pmtud.parse_peer, "10.0.0.0/24", "10.0.0.0/24" + BROADCAST + "10.0.0.255"),
        (pmtud.parse_peer, "10.0.0.11/23", "10.0.0.11/23" + BROADCAST + "10.0.1.255"),
        (
            pmtud.parse_peer,
            "10.0.0.11/255.255.255.0",
            "10.0.0.11/255.255.255.0" + BROADCAST + "10.0.0.255",
        ),
        (pmtud.parse_peer, "10.0.0.12/32", "10.0.0.12/32" + ONE_NODE + "10.0.0.12"),
        (pmtud.parse_peer, "10.0.0.12/31", "10.0.0.12/31" + ONE_NODE + "10.0.0.12"),
        (pmtud.parse_peer, "fd00::12/128", "fd00::12/128" + ONE_NODE + "fd00::12"),
        (
            pmtud.parse_peer,
            "fd00::/64",
            "fd00::/64 is a network, no peer; name its nodes, "
            "or a multicast group of their link like ff02::114%eth0",
        ),
        (pmtud.parse_peer, "10.0.0.0/33", "'10.0.0.0/33' is not an IP address"),
        (pmtud.parse_peer, "fe80::1", "fe80::1 needs its interface, like fe80::1%eth0"),
        (pmtud.parse_peer, "ff02::1", "ff02::1 needs its interface, like ff02::1%eth0"),
        (pmtud.parse_peer, "127.0.0.1", "127.0.0.1" + PEER_HINT),
        (pmtud.parse_peer, "::1", "::1" + PEER_HINT),
        (pmtud.parse_peer, "::ffff:127.0.0.1", "::ffff:127.0.0.1" + PEER_HINT),
        (pmtud.parse_peer, "0.0.0.0", "0.0.0.0" + PEER_HINT),
        (pmtud.parse_peer, "::", "::" + PEER_HINT),
        (pmtud.parse_peer, "255.255.255.255", "255.255.255.255" + PEER_HINT),
        (pmtud.parse_peer, "224.0.0.1", "224.0.0.1" + PEER_HINT),
        *(
            (pmtud.parse_peer_items, text, f"{text!r} is not an IP address; a peer is {KINDS}")
            for text in (
                "fe::zz",
                "10.0.0.999",
                "10.0.0.0/240",
                "node_1",
                "-node",
                "node-",
                "a..b",
                ".",
                "n\u00f6de",
                "a" * 64,
                LONG_NAME + "c",
                "a b",
            )
        ),
        *(
            (pmtud.parse_peer_items, text, f"{text!r} is not {KINDS}")
            for text in (
                "dns:",
                "dns:-x",
                "dns:10.0.0.1",
                "dns:fd00::1",
                "dns:a/b",
                "file:",
                "zoo:keeper",
                "kube:",
                "kube:pods",
                "kube:nodes/x",
            )
        ),
        (pmtud.parse_peer_lines, "10.0.0.12\n\nnode-1", "line 3: 'node-1' is not an IP address"),
        (pmtud.parse_peer_lines, "10.0.0.12,::1", "line 1: ::1" + PEER_HINT),
        (pmtud.parse_peer_lines, "\n10.0.0.0/24", "line 2: 10.0.0.0/24" + BROADCAST + "10.0.0.255"),
        (
            pmtud.parse_peer_lines,
            "10.0.0.12\n" * (pmtud.PEERS_MAX + 1),
            "16385 peers; there must be 1 to 16384, one broadcast address reaches a subnet",
        ),
    ],
)
def test_parsers_refuse(parse: Callable[[str], object], text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert str(caught.value) == message


@unit
def test_peer_addresses_print_with_their_zone() -> None:
    assert [str(pmtud.parse_peer(text)) for text in ("10.0.0.12", "fe80::1%eth0")] == [
        "10.0.0.12",
        "fe80::1%eth0",
    ]


# -----------------------------------------------------------------------------
# Section: packets -- one case for each Reason that parse() can give, and what a valid error means

# Made by Linux 6.18: three namespaces A - R - B joined by veth, R's link to B with mtu 1400,
# offloads off. A TCP client in A connected from port 40000 to port 443 of B and sent 1400 zero
# bytes; an AF_PACKET socket in A saw R's answer. What is left out of the literals is the quoted
# zeros.
GOLDEN = {
    "ipv4": bytes.fromhex(
        "45c0024030ce00004001c323c0000201c000020a0304eff300000578450005ac101c4000400638dec000"
        "020ac63364149c4001bb7e860684edd5b9018018003ff1f000000101080ada093696b6bafb03"
    )
    + bytes(496),
    "ipv6": bytes.fromhex(
        "600284ce04d83a4020010db8000a0000000000000000000120010db8000a000000000000000000100200"
        "365100000578600b00410598064020010db8000a0000000000000000001020010db8000b000000000000"
        "000000209c4001bb240128de20240d3a80180040615500000101080ad063289e4cd150ec"
    )
    + bytes(1160),
}


@unit
@pytest.mark.parametrize(
    ("name", "src", "dst", "quoted_dst", "length"),
    [
        ("ipv4", "192.0.2.1", "192.0.2.10", "198.51.100.20", 1452),
        ("ipv6", "2001:db8:a::1", "2001:db8:a::10", "2001:db8:b::20", 1472),
    ],
)
def test_errors_made_by_a_real_kernel(
    name: str, src: str, dst: str, quoted_dst: str, length: int
) -> None:
    """The addresses, the flow and the MTU of GOLDEN.

    A is both outer destination and quoted source.
    """
    golden = GOLDEN[name]
    net = NETS[name]
    assert pmtud.parse(golden) == pmtud.MtuError(
        net.family,
        packed(src),
        packed(dst),
        packed(dst),
        packed(quoted_dst),
        TCP_PROTOCOL,
        length,
        40000,
        443,
        1400,
        golden[20 if net is V4 else 40 :],
        ttl=64,
    )


class Broken(NamedTuple):
    """A broken packet and the one reason it is dropped for."""

    reason: pmtud.Reason
    name: str
    make: Callable[[Plan], bytes]
    nets: tuple[Plan, ...] = (V4, V6)


def corrupt(packet: bytes, at: int) -> bytes:
    """The packet with one bit flipped."""
    return packet[:at] + bytes([packet[at] ^ 1]) + packet[at + 1 :]


def other(net: Plan) -> Plan:
    """The other family."""
    return V6 if net is V4 else V4


def quote(
    net: Plan, size: Optional[int] = None, protocol: int = TCP_PROTOCOL, **fields: Any
) -> bytes:
    """A quoted packet cut to `size` bytes."""
    return net.wrap(net.vip, net.client, protocol, tcp_start(), **fields)[:size]


HEADER = {"ipv4": 20, "ipv6": 40}
UNCOUNTED = {"ipv4": 0, "ipv6": 40}  # bytes of the header that the length field leaves out
EIGHT = (DESTINATION_OPTIONS, PADDED_OPTIONS)
PACKET_CASES = (
    Broken(Reason.TRUNCATED, "empty", lambda n: b""),
    Broken(Reason.TRUNCATED, "header cut", lambda n: mtu_error(n)[: HEADER[n.family.name] - 1]),
    Broken(Reason.TRUNCATED, "header only", lambda n: mtu_error(n)[: HEADER[n.family.name]]),
    Broken(Reason.TRUNCATED, "last byte missing", lambda n: mtu_error(n)[:-1]),
    Broken(
        Reason.TRUNCATED,
        "no ICMP header",
        lambda n: mtu_error(n, payload=bytes([*n.error, 0, 0, 0, 0, 5])),
    ),
    Broken(
        Reason.TRUNCATED, "length beyond the packet", lambda n: mtu_error(n, outer={"length": 2000})
    ),
    Broken(Reason.TRUNCATED, "version 5", lambda n: mtu_error(n, outer={"first": 0x55})),
    Broken(
        Reason.TRUNCATED,
        "length below the header",
        lambda n: mtu_error(n, outer={"length": 19}),
        (V4,),
    ),
    Broken(Reason.TRUNCATED, "IHL 4", lambda n: mtu_error(n, outer={"first": 0x44}), (V4,)),
    Broken(
        Reason.TRUNCATED,
        "IHL beyond the packet",
        lambda n: mtu_error(n, outer={"first": 0x4F})[:59],
        (V4,),
    ),
    Broken(
        Reason.TRUNCATED, "first fragment", lambda n: mtu_error(n, outer={"fragment": MF}), (V4,)
    ),
    Broken(
        Reason.TRUNCATED, "last fragment", lambda n: mtu_error(n, outer={"fragment": 185}), (V4,)
    ),
    Broken(
        Reason.TRUNCATED,
        "first fragment",
        lambda n: mtu_error(n, outer={"extensions": [fragment_header(0, True)]}),
        (V6,),
    ),
    Broken(
        Reason.TRUNCATED,
        "last fragment",
        lambda n: mtu_error(n, outer={"extensions": [fragment_header(154, False)]}),
        (V6,),
    ),
    Broken(
        Reason.TRUNCATED,
        "too many extension headers",
        lambda n: mtu_error(n, outer={"extensions": [EIGHT] * 8}),
        (V6,),
    ),
    Broken(
        Reason.TRUNCATED,
        "extension header cut",
        lambda n: mtu_error(n, outer={"extensions": [EIGHT]})[:47],
        (V6,),
    ),
    Broken(
        Reason.TRUNCATED,
        "extension header beyond the packet",
        lambda n: mtu_error(n, outer={"extensions": [(HOP_BY_HOP, b"\0\xff" + bytes(6))]}),
        (V6,),
    ),
    Broken(
        Reason.NOT_FRAG_NEEDED,
        "another protocol",
        lambda n: mtu_error(n, outer_protocol=UDP_PROTOCOL),
    ),
    Broken(
        Reason.NOT_FRAG_NEEDED,
        "the other ICMP",
        lambda n: mtu_error(n, outer_protocol=58 if n is V4 else 1),
    ),
    Broken(
        Reason.NOT_FRAG_NEEDED, "another type", lambda n: mtu_error(n, kind=8 if n is V4 else 128)
    ),
    Broken(Reason.NOT_FRAG_NEEDED, "another code", lambda n: mtu_error(n, code=1)),
    Broken(Reason.NOT_FRAG_NEEDED, "encrypted", lambda n: mtu_error(n, outer_protocol=50)),
    Broken(
        Reason.BAD_CHECKSUM,
        "MTU changed",
        lambda n: corrupt(mtu_error(n), HEADER[n.family.name] + 7),
        (V6,),
    ),
    Broken(
        Reason.BAD_CHECKSUM,
        "last byte changed",
        lambda n: corrupt(mtu_error(n), len(mtu_error(n)) - 1),
        (V6,),
    ),
    Broken(Reason.BAD_CHECKSUM, "zero", lambda n: mtu_error(n, checksum=0), (V6,)),
    Broken(Reason.BAD_CHECKSUM, "address changed", lambda n: corrupt(mtu_error(n), 39), (V6,)),
    Broken(
        Reason.QUOTED_FAMILY, "the other family", lambda n: mtu_error(n, quoted=quote(other(n)))
    ),
    Broken(Reason.QUOTED_FAMILY, "no family", lambda n: mtu_error(n, quoted=bytes(60))),
    Broken(Reason.QUOTED_SHORT, "nothing", lambda n: mtu_error(n, quoted=b"")),
    Broken(
        Reason.QUOTED_SHORT,
        "header cut",
        lambda n: mtu_error(n, quoted=quote(n, HEADER[n.family.name] - 1)),
    ),
    Broken(Reason.QUOTED_SHORT, "7 bytes", lambda n: mtu_error(n, transport=tcp_start(size=7))),
    Broken(
        Reason.QUOTED_SHORT,
        "7 bytes and padding",
        lambda n: mtu_error(n, transport=tcp_start(size=7)) + bytes(9),
    ),
    Broken(Reason.QUOTED_SHORT, "IHL 4", lambda n: mtu_error(n, inner={"first": 0x44}), (V4,)),
    Broken(
        Reason.QUOTED_SHORT,
        "7 bytes after options",
        lambda n: mtu_error(n, inner={"options": ROUTER_ALERT}, transport=tcp_start(size=7)),
        (V4,),
    ),
    Broken(
        Reason.QUOTED_SHORT,
        "options cut",
        lambda n: mtu_error(n, quoted=quote(n, 23, options=bytes(8))),
        (V4,),
    ),
    Broken(
        Reason.QUOTED_SHORT,
        "extension header cut",
        lambda n: mtu_error(n, quoted=quote(n, 47, extensions=[EIGHT])),
        (V6,),
    ),
    Broken(
        Reason.QUOTED_SHORT,
        "7 bytes after the authentication header",
        lambda n: mtu_error(n, inner={"extensions": [AUTHENTICATED]}, transport=tcp_start(size=7)),
        (V6,),
    ),
    Broken(
        Reason.QUOTED_SHORT,
        "too many extension headers",
        lambda n: mtu_error(n, inner={"extensions": [EIGHT] * 8}),
        (V6,),
    ),
    Broken(
        Reason.QUOTED_FRAGMENT,
        "second",
        lambda n: mtu_error(n, inner={"fragment": 185 | MF}),
        (V4,),
    ),
    Broken(Reason.QUOTED_FRAGMENT, "last", lambda n: mtu_error(n, inner={"fragment": 1}), (V4,)),
    Broken(
        Reason.QUOTED_FRAGMENT,
        "second",
        lambda n: mtu_error(n, inner={"extensions": [fragment_header(1, True)]}),
        (V6,),
    ),
    Broken(
        Reason.QUOTED_FRAGMENT,
        "last, cut, its payload no header",
        lambda n: mtu_error(
            n,
            inner={"extensions": [EIGHT, fragment_header(154, False)]},
            protocol=HOP_BY_HOP,
            transport=b"",
        ),
        (V6,),
    ),
)
PACKET_ROWS = [
    pytest.param(case, net, id=f"{case.reason.value}-{case.name}-{net.family.name}")
    for case in PACKET_CASES
    for net in case.nets
]


@unit
@pytest.mark.parametrize(("case", "net"), PACKET_ROWS)
def test_parse_refuses(case: Broken, net: Plan) -> None:
    assert pmtud.parse(case.make(net)) is case.reason


@unit
@both_families
def test_parse_gives_every_field(net: Plan) -> None:
    start = tcp_start(8443, 51234)
    packet = mtu_error(net, mtu=1371, transport=start, quoted_length=1477, outer={"ttl": 63})
    assert pmtud.parse(packet) == pmtud.MtuError(
        net.family,
        packed(net.router),
        packed(net.vip),
        packed(net.vip),
        packed(net.client),
        TCP_PROTOCOL,
        1477,
        8443,
        51234,
        1371,
        packet[HEADER[net.family.name] :],
        ttl=63,
    )


GOOD_PACKETS: tuple[tuple[str, tuple[Plan, ...], dict[str, Any]], ...] = (
    ("exactly 8 bytes", (V4, V6), {"transport": tcp_start(size=8)}),
    *((f"protocol {number}", (V4, V6), {"protocol": number}) for number in (17, 33, 132, 50, 253)),
    ("outer options", (V4,), {"outer": {"options": ROUTER_ALERT}}),
    ("quoted options", (V4,), {"inner": {"options": ROUTER_ALERT * 10}}),
    ("quoted first fragment", (V4,), {"inner": {"fragment": MF}}),
    (
        "outer extension headers",
        (V6,),
        {"outer": {"extensions": [(HOP_BY_HOP, PADDED_OPTIONS), ROUTE, EIGHT]}},
    ),
    ("outer AH", (V6,), {"outer": {"extensions": [AUTHENTICATED]}}),
    ("outer atomic fragment", (V6,), {"outer": {"extensions": [fragment_header(0, False)]}}),
    (
        "quoted extension headers",
        (V6,),
        {"inner": {"extensions": [(HOP_BY_HOP, PADDED_OPTIONS), ROUTE, EIGHT]}},
    ),
    ("quoted AH", (V6,), {"inner": {"extensions": [AUTHENTICATED]}}),
    ("quoted first fragment", (V6,), {"inner": {"extensions": [fragment_header(0, True)]}}),
    (
        "seven extension headers",
        (V6,),
        {"inner": {"extensions": [EIGHT] * 7}, "outer": {"extensions": [EIGHT] * 7}},
    ),
)
GOOD_ROWS = [
    pytest.param(net, fields, id=f"{name}-{net.family.name}")
    for name, nets, fields in GOOD_PACKETS
    for net in nets
]


@unit
@pytest.mark.parametrize(("net", "fields"), GOOD_ROWS)
def test_parse_accepts(net: Plan, fields: dict[str, Any]) -> None:
    """Only TCP, UDP, DCCP and SCTP have ports."""
    found = parsed(net, **fields)
    protocol = fields.get("protocol", TCP_PROTOCOL)
    assert found.quoted_protocol == protocol
    assert found.src == packed(net.router)
    assert found.mtu == 1400
    assert found.quoted_src == packed(net.vip)
    assert found.quoted_dst == packed(net.client)
    ports = (443, 40000) if protocol in (6, 17, 33, 132) else (0, 0)
    assert (found.source_port, found.destination_port) == ports


@unit
@both_families
def test_padding_after_the_packet_is_cut_off(net: Plan) -> None:
    """Ethernet frames are at least 60 bytes long; the link's padding is not part of the message."""
    assert pmtud.parse(mtu_error(net) + b"\xaa" * 18) == parsed(net)


@unit
@pytest.mark.parametrize("checksum", [None, 1, 0xFFFE])
@pytest.mark.parametrize("length", [0, 32])  # of RFC 4884
@pytest.mark.parametrize("options", [b"", ROUTER_ALERT * 3])
@pytest.mark.parametrize("start", [bytes(8), struct.pack("!HHI", 0x2000, 0x6558, 7), b"\xff" * 21])
def test_an_error_made_to_be_about_an_echo_reply(
    start: bytes, options: bytes, length: int, checksum: Optional[int]
) -> None:
    """Three bytes change besides the checksum, which is as right or as wrong as it was."""
    packet = error4(protocol=47, transport=start, inner={"options": options}, checksum=0)
    packet = packet[:25] + bytes([length]) + packet[26:]
    summed = internet_checksum(packet[20:]) if checksum is None else checksum
    packet = packet[:22] + struct.pack("!H", summed) + packet[24:]
    before = packet[20:]
    after = pmtud.as_about_echo_reply(packet[20:])
    assert len(after) == len(before)
    at = 8 + 20 + len(options)
    changed = bytearray(before)
    changed[2:4] = after[2:4]
    changed[8 + 9] = 1
    changed[at : at + 2] = bytes(2)
    assert after == bytes(changed)
    right = not pmtud.checksum_remainder(pmtud.IPV4, b"", b"", after)
    assert right is (checksum is None)
    assert right is (pmtud.checksum_remainder(pmtud.IPV4, b"", b"", before) == 0)
    assert pmtud.parse(packet[:20] + after) == parsed(
        V4, protocol=1, transport=bytes(2) + start[2:], inner={"options": options}
    )._replace(icmp=after)


@unit
@both_families
def test_an_error_prints_its_flow(net: Plan) -> None:
    text = f"router={net.router} dst={net.vip} flow={net.vip}:443>{net.client}:40000/6 mtu=1400"
    assert str(parsed(net)) == text


@unit
@both_families
def test_family_of_an_address(net: Plan) -> None:
    assert pmtud.family_of(packed(net.vip)) is net.family


# -----------------------------------------------------------------------------
# Section: netlink codec -- bytes of the headers, walks that always end

nla = struct.Struct("=HH").pack  # struct nlattr is in host byte order
nlmsg = struct.Struct("=IHHII").pack  # struct nlmsghdr too


@unit
@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (pmtud.attribute(5, b""), nla(4, 5)),
        (pmtud.attribute(5, b"abc"), nla(7, 5) + b"abc\0"),
        (pmtud.attribute(5, b"abcd"), nla(8, 5) + b"abcd"),
        (
            pmtud.nested(1, pmtud.attribute(2, b"x"), pmtud.attribute(3, b"")),
            nla(16, 0x8001) + nla(5, 2) + b"x\0\0\0" + nla(4, 3),
        ),
        (pmtud.be16(6, 0x0102), nla(6, 6) + b"\1\2\0\0"),
        (pmtud.be32(6, 0x01020304), nla(8, 6) + b"\1\2\3\4"),
        (pmtud.be32(6, -300), nla(8, 6) + b"\xff\xff\xfe\xd4"),
        (pmtud.be64(6, 0x0102030405060708), nla(12, 6) + b"\1\2\3\4\5\6\7\x08"),
        (pmtud.string(1, "raw"), nla(8, 1) + b"raw\0"),
        (pmtud.string(1, "eth0"), nla(9, 1) + b"eth0\0\0\0\0"),
        (pmtud.message(0x401, 4, 7, b"\2\0\0\x21"), nlmsg(20, 0x401, 5, 7, 0) + b"\2\0\0\x21"),
        (pmtud.message(22, 0x300, 1, b"x"), nlmsg(17, 22, 0x301, 1, 0) + b"x\0\0\0"),
    ],
)
def test_netlink_bytes(built: bytes, expected: bytes) -> None:
    assert built == expected


@unit
def test_nested_attributes_come_back() -> None:
    inner = {1: b"chain\0", 2: struct.pack("!I", 5)}
    data = pmtud.nested(
        4, *(pmtud.attribute(kind, value) for kind, value in inner.items())
    ) + pmtud.be16(9, 3)
    outer = pmtud.attributes(data)
    assert pmtud.attributes(outer[4]) == inner
    assert outer[9] == b"\0\3"
    assert pmtud.attributes(b"HEAD" + data, 4) == outer


@unit
@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", {}),
        (nla(4, 1)[:3], {}),
        (nla(0, 1) * 3, {}),
        (nla(3, 1) + bytes(8), {}),
        (nla(9, 1) + b"four", {}),
        (nla(8, 1) + b"good" + nla(0, 2), {1: b"good"}),
        (nla(8, 1) + b"good" + nla(0xFFFF, 2) + b"garbage", {1: b"good"}),
        (nla(5, 1) + b"x", {1: b"x"}),  # the last one need not be padded
        (nla(8, 1) + b"old." + nla(8, 1) + b"new.", {1: b"new."}),
        (nla(8, 0xC001) + b"flag", {1: b"flag"}),
    ],
)
def test_walking_attributes_ends(data: bytes, found: dict[int, bytes]) -> None:
    assert pmtud.attributes(data) == found


@unit
@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", []),
        (nlmsg(16, 3, 2, 9, 0)[:15], []),
        (nlmsg(16, 3, 2, 9, 0), [(3, 9, b"")]),
        (nlmsg(0, 3, 0, 9, 0) * 2, []),
        (nlmsg(15, 3, 0, 9, 0) * 2, []),
        (nlmsg(21, 3, 0, 9, 0) + b"four", []),
        (
            nlmsg(17, 3, 0, 1, 0) + b"x\0\0\0" + nlmsg(18, 4, 0, 2, 0) + b"yz",
            [(3, 1, b"x"), (4, 2, b"yz")],
        ),
        (nlmsg(20, 3, 0, 1, 0) + b"four" + nlmsg(0xFFFFFFFF, 4, 0, 2, 0), [(3, 1, b"four")]),
    ],
)
def test_walking_messages_ends(data: bytes, found: list[tuple[int, int, bytes]]) -> None:
    assert list(pmtud.messages(data)) == found


@unit
@pytest.mark.parametrize(
    ("payload", "number"),
    [
        (struct.pack("=i", 0) + bytes(16), 0),
        (struct.pack("=i", -1) + bytes(16), 1),
        (struct.pack("=i", -16), 16),
        (b"\0\0\0", 74),  # EBADMSG
    ],
)
def test_error_number(payload: bytes, number: int) -> None:
    assert pmtud.error_number(payload) == number


def nflog_message(
    packet: bytes,
    sequence: Optional[int] = None,
    prefix: bytes = b"",
    kind: int = 0x400,
    between: Sequence[bytes] = (b"\0\0\0\1",),
) -> bytes:
    """What nfnetlink_log sends for one packet, its message padded.

    `between` stands for interface and hardware.
    """
    attrs = [(1, b"\x08\0\0\0")]
    if prefix:
        attrs.append((10, prefix))
    attrs += [(4, data) for data in between]
    if sequence is not None:
        attrs.append((12, struct.pack("!I", sequence)))
    attrs.append((9, packet))
    body = struct.pack("!BBH", 2, 0, 33)
    for number, data in attrs:
        padding = bytes(-len(data) % 4)
        body += nla(4 + len(data), number) + data + padding
    return nlmsg(16 + len(body), kind, 0, 0, 0) + body


@unit
def test_nflog_datagram_with_several_messages() -> None:
    data = (
        nflog_message(b"first", 0x01020304, b"pmtud rpf\0")
        + nflog_message(b"other", 5, kind=0x401)
        + nflog_message(b"second", 6, b"pmtud\0")
        + nflog_message(b"third")
        + nlmsg(20, 3, 2, 0, 0)
        + bytes(4)
    )
    found = [(b"first", b"\1\2\3\4", True), (b"second", b"\0\0\0\6", False), (b"third", b"", False)]
    assert pmtud.parse_nflog(data) == found
    assert pmtud.parse_nflog(data[:-30]) == found[:2]


@unit
def test_nflog_message_without_payload_is_an_empty_packet() -> None:
    """It is counted as truncated and not lost."""
    logged = pmtud.parse_nflog(nlmsg(20, 0x400, 0, 0, 0) + struct.pack("!BBH", 2, 0, 33))
    assert logged == [(b"", b"", False)]
    assert pmtud.parse(logged[0][0]) is Reason.TRUNCATED


# -----------------------------------------------------------------------------
# Section: rules -- what is installed is what is printed, whatever other rules there are


SEED_RULE = "-t raw -A PREROUTING -i eth0 -p icmp -m icmp --icmp-type 3/4 -j NFLOG --nflog-group 33"


def feed_by_nft(node: Host) -> None:
    """The operator's own rule, nftables."""
    node.run(
        "nft",
        "-f",
        "-",
        input="table ip operator { chain raw { type filter hook prerouting priority raw; "
        'iifname "eth0" icmp type destination-unreachable icmp code frag-needed log group 33; }; }',
    )


FEEDS = {
    "iptables-nft": lambda node: node.run("iptables-nft", *SEED_RULE.split()),
    "iptables-legacy": lambda node: node.run("iptables-legacy", *SEED_RULE.split()),
    "nft": feed_by_nft,
}


@pytest.mark.parametrize("tool", FEEDS)
def test_rules_off_with_the_operators_own_rule(tool: str) -> None:
    """The seed's one rule and no other option.

    Every service is served, and our guard is the only thing beside it.
    """
    with Cluster() as cluster:
        for node in cluster.nodes:
            FEEDS[tool](node)
        with daemons_keeping_rules(cluster, *peers_of(4), "--rules", "off") as processes:
            assert "table inet pmtud_33_guard" in processes[0].output()
            with invalid_dropped(cluster), Capture(cluster.fabric) as wire:
                for service in Cluster.SERVICES:
                    assert len(cluster.download(service)) == 23
                assert not [
                    s
                    for s in node_packets(wire.settle(), 4)
                    if s.packet[16:19] == bytes([10, 96, 0])
                ]


NAME_TAKEN = """
import pmtud, time
class Empty(pmtud.Firewall):
    def _requests(self, ifaces):
        return super()._requests(ifaces)[:3]  # the table without anything in it
table = Empty(pmtud.Config(rules="off"), ("eth0",))
print("up", flush=True)
time.sleep(60)
"""


def test_rules_off_where_no_guard_can_be_installed() -> None:
    """Sockets on nodes are served.

    Pods are not, nothing leaks to a VIP, and the log says what to do.
    """
    with Cluster() as cluster:
        for node in cluster.nodes:
            feed_by_nft(node)
            node.start(sys.executable, "-c", NAME_TAKEN, env={"PYTHONPATH": str(HERE)}).wait_for(
                "up"
            )
        processes = [daemon(node, *peers_of(4), "--rules", "off") for node in cluster.nodes]
        assert len(cluster.download("host")) == 23
        # with this the operator guards, but the daemon has not looked again yet
        with invalid_dropped(cluster), Capture(cluster.fabric) as wire:
            assert len(cluster.download("pod", deadline=1.0)) < 20
            leaked = service_packets(wire, 4)
        assert leaked == []
        for process in processes:
            assert process.stop() == 0
            assert "cannot install the guard" in process.output()
            assert "no guard on mark 0x2c: pods behind NAT will not be served" in process.output()


def ruleset(node: Host) -> str:
    """All of nftables without counters and without what traffic put into sets."""
    return re.sub(r"\s*elements = {[^}]*}", "", node.run("nft", "-s", "list", "ruleset"))


@contextlib.contextmanager
def daemons_keeping_rules(cluster: Cluster, *options: str) -> Iterator[list[Process]]:
    """Daemons that must not touch the ruleset at all."""
    before = [ruleset(node) for node in cluster.nodes]
    processes = [daemon(node, *options) for node in cluster.nodes]
    yield processes
    assert [process.stop() for process in processes] == [0] * len(processes)
    assert [ruleset(node) for node in cluster.nodes] == before


@pytest.mark.parametrize("tool", ["nft", "iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize("family", [4, 6])
def test_printed_rules_do_what_the_daemons_own_do(tool: str, family: int) -> None:
    """`pmtud.py rules`, pasted.

    With --rules off everything works, the rescue from strict RPF included.
    """
    with Cluster() as cluster:
        for node in cluster.nodes:
            paste_rules(node, tool)
        cluster.strict_rpf()
        cluster.error_from_management()
        with daemons_keeping_rules(cluster, "--peers", ALL_PEERS, "--rules", "off") as processes:
            for service in Cluster.SERVICES:
                assert len(cluster.download(service, family)) == 23
            assert not any("no guard" in process.output() for process in processes)
            if family == 4:
                assert total_of(cluster.nodes, "pmtud_rpf_rescued_total") > 0


def paste_rules(node: Host, tool: str) -> None:
    """Run one half of what `pmtud.py rules` prints, as an operator would."""
    nft, _, iptables = node.run(sys.executable, str(PROGRAM), "rules").partition("# or iptables")
    if tool == "nft":
        (command,) = re.findall("`(.*)`", nft)
        for _ in range(2):  # the second time in place of the first
            node.run("sh", "-c", command.replace("pmtud.py", f"{sys.executable} {PROGRAM}"))
        assert node.run("nft", "list", "ruleset").count("log group 33") == 1
        return
    variant = tool.partition("-")[2]
    for line in iptables.splitlines()[1:]:
        node.run("sh", "-c", re.sub("^(ip6?tables)", rf"\1-{variant}", line))


@quick
def test_installed_rules_are_the_printed_rules(cluster: Cluster) -> None:
    """What the daemon installs over netlink lists exactly as the printed text does once loaded by
    nft.
    """
    node = cluster.nodes[0]
    node.run("ping", "-c1", "127.0.0.1")  # so that conntrack is in use
    options = (
        "--peers",
        "10.0.0.12,fd00::12,10.0.0.255,ff02::7074%eth0",
        "--ignore-networks",
        "10.7.0.0/16,fd07::/64",
    )
    with daemons([node], *options):
        installed = node.run("nft", "list", "table", "inet", "pmtud_33")
        printed = node.run(sys.executable, str(PROGRAM), "rules", *options).partition(
            "# or iptables"
        )[0]
    node.run("nft", "-f", "-", input=printed)
    loaded = node.run("nft", "list", "table", "inet", "pmtud_33")
    node.run("nft", "delete", "table", "inet", "pmtud_33")
    body = [line for line in installed.splitlines() if "flags owner" not in line and line.strip()]
    body[0] = body[0].partition(" # progname")[0]
    assert body == [line for line in loaded.splitlines() if line.strip()]


@quick
def test_flush_ruleset_leaves_our_table(cluster: Cluster) -> None:
    """`nft flush ruleset`, a firewall reload beside us: an owned table stays."""
    with Cluster(conntrack=False) as plain, daemons(plain.nodes, *peers_of(4)):
        for node in plain.nodes:
            node.run("nft", "flush", "ruleset")
            assert "pmtud_33" in node.run("nft", "list", "ruleset")
        assert len(plain.download("host")) == 23


OLD_KERNEL = """
import pmtud, sys, time
firewall = pmtud.Firewall(pmtud.Config(), ("eth0",), owned=False)
print("up", firewall.owned, flush=True)
time.sleep(60) if sys.argv[1:] else firewall.close()
"""


FLUSHED = """
import pmtud, subprocess, time
firewall = pmtud.Firewall(pmtud.Config(), ("eth0",), owned=False)
for _ in range(3):
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    firewall.replace(("eth0",))
print("back", flush=True)
time.sleep(60)
"""


@pytest.fixture
def cluster_of_its_own() -> Iterator[Cluster]:
    """For a test that removes what the shared one needs."""
    with Cluster() as cluster:
        yield cluster


def test_table_without_ownership_is_replaced_and_removed(cluster_of_its_own: Cluster) -> None:
    """Kernels before 5.12: what SIGKILL leaves behind is replaced by the next start and removed by
    its end.
    """
    node = cluster_of_its_own.nodes[0]
    env = {"PYTHONPATH": str(HERE)}
    killed = node.start(sys.executable, "-c", OLD_KERNEL, "wait", env=env)
    killed.wait_for("up False")
    assert "flags owner" not in node.run("nft", "list", "table", "inet", "pmtud_33")
    killed.stop(signal.SIGKILL)
    left = node.run("nft", "list", "table", "inet", "pmtud_33")
    again = node.start(sys.executable, "-c", OLD_KERNEL, "wait", env=env)
    again.wait_for("up False")
    assert node.run("nft", "list", "table", "inet", "pmtud_33") == left
    again.stop(signal.SIGKILL)
    # Its own, owned table takes the place of the stale one, and daemons() sees it go
    with daemons([node]):
        assert "flags owner" in node.run("nft", "list", "table", "inet", "pmtud_33")
    node.run("nft", "flush", "ruleset")
    flushed = node.start(sys.executable, "-c", FLUSHED, env=env)
    flushed.wait_for("back")
    assert node.run("nft", "list", "table", "inet", "pmtud_33") == left
    flushed.stop(signal.SIGKILL)
    final = node.start(sys.executable, "-c", OLD_KERNEL, env=env)
    assert poll(lambda: final.returncode() is not None, 5)
    assert final.returncode() == 0
    assert "pmtud" not in node.run("nft", "list", "ruleset")


# -----------------------------------------------------------------------------
# Section: policy -- the table of the design, each refusal, each limit


def make_policy(net: Plan = V4, **options: Any) -> pmtud.Policy:
    """A node that knows itself, one peer, one cluster network and a broadcast or multicast group.

    No limits.
    """
    who = pmtud.WhoIsWho(
        own=frozenset({packed(net.node), packed(net.vip)}),
        unshared=frozenset({packed(net.node)}),
        groups=frozenset({packed(net.group)}),
        peers=frozenset({packed(net.peer)}),
        networks=pmtud.Membership([ip_network(net.inside_network)]),
        neighbours=pmtud.Membership(
            [ip_network("10.77.0.0/16"), ip_network("fd77::/64"), ip_network("fe80::/64")]
        ),
    )
    unlimited = {"flow_interval": 0.0, "source_rate": 0.0, "rate": 0.0}
    return pmtud.Policy(pmtud.Config(**{**unlimited, **options}), who)


def outcome(error: pmtud.MtuError, policy: pmtud.Policy, now: float) -> str:
    """What decide() does with an error, or why it does nothing."""
    verdict = pmtud.decide(error, policy, now)
    assert (verdict.action is pmtud.NOTHING) == (verdict.reason is not None)
    return verdict.reason or verdict.action


class WhoCase(NamedTuple):
    """Outer source, outer destination and quoted source, as names of Plan or addresses, and what
    follows.
    """

    src: str
    dst: str
    quoted_src: str
    origin: str
    decision: Union[str, pmtud.Reason]
    nets: tuple[Plan, ...] = (V4, V6)


DELIVER = pmtud.DELIVER
REPLICATE = pmtud.REPLICATE
NEIGHBOURS = (("10.77.0.5", V4), ("fd77::5", V6), ("fe80::1", V6))  # nodes or routers
LINK_LOCAL = ("169.254.7.7", "fe80::7", "febf::7")
SPECIAL = [
    ("127.0.0.1", V4),
    ("127.9.9.9", V4),
    ("0.0.0.0", V4),
    ("224.0.0.0", V4),
    ("224.0.0.5", V4),
    ("239.255.255.255", V4),
    ("255.255.255.255", V4),
    ("169.254.7.7", V4),
    ("::1", V6),
    ("::", V6),
    ("fe80::7", V6),
    ("febf::7", V6),
    ("ff02::1", V6),
    ("::ffff:127.0.0.1", V6),
    ("::127.0.0.1", V6),
]
# Unicast for Linux, and in use in private fabrics
UNUSUAL = (
    "240.0.0.1",
    "255.255.255.254",
    "0.0.0.1",
    "0.9.9.9",
)
WHO_CASES = (
    WhoCase("router", "vip", "vip", "router", REPLICATE),
    WhoCase("client", "vip", "vip", "router", REPLICATE),
    WhoCase("router", "node", "node", "router", DELIVER),  # nobody else can own the peer address
    WhoCase("node", "vip", "vip", "peer", Reason.OWN),
    WhoCase("vip", "vip", "vip", "peer", Reason.OWN),
    WhoCase("node", "group", "vip", "peer", Reason.OWN),
    WhoCase("node", "peer", "vip", "peer", Reason.OWN),
    WhoCase("peer", "vip", "vip", "peer", Reason.IGNORED_NETWORK),
    WhoCase("inside", "vip", "vip", "peer", Reason.IGNORED_NETWORK),
    WhoCase("peer", "node", "node", "peer", Reason.IGNORED_NETWORK),
    WhoCase("peer", "node", "vip", "peer", DELIVER),
    WhoCase("inside", "node", "vip", "peer", DELIVER),
    WhoCase("peer", "group", "vip", "peer", DELIVER),
    WhoCase("peer", "vip", "client", "peer", DELIVER),
    WhoCase("router", "node", "vip", "router", Reason.MISADDRESSED),
    WhoCase("router", "group", "vip", "router", Reason.MISADDRESSED),
    WhoCase("router", "client", "vip", "router", Reason.MISADDRESSED),
    WhoCase("peer", "client", "vip", "peer", Reason.MISADDRESSED),
    *(WhoCase(a, "vip", "vip", "router", REPLICATE, (net,)) for a, net in NEIGHBOURS),
    *(WhoCase(a, "node", "vip", "peer", DELIVER, (net,)) for a, net in NEIGHBOURS),
    *(
        WhoCase(a, "vip", "vip", "router", Reason.MISADDRESSED, (net,))
        for a, net in SPECIAL
        if a not in LINK_LOCAL
    ),
    WhoCase("169.254.7.7", "vip", "vip", "router", REPLICATE, (V4,)),
    *(WhoCase(a, "vip", "vip", "router", REPLICATE, (V4,)) for a in UNUSUAL),
    *(WhoCase("router", a, a, "router", REPLICATE, (V4,)) for a in UNUSUAL),
    *(WhoCase("peer", "node", a, "peer", DELIVER, (V4,)) for a in UNUSUAL),
    *(WhoCase("router", a, a, "router", Reason.MISADDRESSED, (net,)) for a, net in SPECIAL),
    *(WhoCase("peer", a, a, "peer", Reason.MISADDRESSED, (net,)) for a, net in SPECIAL),
    *(WhoCase("peer", "node", a, "peer", Reason.MISADDRESSED, (net,)) for a, net in SPECIAL),
    *(WhoCase("peer", "group", a, "peer", Reason.MISADDRESSED, (net,)) for a, net in SPECIAL),
)
WHO_ROWS = [(case, net) for case in WHO_CASES for net in case.nets]


@unit
@pytest.mark.parametrize(
    ("case", "net"),
    WHO_ROWS,
    ids=[f"{c.src}>{c.dst}-{c.quoted_src}-{n.family.name}" for c, n in WHO_ROWS],
)
def test_who_sent_it_decides(case: WhoCase, net: Plan) -> None:
    """The table of the design, section 3: only a router's error is ever replicated."""
    src, dst, quoted_src = (
        getattr(net, name, name) for name in (case.src, case.dst, case.quoted_src)
    )
    found = parsed(net, src=src, dst=dst, quoted_src=quoted_src)
    policy = make_policy(net)
    assert pmtud.decide(found, policy, 1.0).origin == case.origin
    assert outcome(found, policy, 1.0) == case.decision
    by_addresses = pmtud.classify(found, policy.who)
    assert by_addresses.origin == case.origin
    assert (by_addresses.reason or by_addresses.action) == case.decision


@unit
@both_families
def test_without_peers_an_error_is_still_a_routers(net: Plan) -> None:
    nobody = pmtud.WhoIsWho(own=frozenset({packed(net.node)}))
    assert pmtud.classify(parsed(net), nobody) == (pmtud.ROUTER, REPLICATE, None)


class InvalidCase(NamedTuple):
    """An error, the options that judge it, and the refusal; None: it is believed."""

    reason: Optional[pmtud.Reason]
    fields: dict[str, Any]
    options: dict[str, Any] = {}  # noqa: RUF012 -- never changed
    nets: tuple[Plan, ...] = (V4, V6)


INVALID_CASES = (
    *(InvalidCase(None, {"protocol": number}) for number in (6, 17, 132, 33, 47, 50, 4, 41)),
    InvalidCase(None, {"protocol": 1}, {}, (V4,)),
    InvalidCase(None, {"protocol": 58}, {}, (V6,)),
    InvalidCase(Reason.QUOTED_PROTO, {"protocol": 58}, {}, (V4,)),
    InvalidCase(Reason.QUOTED_PROTO, {"protocol": 1}, {}, (V6,)),
    *(InvalidCase(Reason.QUOTED_PROTO, {"protocol": number}) for number in (2, 89, 103, 253, 255)),
    InvalidCase(Reason.QUOTED_PROTO, {"protocol": AUTHENTICATION}, {}, (V4,)),
    InvalidCase(None, {"mtu": 552}, {}, (V4,)),
    InvalidCase(Reason.MTU_TOO_SMALL, {"mtu": 551}, {}, (V4,)),
    InvalidCase(Reason.MTU_TOO_SMALL, {"mtu": 0}, {}, (V6,)),
    InvalidCase(None, {"mtu": 0}, {}, (V4,)),  # a router from before RFC 1191
    InvalidCase(None, {"mtu": 0}, {"min_mtu": (68, 1280)}, (V4,)),
    InvalidCase(None, {"mtu": 0}, {"min_mtu": (552, 1280)}, (V4,)),
    InvalidCase(Reason.MTU_TOO_SMALL, {"mtu": 0}, {"min_mtu": (553, 1280)}, (V4,)),
    InvalidCase(Reason.MTU_NOT_SMALLER, {"mtu": 0, "quoted_length": 0x0101}, {}, (V4,)),
    InvalidCase(None, {"mtu": 1280}, {}, (V6,)),
    InvalidCase(Reason.MTU_TOO_SMALL, {"mtu": 1279}, {}, (V6,)),
    InvalidCase(None, {"mtu": 1300}, {"min_mtu": (1300, 1300)}),
    InvalidCase(Reason.MTU_TOO_SMALL, {"mtu": 1299}, {"min_mtu": (1300, 1300)}),
    InvalidCase(None, {"mtu": 1499}),
    InvalidCase(Reason.MTU_NOT_SMALLER, {"mtu": 65535}),
    InvalidCase(Reason.MTU_NOT_SMALLER, {"mtu": 0xFFFFFFFF}, {}, (V6,)),
    # 0 is no length, whatever the MTU
    *(InvalidCase(None, {"quoted_length": 0, "mtu": mtu}, {}, (V4,)) for mtu in (1400, 65535)),
    *(InvalidCase(None, {"quoted_length": 40, "mtu": mtu}, {}, (V6,)) for mtu in (1400, 65535)),
    # up to 60 bytes of header left out; 0x0505 is the same in both byte orders
    InvalidCase(None, {"quoted_length": 0x0505, "mtu": 0x0505 + 59}, {}, (V4,)),
    InvalidCase(Reason.MTU_NOT_SMALLER, {"quoted_length": 0x0505, "mtu": 0x0505 + 60}, {}, (V4,)),
    InvalidCase(None, {"quoted_length": 40 + 0x0505, "mtu": 40 + 0x0505 + 59}, {}, (V6,)),
    InvalidCase(
        Reason.MTU_NOT_SMALLER, {"quoted_length": 40 + 0x0505, "mtu": 40 + 0x0505 + 60}, {}, (V6,)
    ),
    # the other byte order, of the field: IPv6 counts what follows its header
    InvalidCase(None, {"quoted_length": 0x0006, "mtu": 0x0600 - 1}, {}, (V4,)),
    InvalidCase(Reason.MTU_NOT_SMALLER, {"quoted_length": 0x0006, "mtu": 0x0600}, {}, (V4,)),
    InvalidCase(None, {"quoted_length": 40 + 0x0006, "mtu": 40 + 0x0600 - 1}, {}, (V6,)),
    InvalidCase(
        Reason.MTU_NOT_SMALLER, {"quoted_length": 40 + 0x0006, "mtu": 40 + 0x0600}, {}, (V6,)
    ),
    InvalidCase(None, {}, {"ports": frozenset({443})}),
    InvalidCase(Reason.PORT_NOT_LISTED, {}, {"ports": frozenset({40000})}),
    InvalidCase(Reason.PORT_NOT_LISTED, {"protocol": 50}, {"ports": frozenset({443})}),
    InvalidCase(
        None,
        {},
        {"service_networks": (ip_network("203.0.113.0/24"), ip_network("2001:db8:2::/48"))},
    ),
    InvalidCase(
        Reason.NOT_SERVICE,
        {},
        {"service_networks": (ip_network("192.0.2.0/24"), ip_network("fd00::/8"))},
    ),
)
INVALID_ROWS = [(case, net) for case in INVALID_CASES for net in case.nets]


@unit
@pytest.mark.parametrize(("case", "net"), INVALID_ROWS)
def test_what_is_believed(case: InvalidCase, net: Plan) -> None:
    found = parsed(net, **case.fields)
    policy = make_policy(net, **case.options)
    assert policy.invalid(found) is (None if case.reason is Reason.NOT_SERVICE else case.reason)
    assert outcome(found, policy, 1.0) is (case.reason or REPLICATE)


class LimitCase(NamedTuple):
    """Errors at their times, and what becomes of each (None: acted on)."""

    options: dict[str, float]
    events: tuple[tuple[float, dict[str, Any], Optional[pmtud.Reason]], ...]


def echo(identifier: int, sequence: int = 1, kind: int = 8) -> bytes:
    """The first bytes of an ICMP echo request (RFC 792, RFC 4443 section 4)."""
    return struct.pack("!BBHHH", kind, 0, 0x1234 + sequence, identifier, sequence)


def gre(flags: int, key: int) -> bytes:
    """The first bytes of GRE (RFC 2890).

    With 0x8000 in the flags the last four are a checksum, without 0x2000 data.
    """
    return struct.pack("!HHI", flags, 0x0800, key)


# Protocol, two flows that differ in what follows the addresses, and another packet of the first
FLOWS_WITHOUT_PORTS: tuple[tuple[str, int, bytes, bytes, bytes, tuple[Plan, ...]], ...] = (
    ("echo id", 1, echo(7), echo(8), echo(7, 2), (V4,)),
    ("echo id", 58, echo(7, kind=128), echo(8, kind=128), echo(7, 2, 128), (V6,)),
    ("request and reply", 1, echo(7), echo(7, kind=0), echo(7, 2), (V4,)),
    ("request and reply", 58, echo(7, kind=128), echo(7, kind=129), echo(7, 2, 128), (V6,)),
    (
        "SPI",
        50,
        struct.pack("!II", 1, 9),
        struct.pack("!II", 2, 9),
        struct.pack("!II", 1, 10),
        (V4, V6),
    ),
    ("GRE key", 47, gre(0x2000, 1), gre(0x2000, 2), gre(0x2000, 1), (V4, V6)),
    ("PPTP call", 47, gre(0x3081, 1), gre(0x3081, 2), gre(0x3001, 1), (V4, V6)),
)
NO_IDENTIFIERS = (
    (47, gre(0, 1), gre(0, 2)),
    (47, gre(0xA000, 1), gre(0xA000, 2)),
    (4, bytes(8), b"\1" * 8),
    (41, bytes(8), b"\1" * 8),
)
OTHER_FLOW = {"transport": tcp_start(443, 40001)}
COPY = {"src": "peer", "dst": "node"}
CAME = {"outer": {"ttl": 62}}
CAME_AGAIN = {"outer": {"ttl": 60}}
LIMIT_CASES = {
    "once per flow and interval": LimitCase(
        {"flow_interval": 1.0},
        (
            (10.0, {}, None),
            (10.5, {}, Reason.LIMITED_FLOW),
            (10.9, {"src": "client"}, Reason.LIMITED_FLOW),
            (11.0, {}, None),
            (11.9, {}, Reason.LIMITED_FLOW),
            (12.0, {}, None),
        ),
    ),
    "another flow or MTU": LimitCase(
        {"flow_interval": 1.0},
        (
            (10.0, {}, None),
            (10.0, {"mtu": 1399}, None),
            (10.0, OTHER_FLOW, None),
            (10.0, {"protocol": 17}, None),
            (10.0, {"quoted_dst": "router"}, None),
            (10.0, {}, Reason.LIMITED_FLOW),
        ),
    ),
    "a copy is not its router's error": LimitCase(
        {"flow_interval": 1.0},
        ((10.0, {}, None), (10.0, COPY, None), (10.1, COPY, Reason.LIMITED_FLOW)),
    ),
    "interval 0": LimitCase({}, ((10.0, {}, None),) * 50),
    "what circles uses up nothing": LimitCase(
        {"flow_interval": 0.1, "source_rate": 2.0, "rate": 2.0},
        (
            (10.0, CAME, None),
            (10.01, CAME_AGAIN, Reason.CIRCLING),
            (10.2, CAME_AGAIN, Reason.CIRCLING),
            (10.9, CAME_AGAIN, Reason.CIRCLING),
            (10.9, {**CAME_AGAIN, "mtu": 1399}, None),
            (10.91, {**CAME_AGAIN, "mtu": 1399}, Reason.LIMITED_FLOW),
            # Another packet of the same flow, the same router
            (10.95, {**CAME_AGAIN, "quoted_length": 1499}, None),
        ),
    ),
    "per source": LimitCase(
        {"source_rate": 2.0},
        (
            (10.0, {}, None),
            (10.0, {}, None),
            (10.0, {}, Reason.LIMITED_SOURCE),
            (10.0, {"src": "client"}, None),
            (10.4, {}, Reason.LIMITED_SOURCE),
            (10.5, {}, None),
            (10.5, {}, Reason.LIMITED_SOURCE),
            (20.0, {}, None),
            (20.0, {}, None),
            (20.0, {}, Reason.LIMITED_SOURCE),
        ),
    ),
    "less than one a second": LimitCase(
        {"source_rate": 0.5},
        (
            (10.0, {}, None),
            (11.9, {}, Reason.LIMITED_SOURCE),
            (12.0, {}, None),
            (13.0, {}, Reason.LIMITED_SOURCE),
        ),
    ),
    "in all": LimitCase(
        {"rate": 2.0},
        (
            (10.0, {}, None),
            (10.0, {"src": "client"}, None),
            (10.0, {}, Reason.LIMITED_TOTAL),
            (10.5, {}, None),
            (10.5, {"src": "client"}, Reason.LIMITED_TOTAL),
        ),
    ),
    "peers and routers apart": LimitCase(
        {"rate": 1.0},
        (
            (10.0, {}, None),
            (10.0, {}, Reason.LIMITED_TOTAL),
            (10.0, COPY, None),
            (10.0, COPY, Reason.LIMITED_TOTAL),
        ),
    ),
    "what was limited does not start an interval": LimitCase(
        {"rate": 1.0, "flow_interval": 5.0},
        (
            (10.0, OTHER_FLOW, None),
            (10.0, {}, Reason.LIMITED_TOTAL),
            (11.0, {}, None),
            (11.0, {}, Reason.LIMITED_FLOW),
        ),
    ),
    "an invalid error costs nothing": LimitCase(
        {"rate": 1.0, "source_rate": 1.0, "flow_interval": 5.0},
        ((10.0, {"mtu": 65535}, Reason.MTU_NOT_SMALLER), (10.0, {}, None)),
    ),
}


@unit
@both_families
@pytest.mark.parametrize("name", LIMIT_CASES)
def test_limits(name: str, net: Plan) -> None:
    policy = make_policy(net, **LIMIT_CASES[name].options)
    for step, (now, fields, reason) in enumerate(LIMIT_CASES[name].events):
        named = {
            key: getattr(net, value) if isinstance(value, str) else value
            for key, value in fields.items()
        }
        action = DELIVER if fields is COPY else REPLICATE
        assert outcome(parsed(net, **named), policy, now) is (reason or action), step


@unit
@pytest.mark.parametrize(
    ("case", "net"),
    [
        pytest.param(case, net, id=f"{case[0]}-{net.family.name}")
        for case in FLOWS_WITHOUT_PORTS
        for net in case[5]
    ],
)
def test_flows_without_ports_are_told_apart(case: tuple[Any, ...], net: Plan) -> None:
    """By their own identifier, whatever else changes from packet to packet.

    No port is made of it.
    """
    _, protocol, first, second, again, _ = case
    policy = make_policy(net, flow_interval=1.0)
    found = [parsed(net, protocol=protocol, transport=start) for start in (first, second, again)]
    reasons = [outcome(error, policy, 1.0) for error in found]
    assert reasons == [REPLICATE, REPLICATE, Reason.LIMITED_FLOW]
    assert {(error.source_port, error.destination_port) for error in found} == {(0, 0)}


@unit
@both_families
@pytest.mark.parametrize(("protocol", "first", "second"), NO_IDENTIFIERS)
def test_what_changes_with_each_packet_makes_no_flow(
    protocol: int, first: bytes, second: bytes, net: Plan
) -> None:
    policy = make_policy(net, flow_interval=1.0)
    found = [parsed(net, protocol=protocol, transport=start) for start in (first, second)]
    assert [outcome(error, policy, 1.0) for error in found] == [
        REPLICATE,
        Reason.LIMITED_FLOW,
    ]


@unit
def test_memory_is_bounded_under_a_spoofed_flood() -> None:
    """100,000 sources, each with a flow of its own, in one interval."""
    policy = make_policy(flow_interval=60.0, source_rate=500.0, rate=1e9)
    template = parsed(V4)
    passed = 0
    for number in range(100_000):
        source = struct.pack("!I", 0x0B000000 + number)
        spoofed = template._replace(src=source, quoted_dst=source, mtu=1300 + number % 50)
        passed += outcome(spoofed, policy, 1.0 + number / 1e6) is REPLICATE
    assert passed == 100_000
    assert len(policy._flows) <= 2 * 32768
    assert len(policy._sources._buckets) <= 2 * 8192
    assert len(policy._total._buckets) <= 2
    assert len(policy.known) <= 4096


@unit
def test_the_total_holds_against_a_spoofed_flood() -> None:
    """New sources each time get past the limit per source, never past the one for all."""
    policy = make_policy(source_rate=1.0, rate=100.0)
    template = parsed(V4)
    spoofed = (
        template._replace(src=struct.pack("!I", 0x0B000000 + number)) for number in range(20_000)
    )
    found = [outcome(one, policy, 5.0) for one in spoofed]
    assert found.count(REPLICATE) == 100
    assert found.count(Reason.LIMITED_TOTAL) == 19_900


@unit
@both_families
def test_membership(net: Plan) -> None:
    members = pmtud.Membership([ip_network(net.inside_network)])
    for address, inside in (
        (net.inside, True),
        (net.vip, False),
        (other(net).inside, False),
        (net.inside, True),
    ):
        assert (packed(address) in members) is inside
    assert packed(net.inside) not in pmtud.Membership(())


@unit
def test_every_reason_has_a_case() -> None:
    """Charter 6; dry_run is proven with the daemon, in a namespace."""
    covered = {case.reason for case in PACKET_CASES} | {case.reason for case in INVALID_CASES}
    covered |= {case.decision for case in WHO_CASES if isinstance(case.decision, Reason)}
    covered |= {reason for case in LIMIT_CASES.values() for _, _, reason in case.events}
    assert covered - {None} == set(Reason) - {Reason.DRY_RUN}


# -----------------------------------------------------------------------------
# Section: counters -- totals that only grow, and what a scrape shows


@unit
def test_histogram_bounds_are_inclusive() -> None:
    histogram = pmtud.Histogram((10, 20))
    for value in (9, 10, 11, 20, 21, 1000):
        histogram.observe(value)
    assert histogram.cumulative() == [("10", 2.0), ("20", 4.0), ("+Inf", 6.0)]
    assert histogram.sum == 1071


@unit
def test_copy_counts_stay_with_the_peers_that_stay() -> None:
    first = pmtud.CopyCounts(["a", "b"])
    first.rounds = 10
    first.refused[1] = 3
    assert first.sent() == {"a": 10, "b": 7}
    assert first.errors() == {"a": 0, "b": 3}
    second = pmtud.CopyCounts(["b", "c"], first)
    second.rounds = 5
    second.refused[0] = 1
    assert second.sent() == {"b": 11, "c": 5}
    assert second.errors() == {"b": 4, "c": 0}
    assert first.totals() == (17, 3)
    assert second.totals() == (26, 4)
    assert pmtud.CopyCounts([], second).totals() == (26, 4)


def scrape(counters: pmtud.Counters) -> dict[tuple[str, tuple[Any, ...]], float]:
    """The samples a Prometheus server would read, by name and labels."""
    text = pmtud.render_metrics(counters).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sorted(sample.labels.items())
            found[sample.name, tuple(labels)] = sample.value
    return found


METRIC_LABELS: dict[str, set[tuple[str, ...]]] = {
    "pmtud_received_total": {("family", "origin")},
    "pmtud_dropped_total": {("reason",)},
    "pmtud_acted_total": {("action",)},
    "pmtud_copies_sent_total": {("peer",)},
    "pmtud_copy_errors_total": {("peer",)},
    "pmtud_copies_received_total": {("peer",)},
    "pmtud_copies_needed_total": {("family",)},
    "pmtud_shed_total": {("family",)},
    "pmtud_ready": {()},
    "pmtud_unready": {("reason",)},
    "pmtud_peer_resolved": {("peer",)},
    "pmtud_node_info": {("address", "family", "node")},
    "pmtud_delivered_total": {("family", "result")},
    "pmtud_rpf_rescued_total": {()},
    "pmtud_nflog_lost_total": {()},
    "pmtud_peers": {("source",)},
    "pmtud_peer_refresh_failures_total": {("source",)},
    "pmtud_last_error_received_timestamp_seconds": {()},
    "pmtud_build_info": {("python_version", "version")},
    "pmtud_reported_mtu_bytes_bucket": {("le",)},
    "pmtud_reported_mtu_bytes_sum": {()},
    "pmtud_reported_mtu_bytes_count": {()},
    "pmtud_batch_duration_seconds_bucket": {("le",)},
    "pmtud_batch_duration_seconds_sum": {()},
    "pmtud_batch_duration_seconds_count": {()},
}


@unit
def test_scrape_has_the_metrics_of_the_design() -> None:
    counters = pmtud.Counters()
    counters.copies["ipv4"] = pmtud.CopyCounts(["10.0.0.12"])
    counters.peers = {"static": 1}
    counters.refresh_failures = {"file:x": 0}
    counters.shed = {"ipv4": 0}
    counters.unready = {"rules": 1}
    counters.resolved = {"10.0.0.12": 1}
    counters.node_info = {("node1", "ipv4", "10.0.0.11"): 1}
    found: dict[str, set[tuple[str, ...]]] = {}
    for name, labels in scrape(counters):
        found.setdefault(name, set()).add(tuple(label for label, _ in labels))
    assert found == METRIC_LABELS


@unit
def test_scrape_starts_at_zero_for_every_label() -> None:
    samples = scrape(pmtud.Counters())
    for reason in Reason:
        assert samples["pmtud_dropped_total", (("reason", reason.value),)] == 0
    for family in ("ipv4", "ipv6"):
        for origin in ("router", "peer"):
            assert samples["pmtud_received_total", (("family", family), ("origin", origin))] == 0
        for result in ("owner", "not_owner", "error"):
            assert samples["pmtud_delivered_total", (("family", family), ("result", result))] == 0


@unit
def test_scrape_shows_what_was_counted() -> None:
    counters = pmtud.Counters()
    counters.dropped[Reason.OWN] = 3
    counters.received["ipv6", "peer"] = 4
    counters.delivered["ipv4", "not_owner"] = 5
    counters.copies["ipv6"] = pmtud.CopyCounts(["fd00::12"])
    counters.copies["ipv6"].rounds = 9
    counters.copies["ipv6"].refused[0] = 2
    counters.rpf_rescued = 6
    counters.nflog_lost = 7
    counters.last_error_received = 1.5e9
    counters.reported_mtu.observe(1400)
    samples = scrape(counters)
    assert samples["pmtud_dropped_total", (("reason", "own"),)] == 3
    assert samples["pmtud_received_total", (("family", "ipv6"), ("origin", "peer"))] == 4
    assert samples["pmtud_delivered_total", (("family", "ipv4"), ("result", "not_owner"))] == 5
    assert samples["pmtud_copies_sent_total", (("peer", "fd00::12"),)] == 7
    assert samples["pmtud_copy_errors_total", (("peer", "fd00::12"),)] == 2
    assert samples["pmtud_rpf_rescued_total", ()] == 6
    assert samples["pmtud_nflog_lost_total", ()] == 7
    assert samples["pmtud_last_error_received_timestamp_seconds", ()] == 1.5e9
    assert samples["pmtud_reported_mtu_bytes_bucket", (("le", "1380"),)] == 0
    assert samples["pmtud_reported_mtu_bytes_bucket", (("le", "1400"),)] == 1
    assert samples["pmtud_reported_mtu_bytes_sum", ()] == 1400


@pytest.mark.parametrize("family", [4, 6])
def test_copies_are_counted_on_both_ends(cluster: Cluster, family: int) -> None:
    """Sent and received agree; where a node drops some the difference names the pair.

    A sender that the receiver does not list is `other`, its address no label.
    """
    sender = ingress(cluster, family)
    address = cluster.node_address(sender + 1, family)
    near, far = (node for i, node in enumerate(cluster.nodes) if i != sender)
    name = f"ipv{family}"

    def received(node: Host, label: str) -> float:
        return metrics(node)[f'pmtud_copies_received_total{{peer="{label}"}}']

    with daemons(cluster.nodes, *peers_of(family)):
        chain = "type filter hook ingress device eth0 priority -10"
        protocol = {4: "icmp type destination-unreachable", 6: "icmpv6 type packet-too-big"}[family]
        rule = f"{protocol} numgen inc mod 2 0 drop"
        far.run("nft", f"table netdev lose {{ chain c {{ {chain}; {rule}; }}; }}")
        inject(cluster.router, family, flow_errors(family, count=20))
        assert poll(lambda: received(near, address) == 20 and received(far, address) == 10, 5)
        sent = metrics(cluster.nodes[sender])
        for number in range(1, 4):
            if number != sender + 1:
                peer = cluster.node_address(number, family)
                assert sent[f'pmtud_copies_sent_total{{peer="{peer}"}}'] == 20
        host = socket.gethostname()
        labels = f'address="{address}",family="{name}",node="{host}"'
        assert sent[f"pmtud_node_info{{{labels}}}"] == 1
        far.run("nft", "delete", "table", "netdev", "lose")
    others = [cluster.node_address(i + 1, family) for i in range(3) if i != sender]
    with (
        daemons([cluster.nodes[sender]], *peers_of(family), "--metrics-port", "0"),
        daemons([near, far], "--peers", ",".join(others), "--ignore-networks", f"{address}"),
    ):
        inject(cluster.router, family, flow_errors(family, count=5))
        assert poll(lambda: received(near, "other") == 5, 5)
        assert not [line for line in metrics(near) if address in line]


@pytest.mark.parametrize("family", [4, 6])
def test_what_the_kernel_sheds_is_counted(cluster: Cluster, family: int, tmp_path: Path) -> None:
    """Errors and copies alike: shed + received = sent, also when the table is made anew."""
    node = cluster.nodes[ingress(cluster, family)]
    path = tmp_path / "peers"
    path.write_text(PEER_LISTS[family].replace(",", "\n"))
    name = f'pmtud_shed_total{{family="ipv{family}"}}'
    with daemons([node], "--peers", f"file:{path}", "--rate", "10") as [process]:
        inject(cluster.router, family, flow_errors(family, count=100), 0)
        first = metrics(node)
        assert first[name] > 0
        assert first[name] + total(first, "pmtud_received_total") == 100
        path.write_text(path.read_text() + "\n10.0.0.77\nfd00::77\n")
        process.wait_for("peers changed")
        other = f'pmtud_shed_total{{family="ipv{10 - family}"}}'
        assert metrics(node)[name] == first[name]
        assert metrics(node)[other] == 0


def test_readiness_and_dead_neighbours_are_metrics(cluster: Cluster, tmp_path: Path) -> None:
    """pmtud_ready with its reason; peers to whose address nobody answers."""
    node = cluster.nodes[ingress(cluster, 4)]
    peers = f"{PEER_LISTS[4]},10.0.0.99"
    with daemons([node], "--peers", f"{peers},dns:no-such.invalid"):
        samples = metrics(node)
        assert samples["pmtud_ready"] == 0
        assert samples['pmtud_unready{reason="peers"}'] == 1
        assert (
            samples['pmtud_unready{reason="rules"}'] == samples['pmtud_unready{reason="loop"}'] == 0
        )
    with daemons([node], "--peers", peers):
        assert metrics(node)["pmtud_ready"] == 1
        inject(cluster.router, 4, flow_errors(4, count=1))
        dead = 'pmtud_peer_resolved{peer="10.0.0.99"}'
        assert metric_becomes(node, dead, 0)
        alive = [
            value for name, value in metrics(node).items() if name.startswith("pmtud_peer_res")
        ]
        assert sorted(alive) == [0, 1, 1]


def test_refused_copies_are_a_warning_of_the_doctor(cluster: Cluster) -> None:
    """A local firewall, for an hour: with the peer and the errno."""
    node = cluster.nodes[ingress(cluster, 4)]
    with daemons([node], *peers_of(4)):
        assert "daemon_says" not in [entry["check"] for entry in diagnose(node).checks]
        rule = "icmp type destination-unreachable ip daddr 10.0.0.0/24 drop"
        chain = "type filter hook output priority 0"
        node.run("nft", f"table inet deny {{ chain c {{ {chain}; {rule}; }}; }}")
        inject(cluster.router, 4, flow_errors(4, count=2))
        node.run("nft", "delete", "table", "inet", "deny")
        said = [entry for entry in diagnose(node).checks if entry["check"] == "daemon_says"]
        assert {entry["status"] for entry in said} == {"WARN"}
        text = "copies to {} were refused within the last hour: Operation not permitted (EPERM)"
        others = [
            a
            for a in PEER_LISTS[4].split(",")
            if a != cluster.node_address(cluster.nodes.index(node) + 1)
        ]
        assert {entry["found"] for entry in said} == {text.format(peer) for peer in others}


@unit
def test_without_prometheus_client_there_is_no_exposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(
        pmtud.PmtudError,
        match=r"^prometheus-client is not installed: pip install prometheus-client$",
    ):
        pmtud.render_metrics(pmtud.Counters())


# -----------------------------------------------------------------------------
# Section: peers -- files that change and break, and who is who on this node


def addresses(*texts: str) -> tuple[pmtud.PeerAddress, ...]:
    """Peers from their texts."""
    return tuple(pmtud.parse_peer(text) for text in texts)


@unit
def test_file_source_follows_changes(tmp_path: Path) -> None:
    path = tmp_path / "peers"
    path.write_text("10.0.0.12\n")
    source = pmtud.FileSource(str(path))
    assert source.name == f"file:{path}"
    assert source.load() == addresses("10.0.0.12")
    assert source.load() is None
    path.touch()
    assert source.load() is None
    path.write_text("10.0.0.12\n10.0.0.13\n")
    assert source.load() == addresses("10.0.0.12", "10.0.0.13")
    (tmp_path / "new").write_text("fd00::12 # renamed into place, as a ConfigMap is\n")
    (tmp_path / "new").rename(path)
    assert source.load() == addresses("fd00::12")


FILE_PROBLEMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file or directory"),
    "directory": (Path.mkdir, "Is a directory"),
    "fifo": (os.mkfifo, "not a regular file of at most 1048576 bytes"),
    "device": (
        lambda path: path.symlink_to("/dev/zero"),
        "not a regular file of at most 1048576 bytes",
    ),
    "big": (
        lambda path: path.write_bytes(bytes(1 << 20) + b"\n"),
        "not a regular file of at most 1048576 bytes",
    ),
    "not UTF-8": (
        lambda path: path.write_bytes(b"10.0.0.12\n\xff"),
        "'utf-8' codec can't decode byte 0xff in position 10: invalid start byte",
    ),
    "not an address": (
        lambda path: path.write_text("10.0.0.12\nnode-2\n"),
        "line 2: 'node-2' is not an IP address",
    ),
}


@unit
@pytest.mark.parametrize("name", FILE_PROBLEMS)
def test_file_source_explains(name: str, tmp_path: Path) -> None:
    make, problem = FILE_PROBLEMS[name]
    path = tmp_path / "peers"
    make(path)
    source = pmtud.FileSource(str(path))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(pmtud.PeerSourceError) as caught:
        source.load()
    assert str(caught.value) == f"file:{path}: {problem}"
    assert len(os.listdir("/proc/self/fd")) == before


def all_answered(peers: pmtud.PeerSources) -> bool:
    """Whether every source has answered."""
    return not peers.unanswered(peers.listed())


def until(condition: Callable[[], bool]) -> None:
    """Poll until the condition holds."""
    assert poll(condition, 5), "waited in vain"


@unit
def test_the_last_good_peers_stay(tmp_path: Path) -> None:
    path = tmp_path / "peers"
    counters = pmtud.Counters()
    changes = []
    path.write_text("10.0.0.12")
    name = f"file:{path}"
    config = pmtud.Config(peers=addresses("fd00::12"), peer_sources=(name,))
    peers = pmtud.PeerSources(config, counters, lambda: changes.append(1))
    assert not all_answered(peers)
    peers.prepare()
    peers.follow()
    try:
        good = {"static": addresses("fd00::12"), name: addresses("10.0.0.12")}
        assert all_answered(peers)
        assert peers.listed() == good
        assert counters.refresh_failures == {name: 0}
        path.write_text("nonsense")
        peers.reload()
        until(lambda: counters.refresh_failures[name] >= 1)
        assert peers.listed() == good
        assert changes == []
        path.write_text("10.0.0.13")
        peers.reload()
        until(lambda: peers.listed()[name] == addresses("10.0.0.13"))
        until(lambda: changes == [1])
    finally:
        peers.close()


@unit
def test_a_bad_file_at_the_start_is_a_usage_error(tmp_path: Path) -> None:
    config = pmtud.Config(peer_sources=(f"file:{tmp_path}/none",))
    with pytest.raises(pmtud.UsageError) as caught:
        pmtud.PeerSources(config, pmtud.Counters(), lambda: None).prepare()
    assert str(caught.value) == f"peers: file:{tmp_path}/none: No such file or directory"


# By address family: what the name has, or the error of getaddrinfo()
Answers = dict[int, Union[list[str], int]]


@pytest.fixture(name="dns")
def fixture_dns(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """What getaddrinfo() answers from now on."""
    answers: Answers = {socket.AF_INET: [], socket.AF_INET6: []}

    def getaddrinfo(host: str, port: None, family: int, kind: int) -> list[tuple[Any, ...]]:
        found = answers[family]
        if isinstance(found, int) or not found:
            code = found if isinstance(found, int) else socket.EAI_NODATA
            raise socket.gaierror(
                code, {socket.EAI_AGAIN: "try again", socket.EAI_NODATA: "no data"}[code]
            )
        return [(family, kind, 17, "", (address, 0)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return answers


def look(source: pmtud.PeerSource) -> Union[list[str], str, None]:
    """What a source says now: its addresses, None if they are what they were, or its complaint."""
    try:
        found = source.load()
    except pmtud.PeerSourceError as problem:
        return str(problem)
    return None if found is None else [str(peer) for peer in found]


def complaint_of(source: pmtud.PeerSource) -> str:
    """What a source that cannot answer says."""
    found = look(source)
    assert isinstance(found, str), found
    return found


@unit
def test_dns_source_takes_all_addresses_and_keeps_none_that_left(dns: Answers) -> None:
    source = pmtud.DnsSource("nodes")
    dns[socket.AF_INET] = ["10.0.0.13", "10.0.0.12", "10.0.0.13"]
    dns[socket.AF_INET6] = ["fd00::12"]
    assert look(source) == ["10.0.0.12", "10.0.0.13", "fd00::12"]
    dns[socket.AF_INET] = ["10.0.0.12"]
    assert look(source) == ["10.0.0.12", "fd00::12"]
    pauses = {source.interval for _ in range(100) if look(source)}
    assert all(7.5 <= pause <= 12.5 for pause in pauses)
    assert len(pauses) > 1


@unit
def test_dns_source_takes_a_familys_last_address_away_after_a_while(
    dns: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the resolver a malformed answer and a long one without TCP are no answer.

    Not believed at once.
    """
    monkeypatch.setattr(pmtud.DnsSource, "KEEP", 0.2)
    source = pmtud.DnsSource("nodes")
    for _ in range(2):
        dns[socket.AF_INET] = ["10.0.0.12"]
        dns[socket.AF_INET6] = ["fd00::12"]
        assert look(source) == ["10.0.0.12", "fd00::12"]
        assert source.doubt == ""
        dns[socket.AF_INET] = []
        dns[socket.AF_INET6] = ["fd00::13"]
        assert look(source) == ["10.0.0.12", "fd00::13"]
        assert source.doubt == "dns:nodes: ipv4: no data"
        time.sleep(0.3)
        assert look(source) == ["fd00::13"]
        assert source.doubt == ""


@unit
def test_dns_source_survives_one_family_that_cannot_be_asked(dns: Answers) -> None:
    source = pmtud.DnsSource("nodes")
    dns[socket.AF_INET] = ["10.0.0.12"]
    dns[socket.AF_INET6] = ["fd00::12"]
    assert look(source) == ["10.0.0.12", "fd00::12"]
    dns[socket.AF_INET] = ["10.0.0.13"]
    dns[socket.AF_INET6] = socket.EAI_AGAIN
    assert look(source) == ["10.0.0.13", "fd00::12"]
    assert source.doubt == "dns:nodes: ipv6: try again"
    dns[socket.AF_INET6] = ["fd00::12"]
    assert look(source) == ["10.0.0.13", "fd00::12"]
    assert source.doubt == ""


@unit
@pytest.mark.parametrize(
    ("ipv4", "ipv6", "complaint"),
    [
        (socket.EAI_AGAIN, socket.EAI_AGAIN, "try again"),
        ([], socket.EAI_AGAIN, "no data"),
        (["127.0.0.1"], ["::1"], "no usable address"),
        (["0.0.0.0"], [], "no usable address"),
    ],
)
def test_dns_source_explains_and_goes_on(
    ipv4: Any, ipv6: Any, complaint: str, dns: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pmtud.DnsSource("nodes")
    dns[socket.AF_INET] = ["10.0.0.12"]
    source.answer = source.load()
    assert source.answer == addresses("10.0.0.12")
    dns[socket.AF_INET] = ipv4
    dns[socket.AF_INET6] = ipv6
    assert [look(source), look(source)] == [f"dns:nodes: {complaint}"] * 2
    dns[socket.AF_INET] = []
    dns[socket.AF_INET6] = []
    monkeypatch.setattr(pmtud.DnsSource, "KEEP", 0.0)
    assert look(source) == "dns:nodes: no usable address"
    dns[socket.AF_INET] = ["10.0.0.14"]
    dns[socket.AF_INET6] = []
    assert look(source) == ["10.0.0.14"]


@pytest.fixture(name="logged")
def fixture_logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The problems that are logged from now on."""
    lines: list[str] = []
    monkeypatch.setattr(
        pmtud, "log", lambda level, text, **fields: lines.append(str(fields.get("problem", text)))
    )
    return lines


@unit
def test_dns_source_leaves_unusable_addresses_out(dns: Answers, logged: list[str]) -> None:
    """One warning for each, as long as it is there; the others count."""
    source = pmtud.DnsSource("nodes")
    dns[socket.AF_INET] = ["10.0.0.12", "0.0.0.0", "224.0.0.1"]
    dns[socket.AF_INET6] = ["fe80::1"]
    assert [look(source), look(source)] == [["10.0.0.12"]] * 2
    assert logged == [
        "0.0.0.0" + PEER_HINT,
        "224.0.0.1" + PEER_HINT,
        "fe80::1 needs its interface, like fe80::1%eth0",
    ]
    dns[socket.AF_INET] = ["10.0.0.12"]
    assert look(source) == ["10.0.0.12"]
    dns[socket.AF_INET] = ["10.0.0.12", "0.0.0.0"]
    assert look(source) == ["10.0.0.12"]
    assert logged[3:] == ["0.0.0.0" + PEER_HINT]
    assert source.doubt == ""


@unit
def test_hundreds_of_names_need_few_threads(dns: Answers) -> None:
    """The unit allows 64 tasks; every name is asked for all the same, and again after SIGHUP."""
    dns[socket.AF_INET] = ["10.0.0.12"]
    names = tuple(f"dns:node-{number}" for number in range(300))
    before = threading.active_count()
    counters = pmtud.Counters()
    peers = pmtud.PeerSources(pmtud.Config(peer_sources=names), counters, lambda: None)
    try:
        peers.follow()
        assert threading.active_count() - before <= 8
        until(partial(all_answered, peers))
        assert set(peers.listed()) == {"static", *names}
        dns[socket.AF_INET] = dns[socket.AF_INET6] = socket.EAI_AGAIN
        peers.reload()
        until(lambda: min(counters.refresh_failures.values()) == 1)
    finally:
        peers.close()
    until(lambda: threading.active_count() == before)


@unit
def test_sighup_during_a_look_asks_for_another(
    dns: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a look that had begun before says may be old."""
    begun = threading.Event()
    free = threading.Event()
    answer = socket.getaddrinfo
    looks: list[int] = []

    def slow(host: str, port: None, family: int, kind: int) -> Any:
        looks.append(family)
        begun.set()
        free.wait(10)
        return answer(host, port, family, kind)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    dns[socket.AF_INET] = ["10.0.0.12"]
    peers = pmtud.PeerSources(
        pmtud.Config(peer_sources=("dns:nodes",)), pmtud.Counters(), lambda: None
    )
    try:
        peers.follow()
        begun.wait(10)
        peers.reload()
        free.set()
        until(lambda: len(looks) == 4)
    finally:
        peers.close()


@unit
def test_a_name_that_is_only_this_node_is_a_good_answer(dns: Answers) -> None:
    """Debian's /etc/hosts gives a node's own name as 127.0.1.1.

    A list of all names holds it on every node.
    """
    source = pmtud.DnsSource("node-1")
    dns[socket.AF_INET] = ["127.0.1.1"]
    assert [look(source), look(source)] == [[], []]


@unit
def test_start_does_not_wait_for_dns(dns: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not ready before the first answer.

    A refresh at once after SIGHUP, failures counted, nothing lost.
    """
    counters = pmtud.Counters()
    free = threading.Event()
    answer = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *arguments: (free.wait(10), answer(*arguments))[1]
    )
    dns[socket.AF_INET] = ["10.0.0.12"]
    peers = pmtud.PeerSources(pmtud.Config(peer_sources=("dns:nodes",)), counters, lambda: None)
    try:
        peers.follow()
        assert not all_answered(peers)
        free.set()
        until(partial(all_answered, peers))
        assert peers.listed()["dns:nodes"] == addresses("10.0.0.12")
        dns[socket.AF_INET] = socket.EAI_AGAIN
        dns[socket.AF_INET6] = socket.EAI_AGAIN
        peers.reload()
        until(lambda: counters.refresh_failures["dns:nodes"] == 1)
        assert peers.listed()["dns:nodes"] == addresses("10.0.0.12")
    finally:
        peers.close()


# -- Kubernetes: an API server stand-in, and the source that follows it


class FakeApi(http.server.ThreadingHTTPServer):
    """The nodes of a Kubernetes API server over HTTPS.

    Pages, watches, bookmarks, expiry, and faults to order.
    """

    daemon_threads = True

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        super().__init__((address, 0), FakeApiHandler)
        self.account = folder
        self.nodes = dict[str, Any]()
        self.version = 100
        self.compacted = 0
        self.history: list[tuple[int, str, Any]] = []  # version, kind, object
        self.requests: list[dict[str, str]] = []
        self.faults: list[str] = []  # one for each request to come
        self.changed = threading.Condition()
        self.watches = self.cut = self.told = 0
        self.retry_after = ""
        self.token("first")
        # No extension by default
        (folder / "openssl.cnf").write_text("[req]\ndistinguished_name=name\n[name]\n")
        certify = (
            f"req -config {folder}/openssl.cnf -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 "
            "-nodes -days 2 -addext subjectKeyIdentifier=none -addext authorityKeyIdentifier=none"
        )
        authority = f"{folder}/ca.crt"
        key = f"{folder}/key.pem"
        leaf = f"{folder}/leaf.pem"
        openssl(
            f"{certify} -keyout {key} -out {authority} -subj /CN=kubernetes "
            "-addext basicConstraints=critical,CA:TRUE"
        )
        openssl(
            f"{certify} -CA {authority} -CAkey {key} -keyout {leaf} -out {leaf}.crt "
            f"-subj /CN=kube-apiserver -addext subjectAltName=IP:{address}"
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(leaf + ".crt", leaf)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up."""

    def token(self, text: str) -> None:
        """Only this one is believed from now on; the mounted file has it, as after a renewal."""
        self.bearer = text
        (self.account / "token").write_text(text + "\n")

    @property
    def environ(self) -> dict[str, str]:
        """What a kubelet tells every container."""
        host, port = self.server_address[:2]
        return {"KUBERNETES_SERVICE_HOST": str(host), "KUBERNETES_SERVICE_PORT": str(port)}

    def change(self, kind: str, name: str, *addresses: str, **labels: str) -> None:
        """A node comes (ADDED), changes (MODIFIED) or goes (DELETED)."""
        with self.changed:
            self.version += 1
            listed = [{"type": "InternalIP", "address": address} for address in addresses]
            node = {
                "metadata": {"name": name, "resourceVersion": str(self.version), "labels": labels},
                "status": {"addresses": [{"type": "Hostname", "address": name}, *listed]},
            }
            self.nodes[name] = node
            if kind == "DELETED":
                del self.nodes[name]
            self.history.append((self.version, kind, node))
            self.changed.notify_all()

    def tell(self, kind: str, content: Any) -> None:
        """Any event: bookmarks, errors, nonsense; bytes go out as they are."""
        with self.changed:
            self.version += 1
            self.history.append((self.version, kind, content))
            self.changed.notify_all()

    def bookmark(self) -> None:
        """Say how far the server is, and no more."""
        self.tell(
            "BOOKMARK", {"kind": "Node", "metadata": {"resourceVersion": str(self.version + 1)}}
        )

    def disconnect(self) -> None:
        """Break every watch that is open, in the middle of its chunked body."""
        with self.changed:
            self.cut += 1
            self.changed.notify_all()


class FakeApiHandler(http.server.BaseHTTPRequestHandler):
    """GET /api/v1/nodes: list, or watch=1."""

    protocol_version = "HTTP/1.1"
    server: FakeApi

    def do_GET(self) -> None:
        api = self.server
        path, _, query = self.path.partition("?")
        asked = dict(urllib.parse.parse_qsl(query))  # leaves out what is empty
        fault = api.faults.pop(0) if api.faults else ""
        api.requests.append(asked)
        if path != "/api/v1/nodes" or self.headers["Authorization"] != f"Bearer {api.bearer}":
            self._answer(401, {"message": "Unauthorized"})
        elif fault.isdigit():
            self._answer(int(fault), {"message": "as ordered"})
        elif fault == "hang up":
            self.close_connection = True
        elif fault == "cut":  # a watch that ends as soon as it is open
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            self.close_connection = True
        elif fault == "stall":
            time.sleep(2)
        elif fault:
            self._answer(200, fault)
        elif asked.get("watch"):
            self._watch(int(asked["resourceVersion"]))
        else:
            self._list(asked)

    def _list(self, asked: dict[str, str]) -> None:
        start = int(asked.get("continue", 0))
        key, _, value = asked.get("labelSelector", "").partition("=")
        nodes = [
            node
            for node in self.server.nodes.values()
            if not key or node["metadata"]["labels"].get(key) == value
        ]
        end = start + int(asked["limit"])
        more = {"continue": str(end)} if end < len(nodes) else {}
        self._answer(
            200,
            {
                "kind": "NodeList",
                "items": nodes[start:end],
                "metadata": {"resourceVersion": str(self.server.version), **more},
            },
        )

    def _answer(self, code: int, body: Any) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        if self.server.retry_after:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        self.wfile.write(data)

    def _watch(self, version: int) -> None:
        api = self.server
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with api.changed:
            cut = api.cut
            told = version
            api.watches += 1
            while api.cut == cut:
                if version < api.compacted:
                    gone = {
                        "kind": "Status",
                        "code": 410,
                        "message": f"too old resource version: {version}",
                    }
                    self._chunk(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
                    break
                for number, kind, content in [entry for entry in api.history if entry[0] > told]:
                    told = number
                    if kind == "END":  # timeoutSeconds are over
                        api.history.clear()
                        self._chunk(b"")
                        api.watches -= 1
                        return
                    event = content if isinstance(content, bytes) else None
                    self._chunk(
                        event or json.dumps({"type": kind, "object": content}).encode() + b"\n"
                    )
                    api.told = number
                api.changed.wait(0.05)
            api.watches -= 1
        self.close_connection = True

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture(name="api")
def fixture_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """An API server that knows two nodes, and what a pod is told about it."""
    with FakeApi(tmp_path) as api:
        monkeypatch.setattr(pmtud.KubeSource, "ACCOUNT", str(tmp_path))
        for name, value in api.environ.items():
            monkeypatch.setenv(name, value)
        api.change("ADDED", "node-1", "10.0.0.11", "fd00::11", role="edge")
        api.change("ADDED", "node-2", "10.0.0.12", role="edge")
        yield api
        api.disconnect()
        api.shutdown()


NODES = ["10.0.0.11", "10.0.0.12", "fd00::11"]


def watching(api: FakeApi) -> pmtud.KubeSource:
    """A source that has listed the nodes and watches them."""
    source = pmtud.KubeSource()
    assert look(source) == NODES
    assert source.load() is None
    assert source.interval == 0.0
    until(lambda: api.watches == 1)
    return source


@unit
def test_kube_source_lists_and_watches(api: FakeApi) -> None:
    source = watching(api)
    assert api.requests[0] == {"limit": "100"}
    assert {**api.requests[1], "timeoutSeconds": ""} == {
        "watch": "1",
        "resourceVersion": "102",
        "timeoutSeconds": "",
        "allowWatchBookmarks": "true",
    }
    api.change("ADDED", "node-3", "10.0.0.13")
    assert look(source) == ["10.0.0.11", "10.0.0.12", "10.0.0.13", "fd00::11"]
    api.change("MODIFIED", "node-3", "10.0.0.13")
    assert source.load() is None  # a heartbeat
    api.change("MODIFIED", "node-3", "10.0.0.14", "fd00::14", "not an address", "127.0.0.1")
    assert look(source) == ["10.0.0.11", "10.0.0.12", "10.0.0.14", "fd00::11", "fd00::14"]
    api.change("DELETED", "node-1")
    assert look(source) == ["10.0.0.12", "10.0.0.14", "fd00::14"]
    api.change("DELETED", "node-3")
    assert look(source) == ["10.0.0.12"]
    assert len(api.requests) == 2


@unit
def test_kube_source_lists_in_pages(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a page that fails, or whose list has expired, it starts with the first."""
    monkeypatch.setattr(pmtud.KubeSource, "PAGE_NODES", 20)
    for number in range(58):
        api.change("ADDED", f"more-{number}", f"10.1.0.{number}")
    assert len(look(pmtud.KubeSource()) or ()) == 61
    assert [request.get("continue") for request in api.requests] == [None, "20", "40"]
    api.requests.clear()
    api.faults = ["", "500", "", "410"]
    source = pmtud.KubeSource()
    assert look(source) == "kube:nodes: the API server answers 500 Internal Server Error"
    assert source.load() is None
    assert 0.5 <= source.interval <= 1.0
    assert len(look(source) or ()) == 61
    asked = [request.get("continue") for request in api.requests]
    assert asked == [None, "20", None, "20", None, "20", "40"]


@unit
def test_kube_source_waits_as_long_as_the_server_wants(api: FakeApi) -> None:
    """Retry-After, up to a minute."""
    source = pmtud.KubeSource()
    api.faults = ["429"] * 4
    for seconds, low, high in (
        ("17", 17, 17),
        ("86400", 60, 60),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 4, 8),
        ("", 8, 16),
    ):
        api.retry_after = seconds
        assert look(source) == "kube:nodes: the API server answers 429 Too Many Requests"
        assert low <= source.interval <= high
    assert look(source) == NODES
    assert source.interval <= 1.0


@unit
def test_kube_source_gives_a_stalled_answer_up(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list, or the handshake; an open watch may be silent for longer."""
    monkeypatch.setattr(pmtud.KubeSource, "READ_SECONDS", 0.5)
    source = pmtud.KubeSource()
    api.faults = ["stall"]
    assert complaint_of(source).endswith("timed out")
    assert look(source) == NODES
    assert source.load() is None
    time.sleep(0.7)
    api.change("DELETED", "node-1")
    assert look(source) == ["10.0.0.12"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.getsockname()[1]))
        assert complaint_of(pmtud.KubeSource()).endswith("timed out")


@unit
def test_kube_source_waits_when_watches_are_cut_at_once(api: FakeApi) -> None:
    """Each is a failure, and the pause grows; the list is not asked for again."""
    source = pmtud.KubeSource()
    assert look(source) == NODES
    api.faults = ["cut"] * 4
    pauses = []
    for _ in range(4):
        assert source.load() is None
        assert look(source) == "kube:nodes: the watch was cut off"
        pauses.append(source.interval)
    for low, pause in zip((1, 2, 4, 8), pauses):
        assert low <= pause <= 2 * low
    assert source.load() is None
    api.change("DELETED", "node-1")
    assert look(source) == ["10.0.0.12"]
    assert [request.get("watch") for request in api.requests] == [None] + ["1"] * 5
    api.tell("END", None)
    assert source.load() is None
    assert source.interval <= 1.0


@unit
def test_kube_source_takes_odd_nodes_as_they_are(api: FakeApi, logged: list[str]) -> None:
    """One that is not like the others does not hide them."""
    odd: list[Any] = [
        None,
        {},
        {"addresses": None},
        {"addresses": [{"address": "10.0.0.66"}]},
        {
            "addresses": [
                {"type": "InternalIP", "address": 12},
                {"type": "InternalIP"},
                {"type": "InternalIP", "address": "10.0.0.14"},
            ]
        },
    ]
    for number, status in enumerate(odd):
        api.nodes[f"odd-{number}"] = {"metadata": {"name": f"odd-{number}"}, "status": status}
    source = pmtud.KubeSource()
    assert look(source) == ["10.0.0.11", "10.0.0.12", "10.0.0.14", "fd00::11"]
    assert source.load() is None
    api.change("ADDED", "node-3", "10.0.0.13", "224.0.0.1")
    assert look(source) == ["10.0.0.11", "10.0.0.12", "10.0.0.13", "10.0.0.14", "fd00::11"]
    assert logged == [
        "'12' is not an IP address",
        "'None' is not an IP address",
        "224.0.0.1" + PEER_HINT,
    ]


KUBE_LOAD = r"""
import re, ssl, sys
strict = ssl.create_default_context
def create(**options):
    context = strict(**options)
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # which Python 3.13 does by itself
    return context
ssl.create_default_context = create
sys.path.insert(0, sys.argv[1])
import http.client, pmtud
pmtud.KubeSource.ACCOUNT = sys.argv[2]
def most():
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
before = most()
print([str(peer) for peer in pmtud.KubeSource().load()])
print(most() - before)
"""


def interpreters() -> list[str]:
    """Every CPython from 3.9 on that is installed here, one of each version.

    The one that runs the tests is tested.
    """
    places = [
        *map(Path, os.environ["PATH"].split(os.pathsep)),
        *Path.home().glob(".pyenv/versions/3.*/bin"),
    ]
    paths = [path for place in places for path in place.glob("python3.*")]
    found = {
        path.name: str(path) for path in paths if re.fullmatch(r"python3\.(9|1[0-9])", path.name)
    }
    return [found[name] for name in sorted(found) if name != f"python3.{sys.version_info.minor}"]


@unit
@pytest.mark.parametrize("python", [sys.executable, *interpreters()])
def test_kube_source_in_every_python(python: str, api: FakeApi) -> None:
    """The server's certificate has no key identifiers, as in many a cluster.

    And 100 nodes take little memory.
    """
    for number in range(100):
        api.change("ADDED", f"more-{number}", "10.0.0.11", images="x" * 10_000)
    command = [python, "-c", KUBE_LOAD, str(HERE), str(api.account)]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.stdout.splitlines()[:1] == [str(NODES)], done.stderr
    assert int(done.stdout.splitlines()[1]) < 25_000  # kB more, for a list of 1 MB


@unit
def test_kube_source_selects(api: FakeApi) -> None:
    api.change("ADDED", "node-3", "10.0.0.13", role="inner")
    assert look(pmtud.KubeSource("role=edge")) == NODES
    assert look(pmtud.KubeSource("role%3Dinner")) == ["10.0.0.13"]
    assert look(pmtud.KubeSource("role=none")) == []
    assert [request["labelSelector"] for request in api.requests] == [
        "role=edge",
        "role=inner",
        "role=none",
    ]


@unit
def test_kube_source_goes_on_where_it_was(api: FakeApi) -> None:
    """A watch that ended or broke is opened again from the last version, of a bookmark too.

    Nothing is listed again.
    """
    source = watching(api)
    api.bookmark()
    assert source.load() is None
    api.tell("END", None)
    assert source.load() is None
    assert 0.5 <= source.interval <= 1.0
    assert source.load() is None
    assert api.requests[-1]["resourceVersion"] == "103"
    until(lambda: api.watches == 1)
    api.bookmark()
    assert source.load() is None
    api.disconnect()  # between two events
    assert source.load() is None
    assert source.load() is None
    assert api.requests[-1]["resourceVersion"] == "105"
    until(lambda: api.watches == 1)
    api.tell("RAW", b'{"type": "DELE')
    until(lambda: api.told == api.version)
    api.disconnect()  # within one
    assert complaint_of(source) == "kube:nodes: the watch was cut off"
    assert 1.0 <= source.interval <= 2.0
    api.history.clear()
    api.change("DELETED", "node-1")
    assert source.load() is None
    assert look(source) == ["10.0.0.12"]
    assert [request.get("watch") for request in api.requests] == [None, "1", "1", "1", "1"]


@unit
@pytest.mark.parametrize("expired", ["in the watch", "at its start"])
def test_kube_source_lists_again_after_410(expired: str, api: FakeApi) -> None:
    """What happened meanwhile, deletions above all, is in the new list."""
    source = watching(api)
    api.disconnect()
    look(source)
    api.change("DELETED", "node-1")
    if expired == "in the watch":
        api.compacted = api.version
        assert source.load() is None
    else:
        api.faults = ["410"]
    assert source.load() is None  # that is no failure
    assert look(source) == ["10.0.0.12"]
    assert "watch" not in api.requests[-1]


@unit
def test_kube_source_reads_a_renewed_token(api: FakeApi) -> None:
    source = watching(api)
    api.bearer = "second"
    api.disconnect()
    look(source)
    assert look(source) == "kube:nodes: the API server answers 401 Unauthorized"
    api.token("second")
    assert source.load() is None
    api.change("DELETED", "node-1")
    assert look(source) == ["10.0.0.12"]


@unit
@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("500", "the API server answers 500 Internal Server Error"),
        ("403", "the API server answers 403 Forbidden"),
        ("hang up", "Remote end closed connection without response"),
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "list indices must be integers or slices, not str"),
        ('{"items": [{}], "metadata": {}}', "'metadata'"),
        ('{"items": 5, "metadata": {}}', "'int' object is not iterable"),
        ('{"items": null, "metadata": {}}', "'resourceVersion'"),
        (
            '{"items": [{"metadata": {"name": "n"}, "status": [1]}], "metadata": {}}',
            "'list' object has no attribute 'get'",
        ),
        (
            '{"items": [], "metadata": {"resourceVersion": ""}}',
            "the API server tells no resourceVersion",
        ),
        ("[" * 100_000, "maximum recursion depth exceeded"),
    ],
)
def test_kube_source_survives_a_broken_list(fault: str, complaint: str, api: FakeApi) -> None:
    source = pmtud.KubeSource()
    api.faults = [fault] * 9
    pauses = []
    for _ in range(9):
        assert complaint_of(source).startswith(f"kube:nodes: {complaint}")
        pauses.append(source.interval)
    for low, pause in zip((1, 2, 4, 8, 15, 15, 15, 15, 15), pauses):
        assert low <= pause <= 2 * low
    assert look(source) == NODES
    assert source.interval <= 1.0


@unit
@pytest.mark.parametrize(
    ("event", "complaint"),
    [
        (b"nonsense\n", "Expecting value: line 1 column 1 (char 0)"),
        (b"[1]\n", "list indices must be integers or slices, not str"),
        (b'{"type": "ADDED", "object": null}\n', "'NoneType' object is not subscriptable"),
        (
            b'{"type": "ERROR", "object": {"code": 500, "message": "no etcd"}}\n',
            "the watch ended with 500 no etcd",
        ),
        (b'{"type": "ERROR", "object": {}}\n', "'code'"),
        (
            b'{"type": "MODIFIED", "object": {"status": [1], '
            b'"metadata": {"name": "node-1", "resourceVersion": "103"}}}\n',
            "'list' object has no attribute 'get'",
        ),
        (b"x" * 5000, "an event is larger than 4096 bytes"),
    ],
)
def test_kube_source_survives_a_broken_event(
    event: bytes, complaint: str, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pmtud.KubeSource, "EVENT_BYTES_MAX", 4096)
    source = watching(api)
    api.change("MODIFIED", "node-1", "10.0.0.31")
    api.history[-1] = (api.version, "RAW", event)  # what was told about it could not be understood
    assert look(source) == f"kube:nodes: {complaint}"
    assert look(source) == ["10.0.0.12", "10.0.0.31"]
    assert source.load() is None
    api.change("DELETED", "node-1")
    assert look(source) == ["10.0.0.12"]


@unit
def test_kube_source_bounds_what_it_reads(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pmtud.KubeSource, "PAGE_BYTES_MAX", 0)
    assert complaint_of(pmtud.KubeSource()) == "kube:nodes: a page is larger than 0 bytes"


@unit
def test_kube_source_bounds_how_many_nodes(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pmtud.KubeSource, "PAGE_NODES", 1)
    monkeypatch.setattr(pmtud, "PEERS_MAX", 1)
    assert look(pmtud.KubeSource()) == "kube:nodes: more than 1 nodes"


@unit
def test_kube_source_outside_a_pod(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = "KUBERNETES_SERVICE_HOST is not set: kube:nodes works in a pod of the cluster"
    (api.account / "ca.crt").write_text("nonsense")
    assert complaint_of(pmtud.KubeSource()).startswith("kube:nodes: [X509")
    (api.account / "token").unlink()
    assert (
        look(pmtud.KubeSource())
        == f"kube:nodes: [Errno 2] No such file or directory: '{api.account}/token'"
    )
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    assert look(pmtud.KubeSource()) == f"kube:nodes: {advice}"


@unit
def test_kube_source_outside_a_pod_is_a_usage_error(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no waiting will change is said at the start; an API server may come late."""
    config = pmtud.Config(peer_sources=("kube:nodes",))
    peers = pmtud.PeerSources(config, pmtud.Counters(), lambda: None)
    api.bearer = "unknown to the pod"
    peers.prepare()
    for name in ("token", "ca.crt"):
        (api.account / name).rename(api.account / "away")
        with pytest.raises(pmtud.UsageError) as caught:
            peers.prepare()
        problem = f"there is no {api.account}/{name}"
        advice = "the pod needs automountServiceAccountToken: true"
        assert str(caught.value) == f"peers: kube:nodes: {problem}; {advice}"
        (api.account / "away").rename(api.account / name)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    with pytest.raises(pmtud.UsageError):
        peers.prepare()
    assert len(api.requests) == 0


@unit
def test_kube_source_believes_only_the_clusters_authority(api: FakeApi, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with FakeApi(other) as impostor:
        for name, value in impostor.environ.items():
            os.environ[name] = value  # the fixture restores them
        assert "certificate verify failed" in complaint_of(pmtud.KubeSource())
        assert impostor.requests == []
        impostor.shutdown()


@unit
def test_an_hour_without_the_api_changes_nothing(api: FakeApi) -> None:
    """The last good set stays, failures are counted, and what changed meanwhile comes with the
    server.
    """
    counters = pmtud.Counters()
    peers = pmtud.PeerSources(pmtud.Config(peer_sources=("kube:nodes",)), counters, lambda: None)
    try:
        peers.follow()
        until(partial(all_answered, peers))
        until(lambda: api.watches == 1)
        api.bearer = "unknown to the pod"
        api.disconnect()
        until(lambda: counters.refresh_failures["kube:nodes"] >= 2)
        assert [str(peer) for peer in peers.listed()["kube:nodes"]] == NODES
        api.change("DELETED", "node-1")
        api.bearer = "first"
        peers.reload()  # SIGHUP ends the pause
        until(lambda: peers.listed()["kube:nodes"] == addresses("10.0.0.12"))
    finally:
        peers.close()


LOCAL = [
    pmtud.LocalAddress(packed("127.0.0.1"), 8, 1, b""),
    pmtud.LocalAddress(packed("::1"), 128, 1, b""),
    pmtud.LocalAddress(packed("10.0.0.11"), 24, 2, packed("10.0.0.255")),
    pmtud.LocalAddress(packed("203.0.113.10"), 32, 1, b""),
    pmtud.LocalAddress(packed("fd00::11"), 64, 2, b""),
]


@pytest.fixture(name="routes")
def fixture_routes(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What the kernel would answer for the source towards a peer, by the peer's text."""
    table: dict[str, bytes] = {}
    monkeypatch.setattr(pmtud, "kernel_source", lambda peer: table.get(str(peer), b""))
    return table


@unit
def test_arrange_removes_this_node_and_sends_from_its_listed_address(
    routes: dict[str, bytes],
) -> None:
    listed = {
        "static": addresses("10.0.0.11", "10.0.0.12", "fd00::11", "fd00::12"),
        "file:x": addresses("10.0.0.12"),
    }
    found = pmtud.arrange(listed, LOCAL, [ip_network("10.9.0.0/16")])
    ipv4 = found.endpoints[pmtud.IPV4]
    ipv6 = found.endpoints[pmtud.IPV6]
    assert ipv4.targets == addresses("10.0.0.12")
    assert ipv6.targets == addresses("fd00::12")
    assert found.removed == addresses("10.0.0.11", "fd00::11")
    assert ipv4.source == packed("10.0.0.11")
    assert ipv6.source == packed("fd00::11")
    assert found.per_source == {"static": 2, "file:x": 1}
    assert found.who.own == {address.packed for address in LOCAL}
    assert found.who.unshared == {packed("10.0.0.11"), packed("fd00::11")}
    assert found.who.peers == {packed("10.0.0.12"), packed("fd00::12")}
    assert [packed(a) in found.who.networks for a in ("10.9.1.1", "10.0.0.13", "fd00::13")] == [
        True,
        False,
        False,
    ]


@unit
def test_arrange_asks_the_kernel_where_this_node_is_not_listed(routes: dict[str, bytes]) -> None:
    routes.update({"10.0.0.12": packed("10.0.0.11")})
    found = pmtud.arrange({"static": addresses("10.0.0.12", "10.7.7.7")}, LOCAL, [])
    assert {one.source for one in found.endpoints.values()} == {b""}
    assert found.removed == ()
    assert found.who.unshared == {packed("10.0.0.11")}


@unit
def test_arrange_never_sends_from_a_service_address(routes: dict[str, bytes]) -> None:
    """Listed by mistake, before this node's own.

    Peers share it and would take our copies for their own.
    """
    routes.update({"10.0.0.12": packed("10.0.0.11")})
    found = pmtud.arrange(
        {"static": addresses("203.0.113.10", "10.0.0.11", "10.0.0.12")}, LOCAL, []
    )
    assert found.removed == addresses("203.0.113.10", "10.0.0.11")
    assert found.endpoints[pmtud.IPV4].source == packed("10.0.0.11")
    assert found.endpoints[pmtud.IPV6].source == b""
    assert found.who.unshared == {packed("10.0.0.11")}


@unit
def test_arrange_leaves_the_source_to_the_kernel_where_peers_are_link_local(
    routes: dict[str, bytes],
) -> None:
    """A raw socket cannot be bound to fe80::11 without its interface, and the kernel chooses it
    anyway.
    """
    own = pmtud.LocalAddress(packed("fe80::11"), 64, 2, b"")
    routes.update({"fe80::12%lo": packed("fe80::11")})
    found = pmtud.arrange({"static": addresses("fe80::11%lo", "fe80::12%lo")}, [*LOCAL, own], [])
    assert {one.source for one in found.endpoints.values()} == {b""}
    assert found.who.unshared == {packed("fe80::11")}


@unit
def test_arrange_takes_the_subnet_of_a_broadcast_peer_for_the_cluster(
    routes: dict[str, bytes],
) -> None:
    found = pmtud.arrange({"static": addresses("10.0.0.255")}, LOCAL, [])
    assert [one.targets for one in found.endpoints.values()] == [addresses("10.0.0.255"), ()]
    assert packed("10.0.0.255") in found.who.groups
    assert [packed(a) in found.who.neighbours for a in ("10.0.0.200", "10.0.1.1")] == [True, False]
    routers = pmtud.arrange({"static": addresses("10.0.0.12")}, LOCAL, []).who
    assert packed("10.0.0.200") not in routers.neighbours
    assert packed("10.0.0.255") in routers.groups  # a peer may broadcast while this node does not


@unit
def test_arrange_takes_the_prefixes_of_a_multicast_peers_link_for_the_cluster(
    routes: dict[str, bytes],
) -> None:
    link = socket.if_nametoindex("lo")
    places = (("fd00::11", link), ("fd01::11", link + 1))
    local = [pmtud.LocalAddress(packed(address), 64, index, b"") for address, index in places]
    found = pmtud.arrange({"static": addresses("ff02::114%lo")}, local, [])
    assert found.who.groups == {packed("ff02::114")}
    assert [packed(a) in found.who.neighbours for a in ("fd00::99", "fd01::99")] == [True, False]


@unit
def test_arrange_survives_a_peer_whose_interface_is_gone() -> None:
    found = pmtud.arrange({"static": addresses("fe80::12%nosuch0", "10.0.0.11")}, LOCAL, [])
    assert found.endpoints[pmtud.IPV6].targets == addresses("fe80::12%nosuch0")


# -- peers that change


def test_peer_file_is_followed(cluster: Cluster, tmp_path: Path) -> None:
    """A changed file is read by itself, SIGHUP forces it.

    A bad file keeps the old peers and says why.
    """
    node = cluster.nodes[0]
    path = tmp_path / "peers"
    path.write_text("10.0.0.12  # worker\n\n10.0.0.11, 10.0.0.13\n")

    def count() -> float:
        return metrics(node)[f'pmtud_peers{{source="file:{path}"}}']

    with daemons([node], "--peers", f"file:{path}") as [process]:
        assert count() == 2
        path.write_text("10.0.0.12\n")
        assert poll(lambda: count() == 1, 5)
        process.wait_for("peers changed: 1 went (10.0.0.13) peers_ipv4=1 peers_ipv6=0\n")
        assert 'pmtud_copies_sent_total{peer="10.0.0.13"}' not in metrics(node)
        path.write_text("10.0.0.12\n10.0.0.999\n")
        process.wait_for("line 2: '10.0.0.999' is not an IP address", 5)
        assert count() == 1
        assert metrics(node)[f'pmtud_peer_refresh_failures_total{{source="file:{path}"}}'] >= 1
        path.unlink()
        process.wait_for("No such file or directory", 5)
        assert count() == 1
        path.write_text("10.0.0.12\n10.0.0.13\n")
        assert poll(lambda: count() == 2, 5)
        process.wait_for("peers changed: 1 came (10.0.0.13) peers_ipv4=2 peers_ipv6=0\n")
        os.kill(process.pid, signal.SIGHUP)
        process.wait_for("SIGHUP: reading the peer sources again")
        assert count() == 2


def account_in(folder: Path) -> str:
    """The patch for a service account that is not where every pod has it."""
    return f"pmtud.KubeSource.ACCOUNT = {str(folder)!r}"


def test_sighup_without_peer_sources_says_that_it_reads_nothing(cluster: Cluster) -> None:
    line = "SIGHUP: nothing to read again, no peer source is in use; options are read at the start"
    for options in ((), peers_of(4)):
        with daemons(cluster.nodes[:1], *options) as [process]:
            os.kill(process.pid, signal.SIGHUP)
            process.wait_for(line)
        assert "SIGHUP: reading" not in process.output()


def test_refused_copies_are_named_once_a_minute(cluster: Cluster) -> None:
    """With peer and errno, those that were refused most first; here a minute is 1.5 seconds."""
    node = cluster.nodes[ingress(cluster, 4)]
    kinds = {f"203.0.113.{n}": "unreachable" for n in range(100, 109)} | {"203.0.113.7": "prohibit"}
    patch = f"{QUICK}\npmtud.Refusals.SECONDS = 1.5"
    options = ("--peers", ",".join((*kinds, "10.0.0.77")), "--flow-interval", "0")
    one = r"203\.0\.113\.\d+: [^;]+ \(E[A-Z]+\), \d+ times; "
    with contextlib.ExitStack() as stack:
        for address, kind in kinds.items():
            node.ip(f"route add {kind} {address}")
            stack.callback(node.ip, f"route del {kind} {address}")
        with daemons([node], *options, patch=patch) as [process]:
            begun = time.monotonic()
            inject(cluster.router, 4, flow_errors(4))
            first = process.wait_for("the kernel refused copies to ")
            assert re.search(
                rf"WARNING the kernel refused copies to ({one}){{8}}and 2 more\n", first
            )
            node.ip("route del prohibit 203.0.113.7", "route add blackhole 203.0.113.7")
            inject(cluster.router, 4, flow_errors(4) * 2)
            assert poll(lambda: process.output().count("the kernel refused") == 2, 5)
            node.ip("route del blackhole 203.0.113.7", "route add prohibit 203.0.113.7")
            took = time.monotonic() - begun
            received(node, 3 * ERRORS)
            time.sleep(2)  # a minute in which nothing is refused
    told = re.findall("WARNING the kernel refused copies to (.*)", process.output())
    assert 2 <= len(told) <= 2 + took / 1.5
    assert "203.0.113.100: No route to host (EHOSTUNREACH), " in "".join(told)
    assert "77" not in "".join(told)


WAITS_FOR_PEERS = """
import time
follow = pmtud.PeerSources.follow
def follow_and_wait(self):
    follow(self)
    while len(self.listed()) < 2:
        time.sleep(0.01)
pmtud.PeerSources.follow = follow_and_wait
"""


def test_peers_that_answer_while_the_daemon_starts(cluster: Cluster) -> None:
    """No daemon is called standalone before the answer is in force.

    One without peers is afterwards.
    """
    node = cluster.nodes[0]
    cases = {
        ("10.0.0.11", "10.0.0.12", "10.0.0.13"): "peers changed: 2 came (10.0.0.12, 10.0.0.13)",
        ("10.0.0.11",): "peers: none, standalone: local rescue only",
    }
    with NameServer(cluster, "10.0.0.1") as names:
        for addresses, line in cases.items():
            names.serve(*addresses)
            process = patched_daemon(node, WAITS_FOR_PEERS, "--peers", "pmtud")
            process.wait_for(line)
            told = re.findall(r"INFO (peers.*?)(?: peers_ipv4.*)?\n", process.output())
            assert told == ["peers: none yet, asking for them", line]
            assert get(node, "/readyz")[0] == "200"
            assert process.stop() == 0


def test_changes_within_a_second_are_taken_together(tmp_path: Path) -> None:
    """One alone is in force at once; 90 that follow it are one. Here that second lasts ten."""
    patch = f"{account_in(tmp_path)}\npmtud.Arranger.CHANGE_GAP = 10.0"
    with Net() as net, ExitStack() as stack:
        node = net.host("node")
        api = stack.enter_context(node.inside(lambda: FakeApi(tmp_path)))
        stack.callback(api.shutdown)
        stack.callback(api.disconnect)
        for number in (12, 13, 14):
            api.change("ADDED", f"node-{number}", f"10.0.0.{number}")
        options = ("--iface", "lo", "--peers", "kube:nodes")
        process = patched_daemon(node, patch, *options, env=api.environ)
        three = "(10.0.0.12, 10.0.0.13, 10.0.0.14)"
        process.wait_for(f"peers changed: 3 came {three} peers_ipv4=3 peers_ipv6=0\n")
        assert poll(lambda: api.watches == 1, 5)
        time.sleep(10.2)
        begun = time.monotonic()
        api.change("ADDED", "node-15", "fd00::15")
        process.wait_for("peers changed: 1 came (fd00::15) peers_ipv4=3 peers_ipv6=1\n")
        assert time.monotonic() - begun < 9
        for number in range(87):
            api.change("ADDED", f"new-{number}", f"10.1.0.{number}")
        for number in (12, 13, 14):
            api.change("DELETED", f"node-{number}")
        few = ", ".join(f"10.1.0.{number}" for number in range(8))
        process.wait_for(
            f"peers changed: 87 came ({few} and 79 more), 3 went {three} "
            "peers_ipv4=87 peers_ipv6=1\n"
        )
        assert process.output().count("peers changed") == 3
        assert process.stop() == 0


class NameServer:
    """dnsmasq in a host, its records changed while it runs; where the hosts of a cluster ask."""

    def __init__(self, cluster: Cluster, address: str) -> None:
        self._host = cluster.fabric
        self._records = Path(tempfile.mkdtemp(prefix="pmtud-dns-")) / "records"
        self.name = "pmtud.kube-system.svc.cluster.local"
        self._address = address
        self._etc = [Path("/etc/netns") / node.namespace for node in cluster.nodes]
        self.process: Optional[Process] = None

    def __enter__(self) -> NameServer:
        for folder in self._etc:  # `ip netns exec` mounts what is in here over /etc
            folder.mkdir(parents=True)
            (folder / "resolv.conf").write_text(
                f"nameserver {self._address}\nsearch kube-system.svc.cluster.local\n"
                "options timeout:1 attempts:1\n"
            )
            (folder / "hosts").write_text("127.0.0.1 localhost\n")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for folder in (*self._etc, self._records.parent):
            shutil.rmtree(folder)

    def serve(self, *addresses: str, options: Sequence[str] = ()) -> None:
        """Answer with these addresses from now on."""
        self._records.write_text("".join(f"{address} {self.name}\n" for address in addresses))
        if self.process and not options:
            os.kill(self.process.pid, signal.SIGHUP)
            return
        self.stop()
        self.process = self._host.start(
            "dnsmasq",
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--pid-file=",
            "--user=root",
            "--no-resolv",
            "--no-hosts",
            f"--addn-hosts={self._records}",
            f"--listen-address={self._address}",
            "--bind-interfaces",
            "--domain-needed",
            "--log-facility=-",
            *(options or ["--local=/cluster.local/"]),
        )
        self.process.wait_for("read ")

    def stop(self) -> None:
        """Answer nothing any more."""
        if self.process:
            self.process.close()
            self.process = None


class OddNameServer(NameServer):
    """A name server that garbles or swallows what it is asked for of one family.

    The resolver is told nothing.
    """

    A = 1
    AAAA = 28

    def __enter__(self) -> OddNameServer:
        super().__enter__()
        for folder in self._etc:
            (folder / "resolv.conf").write_text(f"nameserver {self._address}\n" * 2)
        self.records: dict[int, list[str]] = {self.A: [], self.AAAA: []}
        self.garbled = self.swallowed = self.silences = 0
        self._socket = self._host.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._socket.bind((self._address, 53))
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # not connected; the thread wakes up all the same
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        super().__exit__()

    def _answer(self) -> None:
        """RFC 1035, section 4: a header, the question again, and records whose name points to it."""
        while True:
            query, client = self._socket.recvfrom(512)
            if not query:
                return
            end = query.index(b"\0", 12) + 5
            (kind,) = struct.unpack(">H", query[end - 4 : end - 2])
            family = socket.AF_INET if kind == self.A else socket.AF_INET6
            data = [socket.inet_pton(family, text) for text in self.records[kind]]
            if kind == self.garbled:
                data = [item[:3] for item in data]  # an address of three bytes
            head = query[:2] + struct.pack(">5H", 0x8180, 1, len(data), 0, 0)
            answer = head + query[12:end]
            for item in data:
                answer += struct.pack(">3HIH", 0xC00C, kind, 1, 1, len(item)) + item
            self.silences += kind == self.swallowed
            if kind != self.swallowed:
                self._socket.sendto(answer, client)


def test_odd_answers_of_a_name_server(cluster: Cluster) -> None:
    """Malformed addresses are no removal.

    And where AAAA is never answered, an IPv4 peer that left is gone in 30 s.
    """
    node = cluster.nodes[0]
    with OddNameServer(cluster, "10.0.0.1") as names:
        names.records = {names.A: ["10.0.0.12", "10.0.0.13"], names.AAAA: ["fd00::12"]}
        with daemons([node], "--peers", "pmtud.example.") as [process]:
            label = 'pmtud_peers{source="dns:pmtud.example."}'
            assert metric_becomes(node, label, 3)
            names.garbled = names.A
            os.kill(process.pid, signal.SIGHUP)
            process.wait_for("ipv4: No address associated", 5)
            assert metrics(node)[label] == 3
            assert (
                metrics(node)['pmtud_peer_refresh_failures_total{source="dns:pmtud.example."}'] == 1
            )
            names.garbled = 0
            names.records[names.AAAA] = ["fd00::12", "fd00::13"]
            os.kill(process.pid, signal.SIGHUP)
            assert metric_becomes(node, label, 4)
            names.swallowed = names.AAAA
            os.kill(process.pid, signal.SIGHUP)
            process.wait_for("ipv6: Temporary failure in name resolution", 9)
            names.records[names.A] = ["10.0.0.12"]
            assert metric_becomes(node, label, 3, 30), process.output()
            assert not [name for name in metrics(node) if "10.0.0.13" in name]


def test_two_daemons_that_find_each_other_through_dns(cluster: Cluster) -> None:
    """Nothing but a name is given.

    Not ready before the first answer; then all transfers finish, both families.
    """
    # a bare name, which the resolver completes from its search list
    with (
        NameServer(cluster, "10.0.0.1") as names,
        daemons(cluster.nodes, "--peers", "pmtud") as processes,
    ):
        assert "peers: none yet, asking for them" in processes[0].output()
        assert get(cluster.nodes[0], "/readyz")[0] == "503"
        for process in processes:
            process.wait_for("peer source failed problem=")
            assert "kept=" not in process.output()
        nodes = Cluster.node_addresses(4, 6)
        names.serve(*nodes)
        for process in processes:
            os.kill(process.pid, signal.SIGHUP)
        label = 'pmtud_peers{source="dns:pmtud"}'
        assert poll(lambda: all(metrics(node).get(label) == 4 for node in cluster.nodes), 5)
        assert get(cluster.nodes[0], "/readyz") == ("200", "ok\n")
        for family in (4, 6):
            assert len(cluster.download("pod", family)) == 23
            assert_learned(cluster, "pod", family)


def test_peers_follow_dns(cluster: Cluster) -> None:
    """Without a signal: within 30 s a peer that left is gone with its series.

    A dead server changes nothing.
    """
    node = cluster.nodes[0]
    with NameServer(cluster, "10.0.0.1") as names:
        names.serve("10.0.0.11", "10.0.0.12", "10.0.0.13", "fd00::13")
        source = f"dns:{names.name}."
        # One of them named twice
        with daemons([node], "--peers", f"{names.name}.,10.0.0.12") as [process]:
            label = f'pmtud_peers{{source="{source}"}}'
            failures = f'pmtud_peer_refresh_failures_total{{source="{source}"}}'

            def failed_since(count: float, complaint: str) -> bool:
                return (
                    metrics(node)[failures] > count
                    and complaint in process.output().splitlines()[-1]
                )

            assert metric_becomes(node, label, 3)
            assert 'pmtud_copies_sent_total{peer="10.0.0.13"}' in metrics(node)
            names.serve("10.0.0.11", "10.0.0.12", "fd00::13")
            assert metric_becomes(node, label, 2, 30)
            assert not [name for name in metrics(node) if "10.0.0.13" in name]
            temporary = "Temporary failure in name resolution"
            for trouble, said in (
                ("empty", "Name or service not known"),
                ("refused", temporary),
                ("dead", temporary),
            ):
                before = metrics(node)[failures]
                names.stop()
                if trouble == "refused":
                    names.serve(options=["--cache-size=0"])  # a server that knows nobody to ask
                elif trouble != "dead":
                    names.serve()
                os.kill(process.pid, signal.SIGHUP)
                assert poll(partial(failed_since, before, said), 10), trouble
                assert metrics(node)[label] == 2, trouble
            names.serve("10.0.0.12", "10.0.0.13", "0.0.0.0")
            os.kill(process.pid, signal.SIGHUP)
            process.wait_for(
                "an address is left out source=" + source + ' problem="0.0.0.0' + PEER_HINT, 5
            )
            assert poll(
                lambda: metrics(node).get('pmtud_copies_sent_total{peer="10.0.0.13"}') == 0, 5
            )


def test_stop_while_a_question_is_on_its_way(cluster: Cluster) -> None:
    """The resolver waits for half a minute, the end does not wait for the resolver."""
    node = cluster.nodes[0]
    with OddNameServer(cluster, "10.0.0.1") as names:
        names.swallowed = names.AAAA
        process = node.start(
            sys.executable,
            str(PROGRAM),
            "--peers",
            "pmtud.example.",
            "--metrics-port",
            "0",
            env={"RES_OPTIONS": "timeout:30 attempts:1"},
        )
        assert poll(lambda: names.silences, 5)
        begun = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - begun < 20


def test_an_address_that_moves_here_is_removed_from_the_peers(cluster: Cluster) -> None:
    """Own addresses are followed.

    What becomes ours stops being a peer, and comes back when it leaves.
    """
    node = cluster.nodes[0]
    with daemons([node], "--peers", "10.0.0.12,10.0.0.77"):
        assert metrics(node)['pmtud_peers{source="static"}'] == 2
        node.ip("addr add 10.0.0.77/24 dev eth0")
        assert metric_becomes(node, 'pmtud_peers{source="static"}', 1, 3)
        node.ip("addr del 10.0.0.77/24 dev eth0")
        assert metric_becomes(node, 'pmtud_peers{source="static"}', 2, 3)


def test_one_bad_peer_does_not_starve_the_others(cluster: Cluster) -> None:
    """No route to one peer.

    Its copies are counted as refused, every other peer still gets all of its own.
    """
    first = ingress(cluster, 4)
    node = cluster.nodes[first]
    peer = (first + 1) % 3
    node.ip("route add unreachable 203.0.113.7")
    try:
        with (
            daemons([node], "--peers", f"203.0.113.7,{Cluster.node_address(peer + 1)}"),
            daemons([cluster.nodes[peer]], *peers_of(4)),
        ):
            inject(cluster.router, 4, flow_errors(4))
            received(cluster.nodes[peer], ERRORS)
            samples = metrics(node)
    finally:
        node.ip("route del unreachable 203.0.113.7")
    assert samples['pmtud_copy_errors_total{peer="203.0.113.7"}'] == ERRORS
    assert samples['pmtud_copies_sent_total{peer="203.0.113.7"}'] == 0
    assert samples[f'pmtud_copies_sent_total{{peer="{Cluster.node_address(peer + 1)}"}}'] == ERRORS


# -----------------------------------------------------------------------------
# Section: forwarder -- the whole promise, on real traffic


@quick
@pytest.mark.parametrize("family,service", CASES)
def test_without_the_daemon_transfers_hang(cluster: Cluster, family: int, service: str) -> None:
    """The negative control of every test below.

    The fabric takes the router's errors to one node only.
    """
    finished = cluster.download(service, family, deadline=2.5)
    assert len(finished) < 20, f"{len(finished)} of 23 finished: there is no black hole here"


@quick
@pytest.mark.parametrize("drop_invalid", [False, True])
@pytest.mark.parametrize("family,service", CASES)
def test_with_the_daemon_all_transfers_finish(
    cluster: Cluster, family: int, service: str, drop_invalid: bool
) -> None:
    """Socket, DNAT to the own pod, DNAT + MASQUERADE to another node's pod.

    Also where conntrack INVALID is dropped.
    """
    with contextlib.ExitStack() as stack:
        if drop_invalid:
            stack.enter_context(invalid_dropped(cluster))
        stack.enter_context(daemons(cluster.nodes, "--peers", ALL_PEERS))
        assert len(cluster.download(service, family)) == 23
        assert_learned(cluster, service, family)


@contextlib.contextmanager
def invalid_dropped(cluster: Cluster) -> Iterator[None]:
    """Nodes that drop what conntrack calls INVALID in input, forward and output.

    Without that, a node that does not own a pod's flow routes the router's error back to the
    fabric, which hashes it to the same node again, until its TTL ends: 300 errors became 9,000.
    """
    for node in cluster.nodes:
        node.run("nft", "-f", "-", input=INVALID_DROP_RULES)
    try:
        yield
    finally:
        for node in cluster.nodes:
            node.run("nft", "delete", "table", "inet", "invalid")


@quick
@pytest.mark.parametrize("service", Cluster.SERVICES)
def test_strict_rpf_and_an_error_from_a_management_address(cluster: Cluster, service: str) -> None:
    """No flow learns without the daemon, all with it, and rp_filter is still strict afterwards."""
    cluster.strict_rpf()
    cluster.error_from_management()
    assert cluster.download(service, deadline=2.5) == []
    cluster.flush()
    with daemons(cluster.nodes, *peers_of(4)):
        assert len(cluster.download(service)) == 23
        assert_learned(cluster, service, 4)
        assert total_of(cluster.nodes, "pmtud_rpf_rescued_total") > 0
    for node in cluster.nodes:
        assert node.read("/proc/sys/net/ipv4/conf/eth0/rp_filter").strip() == "1"
        assert node.read("/proc/sys/net/ipv4/conf/all/rp_filter").strip() == "1"


def test_standalone_rescues_from_strict_rpf(cluster: Cluster) -> None:
    """Without peers: what reaches the right node and fails RPF is delivered there.

    Nothing is sent to others.
    """
    cluster.strict_rpf()
    cluster.error_from_management()
    with Capture(cluster.fabric) as wire, daemons(cluster.nodes):
        finished = cluster.download("host", deadline=4)
        assert 0 < len(finished) < 20
        seen = wire.settle()
    assert not node_packets(seen, 4)


def test_standalone_without_rescue_option(cluster: Cluster) -> None:
    """--no-rescue leaves the receiving node alone.

    With strict RPF only the peers' copies are delivered.
    """
    cluster.strict_rpf()
    cluster.error_from_management()
    with daemons(cluster.nodes, *peers_of(4), "--no-rescue"):
        assert 0 < len(cluster.download("host", deadline=4)) < 23
        samples = [metrics(node) for node in cluster.nodes]
    assert sum(s["pmtud_rpf_rescued_total"] for s in samples) == 0


def node_packets(seen: Sequence[Seen], family: int) -> list[Seen]:
    """Of a capture on all of the fabric's interfaces.

    The errors that nodes sent from their own addresses.
    """
    sources = set(map(packed, Cluster.node_addresses(family)))
    arrived = []
    for one in seen:
        is_towards_node = one.interface.startswith("to-node")
        if is_towards_node and one.kind != socket.PACKET_OUTGOING:
            arrived.append(one)
    return [one for one in arrived if source_of(one.packet) in sources]


def ingress(cluster: Cluster, family: int, service: str = "host") -> int:
    """The index of the node that the fabric sends the router's errors to."""
    with contextlib.ExitStack() as stack:
        captures = [stack.enter_context(Capture(node, "eth0")) for node in cluster.nodes]
        inject(cluster.router, family, flow_errors(family, service, 1))
        assert poll(lambda: any(c.packets() for c in captures), 2)
        counts = [sum(s.kind == socket.PACKET_HOST for s in c.settle()) for c in captures]
    assert sum(bool(n) for n in counts) == 1, counts
    return next(i for i, n in enumerate(counts) if n)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("options", [[], ["--ignore-networks", "203.0.113.0/24,2001:db8::/32"]])
@pytest.mark.parametrize("family,service", [(4, "host"), (4, "pod"), (6, "host"), (6, "pod")])
def test_exact_copies_and_no_echo(
    cluster: Cluster, family: int, service: str, options: list[str], size: int
) -> None:
    """23 errors make 23 copies to each peer, none to a VIP, and nothing answers a copy, with 2 and
    with 3 daemons.
    """
    first = ingress(cluster, family, service)
    running = [cluster.nodes[(first + n) % 3] for n in range(size)]
    listed = [Cluster.node_address(1 + (first + n) % 3, family) for n in range(size)]
    with (
        invalid_dropped(cluster),
        daemons(running, "--peers", ",".join(listed), *options) as processes,
    ):
        with Capture(cluster.fabric) as wire:
            inject(cluster.router, family, flow_errors(family, service))
            for host in running[1:]:
                received(host, ERRORS)
            seen = node_packets(wire.settle(1.0), family)
        destinations = Counter(str(ip_address(destination_of(s.packet))) for s in seen)
        sources = {
            node.name
            for node, samples in ((h, metrics(h)) for h in running)
            if sum(v for k, v in samples.items() if "copies_sent" in k)
        }
        assert sources == {running[0].name}
    assert destinations == dict.fromkeys(listed[1:], ERRORS), processes[0].output()


@quick
@pytest.mark.parametrize(
    "lists",
    [((1, 2), (), ()), ((1,), (2,), (0,)), ("all", "all", "all"), ((), (), ())],
    ids=["one-sided", "ring", "broadcast", "none"],
)
def test_no_loop_with_odd_peer_lists(cluster: Cluster, lists: tuple[Any, ...]) -> None:
    """One-sided lists, a ring of lists, broadcast, none at all; node 0 is who gets the errors.

    A copy of each error goes to each peer of that node and no further, none to a VIP.
    """
    first = ingress(cluster, 4, "pod")
    addresses = [Cluster.node_address(1 + (first + number) % 3) for number in range(3)]
    to: list[list[str]] = []
    for peers in lists:
        if peers == "all":
            to.append(["10.0.0.255"])
        else:
            to.append([addresses[peer] for peer in peers])
    processes = []
    for number, peers in enumerate(to):
        options = ["--peers", ",".join(peers)] if peers else []
        processes.append(daemon(cluster.nodes[(first + number) % 3], *options))
    cluster.flush()
    with invalid_dropped(cluster), Capture(cluster.fabric) as wire:
        inject(cluster.router, 4, flow_errors(4, "pod"))
        received(cluster.nodes[first], ERRORS)
        seen = node_packets(wire.settle(1.0), 4)
    assert [process.stop() for process in processes] == [0, 0, 0]
    way = Counter((source_of(s.packet), destination_of(s.packet)) for s in seen)
    assert way == {(packed(addresses[0]), packed(peer)): ERRORS for peer in to[0]}


def test_delivered_counts_tell_the_owner(cluster: Cluster) -> None:
    """Every error is owned exactly once in the cluster.

    The EPERM of the guard says so, per error.
    """
    with invalid_dropped(cluster), daemons(cluster.nodes, *peers_of(4)):
        assert len(cluster.download("pod")) == 23
        delivered = 'pmtud_delivered_total{{family="ipv4",result="{}"}}'

        def counts() -> list[int]:
            samples = [metrics(node) for node in cluster.nodes]
            names = (
                *map(delivered.format, ("owner", "not_owner", "error")),
                'pmtud_acted_total{action="replicate"}',
            )
            return [int(sum(sample[name] for sample in samples)) for name in names]

        # The kernel serves its own flows at once; the daemon hears of these a little later
        def agree() -> bool:
            owner, other, error, acted = counts()
            return owner == acted >= 23 and other == 2 * acted and error == 0

        assert poll(agree, 5), counts()


@quick
@pytest.mark.parametrize("family", [4, 6])
def test_conntrack_not_in_use_stays_so(family: int) -> None:
    """Host services only, no rule that tracks.

    All transfers finish, and not one connection gets tracked.
    """
    with Cluster(conntrack=False) as plain:
        count = "/proc/sys/net/netfilter/nf_conntrack_count"
        with daemons(plain.nodes, "--peers", ALL_PEERS):
            assert len(plain.download("host", family)) == 23
            assert [node.read(count).strip() for node in plain.nodes] == ["0"] * 3
            ruleset = plain.nodes[0].run("nft", "list", "ruleset")
            assert "pmtud_33" in ruleset
            assert "ct state" not in ruleset


@pytest.mark.parametrize("family", [4, 6])
def test_conntrack_that_comes_later_is_noticed(cluster: Cluster, family: int) -> None:
    """kube-proxy may start after us.

    The guard asks conntrack from the first refused delivery on.
    """
    with daemons(cluster.nodes, "--peers", ALL_PEERS) as processes:
        assert len(cluster.download("pod", family)) == 23
        assert any("conntrack came into use" in process.output() for process in processes)
        assert any(
            "ct state related" in node.run("nft", "list", "ruleset") for node in cluster.nodes
        )


def open_sender(family: int) -> socket.socket:
    """A UDP socket from the VIP to a client, with DF."""
    # IP_PMTUDISC_DO
    level, discover, do = ((socket.IPPROTO_IP, 10, 2), (socket.IPPROTO_IPV6, 23, 2))[family == 6]
    sender = socket.socket(PLANS[family].family.af, socket.SOCK_DGRAM)
    sender.setsockopt(level, discover, do)
    sender.bind((Cluster.vip("host", family), 0))
    sender.connect((Cluster.client_address(5, family), 9))
    return sender


def known_mtu(sender: socket.socket) -> int:
    """What the kernel knows of the path of a connected socket: IP_MTU, IPV6_MTU."""
    ipv4 = sender.family == socket.AF_INET
    return sender.getsockopt(socket.IPPROTO_IP if ipv4 else socket.IPPROTO_IPV6, 14 if ipv4 else 24)


@pytest.mark.parametrize("family", [4, 6])
def test_a_corrupt_error_teaches_nobody(cluster: Cluster, family: int) -> None:
    """IPv4: passed on with its wrong checksum, which the owner's kernel refuses.

    IPv6: dropped, not mended.
    """
    node = cluster.nodes[0]
    with (
        daemons([node], *peers_of(family)),
        node.inside(partial(open_sender, family)) as sender,
    ):

        def report(**fields: Any) -> None:
            ports = struct.pack("!HHHH", sender.getsockname()[1], 9, 1480, 0)
            packet = mtu_error(
                PLANS[family],
                src={4: "10.8.0.1", 6: "fd08::1"}[family],
                mtu=1400,
                dst=Cluster.vip("host", family),
                quoted_src=Cluster.vip("host", family),
                quoted_dst=Cluster.client_address(5, family),
                protocol=UDP_PROTOCOL,
                transport=ports,
                **fields,
            )
            blast(cluster.fabric, f"to-{node.name}", node, "eth0", [packet])

        report(checksum=1)
        samples = received(node, 1)
        assert drops(samples) == ({} if family == 4 else {"bad_checksum": 1})
        if family == 4:
            refused = dict(
                zip(
                    *(
                        line.split()
                        for line in node.read("/proc/net/snmp").splitlines()
                        if "Icmp:" in line
                    )
                )
            )
            assert int(refused["InCsumErrors"]) >= 2  # the router's own packet, and our delivery
        assert known_mtu(sender) == 1500
        time.sleep(0.2)  # the flow's interval
        report()
        assert poll(lambda: known_mtu(sender) == 1400, 2)


DEAF_RULES = """
table inet deaf {
  chain prerouting {
    type filter hook prerouting priority mangle
    iifname eth0 icmp type destination-unreachable drop
    iifname eth0 icmpv6 type packet-too-big drop
  }
}
"""


@contextlib.contextmanager
def deaf_to_the_wire(node: Host) -> Iterator[None]:
    """A node whose stack hears no error that comes in.

    What it learns, it learns from a delivery.
    """
    node.run("nft", "-f", "-", input=DEAF_RULES)
    try:
        yield
    finally:
        node.run("nft", "delete", "table", "inet", "deaf")


# Changes to an error about 1500 bytes that says 1400, and what a socket learns
ODD_ERRORS: dict[str, tuple[Callable[[Plan], dict[str, int]], int, tuple[Plan, ...]]] = {
    "no length": (lambda net: {"quoted_length": UNCOUNTED[net.family.name]}, 1400, (V4, V6)),
    "a header left out": (lambda net: {"quoted_length": 1380}, 1400, (V4, V6)),
    "other byte order": (
        lambda net: {"quoted_length": UNCOUNTED[net.family.name] + 0x0006},
        1400,
        (V4, V6),
    ),
    "no MTU": (lambda net: {"mtu": 0}, 552, (V4,)),
}


@pytest.mark.parametrize(
    ("name", "net"),
    [
        pytest.param(name, net, id=f"{name}-{net.family.name}")
        for name, row in ODD_ERRORS.items()
        for net in row[2]
    ],
)
def test_a_socket_learns_from_odd_errors(cluster: Cluster, name: str, net: Plan) -> None:
    """What the kernel believes we pass on.

    The same with a length that cannot be meant teaches nobody.
    """
    changes, learned, _ = ODD_ERRORS[name]
    family = net.family.version
    node = cluster.nodes[0]
    vip = Cluster.vip("host", family)
    client = Cluster.client_address(5, family)
    with deaf_to_the_wire(node), node.inside(partial(open_sender, family)) as sender:

        def report(**fields: Any) -> None:
            transport = struct.pack("!HHHH", sender.getsockname()[1], 9, 1480, 0)
            packet = mtu_error(
                net,
                dst=vip,
                quoted_src=vip,
                quoted_dst=client,
                protocol=UDP_PROTOCOL,
                transport=transport,
                **fields,
            )
            blast(cluster.fabric, f"to-{node.name}", node, "eth0", [packet])

        report()
        with daemons([node], *peers_of(family)):
            report(quoted_length=UNCOUNTED[net.family.name] + 0x0505)
            assert drops(received(node, 1)) == {"mtu_not_smaller": 1}
            assert known_mtu(sender) == 1500
            report(**changes(net))
            assert poll(lambda: known_mtu(sender) == learned, 2), known_mtu(sender)
            samples = received(node, 2)
            assert drops(samples) == {"mtu_not_smaller": 1}
            assert samples["pmtud_reported_mtu_bytes_sum"] == learned


TUNNEL_ENDS = {
    "GRE": (47, gre(0, 0x45000000)),
    "GRE with a key": (47, gre(0x2000, 7)),
    "gretap": (47, b"\0\0eX" + bytes(4)),
    "6in4": (41, b"\x60" + bytes(7)),
}


@pytest.mark.parametrize("name", TUNNEL_ENDS)
def test_the_end_of_a_tunnel_learns(cluster: Cluster, name: str) -> None:
    """Through the node's routing table, in which a tunnel looks; whether this kernel knows the
    tunnel or not.

    The delivery comes in on lo, where the handlers of GRE and of 6in4 on a device find no route. A
    corrupt error teaches nobody, and an error about a pod's tunnel is the pod's.
    """
    protocol, start = TUNNEL_ENDS[name]
    node = cluster.nodes[0]
    vip = Cluster.vip("host")
    client = Cluster.client_address(5)

    def report(address: str, mtu: int, **fields: Any) -> None:
        packet = mtu_error(
            V4,
            dst=address,
            quoted_src=address,
            quoted_dst=client,
            protocol=protocol,
            transport=start,
            mtu=mtu,
            **fields,
        )
        blast(cluster.fabric, f"to-{node.name}", node, "eth0", [packet])

    report(vip, 1398)
    with (
        deaf_to_the_wire(node),
        daemons([node], *peers_of(4)),
        Capture(node, "lo") as loopback,
    ):
        report(vip, 1399, checksum=1)
        assert drops(received(node, 1)) == {}
        assert len(loopback.settle()) == 2 * 2  # each counts as it leaves and as it comes in
        assert cluster.learned(node, client) is None
        report(vip, 1400)
        assert poll(lambda: cluster.learned(node, client) == 1400, 2)
        report(Cluster.vip("pod"), 1401)
        samples = received(node, 3)
        deliveries = [s.packet for s in loopback.settle() if s.kind == socket.PACKET_OUTGOING]
    told = [(int.from_bytes(p[26:28], "big"), p[28 + 9]) for p in deliveries]
    assert told == [(1399, protocol), (1399, 1), (1400, protocol), (1400, 1)]
    quoted = ipv4(vip, client, protocol, start, length=1500)
    unchanged = icmp_error(V4, "", "", quoted, mtu=1400)
    assert unchanged in [p[20:] for p in deliveries]
    assert samples['pmtud_delivered_total{family="ipv4",result="owner"}'] == 2
    assert samples['pmtud_delivered_total{family="ipv4",result="not_owner"}'] == 1


IFLA_GSO_MAX_SIZE = 41  # linux/if_link.h
IFLA_GRO_MAX_SIZE = 58
IFLA_GSO_IPV4_MAX_SIZE = 63
IFLA_GRO_IPV4_MAX_SIZE = 64
BIG_TCP_BYTES = 200_000
BIG_TCP_DOWNLOAD = 100_000_000


def allow_big_tcp(host: Host, interface: str) -> None:
    """Let packets of more than 64 kB through.

    Raises KeyError where the kernel knows none (before 6.3).
    """
    kinds = (IFLA_GSO_MAX_SIZE, IFLA_GRO_MAX_SIZE, IFLA_GSO_IPV4_MAX_SIZE, IFLA_GRO_IPV4_MAX_SIZE)
    wanted = struct.pack("=I", BIG_TCP_BYTES)

    def set_sizes() -> None:
        link = pmtud.IFINFOMSG.pack(0, 0, socket.if_nametoindex(interface), 0, 0)
        sizes = b"".join(pmtud.attribute(kind, wanted) for kind in kinds)
        with pmtud.Netlink(pmtud.NETLINK_ROUTE) as netlink:
            netlink.request("set sizes", pmtud.RTM_NEWLINK, 0, link + sizes)
            answer = netlink.request("read sizes", pmtud.RTM_GETLINK, 0, link)[0][1]
        found = pmtud.attributes(answer, pmtud.IFINFOMSG.size)
        assert [found[kind] for kind in kinds] == [wanted] * 4

    host.inside(set_sizes)


def narrow_a_transfer(net: TwoNodes, client: Host) -> None:
    """A download through a link that becomes thin once the window is wide."""
    net.router.ip("link set to-client mtu 1500")
    net.nodes[0].sysctl("net.ipv4.route.flush", 1)
    with client.inside(lambda: socket.create_connection((net.vip, PORT), 5)) as transfer:
        got = 0
        while got < BIG_TCP_DOWNLOAD:
            data = transfer.recv(1 << 20)
            assert data, "closed early"
            before = got
            got = got + len(data)
            if before < BIG_TCP_DOWNLOAD // 3 <= got:
                net.router.ip("link set to-client mtu 1400")


def test_big_tcp_quotes_no_length() -> None:
    """A router that aggregates over 64 kB quotes the length 0.

    Its report is acted on like any other.
    """
    with TwoNodes(10) as net:
        client = net.host("client")
        node = net.nodes[0]
        net.link(net.router, client, names=("to-client", "eth0"))
        net.router.ip("addr add 10.9.0.1/24 dev to-client")
        client.ip(f"addr add {net.client_address}/24 dev eth0", "route add default via 10.9.0.1")
        for host, interface in (
            (client, "eth0"),
            (net.router, "to-client"),
            (net.router, "nodes"),
            (net.router, "to-node1"),
            (node, "eth0"),
        ):
            host.ip(f"link set {interface} gso_max_segs 65535")
            allow_big_tcp(host, interface)
        start_server(node, BIG_TCP_DOWNLOAD).wait_for("listening")
        with daemons([node], "--peers", net.addresses[1]), Capture(net.router, "nodes") as wire:

            def quoted_lengths() -> list[int]:
                packets = [one.packet for one in wire.settle()]
                errors = [one for one in packets if destination_of(one) == packed(net.vip)]
                return [struct.unpack_from("!H", error, 30)[0] for error in errors]

            for _ in range(10):  # what the link cuts first may be small
                narrow_a_transfer(net, client)
                if 0 in quoted_lengths():
                    break
            assert 0 in quoted_lengths()
            assert set(drops(received(node, len(quoted_lengths())))) <= {"limited_flow"}


@pytest.mark.parametrize("service", Cluster.SERVICES)
def test_routers_that_report_no_mtu(cluster: Cluster, service: str) -> None:
    """Next-hop MTU 0: sockets and pods learn 552, the copies say 0 like the router, and so does the
    log.
    """
    cluster.strict_rpf()
    cluster.error_from_management()
    cluster.router.run(
        "nft",
        "-f",
        "-",
        input="table ip old {\nchain output { type filter hook output priority 0\n"
        "icmp type destination-unreachable icmp mtu set 0\n}\n}\n",
    )
    try:
        assert cluster.download(service, deadline=2.5) == []
        cluster.flush()
        with (
            daemons(cluster.nodes, *peers_of(4)) as processes,
            Capture(cluster.fabric) as wire,
        ):
            assert len(cluster.download(service)) == 23
            copies = [s.packet for s in node_packets(wire.settle(), 4)]
            for node in cluster.nodes:
                assert "mtu_too_small" not in drops(metrics(node))
            assert any(
                "a router reports an MTU router=172.20.20.2" in p.output() for p in processes
            )
            assert all(f" mtu={mtu}\n" not in p.output() for mtu in (552, 1400) for p in processes)
    finally:
        cluster.router.run("nft", "delete", "table", "ip", "old")
    assert {struct.unpack_from("!H", copy, 26)[0] for copy in copies} == {0}
    assert_learned(cluster, service, 4, 552)


@pytest.mark.parametrize("family", [4, 6])
def test_udp_socket_gets_emsgsize(cluster: Cluster, family: int) -> None:
    """A connected UDP socket that sends DF datagrams from the VIP learns the MTU on whichever node
    it is.
    """

    def refused(sender: socket.socket) -> bool:
        try:
            sender.send(bytes(1410))
        except OSError as problem:
            assert problem.errno == errno.EMSGSIZE
            return True
        return False

    with contextlib.ExitStack() as stack:

        def open_senders() -> list[socket.socket]:
            return [
                stack.enter_context(node.inside(partial(open_sender, family)))
                for node in cluster.nodes
            ]

        assert sum([poll(partial(refused, s), 0.5) for s in open_senders()]) == 1, (
            "only the node the fabric chose"
        )
        cluster.flush()
        with daemons(cluster.nodes, *peers_of(family)):
            for sender in open_senders():
                assert poll(partial(refused, sender), 2.5)
                assert known_mtu(sender) == 1400
                # A second report of the same error
                sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                assert sender.send(bytes(1400 - (28 if family == 4 else 48))) > 0


@pytest.mark.parametrize("family,peer", [(4, "10.0.0.255"), (6, "ff02::7074%eth0")])
@pytest.mark.parametrize("service", Cluster.SERVICES)
def test_one_group_copy_reaches_every_node(
    cluster: Cluster, family: int, peer: str, service: str
) -> None:
    """A subnet broadcast or link multicast peer.

    One copy per error on the wire, and every owner learns.
    """
    group = packed(peer.partition("%")[0])
    with (
        invalid_dropped(cluster),
        daemons(cluster.nodes, "--peers", peer),
        Capture(cluster.fabric) as wire,
    ):
        assert len(cluster.download(service, family)) == 23
        arrived = [
            s
            for s in wire.settle()
            if s.interface.startswith("to-node") and s.kind != socket.PACKET_OUTGOING
        ]
        samples = [metrics(node) for node in cluster.nodes]
    copies = sum(destination_of(s.packet) == group for s in arrived)
    assert copies == sum(s[f'pmtud_copies_sent_total{{peer="{peer}"}}'] for s in samples)
    assert copies == sum(s['pmtud_acted_total{action="replicate"}'] for s in samples) > 0
    assert_learned(cluster, service, family)


def test_own_addresses_with_nonlocal_bind(cluster: Cluster) -> None:
    """ip_nonlocal_bind lets any bind succeed: peers must not be taken for this node."""
    node = cluster.nodes[0]
    node.sysctl("net.ipv4.ip_nonlocal_bind", 1)
    try:
        with daemons([node], *peers_of(4)) as [process]:
            told = "peers: 2 (10.0.0.12, 10.0.0.13) peers_ipv4=2 peers_ipv6=0\n"
            assert told in process.output()
            assert "own address removed from peers: 10.0.0.11" in process.output()
    finally:
        node.sysctl("net.ipv4.ip_nonlocal_bind", 0)


def test_nodes_with_several_addresses(cluster: Cluster) -> None:
    """Peers listed by their management addresses.

    Copies leave from the listed address and are taken for copies.
    """
    peers = ",".join(f"172.20.20.{10 + i}" for i in (1, 2, 3))
    with daemons(cluster.nodes, "--peers", peers, "--iface", "eth0,mgmt"):
        assert len(cluster.download("pod")) == 23
        for node in cluster.nodes:
            assert "misaddressed" not in drops(metrics(node))


def test_a_peers_other_address_is_named_once(cluster: Cluster) -> None:
    """A copy from an address that is not listed is dropped, and one line says what to add."""
    first = ingress(cluster, 4)
    receiver = cluster.nodes[(first + 1) % 3]
    stranger = cluster.nodes[first]
    with daemons([receiver], "--peers", "172.20.20.254") as [process]:
        copy = flow_errors(
            4, src=Cluster.node_address(first + 1), dst=Cluster.node_address((first + 1) % 3 + 1)
        )
        inject(stranger, 4, copy)
        assert drops(received(receiver, ERRORS)) == {"misaddressed": ERRORS}
        lines = [line for line in process.output().splitlines() if "add it to --peers" in line]
        assert len(lines) == 1
        assert Cluster.node_address(first + 1) in lines[0]


class TwoNodes(Net):
    """Two nodes with one service address, behind a router that takes all errors to the first.

    router .5.0.1 --+-- node1 eth0 .5.0.11       all of one /8; the service .96.0.1 is on each node's lo,
                    +-- node2 eth0 .5.0.12       the client .9.0.5 somewhere behind the router

    """

    def __init__(self, first_octet: int) -> None:
        super().__init__()
        self.router_address, *self.addresses, self.vip, self.client_address = (
            f"{first_octet}.{rest}" for rest in ("5.0.1", "5.0.11", "5.0.12", "96.0.1", "9.0.5")
        )

    def build(self) -> None:
        self.router = self.host("router", forward=True)
        self.nodes = [self.host(name) for name in ("node1", "node2")]
        self.router.ip(
            "link add nodes type bridge mcast_snooping 0",
            "link set nodes up",
            f"addr add {self.router_address}/24 dev nodes",
        )
        for node, address in zip(self.nodes, self.addresses):
            self.link(self.router, node, names=("", "eth0"))
            self.router.ip(f"link set to-{node.name} master nodes")
            node.ip(
                f"addr add {address}/24 brd + dev eth0",
                f"addr add {self.vip}/32 dev lo",
                f"route add default via {self.router_address}",
            )
        self.router.ip(f"route add {self.vip} via {self.addresses[0]}")

    def open_sender(self, node: Host) -> socket.socket:
        """A UDP socket of a node from the service's address to the client, with DF."""

        def dial() -> socket.socket:
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sender.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
            sender.bind((self.vip, 0))
            sender.connect((self.client_address, 9))
            return sender

        return node.inside(dial)


@pytest.mark.parametrize(
    ("first_octet", "peers", "seen_again"),
    [
        (10, "unicast", {}),
        (240, "unicast", {}),
        (240, "broadcast", {"own": 1}),
        (0, "unicast", {}),
    ],
)
def test_addresses_that_only_private_fabrics_use(
    first_octet: int, peers: str, seen_again: dict[str, int]
) -> None:
    """Routers, peers and services in 240.0.0.0/4 and 0.0.0.0/8.

    The node whose flow it is learns from the other.
    """
    with TwoNodes(first_octet) as net, contextlib.ExitStack() as stack:
        sender = stack.enter_context(net.open_sender(net.nodes[1]))
        listed = ",".join(net.addresses) if peers == "unicast" else f"{first_octet}.5.0.255"
        stack.enter_context(daemons(net.nodes, "--peers", listed))
        udp = struct.pack("!HHHH", sender.getsockname()[1], 9, 1480, 0)
        packet = mtu_error(
            V4,
            src=f"{first_octet}.8.0.1",
            dst=net.vip,
            quoted_src=net.vip,
            protocol=UDP_PROTOCOL,
            quoted_dst=net.client_address,
            transport=udp,
        )
        assert known_mtu(sender) == 1500
        inject(net.router, 4, [packet])
        assert poll(lambda: known_mtu(sender) == 1400, 2)
        samples = [received(node, 1) for node in net.nodes]
    assert [drops(s) for s in samples] == [seen_again, {}]
    assert [s['pmtud_delivered_total{family="ipv4",result="owner"}'] for s in samples] == [1, 1]


def test_dry_run_sends_nothing(cluster: Cluster) -> None:
    """--dry-run decides, counts and logs, and not one packet leaves or is delivered."""
    node = cluster.nodes[ingress(cluster, 4)]
    with daemons([node], *peers_of(4), "--dry-run") as [process]:
        with Capture(cluster.fabric) as wire, Capture(node, "lo") as loopback:
            inject(cluster.router, 4, flow_errors(4))
            assert drops(received(node, ERRORS)) == {"dry_run": ERRORS}
            assert not node_packets(wire.settle(), 4)
            assert not loopback.packets()
        assert poll(lambda: process.output().count("dry run: would replicate") >= ERRORS, 2)
        assert process.output().count("dry run: would replicate") == ERRORS
        samples = metrics(node)
        assert sum(v for k, v in samples.items() if "copies_sent" in k or "delivered" in k) == 0
    # To join a group is to send reports about it
    for options, joined in (
        (["--dry-run"], False),
        ([], True),
    ):
        with daemons([node], "--peers", "ff02::7074%eth0", *options):
            assert ("ff02::7074" in node.run("ip", "maddress", "show", "dev", "eth0")) is joined
    with daemons([node], "--dry-run") as [process]:
        inject(cluster.router, 4, flow_errors(4))
        received(node, ERRORS)
        assert poll(lambda: process.output().count("dry run: would deliver") >= ERRORS, 2)
        assert process.output().count("dry run: would deliver") == ERRORS


OPTION_EFFECTS = [
    # options, changes to the injected errors, expected drops (of 23 errors, 2 ms apart)
    ([], {}, {}),
    (["--min-mtu", "1401"], {}, {"mtu_too_small": 23}),
    (["--ports", "443,8000-8100"], {}, {"port_not_listed": 23}),
    (["--ports", "443,80"], {}, {}),
    (["--service-networks", "10.97.0.0/16"], {}, {"not_service": 23}),
    (["--service-networks", "10.96.0.0/16"], {}, {}),
    (["--ignore-networks", "10.8.0.0/24"], {}, {"ignored_network": 23}),
    (["--source-rate", "0.001"], {}, {"limited_source": 22}),
    (["--flow-interval", "3600"], {"dport_step": 0}, {"limited_flow": 22}),
    (["--flow-interval", "0"], {"dport_step": 0}, {}),
]


@pytest.mark.parametrize("options,changes,expected", OPTION_EFFECTS)
def test_option_effects(
    cluster: Cluster, options: list[str], changes: dict[str, int], expected: dict[str, int]
) -> None:
    """Each option that judges errors changes what happens to 23 of them, counted exactly."""
    node = cluster.nodes[ingress(cluster, 4)]
    packets = flow_errors(4)
    if changes.get("dport_step") == 0:
        packets = packets[:1] * ERRORS
    with daemons([node], *peers_of(4), *options):
        inject(cluster.router, 4, packets)
        assert drops(received(node, ERRORS)) == expected


@pytest.mark.parametrize("family", [4, 6])
def test_pings_from_one_address_are_flows_of_their_own(cluster: Cluster, family: int) -> None:
    """Echo requests from the service's address on three nodes.

    All errors reach one node, and each is acted on.
    """
    net = PLANS[family]
    vip = Cluster.vip("host", family)
    client = Cluster.client_address(5, family)
    with daemons(cluster.nodes, *peers_of(family), "--flow-interval", "60"):
        # As frames: whatever the kernel has learned by then, they leave
        for number, node in enumerate(cluster.nodes):
            request = echo(number, kind={4: 8, 6: 128}[family]) + bytes(1400)
            packet = net.wrap(vip, client, net.family.icmp_protocol, request)
            blast(node, "eth0", cluster.fabric, "nodes", [packet])
        assert poll(lambda: acted(cluster) == 9, 5), [
            drops(metrics(node)) for node in cluster.nodes
        ]
        samples = [metrics(node) for node in cluster.nodes]
    assert [drops(s) for s in samples] == [{}, {}, {}]
    assert sorted(s['pmtud_acted_total{action="replicate"}'] for s in samples) == [0, 0, 3]
    assert [s['pmtud_acted_total{action="deliver"}'] for s in samples].count(3) == 2


@pytest.mark.parametrize(("interval", "copies"), [("0.1", 1), ("0", 32)])
def test_what_an_interval_of_0_costs_where_service_addresses_loop(
    cluster: Cluster, interval: str, copies: int
) -> None:
    """As the README says: an error circles between node and fabric until its TTL ends, and each
    round is one more.
    """
    node = cluster.nodes[ingress(cluster, 4, "pod")]
    with (
        daemons([node], *peers_of(4), "--flow-interval", interval),
        Capture(cluster.fabric) as wire,
    ):
        inject(cluster.router, 4, flow_errors(4, "pod", 1))
        sent = node_packets(wire.settle(), 4)
        dropped = drops(metrics(node))
        assert sum(dropped.values()) == 32 - copies
    destinations = Counter(str(ip_address(destination_of(s.packet))) for s in sent)
    assert len(destinations) == 2
    assert set(destinations.values()) == {copies}


def test_total_rate(cluster: Cluster) -> None:
    """--rate bounds what is acted on; most of what is over it the kernel sheds before we see it."""
    node = cluster.nodes[ingress(cluster, 4)]
    with daemons([node], *peers_of(4), "--rate", "10", "--source-rate", "0"):
        begun = time.monotonic()
        inject(cluster.router, 4, flow_errors(4, count=100), gap=0)
        samples = received(node, 10)
        more = 10 * (time.monotonic() - begun)  # what is allowed meanwhile, after the first ten
        assert set(drops(samples)) <= {"limited_total"}
        assert 10 <= samples['pmtud_acted_total{action="replicate"}'] <= 11 + more
        assert total(samples, "pmtud_received_total") <= 25 + more


def test_ttl_source_and_bytes_of_a_copy(cluster: Cluster) -> None:
    """--ttl is on the wire.

    The outer source is the node, and the ICMP message is byte for byte the router's.
    """
    for family in (4, 6):
        first = ingress(cluster, family)
        node = cluster.nodes[first]
        peer = Cluster.node_address((first + 1) % 3 + 1, family)
        packets = flow_errors(family, mtu=1333)
        with daemons([node], "--peers", peer, "--ttl", "7"), Capture(node, "eth0") as wire:
            inject(cluster.router, family, packets)
            received(node, ERRORS)
            copies = [s.packet for s in wire.settle() if s.kind == socket.PACKET_OUTGOING]
        assert len(copies) == ERRORS
        assert {copy[8 if family == 4 else 7] for copy in copies} == {7}
        assert set(map(destination_of, copies)) == {packed(peer)}
        own = packed(Cluster.node_address(first + 1, family))
        assert set(map(source_of, copies)) == {own}
        start = 20 if family == 4 else 40
        without_checksum = {copy[start : start + 2] + copy[start + 4 :] for copy in copies}
        assert without_checksum == {
            packet[start : start + 2] + packet[start + 4 :] for packet in packets
        }
        if family == 4:
            assert {copy[20:] for copy in copies} == {packet[20:] for packet in packets}


@quick
@pytest.mark.parametrize("family", [4, 6])
def test_families_do_not_mix(cluster: Cluster, family: int) -> None:
    """Peers of both families.

    An error goes to those of its own family, and not one packet to the others.
    """
    node = cluster.nodes[ingress(cluster, family)]
    with daemons([node], "--peers", ALL_PEERS), Capture(node, "eth0") as wire:
        inject(cluster.router, family, flow_errors(family))
        samples = received(node, ERRORS)
        out = [s.packet[0] >> 4 for s in wire.settle() if s.kind == socket.PACKET_OUTGOING]
    assert out == [family] * ERRORS * 2
    copies = {k: n for k, n in samples.items() if "copies_sent" in k}
    assert {n for k, n in copies.items() if (":" in k) == (family == 6)} == {ERRORS}
    assert {n for k, n in copies.items() if (":" in k) != (family == 6)} == {0}


@pytest.mark.parametrize("peers", [PEER_LISTS[6], "ff02::7074%eth0"])
def test_error_from_a_link_local_router_address(cluster: Cluster, peers: str) -> None:
    """The first-hop router may report from fe80::/10.

    Also where link-local neighbours are trusted for copies.
    """
    with daemons(cluster.nodes, "--peers", peers):
        inject(cluster.fabric, 6, flow_errors(6, src="fe80::1"))

        def acted() -> list[float]:
            return sorted(
                metrics(node)['pmtud_acted_total{action="replicate"}'] for node in cluster.nodes
            )

        assert poll(lambda: acted() == [0, 0, ERRORS], 3), acted()
        assert [drops(metrics(node)) for node in cluster.nodes] == [{}] * 3


def test_ipv6_only_cluster() -> None:
    """No IPv4 address on any node: the default route, the peers and the rescue are IPv6."""
    with Cluster() as six:
        for node in six.nodes:
            for name in ("eth0", "mgmt", "to-pod", "lo"):
                node.run("ip", "-4", "addr", "flush", "dev", name)
        with daemons(six.nodes, *peers_of(6)) as processes:
            assert all("errors come in on eth0," in process.output() for process in processes)
            for service in Cluster.SERVICES:
                six.flush()
                assert len(six.download(service, 6)) == 23
                assert_learned(six, service, 6)


def test_node_without_ipv6(cluster: Cluster) -> None:
    """IPv6 switched off by sysctl: IPv4 is served, HTTP answers, IPv6 peers do no harm."""
    with Cluster() as four:
        for node in four.nodes:
            node.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
            node.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
        with daemons(four.nodes, "--peers", ALL_PEERS):
            assert len(four.download("pod")) == 23
            assert get(four.nodes[0], "/readyz") == ("200", "ok\n")


@pytest.mark.parametrize(
    ("family", "peer", "gateway"),
    [
        (4, "10.0.0.255", "10.0.0.1"),
        (6, "ff02::7074%eth0", "fd00::1"),
        (4, "10.0.0.255", "10.0.0.77"),
        (6, "ff02::7074%eth0", "fd00::77"),  # not the default route's: VRRP, advertisements
    ],
)
def test_the_gateway_of_a_group_peers_subnet_is_a_router(
    cluster: Cluster, family: int, peer: str, gateway: str
) -> None:
    """A top-of-rack switch reports from an address of the very subnet that the group peer stands
    for.
    """
    with daemons(cluster.nodes, "--peers", peer):
        inject(cluster.fabric, family, flow_errors(family, src=gateway))

        def acted() -> list[float]:
            return sorted(
                metrics(node)['pmtud_acted_total{action="replicate"}'] for node in cluster.nodes
            )

        assert poll(lambda: acted() == [0, 0, ERRORS], 3), acted()


def test_broadcast_without_a_configured_broadcast_address() -> None:
    """`ip addr add` without `brd +`.

    The kernel receives the subnet's broadcasts all the same, and so do we.
    """
    with Cluster() as cluster:
        for i, node in enumerate(cluster.nodes, 11):
            node.ip(
                f"addr del 10.0.0.{i}/24 dev eth0",
                f"addr add 10.0.0.{i}/24 dev eth0",
                "route add default via 10.0.0.1",
                *(
                    f"route add 10.244.{j}.0/24 via 10.0.0.{10 + j}"
                    for j in (1, 2, 3)
                    if j != i - 10
                ),
            )
        with daemons(cluster.nodes, "--peers", "10.0.0.255"):
            for service in Cluster.SERVICES:
                assert len(cluster.download(service)) == 23


def test_guard_leaves_other_traffic_with_its_mark_alone(cluster: Cluster) -> None:
    """Somebody else's packets may carry the same fwmark: only ICMP errors are ours to drop."""
    with daemons(cluster.nodes[:1], *peers_of(4)):
        for mark in (pmtud.MARK_DELIVER, pmtud.MARK_COPY):
            cluster.nodes[0].run("ping", "-c1", "-W2", "-m", str(mark), "10.0.0.12")


def test_a_flow_that_is_only_forwarded_is_not_owned(cluster: Cluster) -> None:
    """A node that tracks a flow because it routes it must not send the error back out to the flow's
    address.
    """
    node = cluster.nodes[0]
    cluster.fabric.ip("route add 203.0.113.9 via 10.0.0.11")
    try:
        with daemons([node], *peers_of(4)):
            cluster.client.run("bash", "-c", "echo hello > /dev/udp/203.0.113.9/80")
            assert poll(lambda: "203.0.113.9" in node.run("conntrack", "-L", "-p", "udp"), 2)
            tracked = node.run("conntrack", "-L", "-p", "udp")
            client, port = re.findall(r"src=(\S+) dst=203.0.113.9 sport=(\d+)", tracked)[0]
            udp = struct.pack("!HHHH", 80, int(port), 1480, 0)
            packet = mtu_error(
                V4,
                src="10.8.0.1",
                dst="203.0.113.9",
                quoted_src="203.0.113.9",
                quoted_dst=client,
                protocol=17,
                transport=udp,
            )
            with Capture(cluster.fabric) as wire:
                inject(cluster.router, 4, [packet])
                samples = received(node, 1)
                assert not [
                    s
                    for s in node_packets(wire.settle(), 4)
                    if s.packet[16:20] == bytes([203, 0, 113, 9])
                ]
        assert samples['pmtud_delivered_total{family="ipv4",result="not_owner"}'] == 1
    finally:
        cluster.fabric.ip("route del 203.0.113.9 via 10.0.0.11")


# -- what real nodes do to an error


UPLOAD = """
import socket, sys
sender = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3]))
sender.sendall(bytes(200000))
sender.shutdown(socket.SHUT_WR)
assert sender.recv(1) == b"!"
print("done")
"""
DOWNLOADS_TAKEN = """
import socket, threading
def take(connection):
    with connection:
        while connection.recv(1 << 16):
            pass
        connection.sendall(b"!")
listener = socket.create_server(("::", 8080), family=socket.AF_INET6, backlog=64, dualstack_ipv6=True)
print("listening", flush=True)
while True:
    threading.Thread(target=take, args=(listener.accept()[0],), daemon=True).start()
"""
BIND = "listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth0')\n"
BOUND_SERVER = SERVER.replace("print(", f"{BIND}print(")
SERVICE_NETWORKS = {4: "10.96.0.0/24", 6: "fd96::/64"}
CLIENT_NETWORKS = {4: "10.9.0.0/24", 6: "fd09::/64"}
EVERYWHERE = {4: "0.0.0.0/0", 6: "::/0"}
FABRIC = {4: "10.0.0.1", 6: "fd00::1"}
MANAGEMENT_PEERS = {4: "172.20.20.11,172.20.20.12,172.20.20.13", 6: "fd20::11,fd20::12,fd20::13"}


def add_discard_route(node: Host, kind: str) -> None:
    """What a BGP speaker keeps for the service networks, or a node that has routes to its clients
    only.
    """
    for family in (4, 6):
        if kind == "no default route":
            node.ip(
                f"route del {EVERYWHERE[family]}",
                f"route add {CLIENT_NETWORKS[family]} via {FABRIC[family]} dev eth0",
            )
        else:
            node.ip(f"route add {kind} {SERVICE_NETWORKS[family]} proto bird")


def worst_case(cluster: Cluster) -> None:
    """Strict reverse path filtering, and errors from a management address.

    By itself no IPv4 socket ever learns.
    """
    cluster.strict_rpf()
    cluster.error_from_management()


def service_packets(wire: Capture, family: int) -> list[Seen]:
    """The errors that nodes sent to service addresses: there must be none."""
    prefix = packed(Cluster.vip("host", family))[:-1]
    found = []
    for one in node_packets(wire.settle(), family):
        if destination_of(one.packet).startswith(prefix):
            found.append(one)
    return found


def results(hosts: Sequence[Host], family: int) -> dict[str, int]:
    """How deliveries ended on these hosts, by result."""
    samples = [metrics(host) for host in hosts]
    name = 'pmtud_delivered_total{family="ipv%d",result="%s"}'
    return {
        result: sum(int(s[name % (family, result)]) for s in samples)
        for result in pmtud.DELIVERY_RESULTS
    }


@pytest.mark.parametrize("kind", ["blackhole", "unreachable", "prohibit", "no default route"])
def test_discard_routes_and_no_route_refuse_no_delivery(kind: str) -> None:
    """The kernel routes what a node sends before NAT translates it.

    A pod behind such a route would never learn.
    """
    with Cluster(invalid_drop=True) as cluster:
        for node in cluster.nodes:
            add_discard_route(node, kind)
        worst_case(cluster)
        for service in Cluster.SERVICES:
            assert cluster.download(service, deadline=1.5) == []
        with (
            daemons(cluster.nodes, "--iface", "eth0", "--peers", ALL_PEERS),
            Capture(cluster.fabric) as wire,
        ):
            for family, service in CASES:
                cluster.flush()
                assert len(cluster.download(service, family)) == 23, f"{service} over IPv{family}"
                assert_learned(cluster, service, family)
            for family in (4, 6):
                before = results(cluster.nodes, family)
                assert before["error"] == 0
                assert before["owner"] > 2 * 20
                assert before["not_owner"] > 20
                # About flows that nobody has
                inject(cluster.router, family, flow_errors(family, "pod"))
                refused = {**before, "not_owner": before["not_owner"] + 3 * ERRORS}
                assert becomes(partial(results, cluster.nodes, family), refused, 5)
                assert service_packets(wire, family) == []


@pytest.mark.parametrize("place", ["eth0", "lo", "a socket bound to eth0"])
def test_wherever_the_service_address_is(place: str) -> None:
    """On a NIC, on lo, and for a socket that takes only what comes in on its device.

    It does come in there.
    """
    with Cluster() as cluster:
        port = PORT
        for node in cluster.nodes:
            if place == "eth0":
                node.ip("addr del 10.96.0.1/32 dev lo", "addr add 10.96.0.1/32 dev eth0")
            if place == "a socket bound to eth0":
                port = 81
                node.start(
                    sys.executable, "-ISc", BOUND_SERVER, "81", str(DOWNLOAD_BYTES)
                ).wait_for("listening")
        worst_case(cluster)
        command = (
            sys.executable,
            "-ISc",
            CLIENT,
            cluster.vip("host"),
            str(port),
            str(DOWNLOAD_BYTES),
            "2.5",
        )
        sources = [cluster.client_address(k) for k in range(1, 24)]
        assert json.loads(cluster.client.run(*command, *sources)) == []
        cluster.flush()
        with daemons(cluster.nodes, *peers_of(4)):
            assert len(json.loads(cluster.client.run(*command, *sources))) == 23


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("conntrack", [True, False])
def test_a_service_address_that_is_routed_to_a_pod(conntrack: bool, family: int) -> None:
    """Without translation the pod has the service address itself.

    With and without connection tracking.
    """
    with Cluster(conntrack=conntrack) as cluster:
        for i, node in enumerate(cluster.nodes, 1):
            pod = cluster.host(f"routed{i}")
            cluster.link(node, pod, names=("routed", "eth0"))
            node.ip(
                f"addr add 10.245.{i}.1/24 dev routed",
                f"addr add fd45:{i}::1/64 dev routed",
                f"route add 10.96.0.7 via 10.245.{i}.2",
                f"route add fd96::7 via fd45:{i}::2",
            )
            pod.ip(
                f"addr add 10.245.{i}.2/24 dev eth0",
                f"addr add fd45:{i}::2/64 dev eth0",
                "addr add 10.96.0.7/32 dev lo",
                "addr add fd96::7/128 dev lo",
                f"route add default via 10.245.{i}.1",
                f"route add ::/0 via fd45:{i}::1",
            )
            start_server(pod, DOWNLOAD_BYTES).wait_for("listening")
        command = [
            sys.executable,
            "-ISc",
            CLIENT,
            {4: "10.96.0.7", 6: "fd96::7"}[family],
            str(PORT),
            str(DOWNLOAD_BYTES),
            "2.5",
            *(cluster.client_address(k, family) for k in range(1, 24)),
        ]
        assert len(json.loads(cluster.client.run(*command))) < 20
        with daemons(cluster.nodes, "--peers", ALL_PEERS), Capture(cluster.fabric) as wire:
            for pod in cluster.hosts[-3:]:
                pod.sysctl("net.ipv4.route.flush", 1)
                execute("ip", "-6", "-n", pod.namespace, "route", "flush", "cache")
            assert len(json.loads(cluster.client.run(*command))) == 23
            assert service_packets(wire, family) == []


@pytest.mark.parametrize("discard", [False, True])
def test_pods_whose_source_is_translated_to_an_address_on_no_interface(discard: bool) -> None:
    """Egress gateways, NATOutgoingAddress: the node translates the flow, so it owns it."""
    with Cluster() as cluster:
        for i, node in enumerate(cluster.nodes, 1):
            egress = f"10.96.0.{50 + i}"
            cluster.fabric.ip(f"route add {egress} via {cluster.node_address(i)}")
            node.run(
                "nft",
                "-f",
                "-",
                input="table ip egress {\nchain out {\n"
                "type nat hook postrouting priority srcnat - 1;\n"
                f"ip saddr {pod_address(i)} ip daddr 10.9.0.0/24 snat to {egress}\n}}\n}}\n",
            )
            if discard:
                add_discard_route(node, "blackhole")
        cluster.client.start(sys.executable, "-ISc", DOWNLOADS_TAKEN).wait_for("listening")
        worst_case(cluster)

        def uploads() -> int:
            argv = (sys.executable, "-ISc", UPLOAD)
            running = [
                pod.start(*argv, cluster.client_address(k), "8080", "3")
                for k in range(1, 9)
                for pod in cluster.pods
            ]
            poll(lambda: all(process.returncode() is not None for process in running), 8)
            return sum("done" in process.output() for process in running)

        assert uploads() == 0
        cluster.flush()
        with daemons(cluster.nodes, *peers_of(4)):
            assert uploads() == 24


def pod_address(i: int) -> str:
    """Of the pod on node i."""
    return f"10.244.{i}.2"


@pytest.mark.parametrize("family", [4, 6])
def test_peers_on_another_interface(cluster: Cluster, family: int) -> None:
    """Internal addresses on an interface of their own.

    Copies are heard there, without any option; routers are not.
    """
    worst_case(cluster)
    with daemons(cluster.nodes, "--peers", MANAGEMENT_PEERS[family]):
        for service in Cluster.SERVICES:
            cluster.flush()
            assert len(cluster.download(service, family)) == 23
        before = received_in_the_end(cluster.nodes)
        assert sum(received_by_origin(node)["peer"] for node in cluster.nodes) > 2 * 20
        stranger = {4: "172.20.20.99", 6: "fd20::99"}[family]
        for node in cluster.nodes:
            cluster.mgmt.ip(f"addr replace {stranger}/{24 if family == 4 else 64} dev mgmt")
            cluster.mgmt.ip(
                f"route replace {cluster.vip('host', family)} via "
                f"{MANAGEMENT_PEERS[family].split(',')[cluster.nodes.index(node)]}"
            )
            inject(cluster.mgmt, family, flow_errors(family, "host", src=stranger))
        assert received_in_the_end(cluster.nodes) == before
        cluster.mgmt.ip(f"route del {cluster.vip('host', family)}", "addr flush dev mgmt")


# Stands in for the program that Calico's eBPF data plane has at tc egress: it drops ICMP errors
# whose mark is not exactly 0x03000000, but for those about flows that it knows, which here go to
# pods: so only what goes to a node. Classic BPF: code, jumps if true and if false, value.
EGRESS_FILTER = (
    (0x28, 0, 0, 12),  # EtherType
    (0x15, 0, 7, 0x0800),
    (0x30, 0, 0, 23),  # IPv4: protocol
    (0x15, 0, 14, 1),
    (0x30, 0, 0, 34),  # type
    (0x15, 0, 12, 3),
    (0x20, 0, 0, 30),  # destination
    (0x54, 0, 0, 0xFFFFFF00),
    (0x15, 7, 9, 0x0A000000),
    (0x15, 0, 8, 0x86DD),
    (0x30, 0, 0, 20),  # IPv6: next header
    (0x15, 0, 6, 58),
    (0x30, 0, 0, 54),  # type
    (0x15, 0, 4, 2),
    (0x20, 0, 0, 38),  # destination
    (0x15, 0, 2, 0xFD000000),
    (0x20, 0, 0, 0xFFFFF014),  # the mark
    (0x15, 0, 1, 0x03000000),
    (0x06, 0, 0, 0xFFFFFFFF),  # TC_ACT_UNSPEC
    (0x06, 0, 0, 2),  # TC_ACT_SHOT
)


@contextlib.contextmanager
def egress_filters(nodes: Sequence[Host]) -> Iterator[None]:
    """EGRESS_FILTER on eth0 of each node."""
    code = ",".join(" ".join(map(str, row)) for row in EGRESS_FILTER)
    for node in nodes:
        node.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
        given = ("bpf", "da", "bytecode", f"{len(EGRESS_FILTER)},{code}")
        node.run("tc", "filter", "add", "dev", "eth0", "egress", *given)
    try:
        yield
    finally:
        for node in nodes:
            node.run("tc", "qdisc", "del", "dev", "eth0", "clsact")


@contextlib.contextmanager
def calico_bpf(nodes: Sequence[Host]) -> Iterator[None]:
    """The interface by which Calico's eBPF data plane is known, on each node."""
    for node in nodes:
        node.ip("link add bpfin.cali type bridge")
    try:
        yield
    finally:
        for node in nodes:
            node.ip("link del bpfin.cali")


def know_each_other(cluster: Cluster, family: int) -> None:
    """Each node resolves the addresses of the others."""
    for node in cluster.nodes:
        for number in range(1, cluster.size + 1):
            node.run("ping", "-qnc1", "-W2", Cluster.node_address(number, family))


def copies_counted(nodes: Sequence[Host]) -> tuple[int, int, int]:
    """Copies sent, refused and heard, by all daemons together."""
    received_in_the_end(nodes)
    samples = [metrics(node) for node in nodes]
    sent = sum(total(one, "pmtud_copies_sent_total") for one in samples)
    refused = sum(total(one, "pmtud_copy_errors_total") for one in samples)
    heard = sum(received_by_origin(node)["peer"] for node in nodes)
    return sent, refused, heard


@pytest.mark.parametrize("family", [4, 6])
def test_calicos_ebpf_data_plane(cluster: Cluster, family: int) -> None:
    """Copies pass a program at tc egress that lets through what has Calico's mark.

    Not without that interface; then each copy that it drops counts as refused.
    """
    worst_case(cluster)
    peers = peers_of(family)
    # What waits for its neighbour's address counts as sent, whatever becomes of it later
    know_each_other(cluster, family)
    with egress_filters(cluster.nodes):
        with daemons(cluster.nodes, *peers) as processes:
            for service in ("host", "pod"):
                cluster.flush()
                assert len(cluster.download(service, family, deadline=1.5)) < 20
            sent, refused, heard = copies_counted(cluster.nodes)
            assert sent == heard == 0
            assert refused > 2 * 2 * 10
            blamed = (
                r"\(ENOBUFS\), \d+ times; all of them: a program or a queue on eth0 drops copies"
            )
            assert poll(lambda: any(re.search(blamed, one.output()) for one in processes), 5)
            assert not any("copies leave" in one.output() for one in processes)
        with calico_bpf(cluster.nodes), daemons(cluster.nodes, *peers) as processes:
            for service in ("host", "pod"):
                cluster.flush()
                assert len(cluster.download(service, family)) == 23
            sent, refused, heard = copies_counted(cluster.nodes)
            assert sent == heard > 2 * 2 * 10
            assert refused == 0
            cluster.flush()
            assert len(cluster.download("cross", family)) == 23
            for process in processes:
                assert process.output().count("copies leave with mark 0x3000000") == 1
        with calico_bpf(cluster.nodes), daemons(cluster.nodes, *peers, "--copy-mark", "none"):
            cluster.flush()
            assert len(cluster.download("host", family, deadline=1.5)) < 20
            assert copies_counted(cluster.nodes)[2] == 0
        with daemons(cluster.nodes, *peers, "--copy-mark", "0x3000000"):
            cluster.flush()
            assert len(cluster.download("host", family)) == 23


def test_calicos_ebpf_data_plane_comes_and_goes(cluster: Cluster) -> None:
    """The mark follows within seconds, without a restart; everything else in the table stays."""
    worst_case(cluster)
    again = "copies leave with our mark 0x2e again"
    know_each_other(cluster, 4)
    with egress_filters(cluster.nodes), daemons(cluster.nodes, *peers_of(4)) as running:
        plain = [ruleset(node) for node in cluster.nodes]
        with calico_bpf(cluster.nodes):
            for process in running:
                process.wait_for("copies leave with mark 0x3000000 (Calico's eBPF data plane")
            cluster.flush()
            assert len(cluster.download("pod")) == 23
        for process in running:
            process.wait_for(again)
        assert [ruleset(node) for node in cluster.nodes] == plain
        sent, refused, heard = copies_counted(cluster.nodes)
        assert sent == heard > 2 * 10
        assert refused == 0
        inject(cluster.router, 4, flow_errors(4))
        assert poll(lambda: copies_counted(cluster.nodes) == (sent, 2 * ERRORS, heard), 8)


def test_an_icmp_error_about_somebody_elses_ping_costs_no_copy(cluster: Cluster) -> None:
    """With IP_RECVERR the kernel notes it on every raw ICMP socket; no later send fails for it."""
    node = cluster.nodes[ingress(cluster, 4)]
    address = Cluster.node_address(cluster.nodes.index(node) + 1)
    ping = IP(src=address, dst="10.9.0.1")
    ping /= ICMP(id=7) / bytes(8)
    unreachable = IP(src="10.8.0.1", dst=address)
    unreachable /= ICMP(type=3, code=1) / ping
    with daemons([node], *peers_of(4)):
        for count, errors in enumerate((flow_errors(4), flow_errors(4, mtu=1300)), 1):
            for one in errors:
                inject(cluster.router, 4, [bytes(unreachable)] * 3 + [one])
            samples = received(node, count * ERRORS)
            assert total(samples, "pmtud_copy_errors_total") == 0
            assert total(samples, "pmtud_copies_sent_total") == 2 * count * ERRORS


REFUSES_TWICE = """
commit, left = pmtud.Firewall._commit, 2
def refuse(self, operation, requests):
    global left
    if b"peers_ipv4" in b"".join(data for _, data in requests) and left:
        left -= 1
        raise pmtud.NetlinkError(operation, 12)
    commit(self, operation, requests)
pmtud.Firewall._commit = refuse
"""


def test_rules_that_the_kernel_refuses_are_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    """New peers are heard all the same, a second or two later; one line says what failed."""
    node = cluster.nodes[0]
    file = tmp_path / "peers"
    file.write_text("fd00::12\n")
    with daemons([node], "--peers", f"file:{file}", patch=REFUSES_TWICE) as [process]:
        file.write_text("10.0.0.12\n")
        process.wait_for("cannot replace our rules, trying again each second")
        assert poll(lambda: "10.0.0.12" in node.run("nft", "list", "ruleset"), 5)
    assert process.output().count("cannot replace our rules") == 1


def test_a_peer_file_that_is_empty(cluster: Cluster, tmp_path: Path) -> None:
    """Exit 2 as for one with a blank line, not a daemon that waits for an answer."""
    for content in ("", "\n"):
        file = tmp_path / "peers"
        file.write_text(content)
        code, told = run_to_end(cluster.nodes[0], "--peers", f"file:{file}")
        assert code == 2
        assert "0 peers; there must be 1 to" in told


@pytest.mark.parametrize("family", [4, 6])
def test_errors_that_circle(cluster: Cluster, family: int) -> None:
    """They use up nobody's limits, and log and doctor say what stops them.

    The rule does, and what the node itself sends to services still arrives, by NAT in OUTPUT as
    kube-proxy has it. With a discard route it would not.
    """
    at = ingress(cluster, family, "pod")
    node = cluster.nodes[at]
    vip = cluster.vip("pod", family)
    options = ("--source-rate", str(ERRORS + 2), "--flow-interval", "0.0001")
    advice = f"errors about {vip} circle between the fabric and this node"
    ip, word, pod, network = {
        4: ("ip", "ip", f"10.244.{at + 1}.2", "10.96.0.0/24"),
        6: ("ip -6", "ip6", f"fd44:{at + 1}::2", "fd96::/64"),
    }[family]
    out = f"type nat hook output priority -100; {word} daddr {vip} dnat to {pod}"
    node.run("nft", f"table {word} own {{ chain out {{ {out}; }}; }}")
    connect = f"import socket; socket.create_connection(('{vip}', {PORT}), 3)"

    def connects() -> bool:
        with suppress(CommandFailed):
            node.run(sys.executable, "-c", connect)
            return True
        return False

    def dropped(reason: str) -> int:
        return int(metrics(node)[f'pmtud_dropped_total{{reason="{reason}"}}'])

    with daemons([node], *peers_of(family), *options) as [process]:
        inject(cluster.router, family, flow_errors(family, "pod"))
        received_in_the_end([node])
        circled = dropped("circling")
        assert circled > 10 * ERRORS
        assert dropped("limited_source") == dropped("limited_flow") == 0
        assert metrics(node)['pmtud_acted_total{action="replicate"}'] == ERRORS
        assert process.output().count(advice) == 1
        found = diagnose(node).of("daemon_says")
        assert found["status"] == "WARN"
        assert found["found"].startswith(advice)
        assert found["found"].endswith(f": {ip} rule add iif IFACE to NETWORK blackhole")
        time.sleep(1.1)
        rule = f"iif eth0 to {network} blackhole"
        node.run("sh", "-c", f"{ip} rule add {rule}")
        inject(cluster.router, family, flow_errors(family, "pod"))
        received_in_the_end([node])
        assert dropped("circling") == circled
        assert metrics(node)['pmtud_acted_total{action="replicate"}'] == 2 * ERRORS
        assert connects()
        node.run("sh", "-c", f"{ip} rule del {rule}")
    add_discard_route(node, "blackhole")
    assert not connects()
    node.ip("route del blackhole 10.96.0.0/24", "route del blackhole fd96::/64")
    node.run("nft", f"delete table {word} own")


def received_in_the_end(hosts: Sequence[Host]) -> int:
    """All errors that the hosts' daemons took, once the last ones on their way are counted."""
    totals = [-1]

    def steady() -> bool:
        time.sleep(0.3)
        totals.append(sum(sum(received_by_origin(host).values()) for host in hosts))
        return totals[-1] == totals[-2]

    assert poll(steady, 8)
    return totals[-1]


def received_by_origin(host: Host) -> dict[str, int]:
    """Errors that a host's daemon took from NFLOG, by who sent them."""
    samples = metrics(host)
    found = dict.fromkeys(pmtud.ORIGINS, 0)
    for name, value in samples.items():
        for origin in pmtud.ORIGINS:
            if name.startswith("pmtud_received_total") and origin in name:
                found[origin] += int(value)
    return found


FILTERS_LOADED_LATER = {
    "nft raw": "nft add table ip late; "
    "nft add chain ip late pre '{ type filter hook prerouting priority raw; }'; "
    "nft add rule ip late pre fib saddr . iif oif 0 drop",
    "iptables-nft": "iptables-nft -t raw -A PREROUTING -m rpfilter --invert -j DROP",
    "iptables-legacy": "iptables-legacy -t raw -A PREROUTING -m rpfilter --invert -j DROP",
}


@pytest.mark.parametrize("tool", FILTERS_LOADED_LATER)
def test_a_reverse_path_filter_loaded_after_us_drops_nothing_before_us(tool: str) -> None:
    """Of chains with equal priority the one registered last runs first."""
    with Cluster() as cluster:
        cluster.error_from_management()
        with daemons(cluster.nodes, *peers_of(4)):
            for node in cluster.nodes:
                node.run("sh", "-ec", FILTERS_LOADED_LATER[tool])
            for service in Cluster.SERVICES:
                cluster.flush()
                assert len(cluster.download(service)) == 23
        cluster.flush()
        assert cluster.download("pod", deadline=1.5) == []


def drop_invalid_forwards(node: Host) -> None:
    """What kube-proxy does, too.

    An error about another node's flow is not routed back to the fabric.
    """
    node.run(
        "nft",
        "-f",
        "-",
        input="table inet invalid {\nchain forward {\n"
        "type filter hook forward priority filter;\nct state invalid drop\n}\n}\n",
    )


def mark_icmp(node: Host, priority: str) -> None:
    """Traffic shaping that marks ICMP in OUTPUT."""
    node.run(
        "nft",
        "-f",
        "-",
        input="table inet shaping {\nchain out {\n"
        f"type filter hook output priority {priority};\n"
        "meta l4proto { icmp, ipv6-icmp } meta mark set 1\n}\n}\n",
    )


@pytest.mark.parametrize("family", [4, 6])
def test_a_mark_overwritten_after_us_lets_nothing_out(family: int) -> None:
    """The guard sees our mark before `mangle` rules of others do, whenever they were loaded."""
    with Cluster() as cluster:
        for node in cluster.nodes:
            drop_invalid_forwards(node)
        with daemons(cluster.nodes, "--peers", ALL_PEERS), Capture(cluster.fabric) as wire:
            for node in cluster.nodes:
                mark_icmp(node, "mangle")
            inject(cluster.router, family, flow_errors(family, "pod"))
            assert poll(lambda: results(cluster.nodes, family)["not_owner"] == 3 * ERRORS, 5)
            assert results(cluster.nodes, family)["owner"] == 0
            assert service_packets(wire, family) == []
            for service in Cluster.SERVICES:
                cluster.flush()
                assert len(cluster.download(service, family)) == 23


def test_a_mark_overwritten_before_the_guard_is_noticed() -> None:
    """Earlier than conntrack nobody can guard.

    Deliveries to pods end, own addresses are served, the log says why.
    """
    with Cluster() as cluster:
        for node in cluster.nodes:
            drop_invalid_forwards(node)
        with (
            daemons(cluster.nodes, *peers_of(4), patch=QUICK) as processes,
            Capture(cluster.fabric) as wire,
        ):
            for node in cluster.nodes:
                mark_icmp(node, "raw")
            for process in processes:
                process.wait_for("our rules are overruled")
            seen = len(service_packets(wire, 4))
            inject(cluster.router, 4, flow_errors(4, "pod"))
            assert poll(lambda: results(cluster.nodes, 4)["error"] == 3 * ERRORS, 5)
            assert len(service_packets(wire, 4)) == seen
            assert len(cluster.download("host")) == 23
            for node in cluster.nodes:
                node.run("nft", "delete", "table", "inet", "shaping")
            for node in cluster.nodes:
                assert poll(partial(is_ready, node), 5)
            cluster.flush()
            assert len(cluster.download("pod")) == 23
            # Once a family
            assert [process.output().count("overruled") for process in processes] == [
                2,
                2,
                2,
            ]


def errors_about_pods(cluster: Cluster) -> list[tuple[int, bytes]]:
    """Errors about six new UDP flows to the pods' service, each with the node that translates it."""
    vip = cluster.vip("pod")
    command = "for i in 1 2 3 4 5 6; do echo > /dev/udp/10.96.0.2/80; done"
    cluster.client.run("bash", "-c", command)
    found = []
    for number, node in enumerate(cluster.nodes):
        tracked = node.run("conntrack", "-L", "-p", "udp", "-d", vip)
        for port in re.findall(r"dst=10.96.0.2 sport=(\d+)", tracked):
            error = mtu_error(
                V4,
                src="10.8.0.1",
                dst=vip,
                quoted_src=vip,
                protocol=17,
                quoted_dst=cluster.client_address(1),
                transport=struct.pack("!HHHH", 80, int(port), 1480, 0),
            )
            found.append((number, error))
    return found


@contextlib.contextmanager
def unreachable_pods(cluster: Cluster) -> Iterator[None]:
    """No node may send anything to its pod."""
    for i, node in enumerate(cluster.nodes, 1):
        node.ip(f"route add prohibit {pod_address(i)}")
    yield
    for i, node in enumerate(cluster.nodes, 1):
        node.ip(f"route del prohibit {pod_address(i)}")


def test_a_delivery_that_the_stack_refuses_is_said_once(cluster: Cluster) -> None:
    """A pod that cannot be reached after translation.

    An operator's problem, in the log and in the metrics.
    """
    with daemons(cluster.nodes, *peers_of(4)) as processes:
        errors = errors_about_pods(cluster)
        assert len(errors) == 6
        with unreachable_pods(cluster):
            for _, error in errors:
                inject(cluster.router, 4, [error])
            assert poll(lambda: results(cluster.nodes, 4)["error"] == 6, 3), results(
                cluster.nodes, 4
            )
        said = [process.output().count("stack refuses a delivery") for process in processes]
        owners = {number for number, _ in errors}
        assert said == [int(number in owners) for number in range(3)]
        assert any('problem="Permission denied"' in process.output() for process in processes)


def test_copies_that_were_needed_are_counted(cluster: Cluster) -> None:
    """About a pod's flow, on the node that translates it, where another node got the error.

    Nothing is counted where the router's own error came in, nor for an address on lo.
    """
    got_them = ingress(cluster, 4, "pod")
    with daemons(cluster.nodes, *peers_of(4)):
        errors = errors_about_pods(cluster)
        inject(cluster.router, 4, [error for _, error in errors])
        inject(cluster.router, 4, flow_errors(4))

        def counted() -> list[int]:
            samples = [metrics(node) for node in cluster.nodes]
            return [total(one, "pmtud_copies_needed_total") for one in samples]

        owners = Counter(number for number, _ in errors if number != got_them)
        assert poll(lambda: counted() == [owners[number] for number in range(3)], 5), counted()
        assert any(owners.values())


def test_lo_that_is_down(node: Host) -> None:
    """Deliveries to own addresses come in there."""
    assert diagnose(node).status("delivery") == "OK"
    node.ip("link set lo down")
    found = diagnose(node).of("delivery")
    assert found["status"] == "FAIL"
    assert found["fix"] == "ip link set dev lo up"
    assert "refuses ipv4 errors: Network is unreachable" in found["found"]
    run_fix(node, found)
    assert diagnose(node).status("delivery") == "OK"


@pytest.mark.parametrize("family", [4, 6])
def test_a_rule_that_drops_deliveries_in_output(node: Host, family: int) -> None:
    """To the daemon it looks like another node's flow; check tells the difference."""
    table = f"inet firewall{family}"
    node.run(
        "nft",
        "-f",
        "-",
        input=f"table {table} {{\nchain out {{\ntype filter hook output priority 0;\n"
        f"meta l4proto {'icmp' if family == 4 else 'ipv6-icmp'} drop\n}}\n}}\n",
    )
    found = diagnose(node).of("delivery")
    assert found["status"] == "FAIL"
    assert f"drops ipv{family} errors that pmtud delivers" in found["found"]
    node.run("nft", "delete", "table", *table.split())
    assert diagnose(node).status("delivery") == "OK"


# -----------------------------------------------------------------------------
# Section: daemon -- its life: start, stop, what it says, as a DaemonSet


@quick
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_clean_stop(cluster: Cluster, number: int) -> None:
    """Exit 0 in under a second, table gone, group free for the next one."""
    node = cluster.nodes[0]
    process = daemon(node, *peers_of(4))
    begun = time.monotonic()
    assert process.stop(number) == 0
    assert time.monotonic() - begun < PATIENCE
    assert "pmtud" not in node.run("nft", "list", "ruleset")
    assert node.read("/proc/net/netfilter/nfnetlink_log") == ""
    assert process.output().splitlines()[-1].split()[2] == "stopped"


SLOW_IMPORT = """
import pathlib, time
pathlib.Path({0!r}).touch()
time.sleep(60)
"""


def as_init(host: Host, *options: str, env: dict[str, str] | None = None) -> tuple[Process, int]:
    """The daemon as process 1 of a PID namespace, as in a container, and its pid out here."""
    container = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    command = (sys.executable, "--", str(PROGRAM), "--iface", "lo", "--metrics-port", "0", *options)
    process = host.start(*container, *command, env=env)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    assert poll(lambda: children.read_text().split(), 10), process.output()
    return process, int(children.read_text())


def handles_sigterm(pid: int) -> bool:
    """Whether a process has a handler for it.

    Without one the kernel drops what process 1 is sent.
    """
    (mask,) = re.findall(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> signal.SIGTERM - 1 & 1)


def ended(process: Process) -> bool:
    return process.returncode() is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_starting_ends_process_1_with_0(number: int, tmp_path: Path) -> None:
    """At once: while modules are imported, and at a dozen moments up to the last line of the start."""
    loading = tmp_path / "loading"
    (tmp_path / "argparse.py").write_text(SLOW_IMPORT.format(str(loading)))
    with Net() as net:
        node = net.host("bare")
        process, pid = as_init(node, env={"PYTHONPATH": str(tmp_path)})
        assert poll(loading.exists, 10), process.output()
        os.kill(pid, number)
        assert poll(partial(ended, process), 5), "the signal was lost"  # the import takes a minute
        assert process.returncode() == 0
        assert process.output() == ""
        process, pid = as_init(node)
        assert poll(partial(handles_sigterm, pid), 10)
        begun = time.monotonic()
        process.wait_for("limits:")
        whole = time.monotonic() - begun
        os.kill(pid, number)
        for part in range(12):
            assert poll(partial(ended, process), 5), "the signal was lost"
            assert process.returncode() == 0, process.output()
            assert "Traceback" not in process.output()
            assert "pmtud" not in node.run("nft", "list", "ruleset")
            process, pid = as_init(node)
            assert poll(partial(handles_sigterm, pid), 10)
            time.sleep(whole * part / 10)
            os.kill(pid, number)


@pytest.mark.parametrize(
    "command,code", [("run", 0), ("check", -signal.SIGTERM), ("rules", -signal.SIGTERM)]
)
def test_signals_before_the_command_is_known(command: str, code: int, tmp_path: Path) -> None:
    """SIGHUP, then SIGTERM, while modules are imported.

    An interrupted doctor never says "all well".
    """
    loading = tmp_path / "loading"
    (tmp_path / "argparse.py").write_text(SLOW_IMPORT.format(str(loading)))
    with Net() as net:
        argv = (sys.executable, "--", str(PROGRAM), "--iface", "lo", command)
        process = net.host("bare").start(*argv, env={"PYTHONPATH": str(tmp_path)})
        assert poll(loading.exists, 10), process.output()
        if command == "run":
            os.kill(process.pid, signal.SIGHUP)
            time.sleep(0.2)
        assert process.stop() == code, process.output()


@quick
def test_sigkill_leaves_nothing(cluster: Cluster) -> None:
    """The kernel removes the table and frees the group."""
    node = cluster.nodes[0]
    process = daemon(node, *peers_of(4))
    assert "pmtud_33" in node.run("nft", "list", "ruleset")
    process.stop(signal.SIGKILL)
    assert poll(lambda: "pmtud" not in node.run("nft", "list", "ruleset"), 2)
    assert node.read("/proc/net/netfilter/nfnetlink_log") == ""
    with daemons([node]):
        pass


def run_to_end(
    host: Host, *options: str, python: Sequence[str] = (sys.executable,), program: Path = PROGRAM
) -> tuple[int, str]:
    """Exit code and whole output of a program run that ends by itself."""
    process = host.start(*python, str(program), *options)
    assert poll(lambda: process.returncode() is not None, 10), process.output()
    code = process.returncode()
    assert code is not None
    return code, process.output()


@quick
def test_second_daemon_names_the_first(cluster: Cluster) -> None:
    """Exit 1 and one line; no advice to take another group: every error would be copied twice."""
    node = cluster.nodes[0]
    line = "pmtud: pmtud already runs here (pid {})\n"
    with daemons([node]) as [first]:
        assert run_to_end(node) == (1, line.format(first.pid))
        with daemon_of_group(node, 34, "--metrics-port", "0") as other:  # whoever insists
            assert run_to_end(node, "--nflog-group", "34") == (1, line.format(other.pid))


@pytest.mark.parametrize(
    "start",
    [
        (sys.executable, "-c", "import pmtud, sys; sys.exit(pmtud.main())", "--rules", "off"),
        (sys.executable, "-m", "pmtud", "--rules", "off"),
        (sys.executable, "-m", "pmtud"),
    ],
)
def test_second_daemon_knows_the_first_however_that_was_started(
    cluster: Cluster, start: tuple[str, ...]
) -> None:
    """By its table, its name or its script; also from a container, which cannot see its process."""
    node = cluster.nodes[0]
    first = node.start(*start, env={"PYTHONPATH": str(HERE)})
    first.wait_for("limits:")
    assert run_to_end(node) == (1, f"pmtud: pmtud already runs here (pid {first.pid})\n")
    blind = ("unshare", "--pid", "--fork", "--mount-proc", sys.executable)
    line = "pmtud: pmtud already runs here (in a process not visible from here)\n"
    assert run_to_end(node, python=blind) == (1, line)
    assert first.stop() == 0


def test_group_held_by_another_program(cluster: Cluster, tmp_path: Path) -> None:
    """Exit 1 and one line with port id, pid and what to do; a pasted table of ours is no daemon."""
    node = cluster.nodes[0]
    (tmp_path / "go-pmtud").write_text(HOLDER.format(str(HERE)))
    stranger = node.start(sys.executable, str(tmp_path / "go-pmtud"))
    stranger.wait_for("held")
    node.run("nft", "add table inet pmtud_33")
    try:
        code, output = run_to_end(node)
    finally:
        node.run("nft", "delete table inet pmtud_33")
    assert code == 1
    assert output.count("\n") == 1
    assert f"NFLOG group 33 is taken by port id {stranger.pid}, pid {stranger.pid} (" in output
    assert ") (see /proc/net/netfilter/nfnetlink_log); choose another with --nflog-group" in output


@contextlib.contextmanager
def daemon_of_group(node: Host, group: int, *options: str) -> Iterator[Process]:
    """A second daemon beside the first one, in a group of its own."""
    process = daemon(node, "--nflog-group", str(group), *options)
    assert f"pmtud_{group}" in node.run("nft", "list", "ruleset")
    yield process
    assert process.stop() == 0
    assert f"pmtud_{group}" not in node.run("nft", "list", "ruleset")


START_FAILURES = [
    # options, exit code, the one line
    (["--iface", "eth7"], 2, "--iface: there is no interface eth7; there are lo"),
    (["--peers", "file:/nonexistent"], 2, "peers: file:/nonexistent: No such file or directory"),
    (["--no-rescue"], 2, "--no-rescue without --peers leaves nothing to do; give --peers"),
    (
        ["--iface", "lo", "--peers", "10.0.0.12,kube:nodes"],
        2,
        "peers: kube:nodes: KUBERNETES_SERVICE_HOST is not set: kube:nodes works in a pod of "
        "the cluster",
    ),
    ([], 1, "there is no default route; name the interface errors come in on with --iface"),
]


@quick
@pytest.mark.parametrize("options,code,text", START_FAILURES)
def test_start_failures_are_one_line(options: list[str], code: int, text: str) -> None:
    """In a namespace with nothing but a loopback interface."""
    with Net() as net:
        assert run_to_end(net.host("bare"), *options) == (code, f"pmtud: {text}\n")


@pytest.mark.parametrize("limit", [7, 9, 11])
def test_too_few_file_descriptors_is_one_line(limit: int) -> None:
    with Net() as net:
        process = net.host("bare").start(
            "sh", "-c", f"ulimit -n {limit}; exec {sys.executable} {SCRIPT} --iface lo"
        )
        assert poll(lambda: process.returncode() is not None, 10)
        assert process.returncode() == 1
        assert re.fullmatch("pmtud: .*(Too many open files).*\n", process.output()), (
            process.output()
        )


def test_a_bridge_port_is_pointed_out() -> None:
    """Its packets come in on the bridge as far as the rules can see."""
    with Net() as net:
        node = net.host("bare")
        node.ip(
            "link add br0 type bridge",
            "link add eth0 type veth peer name far",
            "link set eth0 master br0 up",
        )
        process = node.start(sys.executable, SCRIPT, "--iface", "eth0", "--metrics-port", "0")
        process.wait_for(
            "eth0 belongs to a bridge or bond: errors come in on that one; name it with --iface"
        )
        assert process.stop() == 0


def test_who_the_process_says_it_is(cluster: Cluster) -> None:
    """The name `pmtud` in ps, ss and nft, every thread's too.

    The command line and process id it was started with.
    """
    node = cluster.nodes[0]
    command = [sys.executable, "-Werror", str(PROGRAM), "--peers", "localhost,10.0.0.12"]
    process = node.start(*command)
    process.wait_for("limits:")
    assert get(node, "/healthz") == ("200", "ok\n")
    assert execute("ps", "-o", "comm=", "-p", str(process.pid)) == "pmtud\n"
    threads = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/comm")]
    assert len(threads) >= 3
    assert not any("python" in name for name in threads)
    assert Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")[:-1] == command
    for pattern in (["-x", "pmtud"], ["-f", "pmtud.py"]):
        assert str(process.pid) in execute("pgrep", *pattern).split()
    assert f'users:(("pmtud",pid={process.pid},' in node.run("ss", "-Htlnp", "sport = :30040")
    assert "table inet pmtud_33 { # progname pmtud\n" in node.run("nft", "list", "ruleset")
    assert process.stop() == 0


class NotifySocket:
    """Where a service manager listens; what it was told."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)
        self._told: list[list[str]] = []

    def told(self) -> list[list[str]]:
        """The lines of every message so far."""
        with suppress(BlockingIOError):
            while True:
                self._told.append(self._socket.recv(4096).decode().split("\n"))
        return self._told

    def count(self, line: str) -> int:
        """How many messages had a line that starts like this."""
        return sum(any(found.startswith(line) for found in message) for message in self.told())

    def close(self) -> None:
        self._socket.close()


def test_what_the_service_manager_is_told(cluster: Cluster, tmp_path: Path) -> None:
    """READY once, STATUS on each change, a reload as systemd wants it, STOPPING.

    A path and an abstract address.
    """
    node = cluster.nodes[0]
    path = tmp_path / "peers"
    for address in (str(tmp_path / "notify"), f"@pmtud-test-{os.getpid()}"):
        path.write_text("10.0.0.12\n10.0.0.13\n")
        command = (sys.executable, str(PROGRAM), "--peers", f"file:{path}")
        # abstract addresses belong to a network namespace
        with contextlib.closing(node.inside(partial(NotifySocket, address))) as manager:
            process = node.start(*command, env={"NOTIFY_SOCKET": address})
            process.wait_for("limits:")
            assert poll(partial(manager.count, "READY=1"), 5) == 1
            assert manager.told() == [["READY=1", "STATUS=2 peers, 0 errors, 0 copies"]]
            path.write_text("10.0.0.13\n")
            assert poll(partial(manager.count, "STATUS=1 peers"), 5) == 1
            before = time.monotonic_ns() // 1000
            os.kill(process.pid, signal.SIGHUP)
            process.wait_for("SIGHUP")
            assert poll(lambda: manager.count("READY=1") == 2, 5)
            (reloading, stamp), ready = manager.told()[-2:]
            assert reloading == "RELOADING=1"
            assert ready[0] == "READY=1"
            assert (
                before <= int(stamp.partition("MONOTONIC_USEC=")[2]) <= time.monotonic_ns() // 1000
            )
            assert process.stop() == 0
            assert manager.told()[-1] == ["STOPPING=1"]
            assert manager.count("WATCHDOG=1") == 0


HANGING = """
import os, time
turn = pmtud.Daemon._tick
def tick(self, now):
    turn(self, now)
    if os.path.exists(os.environ["HANG"]):
        print("hanging", flush=True)
        time.sleep(600)
pmtud.Daemon._tick = tick
"""


def test_a_hung_loop_gives_no_sign_of_life(cluster: Cluster, tmp_path: Path) -> None:
    """WATCHDOG=1 at half the time systemd waits, from the loop itself.

    None while it hangs, though threads live.
    """
    node = cluster.nodes[0]
    address = str(tmp_path / "notify")
    hang = tmp_path / "hang"
    env = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "400000"}
    with contextlib.closing(NotifySocket(address)) as manager:
        process = patched_daemon(node, HANGING, env={**env, "HANG": str(hang)})
        process.wait_for("limits:")
        assert poll(lambda: manager.count("WATCHDOG=1") >= 3, 5)
        begun = time.monotonic()
        count = manager.count("WATCHDOG=1")
        times = [begun]
        for more in range(1, 11):
            wanted = count + more
            poll(lambda w=wanted: manager.count("WATCHDOG=1") >= w, 5)  # type: ignore[misc]
            assert manager.count("WATCHDOG=1") >= wanted
            times.append(time.monotonic())
        assert times[-1] - begun >= 1.8  # ten half periods of 0.2 s
        assert min(later - earlier for earlier, later in zip(times, times[1:])) < 0.4
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.1)
        count = manager.count("WATCHDOG=1")
        time.sleep(0.6)
        assert manager.count("WATCHDOG=1") == count
        os.kill(process.pid, signal.SIGCONT)
        assert poll(lambda: manager.count("WATCHDOG=1") > count, 2)
        hang.touch()
        process.wait_for("hanging")
        count = manager.count("WATCHDOG=1")
        time.sleep(0.6)
        assert manager.count("WATCHDOG=1") == count
        # A thread that answered for the loop would be wrong
        assert get(node, "/metrics")[0] == "200"
        process.close()
        other = node.start(sys.executable, str(PROGRAM), env={**env, "WATCHDOG_PID": "1"})
        other.wait_for("limits:")
        time.sleep(0.5)
        assert manager.count("WATCHDOG=1") == count
        assert other.stop() == 0


def test_a_service_manager_that_is_gone_is_nobodys_problem(
    cluster: Cluster, tmp_path: Path
) -> None:
    process = cluster.nodes[0].start(
        sys.executable, str(PROGRAM), env={"NOTIFY_SOCKET": f"{tmp_path}/none"}
    )
    process.wait_for("limits:")
    assert process.stop() == 0


UNIT = HERE / "pmtud.service"


@quick
@pytest.mark.parametrize("verb", [("verify",), ("security", "--offline=true", "--threshold=15")])
def test_unit_is_clean_and_tight(verb: tuple[str, ...], tmp_path: Path) -> None:
    """systemd's own judgement: nothing to complain about, exposure 1.5 or lower."""
    done = subprocess.run(
        ["systemd-analyze", *verb, str(UNIT)], text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-500:] + done.stderr


# A container around systemd: an overlay of this machine whose changes go when it does, no unit but
# ours, and a control group of its own, so that the manager finds no process of this machine in its
# tree.
BOOT = r"""
set -eu
base=$1 console=$2 group=$3
mount --make-rprivate /
mount -t cgroup2 cgroup2 $base
mkdir $base/$group
echo $$ >$base/$group/cgroup.procs
umount $base
exec unshare --fork --pid --uts --ipc --cgroup --kill-child sh -euc '
mount -t tmpfs tmpfs $0
mkdir $0/upper $0/work $0/root
cp $2 $3 $4 $5 $0
mount -t overlay overlay -o lowerdir=/,upperdir=$0/upper,workdir=$0/work $0/root
cd $0/root
for kind in proc sysfs:sys cgroup2:sys/fs/cgroup tmpfs:run tmpfs:tmp tmpfs:dev; do
    mount -t ${kind%:*} none ${kind#*:}
done
for device in null zero full random urandom tty; do
    touch dev/$device
    mount --bind /dev/$device dev/$device
done
touch dev/console
mount --bind $1 dev/console
mkdir -p dev/pts dev/shm usr/local/bin
mount -t devpts devpts dev/pts
ln -s pts/ptmx dev/ptmx
rm -rf etc/systemd/system usr/lib/systemd/system/*.wants
mkdir -p etc/systemd/system/pmtud.service.d
cp $0/pmtud.py usr/local/bin/
chmod 755 usr/local/bin/pmtud.py
cp $0/pmtud.service etc/systemd/system/
cp $0/test.conf etc/systemd/system/pmtud.service.d/
cp $0/pmtud etc/default/pmtud
printf "[Unit]\nWants=pmtud.service\n" >etc/systemd/system/test.target
exec env -i container=pmtud PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot . /lib/systemd/systemd --unit=test.target
' $base $console $4 $5 $6 $7
"""


class Booted:
    """systemd as process 1 in a host, with pmtud.service and nothing else."""

    def __init__(self, host: Host, folder: Path, options: str) -> None:
        self._host = host
        self._group = f"{host.namespace}-systemd"
        self._terminal, self._slave = pty.openpty()
        self._folder = folder / "base"
        self._folder.mkdir()
        (folder / "pmtud").write_text(options)
        # two seconds instead of 20 and 2, and a log that can be read without a journal
        # The README's own drop-in
        (narrowed,) = re.findall(r"^```ini\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
        (folder / "test.conf").write_text(
            narrowed + "WatchdogSec=2\nRestartSec=0\nStandardError=append:/run/log\n"
        )
        files = [str(path) for path in (PROGRAM, UNIT, folder / "test.conf", folder / "pmtud")]
        self.process = host.start(
            "unshare",
            "--mount",
            "sh",
            "-c",
            BOOT,
            "boot",
            str(self._folder),
            os.ttyname(self._slave),
            self._group,
            *files,
        )

    def manager(self) -> int:
        """The process id of systemd, 0 before it is there."""
        return next((pid for pid, name in self._processes("comm") if name == "systemd\n"), 0)

    def _processes(self, what: str) -> Iterator[tuple[int, str]]:
        """Process ids and this file of theirs in /proc."""
        for pid in self._host.run("sh", "-c", "ip netns pids " + self._host.namespace).split():
            with suppress(OSError):  # gone meanwhile
                yield int(pid), Path(f"/proc/{pid}/{what}").read_text()

    def systemctl(self, *words: str) -> str:
        """What systemctl, run in there, prints."""
        return execute(
            "nsenter",
            f"--target={self.manager()}",
            "--mount",
            "--pid",
            "--root",
            "systemctl",
            *words,
            check=False,
        )

    def show(self, key: str) -> str:
        """A property of the service."""
        return self.systemctl("show", "--value", "--property", key, "pmtud").strip()

    def log(self) -> str:
        """What the daemon has printed."""
        return Path(f"/proc/{self.manager()}/root/run/log").read_text()

    def daemon(self) -> int:
        """The daemon's process id as this machine counts, 0 where there is none."""
        found = (
            pid for pid, line in self._processes("cmdline") if "\0/usr/local/bin/pmtud.py" in line
        )
        return next(found, 0)

    def close(self) -> None:
        """End it and remove its control group."""
        with suppress(ProcessLookupError):
            os.kill(self.manager() or self.process.pid, signal.SIGKILL)
        self.process.close()
        for descriptor in (self._terminal, self._slave):
            os.close(descriptor)
        program = "mount -t cgroup2 cgroup2 $0; find $0/$1 -depth -type d -exec rmdir {} +"
        poll(
            lambda: (
                not execute(
                    "unshare",
                    "--mount",
                    "sh",
                    "-c",
                    program + " 2>&1",
                    str(self._folder),
                    self._group,
                    check=False,
                )
            ),
            5,
        )


def test_under_systemd(cluster: Cluster, tmp_path: Path) -> None:
    """The unit as it is, under a real systemd.

    Capabilities, system call filter and all; reload, watchdog, stop.
    """
    node = cluster.nodes[0]
    with contextlib.closing(Booted(node, tmp_path, f"PMTUD_PEERS={ALL_PEERS}\n")) as booted:
        assert poll(booted.manager, 10), booted.process.output()
        assert poll(lambda: booted.show("ActiveState") == "active", 15), booted.systemctl(
            "status", "pmtud"
        )
        assert booted.show("StatusText") == "4 peers, 0 errors, 0 copies"
        (allowed,) = re.findall(r"^IPAddressAllow=localhost (.+)$", README, re.MULTILINE)
        assert sorted(booted.show("IPAddressAllow").split()) == sorted(
            ["127.0.0.0/8", "::1/128", *allowed.split()]
        )
        status = Path(f"/proc/{booted.daemon()}/status").read_text()
        assert status.startswith("Name:\tpmtud\n")
        fields = dict(re.findall(r"(\w+):\s+(.+)", status))
        assert {key: fields[f"Cap{key}"] for key in ("Prm", "Eff", "Bnd")} == dict.fromkeys(
            ("Prm", "Eff", "Bnd"), "0000000000003000"
        )
        assert fields["NoNewPrivs"] == "1"
        assert fields["Seccomp"] == "2"
        assert int(fields["Uid"].split()[0]) >= 61184  # a dynamic user
        with daemons(cluster.nodes[1:], "--peers", ALL_PEERS):
            for family, service in CASES:
                assert len(cluster.download(service, family)) == 23, booted.log()
        assert get(node, "/readyz") == ("200", "ok\n")
        warned = warnings(booted.log())
        assert not [line for line in warned if "running without metrics" not in line]
        booted.systemctl("reload", "pmtud")
        assert poll(
            lambda: "SIGHUP: nothing to read again, no peer source is in use" in booted.log(), 5
        )
        assert booted.show("ActiveState") == "active"
        first = booted.daemon()
        os.kill(first, signal.SIGSTOP)
        assert poll(lambda: booted.show("NRestarts") == "1", 15)
        assert poll(
            lambda: booted.show("ActiveState") == "active" and booted.daemon() not in (0, first), 10
        )
        booted.systemctl("stop", "pmtud")
        assert booted.show("ActiveState") == "inactive"
        assert booted.show("ExecMainStatus") == "0"
        assert "pmtud" not in node.run("nft", "list", "tables")


def test_under_systemd_what_comes_late_is_waited_for(cluster: Cluster, tmp_path: Path) -> None:
    """An interface that is not there yet is exit code 2, and no reason to stay away for good."""
    node = cluster.nodes[0]
    with contextlib.closing(Booted(node, tmp_path, "PMTUD_IFACE=late0\n")) as booted:
        assert poll(booted.manager, 10), booted.process.output()
        assert poll(lambda: int(booted.show("NRestarts") or 0) >= 2, 15), booted.systemctl(
            "status", "pmtud"
        )
        assert "--iface: there is no interface late0" in booted.log()
        node.ip("link add late0 type veth peer name late1")
        try:
            assert poll(lambda: booted.show("ActiveState") == "active", 15), booted.systemctl(
                "status", "pmtud"
            )
            booted.systemctl("stop", "pmtud")
        finally:
            node.ip("link del late0")


# -- HTTP and logs


def get(host: Host, path: str, port: int = 30040, address: str = "127.0.0.1") -> tuple[str, str]:
    """Status code and body."""
    url = f"http://{address}:{port}{path}"
    text = host.run("curl", "-sS", "--max-time", "20", "-w", "\n%{http_code}", url, check=False)
    body, _, code = text.rpartition("\n")
    return code, body


@quick
def test_http(cluster: Cluster) -> None:
    """/metrics, /healthz, /readyz; --metrics-port and --metrics-addr; 0 turns it off."""
    node = cluster.nodes[0]
    with daemons([node], *peers_of(4)):
        assert get(node, "/healthz") == ("200", "ok\n")
        assert get(node, "/readyz") == ("200", "ok\n")
        assert get(node, "/metrics", address="[::1]")[0] == "200"
        assert get(node, "/etc/passwd")[0] == "404"
        assert get(node, "/healthz?verbose") == ("200", "ok\n")
        head = node.run("curl", "-sSi", "http://127.0.0.1:30040/metrics").splitlines()
        assert head[0] == "HTTP/1.0 200 OK"
        assert "Content-Type: text/plain; version=0.0.4; charset=utf-8" in head
        name = f"pmtud/{pmtud.__version__} ({socket.gethostname()}, NFLOG group 33)"
        assert f"Server: {name}" in head
        for option in ("-XPOST", "-I"):
            url = "http://127.0.0.1:30040/healthz"
            assert "501 Unsupported method" in node.run("curl", "-sSi", option, url, check=False)
        assert metrics(node)['pmtud_peers{source="static"}'] == 2
    with daemons([node], "--metrics-port", "31000", "--metrics-addr", "10.0.0.11"):
        assert get(node, "/healthz", 31000, "10.0.0.11") == ("200", "ok\n")
        assert get(node, "/healthz", 31000)[0] == "000"
    with daemons([node], "--metrics-port", "0"):
        assert get(node, "/healthz")[0] == "000"


def test_metrics_port_taken(cluster: Cluster) -> None:
    """By default a warning, and the errors are still handled.

    A failure if the port was asked for.
    """
    node = cluster.nodes[0]
    first = daemon(node, "--nflog-group", "40")
    with daemon_of_group(node, 42, "--metrics-port", "0"):
        pass
    with contextlib.closing(first), contextlib.closing(daemon(node)) as second:
        assert (
            "metrics cannot be served on * port 30040 (Address already in use); running without"
            in second.output()
        )
        code, output = run_to_end(node, "--nflog-group", "41", "--metrics-port", "30040")
        assert code == 1
        assert output == (
            "pmtud: metrics cannot be served on * port 30040 (Address already in use); "
            "choose others with --metrics-addr and --metrics-port, port 0 for none\n"
        )


def test_without_prometheus_client(cluster: Cluster) -> None:
    """The whole job without the library (python -S sees no site-packages), and exit 2 if metrics
    were asked for.
    """
    python = (sys.executable, "-S")
    processes = [node.start(*python, str(PROGRAM), *peers_of(4)) for node in cluster.nodes]
    for process in processes:
        process.wait_for("limits:")
    assert len(cluster.download("pod")) == 23
    advice = "prometheus-client is not installed: pip install prometheus-client\n"
    assert get(cluster.nodes[0], "/metrics") == ("503", advice)
    assert get(cluster.nodes[0], "/readyz") == ("200", "ok\n")
    assert [process.stop() for process in processes] == [0, 0, 0]
    assert processes[0].output().count(f"WARNING running without metrics: {advice}") == 1
    code, output = run_to_end(cluster.nodes[0], "--metrics-port", "30040", python=python)
    assert code == 2
    assert output == (
        "pmtud: --metrics-port and --metrics-addr need prometheus-client: pip install "
        "prometheus-client, "
        "or --metrics-port 0\n"
    )


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    # file of the library, what happens to it, what Python says
    (
        "registry.py",
        Path.unlink,
        "ModuleNotFoundError: No module named 'prometheus_client.registry'",
    ),
    ("exposition.py", lambda path: os.truncate(path, 0), "ImportError: cannot import name "),
    ("exposition.py", lambda path: os.truncate(path, 2000), "SyntaxError: "),
    (
        "exposition.py",
        lambda path: path.open("a").write("\ngenerate_latest = list\n"),
        "TypeError: ",
    ),
]


@pytest.mark.parametrize("name,damage,said", DAMAGES)
def test_a_damaged_prometheus_client(
    node: Host, tmp_path: Path, name: str, damage: Callable[[Path], object], said: str
) -> None:
    """What failed stands in the log, once, and in each answer of /metrics.

    Everything else works.
    """
    spec = importlib.util.find_spec("prometheus_client")
    assert spec
    assert spec.origin
    shutil.copytree(Path(spec.origin).parent, tmp_path / "prometheus_client")
    damage(tmp_path / "prometheus_client" / name)
    process = node.start(
        sys.executable, str(PROGRAM), "--metrics-port", "30040", env={"PYTHONPATH": str(tmp_path)}
    )
    text = process.wait_for("WARNING running without metrics: ").partition(
        "running without metrics: "
    )[2]
    process.wait_for("limits:")
    text = text.splitlines()[0] + "\n"
    assert text.startswith(f"prometheus-client does not work, install it again: {said}")
    for _ in range(2):
        assert get(node, "/metrics") == ("503", text)
    assert get(node, "/readyz") == ("200", "ok\n")
    assert process.stop() == 0
    assert process.output().count("WARNING") == 1
    assert "Traceback" not in process.output()


def test_a_loopback_address_in_a_pod_is_pointed_out(node: Host) -> None:
    """No kubelet can ask there. Outside of a pod it is a good choice."""
    for env, count in (({"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, 1), ({}, 0)):
        for address in ("127.0.0.1", "::1"):
            process = node.start(sys.executable, str(PROGRAM), "--metrics-addr", address, env=env)
            output = process.wait_for("limits:")
            assert (
                output.count(
                    "a kubelet's probes go to the node's address and fail, HTTP is served on "
                    f"{address} only\n"
                )
                == output.count("WARNING")
                == count
            )
            assert process.stop() == 0


@unit
@pytest.mark.parametrize("as_json", [False, True])
def test_a_log_line_fits_into_a_pipe_and_stays_json(as_json: bool) -> None:
    """Its long texts are cut, its numbers stay; a line that fits stays whole."""
    handler = pmtud.PatientHandler()
    handler.setFormatter(pmtud.Formatter(as_json))

    def formatted(text: str, **fields: object) -> str:
        extra = {"msg": text, "levelno": 20, "levelname": "INFO", "fields": fields}
        return handler.format(logging.makeLogRecord(extra))

    whole = formatted("x" * 3500, count=7)
    assert "x" * 3500 in whole
    for letter in ("x", "\u00e9", "\U0001f600"):
        line = formatted(letter * 5000, problem=letter * 5000, count=7)
        assert len(line.encode()) < 4096
        assert line.count(letter if not as_json else "...") >= 2
        if as_json:
            assert json.loads(line)["count"] == 7
            assert json.loads(line)["message"] == letter * 100 + " ..."


def test_json_log(cluster: Cluster) -> None:
    """Every line is an object with time, level and message.

    A router's MTU is told once, a packet in words.
    """
    node = cluster.nodes[ingress(cluster, 4)]
    with daemons([node], "--log-format", "json") as [process]:
        inject(cluster.router, 4, flow_errors(4, count=1) * 3, gap=0.15)
        blast(
            cluster.fabric,
            f"to-{node.name}",
            node,
            "eth0",
            flow_errors(4, count=1, quoted_src="10.96.0.99"),
        )
        received(node, 4)
    entries = [json.loads(line) for line in process.output().splitlines()]
    assert all({"time", "level", "message"} <= set(entry) for entry in entries)
    news = [entry for entry in entries if entry["message"] == "a router reports an MTU"]
    assert len(news) == 1
    assert {k: news[0][k] for k in ("router", "destination", "mtu")} == {
        "router": "10.8.0.1",
        "destination": "10.9.0.1",
        "mtu": 1400,
    }
    forged = [
        entry["error"] for entry in entries if entry["level"] == "warning" and "error" in entry
    ]
    assert forged == [
        f"router=10.8.0.1 dst={Cluster.vip('host')} flow=10.96.0.99:80>10.9.0.1:40000/6 mtu=1400"
    ]


def test_news_that_found_no_room_is_told_later(cluster: Cluster) -> None:
    """At most News.PER_MINUTE lines.

    What is reported again a minute later is news still. A minute is a second here.
    """
    node = cluster.nodes[ingress(cluster, 4)]
    patch = f"{QUICK}\n{SHORT_MINUTE}\npmtud.News.PER_MINUTE = 15"
    with daemons([node], patch=patch) as [process]:

        def told() -> list[str]:
            return re.findall(
                r"a router reports an MTU router=10.8.0.1 destination=(\S+)", process.output()
            )

        inject(cluster.router, 4, flow_errors(4))
        process.wait_for("last minute")
        for _ in range(3):  # a minute in which 15 are told, and some more
            time.sleep(1.2)
            inject(cluster.router, 4, flow_errors(4))
        assert poll(lambda: len(told()) == 23, 5), told()
        assert len(set(told())) == 23


# -- the DaemonSet

MANIFEST = (HERE / "daemonset.yaml").read_text()


def uncommented(document: str) -> str:
    """What an editor makes of a document of comments.

    Every line without its `# `, up to the next one's heading.
    """
    return re.sub(r"^# ", "", document.partition("\n\n")[0], flags=re.MULTILINE)


def without_wheel() -> str:
    """The manifest after the command in it that has the library fetched with pip."""
    (command,) = re.findall(r"^#   (sed 's/\^#pip .*) daemonset.yaml \|", MANIFEST, re.MULTILINE)
    return execute("sh", "-c", command, input=MANIFEST)


def by_kind(documents: str) -> dict[str, Any]:
    """The documents that are not comments only."""
    return {item["kind"]: item for item in yaml.safe_load_all(documents) if item}


ACTIVE = by_kind(MANIFEST)
PIP = by_kind(without_wheel())
DOCUMENTS = re.sub("^#pip .*\n", "", MANIFEST, flags=re.MULTILINE).split("---\n")[1:]
OPTIONAL = by_kind(
    "---\n".join(uncommented(text) + "\n" for text in DOCUMENTS if not yaml.safe_load(text))
)
POD, PIP_POD = (kinds["DaemonSet"]["spec"]["template"]["spec"] for kinds in (ACTIVE, PIP))
FIELDS = {"spec.nodeName": "worker-1", "status.hostIP": "10.0.0.11"}  # what a kubelet fills in


def environment(container: dict[str, Any]) -> dict[str, str]:
    """What a container of the manifest is given."""
    return {
        item["name"]: item["value"]
        if "value" in item
        else FIELDS[item["valueFrom"]["fieldRef"]["fieldPath"]]
        for item in container["env"]
    }


@quick
def test_manifests_are_valid() -> None:
    """Against the Kubernetes schemas, strictly.

    No field that does not exist. Three kinds are not Kubernetes' own.
    """
    assert set(ACTIVE) == {"Service", "ServiceAccount", "DaemonSet"} == set(PIP) - {"ConfigMap"}
    assert set(OPTIONAL) == {
        "PodMonitor",
        "PrometheusRule",
        "ConfigMap",
        "SecurityContextConstraints",
        "ClusterRole",
        "ClusterRoleBinding",
    }
    for manifest in (*ACTIVE.values(), *PIP.values(), *OPTIONAL.values()):
        if manifest["kind"] not in ("PodMonitor", "PrometheusRule", "SecurityContextConstraints"):
            kubernetes_validate.validate(
                manifest, kubernetes_validate.latest_version(), strict=True
            )
    broken = json.loads(
        json.dumps(ACTIVE["DaemonSet"]).replace("terminationGracePeriodSeconds", "gracePeriod")
    )
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_manifest_keeps_its_promises() -> None:
    labels = ACTIVE["DaemonSet"]["spec"]["template"]["metadata"]["labels"]
    selector = {"app.kubernetes.io/name": "pmtud"}
    assert (
        labels
        == ACTIVE["DaemonSet"]["metadata"]["labels"]
        == ACTIVE["Service"]["metadata"]["labels"]
    )
    assert labels["app.kubernetes.io/version"] == pmtud.__version__
    assert (
        ACTIVE["DaemonSet"]["spec"]["selector"]["matchLabels"]
        == selector
        == ACTIVE["Service"]["spec"]["selector"]
    )
    assert OPTIONAL["PodMonitor"]["spec"]["selector"]["matchLabels"] == selector
    assert ACTIVE["Service"]["spec"]["clusterIP"] == "None"
    assert ACTIVE["Service"]["spec"]["publishNotReadyAddresses"] is True
    assert (
        POD["automountServiceAccountToken"]
        is ACTIVE["ServiceAccount"]["automountServiceAccountToken"]
        is False
    )
    assert POD["hostNetwork"] is True
    assert POD["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert POD["shareProcessNamespace"] is True
    assert POD["priorityClassName"] == "system-node-critical"
    assert POD["tolerations"] == [{"operator": "Exists"}]
    assert ACTIVE["DaemonSet"]["spec"]["updateStrategy"]["rollingUpdate"] == {
        "maxUnavailable": "10%"
    }
    assert POD["securityContext"] == {"seccompProfile": {"type": "RuntimeDefault"}}
    assert "initContainers" not in POD
    for container in POD["containers"] + PIP_POD["containers"] + PIP_POD["initContainers"]:
        assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", container["image"])
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"]["drop"] == ["ALL"]
        assert {"memory"} == set(container["resources"]["limits"])
    assert POD["containers"][0]["securityContext"]["capabilities"]["add"] == [
        "NET_ADMIN",
        "NET_RAW",
    ]
    monitored = OPTIONAL["PodMonitor"]["spec"]
    jobs = set(re.findall(r'job="([^"]+)"', README))
    assert jobs == {labels[monitored["jobLabel"]]} == set(re.findall(r'# job="([^"]+)"', MANIFEST))
    assert OPTIONAL["ClusterRole"]["rules"] == [
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "watch"]}
    ]


@quick
def test_manifest_options_are_the_programs() -> None:
    container = POD["containers"][0]
    service = ACTIVE["Service"]
    config = parse_options([], **environment(container))
    assert config.peer_sources == ("dns:" + service["metadata"]["name"],)
    assert config.nodename == "worker-1"
    (other,) = re.findall(r"# - \{name: PMTUD_PEERS, value: \"(.*)\"\}", MANIFEST)
    assert parse_options(["--peers", other]).peer_sources == ("kube:nodes",)
    # Where a kubelet's probes go if they name no host
    assert config.metrics_addr == FIELDS["status.hostIP"]
    commands = README.partition("### Kubernetes\n\n```\n")[2].partition("```")[0].splitlines()
    assert len(commands) == 4
    assert all(f"#   {line}\n" in MANIFEST for line in commands)
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["path"] in ("/healthz", "/readyz")
        assert asked == {
            "path": asked["path"],
            "port": "metrics",
        }


def test_the_port_of_the_manifest_is_nobody_elses() -> None:
    """No node port, no ephemeral one, none of the exporters', Kubernetes' and the CNIs'.

    One number everywhere.
    """
    container = POD["containers"][0]
    number = pmtud.OTHER_PORT
    config = parse_options([], **environment(container))
    assert config.metrics_port == number  # where it is taken the daemon ends
    assert config.metrics_required is True
    assert container["ports"] == [{"name": "metrics", "containerPort": number}]
    assert ACTIVE["Service"]["spec"]["ports"] == [{"name": "metrics", "port": number}]
    assert OPTIONAL["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["port"] == "metrics"
    assert 11000 <= number < 30000 == pmtud.NODE_PORTS.start
    assert pmtud.NODE_PORTS.stop == 32768
    assert pmtud.Config().metrics_port in pmtud.NODE_PORTS
    assert f"PMTUD_METRICS_PORT={number}" in README


def test_the_security_context_constraints_admit_the_pod() -> None:
    """All that the pod asks for, with pip or without, and no more."""
    allowed = OPTIONAL["SecurityContextConstraints"]
    account = ACTIVE["ServiceAccount"]["metadata"]
    assert allowed["users"] == [f"system:serviceaccount:{account['namespace']}:{account['name']}"]
    granted = {key for key, value in allowed.items() if key.startswith("allow") and value is True}
    assert granted == {"allowHostNetwork", "allowHostPorts"}
    assert (
        allowed["allowedCapabilities"]
        == POD["containers"][0]["securityContext"]["capabilities"]["add"]
    )
    volumes = {
        next(key for key in volume if key != "name")
        for volume in POD["volumes"] + PIP_POD["volumes"]
    }
    assert set(allowed["volumes"]) == volumes | {"projected"}
    assert allowed["readOnlyRootFilesystem"] is True
    assert allowed["seccompProfiles"] == ["runtime/default"]
    assert (
        "kubectl label namespace kube-system pod-security.kubernetes.io/enforce=privileged"
        in MANIFEST
    )


def test_a_config_map_holds_the_script() -> None:
    """One has at most 1 MiB, as JSON in which Go escapes these three.

    What kubectl applies by itself is kept in an annotation, too, of at most 262,144 bytes. README
    says that the script is longer.
    """
    text = re.sub("[<>&]", "......", json.dumps(SOURCE))
    assert 262_144 < len(text) < 400_000
    assert "kubectl apply --server-side" in README


def config_map(folder: Path, files: dict[str, bytes]) -> Path:
    """A ConfigMap as a kubelet lays it out.

    Names that are links through ..data, so that all change at once.
    """
    version = folder / "..2026_11_22_04_05_06.1234567890"
    version.mkdir(parents=True)
    (folder / "..data").symlink_to(version.name)
    for name, data in files.items():
        (version / name).write_bytes(data)
        (folder / name).symlink_to(f"..data/{name}")
    return folder


@pytest.fixture(name="wheel", scope="module")
def fixture_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, fetched and verified by the commands of the manifest."""
    folder = tmp_path_factory.mktemp("wheel")
    (commands,) = re.findall(
        r"^#   (pip download .*?sha256sum --check)$", MANIFEST, re.MULTILINE | re.DOTALL
    )
    script = re.sub(r"^# +", "", commands, flags=re.MULTILINE)
    execute("sh", "-ec", f"cd {folder}; PATH={VENV}/bin:$PATH; {script}", timeout=120)
    (wheel,) = folder.iterdir()
    assert f"--from-file={wheel.name}\n" in MANIFEST
    return wheel


def warnings(output: str) -> list[str]:
    """The warnings of a daemon on the cluster; errors circle where the fabric's hash wants it."""
    lines = [line for line in output.splitlines() if " WARNING " in line]
    return [line for line in lines if " circle between " not in line]


class FakePod:
    """The DaemonSet's pod on a host, as far as this machine can be its image.

    Volumes, mounts, user, capabilities.
    """

    def __init__(self, host: Host, spec: dict[str, Any], folder: Path, wheel: Path) -> None:
        self.host = host
        self.container = spec["containers"][0]
        self._root = folder / "root"
        # What the image's `python` stands for
        self.python = os.path.realpath(VENV / "bin" / "python")
        maps = {
            "pmtud": {"pmtud.py": PROGRAM.read_bytes()},
            "pmtud-wheel": {wheel.name: wheel.read_bytes()},
        }
        maps["pmtud-requirements"] = {
            name: text.encode() for name, text in PIP["ConfigMap"]["data"].items()
        }
        folder.chmod(0o755)
        self._root.mkdir()
        self.volumes = {volume["name"]: folder / volume["name"] for volume in spec["volumes"]}
        for volume in spec["volumes"]:
            if "configMap" in volume:
                config_map(self.volumes[volume["name"]], maps[volume["configMap"]["name"]])
            else:  # an emptyDir
                self.volumes[volume["name"]].mkdir()
                self.volumes[volume["name"]].chmod(0o777)
        for container in spec.get("initContainers", ()):
            # It has pip
            execute(*self._command(container, str(VENV / "bin" / "python")), timeout=120)

    def start(self, **environ: str) -> Process:
        """Start its only container.

        More environment than the manifest's where a test wants to see what that does.
        """
        return self.host.start(*self._command(self.container, self.python, environ))

    def enter(self, process: Process, *command: str) -> str:
        """What `kubectl exec` prints."""
        place = [f"--target={process.pid}", "--net", "--mount", "--root", "--wd"]
        return execute(
            "nsenter",
            *place,
            *self._as_in_there(self.container, environment(self.container)),
            *command,
            check=False,
        )

    @staticmethod
    def _as_in_there(container: dict[str, Any], environ: dict[str, str]) -> list[str]:
        """The start of a command line: environment, capabilities and user of a container."""
        security = container["securityContext"]
        added = "".join(f",+{name.lower()}" for name in security["capabilities"].get("add", ()))
        user = [
            f"--reuid={security['runAsUser']}",
            f"--regid={security.get('runAsGroup', 0)}",
            "--clear-groups",
        ]
        return [
            "env",
            "-i",
            "PATH=/image:/usr/bin:/bin:/usr/sbin:/sbin",
            "LANG=C.UTF-8",
            *(f"{name}={value}" for name, value in environ.items()),
            *setpriv(added),
            *user,
        ]

    def _command(
        self, container: dict[str, Any], python: str, environ: Optional[dict[str, str]] = None
    ) -> list[str]:
        """The command line that runs a container.

        A read-only root and its mounts; no library but the manifest's.
        """
        root = self._root
        base = Path(sys.base_prefix)
        places = [
            Path(place)
            for place in ("/usr", "/etc", "/lib", "/lib64", "/bin", "/sbin")
            if Path(place).exists()
        ]
        mounts = [(place, place, True) for place in (*places, base, VENV)]
        mounts += [
            (self.volumes[item["name"]], Path(item["mountPath"]), item.get("readOnly", False))
            for item in container["volumeMounts"]
        ]
        etc = next((mount for mount in mounts if str(mount[1]).startswith("/etc/")), None)
        lines = [f"mount -t tmpfs tmpfs {root}", f"cd {root}", "mkdir -p proc dev image"]
        if etc:  # its directory is not in this machine's /etc
            lines += [f"mkdir -p etc && cp -r /etc/. etc && mkdir -p .{etc[1]}"]
            mounts.remove((Path("/etc"), Path("/etc"), True))
        for source, target, read_only in mounts:
            lines += [f"mkdir -p .{target}", f"mount --rbind {source} .{target}"]
            lines += [f"mount -o remount,bind,ro .{target}"] if read_only else []
        if container is self.container:  # the library may be installed here, it is not in the image
            for prefix in {Path("/usr"), Path("/usr/local"), base}:
                lines += [
                    f"mount -t tmpfs tmpfs .{path}"
                    for path in prefix.glob("lib/python3*/*-packages")
                ]
        lines += [
            f"ln -s {python} image/python",
            "mount --bind /proc proc",
            "touch dev/null dev/urandom",
            "mount --bind /dev/null dev/null",
            "mount --bind /dev/urandom dev/urandom",
            f"mount -o remount,ro {root}",
        ]
        there = self._as_in_there(container, {**environment(container), **(environ or {})})
        lines += [f'exec chroot {root} {shlex.join(there)} "$@"']
        command = container["command"] + container.get("args", [])
        return [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-euc",
            "\n".join(lines),
            "sh",
            *command,
        ]


@with_wheel
@pytest.mark.parametrize("spec", [POD, PIP_POD], ids=["wheel", "pip"])
def test_containers_of_the_daemonset(
    cluster: Cluster, tmp_path: Path, wheel: Path, spec: dict[str, Any]
) -> None:
    """The library from the wheel, or fetched by its hash.

    The daemon from the ConfigMap finds peers and rescues.
    """
    node = cluster.nodes[0]
    port = pmtud.OTHER_PORT
    pod = FakePod(node, spec, tmp_path, wheel)
    assert sorted(
        path.name for path in pod.volumes["libs"].iterdir() if not path.name.startswith("..")
    ) == (
        [wheel.name] if spec is POD else ["prometheus_client", "prometheus_client-0.26.0.dist-info"]
    )
    ask = partial(get, node, port=port, address="10.0.0.11")
    with NameServer(cluster, "10.0.0.1") as names:
        names.serve(*Cluster.node_addresses(4, 6))
        process = pod.start()
        process.wait_for("on worker-1: errors come in on eth0")
        with daemons(cluster.nodes[1:], "--peers", ALL_PEERS):
            assert poll(lambda: ask("/readyz")[0] == "200", 10), process.output()
            assert 'pmtud_peers{source="dns:pmtud"} 4.0\n' in ask("/metrics")[1]
            for address in ("10.96.0.1", "127.0.0.1"):
                assert get(node, "/metrics", port, address)[0] == "000"
            for family in (4, 6):
                assert len(cluster.download("pod", family)) == 23
        status = Path(f"/proc/{process.pid}/status").read_text()
        fields = dict(re.findall(r"(\w+):\s+(.+)", status))
        assert (fields["CapPrm"], fields["CapBnd"], fields["NoNewPrivs"]) == (
            "0000000000003000",
        ) * 2 + ("1",)
        checked = pod.enter(process, "python", "/opt/pmtud/pmtud.py", "check", "--json")
        found = Diagnosis(0, json.loads(checked)["checks"])
        assert json.loads(checked)["node"] == "worker-1"
        assert found.of("daemon")["found"].startswith("running, pid ")
        assert found.of("http")["found"] == f"the daemon answers on 10.0.0.11 port {port}"
        assert found.of("peers")["found"] == (
            "4 on-link, 0 routed; 10.0.0.11 is this node; fd00::11 is this node"
        )
        assert process.stop() == 0
    assert not warnings(process.output())


@with_wheel
def test_a_container_that_starts_again_finds_its_bytecode(
    cluster: Cluster, tmp_path: Path, wheel: Path
) -> None:
    """In the same pod: nothing is compiled but what Python never keeps, the script and what is in a
    wheel.
    """
    pod = FakePod(cluster.nodes[0], POD, tmp_path, wheel)
    compiled = []
    for _ in range(2):
        process = pod.start(PYTHONVERBOSE="1")
        process.wait_for("limits:", 20)
        assert poll(
            lambda: get(pod.host, "/metrics", pmtud.OTHER_PORT, "10.0.0.11")[0] == "200", 10
        ), process.output()
        assert process.stop() == 0
        compiled.append(
            re.findall(r"^# code object from (/.+\.py)$", process.output(), re.MULTILINE)
        )
    assert len(compiled[0]) > 50
    assert compiled[1] == []
    size = 0
    for path in pod.volumes["bytecode"].rglob("*"):
        size += path.stat().st_size
    (volume,) = (volume for volume in POD["volumes"] if volume["name"] == "bytecode")
    assert size < 8 << 20
    assert volume["emptyDir"] == {"sizeLimit": "16Mi"}


@with_wheel
def test_the_daemonset_where_its_port_is_taken(
    cluster: Cluster, tmp_path: Path, wheel: Path
) -> None:
    """It ends, and says why.

    It would never get ready, and the probes would ask whoever has the port.
    """
    pod = FakePod(cluster.nodes[0], POD, tmp_path, wheel)
    stranger = pod.host.inside(partial(socket.create_server, ("10.0.0.11", pmtud.OTHER_PORT)))
    with contextlib.closing(stranger):
        process = pod.start()
        assert poll(lambda: process.returncode() is not None, 10)
    assert process.returncode() == 1
    assert process.output() == (
        "pmtud: metrics cannot be served on 10.0.0.11 port "
        f"{pmtud.OTHER_PORT} (Address already in use); choose others with --metrics-addr and "
        f"--metrics-port, port 0 "
        "for none\n"
    )


@with_wheel
def test_the_daemonset_without_the_library(cluster: Cluster, tmp_path: Path, wheel: Path) -> None:
    """It says what is missing; without HTTP, as the manifest says, all else works."""
    pod = FakePod(cluster.nodes[0], POD, tmp_path, wheel)
    pod.volumes["libs"] = tmp_path / "nothing"
    pod.volumes["libs"].mkdir()
    process = pod.start()
    assert poll(lambda: process.returncode() is not None, 10)
    assert process.returncode() == 2
    assert process.output().startswith(
        "pmtud: --metrics-port and --metrics-addr need prometheus-client: "
    )
    with NameServer(cluster, "10.0.0.1") as names:
        names.serve(*Cluster.node_addresses(4))
        process = pod.start(PMTUD_METRICS_PORT="0")
        process.wait_for("peers changed")
        with daemons(cluster.nodes[1:], "--peers", ALL_PEERS):
            assert len(cluster.download("pod")) == 23
        assert process.stop() == 0
    assert not warnings(process.output())


def setpriv(capabilities: str) -> tuple[str, ...]:
    """The start of a command line that leaves root these capabilities and no others."""
    return (
        "setpriv",
        f"--bounding-set=-all{capabilities}",
        f"--inh-caps=-all{capabilities}",
        "--no-new-privs",
    )


@pytest.fixture(name="program")
def fixture_program(tmp_path: Path) -> Path:
    """A copy where root may read it without any privilege, as perhaps it may not in somebody's
    home.
    """
    return Path(shutil.copy(PROGRAM, tmp_path))


@pytest.mark.parametrize("capabilities", ["", ",+net_raw", ",+net_admin"])
def test_without_privileges(cluster: Cluster, program: Path, capabilities: str) -> None:
    """Without one of the two capabilities: exit 1, and the line names both."""
    code, output = run_to_end(
        cluster.nodes[0], python=(*setpriv(capabilities), sys.executable), program=program
    )
    assert code == 1
    assert output.count("\n") == 1
    assert output.endswith("CAP_NET_ADMIN and CAP_NET_RAW are needed: run as root, or grant both\n")
    assert "pmtud" not in cluster.nodes[0].run("nft", "list", "ruleset")


def test_with_the_two_capabilities_and_nothing_else(cluster: Cluster, program: Path) -> None:
    """CAP_NET_ADMIN and CAP_NET_RAW are enough for the whole job."""
    command = (*setpriv(",+net_admin,+net_raw"), sys.executable, str(program), "--peers", ALL_PEERS)
    processes = [node.start(*command) for node in cluster.nodes]
    for process in processes:
        process.wait_for("limits:")
    for family in (4, 6):
        assert len(cluster.download("pod", family)) == 23
    status = Path(f"/proc/{processes[0].pid}/status").read_text()
    assert re.findall(r"CapEff:\s+(\w+)", status) == ["0000000000003000"]  # bits 12 and 13
    assert [process.stop() for process in processes] == [0, 0, 0]
    for node in cluster.nodes:
        assert "pmtud" not in node.run("nft", "list", "tables")


def test_root_drops_all_other_privileges(cluster: Cluster, tmp_path: Path) -> None:
    """In every thread, before the first error is handled.

    Root's own peer file is still read, routes still change.
    """
    node = cluster.nodes[0]
    path = tmp_path / "peers"
    path.write_text("10.0.0.12\n")
    path.chmod(0o600)
    tmp_path.chmod(0o700)
    with daemons([node], "--peers", f"file:{path},localhost") as [process]:
        assert get(node, "/metrics")[0] == "200"
        for status in Path(f"/proc/{process.pid}/task").glob("*/status"):
            fields = dict(re.findall(r"(\w+):\s+(.+)", status.read_text()))
            found = [
                fields[name]
                for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")
            ]
            assert found == ["0" * 16, *["0000000000003000"] * 3, "0" * 16, "1"], status
        assert len(list(Path(f"/proc/{process.pid}/task").iterdir())) >= 3
        path.write_text("10.0.0.12\n10.0.0.13\n")  # new peers: every raw socket is opened anew
        assert metric_becomes(node, f'pmtud_peers{{source="file:{path}"}}', 2)
        # Another interface: rules replaced
        node.ip("route replace default via 172.20.20.2 dev mgmt")
        try:
            process.wait_for("the default route moved", 15)
        finally:
            node.ip("route replace default via 10.0.0.1")
        assert 'iifname "mgmt"' in node.run("nft", "list", "ruleset")
        process.wait_for(" now=eth0", 15)
        assert not warnings(process.output())


def test_a_library_that_only_all_of_roots_privileges_reach(
    cluster: Cluster, tmp_path: Path
) -> None:
    """In somebody's home, closed to others.

    It is read before privileges are dropped, and scrapes work.
    """
    spec = importlib.util.find_spec("prometheus_client")
    assert spec
    assert spec.origin
    shutil.copytree(Path(spec.origin).parent, tmp_path / "home" / "prometheus_client")
    os.chown(tmp_path / "home", 1000, 1000)
    (tmp_path / "home").chmod(0o700)
    process = cluster.nodes[0].start(
        sys.executable, "-S", str(PROGRAM), env={"PYTHONPATH": str(tmp_path / "home")}
    )
    process.wait_for("limits:")
    assert get(cluster.nodes[0], "/metrics")[0] == "200"
    assert process.stop() == 0
    assert not warnings(process.output())


def test_privileges_that_cannot_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[tuple[str, object]] = []

    def refuse() -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pmtud, "drop_privileges", refuse)
    monkeypatch.setattr(pmtud, "log", lambda level, text, problem: lines.append((text, problem)))
    pmtud.keep_two_capabilities()
    assert lines == [("cannot drop privileges, going on with all", "Operation not permitted")]


def test_default_route_over_several_interfaces(cluster: Cluster) -> None:
    """A multipath default route: errors may come in on any of its interfaces."""
    node = cluster.nodes[0]
    node.ip("route replace default nexthop via 10.0.0.1 dev eth0 nexthop via 172.20.20.2 dev mgmt")
    try:
        with daemons([node]) as [process]:
            assert "errors come in on eth0, mgmt," in process.output()
    finally:
        node.ip("route replace default via 10.0.0.1")


# Nexthop objects, the default route, and the interfaces that errors come in on
DEFAULT_BY_NEXTHOP = {
    "IPv4": (("id 1 via 10.0.0.1 dev eth0",), "route add default nhid 1", "eth0"),
    "IPv4 device": (("id 1 dev mgmt",), "route add default nhid 1", "mgmt"),
    "IPv4 via IPv6": (("id 1 via fd20::2 dev mgmt",), "route add default nhid 1", "mgmt"),
    "IPv4 group": (
        ("id 1 via 10.0.0.1 dev eth0", "id 2 via 172.20.20.2 dev mgmt", "id 3 group 1,2/2,5"),
        "route add default nhid 3",
        "eth0, mgmt",
    ),
    "IPv6": (("id 1 via fd20::2 dev mgmt",), "route add ::/0 nhid 1", "mgmt"),
    "IPv6 group": (
        ("id 1 via fd20::2 dev mgmt", "id 2 via fd00::1 dev eth0", "id 3 group 1/2"),
        "route add ::/0 nhid 3",
        "mgmt, eth0",
    ),
}


@pytest.mark.parametrize("compat", [0, 1])
@pytest.mark.parametrize("name", DEFAULT_BY_NEXTHOP)
def test_default_route_by_nexthop_object(name: str, compat: int) -> None:
    """With net.ipv4.nexthop_compat_mode 0 the route holds the object's number and nothing else."""
    objects, route, ifaces = DEFAULT_BY_NEXTHOP[name]
    with PathNet() as net:
        net.node.sysctl("net.ipv4.nexthop_compat_mode", compat)
        net.node.ip(
            "route del default",
            "route del ::/0",
            *(f"nexthop add {text}" for text in objects),
            route,
        )
        with daemons([net.node]) as [process]:
            assert f"errors come in on {ifaces}," in process.output()
        net.node.ip(route.replace(" add ", " del "))
        code, said = run_to_end(net.node)
        assert code == 1
        assert "there is no default route" in said


@pytest.mark.parametrize("number", [b"", b"\xff" * 4, b"\xff" * 8])
@unit
def test_a_nexthop_number_that_is_none(number: bytes) -> None:
    assert pmtud.route_hops({pmtud.RTA_NH_ID: number}) == []


def test_default_route_by_a_nexthop_that_drops() -> None:
    """A blackhole is no way out."""
    with PathNet() as net:
        net.node.sysctl("net.ipv4.nexthop_compat_mode", 0)
        net.node.ip(
            "route del default",
            "route del ::/0",
            "nexthop add id 1 blackhole",
            "route add default nhid 1",
        )
        code, said = run_to_end(net.node)
        assert code == 1
        assert "there is no default route" in said


BROKEN_SOCKET = """
import errno
class Breaking(pmtud.Nflog):
    left = 1
    def read(self):
        if Breaking.left:
            Breaking.left -= 1
            raise OSError(errno.EIO, "broken by the test")
        return super().read()
pmtud.Nflog = Breaking
"""


TAKEN_SOCKET = f"""
{BROKEN_SOCKET}
def close_and_take(self):
    super(Breaking, self).close()
    self.other = Breaking.__mro__[1](33)
Breaking.close = close_and_take
import warnings
warnings.simplefilter("ignore", ResourceWarning)  # what it takes stays open
"""


def test_a_broken_nflog_socket_whose_group_is_taken_ends_the_daemon(cluster: Cluster) -> None:
    """Exit 1 and one line; a service manager starts it again."""
    node = cluster.nodes[ingress(cluster, 4)]
    process = patched_daemon(node, TAKEN_SOCKET, *peers_of(4))
    process.wait_for("limits:")
    inject(cluster.router, 4, flow_errors(4, count=1))
    assert poll(lambda: process.returncode() is not None, 5), process.output()
    last = process.output().splitlines()[-1]
    assert process.returncode() == 1 and last.startswith(
        "pmtud: NFLOG group 33 is taken by port id"
    ), process.output()
    assert "pmtud" not in node.run("nft", "list", "tables")


def test_a_broken_nflog_socket_is_opened_again(cluster: Cluster) -> None:
    """The daemon goes on with a new socket; what had arrived by then is gone."""
    node = cluster.nodes[ingress(cluster, 4)]
    process = patched_daemon(node, BROKEN_SOCKET, *peers_of(4))
    process.wait_for("limits:")
    inject(cluster.router, 4, flow_errors(4, count=1))
    process.wait_for("the NFLOG socket broke and was opened again")
    inject(cluster.router, 4, flow_errors(4))
    received(node, ERRORS)
    assert process.stop() == 0


def test_summary_of_the_last_minute(cluster: Cluster) -> None:
    """One line with what changed, none while nothing does; here a minute is a second long."""
    node = cluster.nodes[ingress(cluster, 4)]
    process = patched_daemon(node, SHORT_MINUTE, *peers_of(4))
    process.wait_for("limits:")
    inject(cluster.router, 4, flow_errors(4))
    received(node, ERRORS)

    def summed(name: str) -> int:
        return sum(map(int, re.findall(rf"last minute.* {name}=(\d+)", process.output())))

    assert poll(lambda: (summed("received"), summed("copies")) == (ERRORS, 2 * ERRORS), 5), (
        process.output()
    )
    lines = process.output().count("last minute")
    time.sleep(2.2)  # two quiet minutes, to see that they pass in silence
    assert process.output().count("last minute") == lines
    assert process.stop() == 0


def test_totals_keep_the_peers_that_left(cluster: Cluster, tmp_path: Path) -> None:
    """Minutes and the last line count every copy.

    The series of who has left are gone all the same.
    """
    node = cluster.nodes[ingress(cluster, 4)]
    path = tmp_path / "peers"
    path.write_text("10.0.0.77\n10.0.0.78\n10.0.0.79\n")
    options = ("--peers", f"file:{path}", "--flow-interval", "0")
    process = patched_daemon(node, SHORT_MINUTE, *options)
    process.wait_for("limits:")
    inject(cluster.router, 4, flow_errors(4))
    received(node, ERRORS)
    path.write_text("10.0.0.80\n")
    process.wait_for("peers changed")
    inject(cluster.router, 4, flow_errors(4))
    received(node, 2 * ERRORS)
    node.ip("route add unreachable 10.0.0.80")
    try:
        inject(cluster.router, 4, flow_errors(4))
        samples = received(node, 3 * ERRORS)
    finally:
        node.ip("route del unreachable 10.0.0.80")
    names = {name for name in samples if "{peer=" in name and "other" not in name}
    assert {name.partition("{")[2] for name in names} == {'peer="10.0.0.80"}'}
    series = {name.partition("{")[0] for name in names} - {"pmtud_peer_resolved"}
    kinds = ("copies_sent", "copy_errors", "copies_received")
    assert series == {f"pmtud_{kind}_total" for kind in kinds}
    path.write_text("10.0.0.81\n")
    assert poll(lambda: process.output().count("peers changed") == 2, 5)
    time.sleep(1.2)  # a minute more
    assert process.stop() == 0
    minutes = [line for line in process.output().splitlines() if "last minute" in line]
    (stopped,) = [line for line in process.output().splitlines() if " stopped " in line]
    for name, count in (("copies", 4 * ERRORS), ("copy_errors", ERRORS)):
        assert f" {name}={count} " in f"{stopped} "
        counts = re.findall(rf" {name}=(-?\d+)", "\n".join(minutes))
        assert sum(map(int, counts)) == count
    assert "=-" not in process.output()


@pytest.mark.parametrize("python", interpreters())
def test_every_python_passes_the_unit_tests(python: str) -> None:
    """Each in a virtual environment of its own, which stays for the next time."""
    venv = VENV / f"units-{Path(python).name}"
    environ = {**ENVIRONMENT, "PMTUD_VENV": str(venv), "PMTUD_TEST_EXAMPLES": "50"}
    environ["PMTUD_TEST_PICTURES"] = "0"
    done = subprocess.run(
        [python, __file__, "unit", "-x"], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and re.search(r"^\d+ passed", done.stdout, re.M), (
        done.stdout[-4000:] + done.stderr
    )


@pytest.mark.parametrize("python", interpreters())
def test_every_python_does_the_whole_job(cluster: Cluster, python: str) -> None:
    """Both families and every kind of service, without one warning."""
    processes = [
        node.start(python, "-Werror", str(PROGRAM), "--peers", ALL_PEERS) for node in cluster.nodes
    ]
    for process in processes:
        process.wait_for("limits:")
    finished = [len(cluster.download(service, family)) for family, service in CASES]
    assert [process.stop() for process in processes] == [0, 0, 0]
    assert finished == [23] * 6
    assert "Traceback" not in processes[0].output()


# -----------------------------------------------------------------------------
# Section: doctor -- each check in the good and the bad state, and the printed fix run

RUNNER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import pmtud
options, check = map(json.loads, sys.argv[2:])
asked = pmtud.parse_args(["check", "host.invalid", *options], {})
sys.exit(pmtud.examine(asked.config, *check, asked.source))
"""  # not the command line: /etc/cni/net.d is this machine's, each test has its own
NOBODYS = RUNNER.replace(
    "sys.exit",
    """
import os, shutil, subprocess, textwrap  # as long as everything can be read, wherever it lies
os.setgroups([])
os.setresuid(65534, 65534, 65534)
sys.exit""",
)


class Diagnosis(NamedTuple):
    """What `check --json` said: its exit code and its findings."""

    code: int
    checks: list[dict[str, str]]

    def of(self, check: str, word: str = "") -> dict[str, str]:
        """The one finding of a check whose text has this word."""
        (found,) = [
            entry for entry in self.checks if entry["check"] == check and word in entry["found"]
        ]
        return found

    def status(self, check: str, word: str = "") -> str:
        """How that finding judges."""
        return self.of(check, word)["status"]


def doctor_argv(
    options: tuple[str, ...],
    hosts: tuple[str, ...],
    as_json: bool,
    cni_dir: str,
    runner: str = RUNNER,
) -> list[str]:
    """The command that runs the doctor."""
    arguments = json.dumps(options), json.dumps([hosts, as_json, True, cni_dir])
    return [sys.executable, "-c", runner, str(HERE), *arguments]


def diagnose(
    host: Host,
    *options: str,
    hosts: tuple[str, ...] = (),
    cni_dir: str = "/none",
    before: tuple[str, ...] = (),
    runner: str = RUNNER,
) -> Diagnosis:
    """Run the doctor in a namespace."""
    argv = [
        "ip",
        "netns",
        "exec",
        host.namespace,
        *before,
        *doctor_argv(options, hosts, True, cni_dir, runner),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30 * PATIENCE, check=False)
    assert done.returncode in (0, 1, 2) and not done.stderr, done.stderr
    answer = json.loads(done.stdout)
    assert answer["schema"] == 1
    assert set(answer) == {"schema", "node", "summary", "checks"}
    for entry in answer["checks"]:
        assert bool(entry["next_step"]) <= bool(entry["risk"])
        if not entry["next_step"]:
            del entry["next_step"], entry["risk"]
    return Diagnosis(done.returncode, answer["checks"])


def text_of(host: Host, *options: str, hosts: tuple[str, ...] = (), cni_dir: str = "/none") -> str:
    """What the doctor prints for people."""
    return host.run(*doctor_argv(options, hosts, False, cni_dir), check=False, timeout=30)


STARTS = (
    "systemctl enable --now pmtud",
    "install pmtud.py /usr/local/bin && cp pmtud.service /etc/systemd/system && "
    "systemctl enable --now pmtud",
    "kubectl apply -f daemonset.yaml",
)


def run_fix(
    host: Host, finding: dict[str, str], wait_for: str = "", *options: str
) -> Process | None:
    """Run the printed commands, the next step's as well.

    Where they start the daemon, as a unit of this machine, it is started from here instead, and
    left running once it says `wait_for`.
    """
    if wait_for:
        assert finding["fix"] in STARTS
        process = host.start(sys.executable, SCRIPT, "--metrics-port", "0", *options)
        process.wait_for(wait_for)
        return process
    commands = f"{finding['fix']}\n{finding.get('next_step', '')}"
    assert commands.strip() and not any(start in commands for start in STARTS), finding
    host.run("sh", "-ec", commands)
    return None


class OneNode(Net):
    """node -- router, one link; the default route of the node leads to the router."""

    def build(self) -> None:
        self.node = self.host("node")
        self.router = self.host("router", forward=True)
        self.link(self.node, self.router, names=("eth0", "to-node"))
        self.node.ip(
            "addr add 10.0.0.2/24 dev eth0",
            "addr add fd00::2/64 dev eth0",
            "addr add 10.96.0.1/32 dev lo",
            "route add default via 10.0.0.1",
            "route add ::/0 via fd00::1",
        )
        self.router.ip("addr add 10.0.0.1/24 dev to-node", "addr add fd00::1/64 dev to-node")


@pytest.fixture
def node() -> Iterator[Host]:
    """The node of a fresh OneNode."""
    with OneNode() as net:
        yield net.node


@quick
def test_a_good_node_is_all_ok(node: Host) -> None:
    """Without the daemon a warning; the fix starts it: exit 0, and nothing to repair."""
    bad = diagnose(node)
    assert bad.code == 1
    assert bad.status("daemon") == "WARN"
    assert bad.of("daemon")["found"] == "not running"
    daemon = run_fix(node, bad.of("daemon"), "limits:")
    good = diagnose(node)
    assert good.code == 0
    assert {entry["status"] for entry in good.checks} == {"OK"}
    assert not any(entry["fix"] for entry in good.checks)
    assert daemon
    assert good.of("daemon")["found"].startswith(f"running, pid {daemon.pid} (/")
    assert [entry["check"] for entry in good.checks] == [
        "privileges",
        "nftables",
        "nflog_group",
        "daemon",
        "nflog_rule",
        "guard",
        "delivery",
        "rp_filter",
        "ipv6",
        "programs",
        "ip_no_pmtu_disc",
        "tcp_mtu_probing",
        "min_pmtu",
        "conntrack",
        "peers",
        "mtu",
    ]


# Loads a program of two instructions (r0 = what lets packets pass, exit) and attaches it to an
# interface, for as long as this process runs; arguments: index, kinds of program and of attachment
BPF_PROGRAM = """
import ctypes, os, platform, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
number = {"x86_64": 321, "aarch64": 280}[platform.machine()]
def bpf(command, given):
    given = ctypes.create_string_buffer(given.ljust(128, b"\\0"), 128)
    found = libc.syscall(number, command, given, 128)
    if found < 0:
        sys.exit(os.strerror(ctypes.get_errno()))
    return found
index, kind, attach = map(int, sys.argv[1:])
passes = {3: -1, 6: 2}[kind]
code = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xb7, 0, 0, passes, 0x95, 0, 0, 0))
license = ctypes.create_string_buffer(b"GPL")
program = struct.pack("=IIQQ", kind, 2, ctypes.addressof(code), ctypes.addressof(license))
link = bpf(28, struct.pack("=IIII", bpf(5, program), index, attach, 0))
print("attached", flush=True)
time.sleep(600)
"""


def test_check_sees_programs(node: Host) -> None:
    """Of tc, which `tc` shows, and of TCX, which it does not."""
    found = diagnose(node).of("programs")
    assert found["status"] == "OK"
    assert found["found"] == "none at egress of eth0"
    with egress_filters([node]):
        found = diagnose(node).of("programs")
        assert found["status"] == "WARN"
        assert found["found"].startswith("at egress of eth0 (bpf) may drop copies; see whether ")
    index = str(node.inside(lambda: socket.if_nametoindex("eth0")))
    tcx = ("3", "47"), "at egress of eth0 (1 by TCX) may drop copies; see whether copies arrive"
    xdp = ("6", "37"), "XDP on eth0 sees errors before the kernel; see whether they come"
    for kinds, says in (tcx, xdp):
        program = node.start(sys.executable, "-c", BPF_PROGRAM, index, *kinds)
        program.wait_for("attached")
        found = diagnose(node).of("programs")
        assert found["status"] == "WARN"
        assert found["found"].startswith(says)
        program.stop()
        assert poll(lambda: diagnose(node).status("programs") == "OK", 5)


def test_check_says_where_programs_cannot_be_seen(node: Host) -> None:
    """A container's seccomp profile refuses bpf(), as the kernel does without privileges."""
    found = diagnose(node, before=("setpriv", "--bounding-set=-net_admin,-sys_admin,-bpf"))
    said = found.of("programs")
    assert said["status"] == "WARN"
    assert said["found"].startswith("programs on eth0 cannot be seen, bpf() is refused: Operation ")


def test_check_knows_ebpf_data_planes(node: Host) -> None:
    """Calico's, which broadcast peers and other marks do not suit; Cilium's without kube-proxy."""
    with calico_bpf([node]):
        plain = diagnose(node).of("programs")
        group = diagnose(node, "--peers", "10.0.0.255").of("programs")
        unmarked = diagnose(node, "--copy-mark", "none").of("programs")
        command = (sys.executable, SCRIPT, "--metrics-port", "0", "--peers", "10.0.0.255")
        printed = node.run(sys.executable, SCRIPT, "rules")
        warned = node.start(*command)
        warned.wait_for("Calico's eBPF data plane does not give pods what comes by broadcast")
        assert warned.stop() == 0
    assert plain["status"] == "OK"
    assert plain["found"].endswith("with its mark 0x3000000")
    assert "icmp code frag-needed meta mark set 0x3000000\n" in printed
    assert (
        "iptables -t mangle -A OUTPUT -p icmp -m icmp --icmp-type 3/4 -m mark --mark 0x2e"
        in printed
    )
    assert printed.count("-j MARK --set-mark 0x3000000\n") == 2
    assert "0x3000000" not in node.run(sys.executable, SCRIPT, "rules")
    assert group["status"] == "FAIL"
    assert group["found"].endswith("multicast; list the nodes")
    assert unmarked["status"] == "FAIL"
    assert unmarked["found"].endswith("use --copy-mark auto")
    node.ip("link add cilium_host type bridge", "link set cilium_host up")
    assert diagnose(node).status("programs") == "WARN"
    node.run("iptables", "-t", "nat", "-N", "KUBE-SERVICES")
    assert diagnose(node).status("programs") == "OK"
    node.ip("link del cilium_host")


@pytest.mark.parametrize(
    ("options", "env"),
    [
        (("--dry-run",), {}),
        (("--no-rescue", "--peers", "10.0.0.9"), {}),
        ((), {"PMTUD_DRY_RUN": "Yes"}),
    ],
)
def test_a_daemon_that_delivers_nothing(
    node: Host, options: tuple[str, ...], env: dict[str, str]
) -> None:
    """It is running, but rescues nobody."""
    node.sysctl("net.ipv4.conf.all.rp_filter", 1)
    node.start(sys.executable, SCRIPT, "--metrics-port", "0", *options, env=env).wait_for("limits:")
    found = diagnose(node)
    assert found.status("daemon") == "WARN"
    assert found.of("daemon")["found"].startswith("--dry-run or --no-rescue: pid ")
    assert found.status("rp_filter") == "WARN"


def test_a_daemon_on_another_interface(node: Host) -> None:
    """What comes in where it does not listen is not rescued; the fix names every interface."""
    node.ip("link add eth1 type veth peer name far", "link set eth1 up", "link set far up")
    node.sysctl("net.ipv4.conf.all.rp_filter", 1)
    daemon = node.start(sys.executable, SCRIPT, "--metrics-port", "0", "--iface", "eth1")
    daemon.wait_for("limits:")
    assert diagnose(node, "--iface", "eth1").status("rp_filter") == "OK"
    bad = diagnose(node, "--iface", "eth0,eth1").of("rp_filter", "eth0:")
    assert bad["status"] == "WARN"
    assert bad["fix"] == ""
    assert bad["found"].endswith("let it take errors on eth0, by --iface")
    daemon.stop()
    more = ("--metrics-port", "0", "--iface", "eth0,eth1")
    node.start(sys.executable, SCRIPT, *more).wait_for("limits:")
    assert diagnose(node, "--iface", "eth0,eth1").status("rp_filter", "eth0:") == "OK"


STRANGER = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    server_version, sys_version = "stranger/1", ""
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"ok\\n")
http.server.HTTPServer(("", 8080), Handler).serve_forever()
"""
# What kube-proxy does for a Service with this node port: to each address of the node, wherever
# packets come from
NODE_PORT = """
table inet services {{
    chain translate {{ fib daddr type local tcp dport {port} dnat ip to 10.0.0.1:{target}; }}
    chain prerouting {{ type nat hook prerouting priority dstnat; jump translate; }}
    chain output {{ type nat hook output priority -100; jump translate; }}
    chain postrouting {{ type nat hook postrouting priority srcnat; ct status dnat masquerade; }}
}}
"""


def test_who_answers_where_the_daemon_listens(node: Host) -> None:
    """A Service that takes the port over answers the node's probes.

    FAIL; the fix is a port no Service can have.
    """
    router = node.net.hosts[1]
    options = ["--nodename", "a"]
    env = {"PMTUD_METRICS_ADDR": "0.0.0.0"}
    router.start(sys.executable, "-c", STRANGER)
    node.sysctl("net.ipv4.ip_forward", 1)
    daemon = node.start(sys.executable, SCRIPT, *options)
    daemon.wait_for("limits:")
    good = {
        "check": "http",
        "status": "OK",
        "found": "the daemon answers on 10.0.0.2, fd00::2 port 30040",
        "fix": "",
    }
    assert diagnose(node).of("http") == good
    node.run("nft", "-f", "-", input=NODE_PORT.format(port=30040, target=8080))
    for host in (node, router):
        assert poll(
            lambda host=host: (
                "stranger/1"  # type: ignore[misc]
                in host.run(
                    "curl", "-si", "--max-time", "2", "http://10.0.0.2:30040/healthz", check=False
                )
            ),
            5,
        )
    bad = diagnose(node)
    assert bad.of("http") == {
        "check": "http",
        "status": "FAIL",
        "found": "10.0.0.2 port 30040: somebody else answers, stranger/1 (a Service "
        "with nodePort 30040?); start the daemon with --metrics-port 23040",
        "fix": "ss -Htlnp sport = :30040",
    }
    assert bad.code == 2
    assert daemon.stop() == 0
    daemon = node.start(sys.executable, SCRIPT, "--metrics-port", "23040", env=env)
    daemon.wait_for("limits:")
    assert diagnose(node).of("http") == {
        **good,
        "found": "the daemon answers on 10.0.0.2 port 23040",
    }


def test_another_pmtud_answers_where_the_daemon_listens(node: Host) -> None:
    """One of another node, behind a Service.

    One of another group on this node, which had the port first.
    """
    router = node.net.hosts[1]
    version = pmtud.__version__
    server = f"pmtud/{version} ({{}}, NFLOG group {{}})"
    answer = f"10.0.0.2 port {{}}: somebody else answers, {server} ({{}}?)"
    other = router.start(sys.executable, SCRIPT, "--iface", "to-node", "--nodename", "b")
    mine = node.start(
        sys.executable, SCRIPT, env={"PMTUD_NODENAME": "a", "PMTUD_METRICS_PORT": "29040"}
    )
    for process in (other, mine):
        process.wait_for("limits:")
    assert diagnose(node).status("http") == "OK"
    node.run("nft", "-f", "-", input=NODE_PORT.format(port=29040, target=30040))
    found = diagnose(node).of("http")
    assert found["found"] == answer.format(29040, "b", 33, "another program")
    assert found["fix"] == "ss -Htlnp sport = :29040"
    node.run("nft", "delete", "table", "inet", "services")
    assert diagnose(node).status("http") == "OK"
    assert mine.stop() == 0
    first = node.start(sys.executable, SCRIPT, "--nflog-group", "40", "--nodename", "a")
    first.wait_for("limits:")
    second = node.start(sys.executable, SCRIPT, "--nodename", "a")
    second.wait_for("limits:")
    assert (
        diagnose(node).of("http")["found"]
        == answer.format(30040, "a", 40, "a Service with nodePort 30040")
        + "; start the daemon with --metrics-port 23040"
    )
    assert diagnose(node, "--nflog-group", "40").status("http") == "OK"


def test_a_daemon_that_does_not_answer(node: Host) -> None:
    """A Service without endpoints refuses what is sent to its node port; and a daemon may hang."""
    daemon = node.start(sys.executable, SCRIPT)
    daemon.wait_for("limits:")
    node.run(
        "nft",
        "table inet f { chain c { type filter hook output priority 0; "
        "tcp dport 30040 reject with tcp reset; }; }",
    )
    found = diagnose(node).of("http")
    assert found["status"] == "FAIL"
    assert found["found"] == (
        "10.0.0.2 port 30040: Connection refused: the daemon is not heard there; "
        "start the daemon with --metrics-port 23040"
    )
    node.run("nft", "delete", "table", "inet", "f")
    node.run(
        "nft",
        "table inet f { chain c { type filter hook output priority 0; tcp sport 30040 drop; }; }",
    )
    found = diagnose(node).of("http")
    assert found["found"].startswith(
        "10.0.0.2 port 30040: timed out: the daemon is not heard there"
    )
    node.run("nft", "delete", "table", "inet", "f")
    os.kill(daemon.pid, signal.SIGSTOP)
    stopped = diagnose(node)
    found = stopped.of("daemon")
    assert found["status"] == "FAIL"
    assert found["fix"] == f"kill -CONT {daemon.pid}"
    assert found["found"].startswith(f"stopped, pid {daemon.pid} (")
    assert "http" not in [finding["check"] for finding in stopped.checks]
    subprocess.run(shlex.split(found["fix"]), check=True)
    assert diagnose(node).status("http") == "OK"


def test_the_check_leaves_nothing_behind(node: Host) -> None:
    """No table is ever made, no group stays bound, no setting moves."""
    monitor = node.start("nft", "monitor")
    found = "find /proc/sys/net -type f -perm -400 | grep -v -e nf_conntrack_count -e flush"
    settings = f"cat $({found}) 2>/dev/null"
    probe = "add table inet before; delete table inet before"
    # Once the monitor listens
    assert poll(lambda: node.run("nft", probe) or "before" in monitor.output(), 5)
    before = node.run("sh", "-c", settings, check=False)
    diagnose(node, hosts=("10.0.0.1",))
    node.run("nft", "add table inet after")
    assert "pmtud" not in monitor.wait_for("after")
    assert node.run("sh", "-c", settings, check=False) == before
    assert "33" not in [
        line.split()[0] for line in node.read("/proc/net/netfilter/nfnetlink_log").splitlines()
    ]


def test_privileges(node: Host) -> None:
    """Without the capabilities one warning, and what cannot be seen is left out.

    A healthy path is OK.
    """
    before = ("setpriv", "--bounding-set=-net_admin,-net_raw")
    node.sysctl("net.ipv4.conf.all.rp_filter", 0)
    bad = diagnose(node, "--rules", "off", hosts=("10.0.0.1",), before=before)
    assert bad.code == 1
    assert bad.status("privileges") == "WARN"
    assert "CAP_NET_ADMIN and CAP_NET_RAW" in bad.of("privileges")["found"]
    assert bad.of("privileges")["found"].endswith(
        "Daemon, group, rules and guard are not looked at"
    )
    assert bad.of("privileges")["fix"] == f"sudo python3 {PROGRAM} check"
    assert {entry["status"] for entry in bad.checks[1:]} == {"OK"}
    assert bad.checks[1]["check"] == "rp_filter"
    # This works without root
    assert bad.of("path")["found"] == "10.0.0.1: path MTU 1500, all of eth0"


HOLDER = """
import sys, time; sys.path.insert(0, {!r}); import pmtud
held = pmtud.Nflog(33); print('held', flush=True); time.sleep(60)
"""


def test_nflog_group(node: Host, tmp_path: Path) -> None:
    """Taken by a stranger: FAIL names it.

    The fix takes the next group, which is then seen as pmtud's own.
    """
    (tmp_path / "go-pmtud").write_text(HOLDER.format(str(HERE)))
    stranger = node.start(sys.executable, str(tmp_path / "go-pmtud"))
    stranger.wait_for("held")
    bad = diagnose(node).of("nflog_group")
    assert bad["status"] == "FAIL"
    assert f"pid {stranger.pid} " in bad["found"]
    assert diagnose(node).of("daemon") == {
        "check": "daemon",
        "status": "WARN",
        "found": "not running",
        "fix": "",
    }
    assert bad["fix"] == f"ps -fp {stranger.pid}"
    daemon = node.start(sys.executable, SCRIPT, "--nflog-group", "34", "--metrics-port", "0")
    daemon.wait_for("limits:")
    good = diagnose(node, "--nflog-group", "34")
    assert good.of("nflog_group")["found"] == "group 34 is held by pmtud"
    assert good.of("daemon")["found"].startswith(f"running, pid {daemon.pid} (/")
    assert good.of("nflog_rule")["found"] == "table inet pmtud_34 of the daemon"
    assert good.of("guard") == {
        "check": "guard",
        "status": "OK",
        "found": "holds for ipv4, ipv6",
        "fix": "",
    }


def test_rules_of_the_operator(node: Host) -> None:
    """--rules off and no rule: FAIL; the fix installs rules and guard."""
    bad = diagnose(node, "--rules", "off")
    assert bad.of("nflog_rule")["found"] == "--rules off, and nothing feeds group 33"
    assert bad.code == 2
    assert bad.status("guard") == "FAIL"
    paste = f"python3 {PROGRAM} rules | sed -n '1,/^}}/p' | nft -f -"
    assert bad.of("nflog_rule")["fix"] == paste == bad.of("guard")["fix"]
    run_fix(node, bad.of("nflog_rule"))
    good = diagnose(node, "--rules", "off")
    assert good.status("nflog_rule") == good.status("guard") == "OK"
    assert good.of("nflog_rule")["found"] == "inet pmtud_33 mtu_errors, no counter"


def test_a_daemon_that_the_operators_rules_feed(node: Host) -> None:
    """check finds out by its table that it runs with --rules off."""
    chain = "type filter hook prerouting priority -300"
    node.run("nft", f"table inet f {{ chain c {{ {chain}; counter log group 33; }}; }}")
    with daemons([node], "--rules", "off", "--metrics-port", "0"):
        found = diagnose(node)
        assert found.of("nflog_rule")["found"].startswith("inet f c, ")
        assert found.status("guard") == "OK"
        text = "none given here; what the daemon has cannot be seen"
        assert found.of("peers")["found"] == text


@quick
@pytest.mark.parametrize(
    ("chain", "status"),
    [
        (
            'chain c { type filter hook prerouting priority -300; iifname "nope9" tcp dport 1 '
            "log group 33; }",
            "FAIL",
        ),
        (
            'chain c { type filter hook prerouting priority -300; iifname "nope9" icmp type 3 '
            "log group 33; }",
            "FAIL",
        ),
        (
            "chain c { type filter hook prerouting priority -300; tcp dport 1 log group 33; }",
            "FAIL",
        ),
        ("chain c { icmp type destination-unreachable log group 33; }", "FAIL"),
        (
            "chain c { type filter hook output priority -300; icmp type "
            "destination-unreachable log group 33; }",
            "FAIL",
        ),
        ("chain c { type filter hook prerouting priority -300; log group 33; }", "OK"),
        (
            "chain d { icmp type destination-unreachable log group 33; }; chain c { "
            'type filter hook prerouting priority -300; iifname "eth*" jump d; }',
            "OK",
        ),
        (
            "chain d { icmp type destination-unreachable log group 33; }; chain c { "
            'type filter hook prerouting priority -300; iifname vmap { "eth0" : goto d, "eth1" '
            ": accept }; }",
            "OK",
        ),
        (
            "chain d { icmp type destination-unreachable log group 33; }; "
            'map m { type ifname : verdict; elements = { "eth0" : jump d }; }; '
            "chain c { type filter hook prerouting priority -300; iifname vmap @m; }",
            "OK",
        ),
        (
            "chain c { type filter hook prerouting priority -300; "
            'iifname { "nope8", "nope9" } log group 33; }',
            "FAIL",
        ),
        (
            "chain c { type filter hook prerouting priority -300; "
            'iifname { "nope9", "eth0" } log group 33; }',
            "OK",
        ),
        (
            'chain c { type filter hook prerouting priority -300; iifname "eth" log group 33; }',
            "FAIL",
        ),
        (
            "chain c { type filter hook prerouting priority -300; meta l4proto != tcp log "
            "group 33; }",
            "OK",
        ),
        (
            "chain c { type filter hook prerouting priority -300; meta l4proto { tcp, udp } "
            "log group 33; }",
            "FAIL",
        ),
        (
            "chain c { type filter hook prerouting priority -300; meta l4proto { tcp, icmp } "
            "log group 33; }",
            "OK",
        ),
    ],
)
def test_what_feeds_the_group(node: Host, chain: str, status: str) -> None:
    """A rule that packets reach, early, for ICMP, from one of our interfaces."""
    node.run("nft", f"table inet f {{ {chain}; }}")
    assert diagnose(node, "--rules", "off").status("nflog_rule") == status


def test_rules_that_cannot_be_seen(node: Host, tmp_path: Path) -> None:
    """Without nft, or its JSON, nothing is claimed."""
    found = diagnose(node, "--rules", "off", before=("env", f"PATH={tmp_path}")).of("nflog_rule")
    assert found["status"] == "WARN"
    assert (
        found["found"]
        == "--rules off, and what feeds the group cannot be seen: nft is not installed"
    )
    (tmp_path / "nft").write_text(
        "#!/bin/sh\necho 'Error: JSON support not compiled-in' >&2; exit 1\n"
    )
    (tmp_path / "nft").chmod(0o755)
    found = diagnose(node, "--rules", "off", before=("env", f"PATH={tmp_path}")).of("nflog_rule")
    assert found["status"] == "WARN"
    unseen = "what feeds the group cannot be seen: `nft -j list ruleset` gives no JSON"
    assert found["found"] == f"--rules off, and {unseen}"


@pytest.mark.parametrize(
    ("rule", "status"),
    [
        ("-i eth+ -p icmp -j NFLOG --nflog-group 33", "OK"),
        ("-i eth -p icmp -j NFLOG --nflog-group 33", "FAIL"),
        ("! -i nope9 ! -p tcp -j NFLOG --nflog-group 33", "OK"),
        ("-i nope9 -j NFLOG --nflog-group 33", "FAIL"),
        ("-p tcp -j NFLOG --nflog-group 33", "FAIL"),
        ('-p icmp -m comment --comment "-i nope9 -p tcp" -j NFLOG --nflog-group 33', "OK"),
        ('-p icmp -m comment --comment "-j NFLOG --nflog-group 33" -j ACCEPT', "FAIL"),
        ("-p icmp -g hop", "OK"),
    ],
)
def test_iptables_rules_that_feed_the_group(node: Host, rule: str, status: str) -> None:
    """Read as text where nft does not see them."""
    node.run("iptables-legacy", "-t", "raw", "-N", "hop")
    node.run("iptables-legacy", "-t", "raw", "-A", "hop", "-j", "NFLOG", "--nflog-group", "33")
    node.run("iptables-legacy", "-t", "raw", "-A", "PREROUTING", *shlex.split(rule))
    assert diagnose(node, "--rules", "off").status("nflog_rule") == status


@pytest.mark.parametrize("command", ["iptables-nft", "iptables-legacy"])
def test_reverse_path_rules_of_iptables(node: Host, command: str) -> None:
    """Of both kinds, with --invert only; one of IPv4 is none of IPv6."""
    rule = f"{command} -t raw -A PREROUTING -m rpfilter".split()
    node.run(*rule, "-j", "ACCEPT")
    assert "dropped" not in diagnose(node).of("rp_filter")["found"]
    node.run(*rule, "--invert", "-j", "DROP")
    found = diagnose(node).of("rp_filter")
    assert found["status"] == "WARN"
    assert "is dropped by a rule in ip raw PREROUTING. Loosening" in found["found"]


@pytest.mark.parametrize("command", ["iptables-nft", "iptables-legacy"])
def test_iptables_rule_and_its_counter(node: Host, command: str) -> None:
    """Found in both kinds of iptables, once, with its counter."""
    rule = "-p icmp -m icmp --icmp-type 3/4 -j NFLOG --nflog-group 33 -c 5 320"
    node.run(command, "-t", "raw", "-A", "PREROUTING", *rule.split())
    found = diagnose(node, "--rules", "off").of("nflog_rule")
    assert found["status"] == "OK"
    assert found["found"] == "ip raw PREROUTING, 5 packets so far"
    twice = diagnose(node).of("nflog_rule")
    assert twice["status"] == "WARN"
    assert (
        "feeds every error in again; remove it, or start pmtud with --rules off: "
        "ip raw PREROUTING" in twice["found"]
    )
    assert "--nflog-group 33" in node.run("sh", "-c", twice["fix"])
    assert diagnose(node, "--rules", "off", "--nflog-group", "3").status("nflog_rule") == "FAIL"


@pytest.mark.parametrize(
    "rule",
    [
        ("iptables", "-A", "INPUT", "-p", "icmp", "-j", "NFLOG", "--nflog-group", "33"),
        (
            "nft",
            "table inet f { chain late { type filter hook input priority 0; icmp type 3 "
            "counter log group 33; }; }",
        ),
    ],
)
def test_a_rule_after_rp_filter_is_too_late(node: Host, rule: tuple[str, ...]) -> None:
    """INPUT comes after the reverse path check."""
    node.run(*rule)
    late = diagnose(node, "--rules", "off").of("nflog_rule")
    assert late["status"] == "WARN"
    assert late["found"].startswith("too late, rp_filter comes first: i")
    assert ", 0 packets so far" in late["found"]


@quick
@pytest.mark.parametrize("scope", ["all", "eth0"])
def test_rp_filter(node: Host, scope: str) -> None:
    """Strict: WARN, and the fix is to run pmtud, never to loosen it; the fix turns it OK."""
    node.sysctl(f"net.ipv4.conf.{scope}.rp_filter", 1)
    bad = diagnose(node)
    finding = bad.of("rp_filter")
    assert bad.code == 1
    assert finding["status"] == "WARN"
    assert finding["found"].startswith("eth0: strict (all ")
    assert "weakens anti-spoofing" in finding["found"]
    run_fix(node, finding, "limits:")
    good = diagnose(node).of("rp_filter")
    assert good["status"] == "OK"
    assert good["found"].endswith("; pmtud delivers what is dropped by rp_filter")


def test_loose_rp_filter_is_no_error(node: Host) -> None:
    """The higher of all and interface counts."""
    node.sysctls({"net.ipv4.conf.all.rp_filter": 2, "net.ipv4.conf.eth0.rp_filter": 1})
    found = diagnose(node).of("rp_filter")
    assert found["status"] == "OK"
    assert found["found"] == "eth0: loose, errors from any routed address pass (all 2, eth0 1)"


@pytest.mark.parametrize(
    "rule",
    [
        "meta nfproto ipv6 fib saddr . mark . iif oif missing drop",
        "fib saddr . iif oif 0 counter drop",
    ],
)
def test_reverse_path_rules_of_nft(node: Host, rule: str) -> None:
    """What firewalld installs for IPv6 counts like rp_filter; an accepting rule does not."""
    node.run(
        "nft",
        f"table inet fw {{ chain pre {{ type filter hook prerouting priority -290; {rule}; }}; }}",
    )
    bad = diagnose(node).of("rp_filter")
    assert bad["status"] == "WARN"
    assert "is dropped by a rule in inet fw pre. Loosening" in bad["found"]
    run_fix(node, bad, "limits:")
    assert (
        diagnose(node)
        .of("rp_filter")["found"]
        .endswith("pmtud delivers what is dropped by a rule in inet fw pre")
    )
    node.run(
        "nft",
        "flush ruleset inet; add table inet fw; add chain inet fw pre; "
        "add rule inet fw pre fib saddr . iif oif != 0 accept",
        check=False,
    )
    assert "dropped" not in diagnose(node, "--nflog-group", "5").of("rp_filter")["found"]


CALICO_RPF = "-m mark --mark 0x40000/0x40000 -m rpfilter --invert --validmark -j DROP"


@pytest.mark.parametrize("command", ["iptables", "ip6tables", "iptables-legacy"])
def test_a_reverse_path_rule_that_asks_for_a_mark(node: Host, command: str) -> None:
    """As Calico's cali-PREROUTING, for its workloads alone: no loss while its counter rests."""
    for words in ("-N cali", "-A PREROUTING -j cali", f"-A cali {CALICO_RPF}"):
        node.run(command, "-t", "raw", *words.split())
    family = "ip6" if "6" in command else "ip"
    before = f"eth0: perhaps a rule in {family} raw cali drops errors too, by more than the path; "
    perhaps = f"{before}it counts 0 packets, 0 more a second later"
    found = [entry for entry in diagnose(node).checks if entry["check"] == "rp_filter"]
    assert [(entry["status"], entry["found"]) for entry in found][1:] == [("OK", perhaps)]
    assert found[0]["status"] == "OK"


def test_a_conditional_reverse_path_rule_that_drops(node: Host) -> None:
    """Of nftables: its counter moves; one without a counter; one for another interface."""
    router = node.net.hosts[1]
    rule = "ip saddr 10.77.0.0/16 fib saddr . iif oif missing counter drop"
    chain = "type filter hook prerouting priority -290"
    node.run("nft", f"table inet fw {{ chain pre {{ {chain}; {rule}; }}; }}")
    router.ip("addr add 10.77.0.1/32 dev lo")
    node.ip("route add unreachable 10.77.0.0/16")
    ping = router.start("ping", "-i", "0.1", "-I", "10.77.0.1", "10.0.0.2")
    found = diagnose(node).of("rp_filter", "perhaps")
    assert found["status"] == "WARN"
    assert " 0 more a second later" not in found["found"]
    ping.stop()
    for other, status in ((rule.replace("counter", ""), "WARN"), (f"iifname eth9 {rule}", "")):
        node.run("nft", f"flush chain inet fw pre; add rule inet fw pre {other}")
        entries = diagnose(node).checks
        assert "".join(one["status"] for one in entries if "perhaps" in one["found"]) == status


@pytest.mark.parametrize(
    ("name", "value", "status", "words"),
    [
        ("ip_no_pmtu_disc", 1, "WARN", "1: packets leave without DF"),
        ("ip_no_pmtu_disc", 2, "FAIL", "2: the kernel discards every error"),
        ("ip_no_pmtu_disc", 3, "WARN", "CVE-2026-23398"),
        ("route.min_pmtu", 1400, "WARN", "1400: smaller reports count as this one"),
    ],
)
def test_settings(node: Host, name: str, value: int, status: str, words: str) -> None:
    """Each bad value, and the sysctl that repairs it."""
    node.sysctl(f"net.ipv4.{name}", value)
    bad = diagnose(node)
    finding = bad.of(name.rpartition(".")[2])
    assert finding["status"] == status
    assert words in finding["found"]
    assert bad.code == {"WARN": 1, "FAIL": 2}[status]
    run_fix(node, finding)
    assert diagnose(node).status(name.rpartition(".")[2]) == "OK"


@pytest.mark.parametrize("value", [1, 2])
def test_tcp_mtu_probing_is_information(node: Host, value: int) -> None:
    """Always OK, and it says what the value does."""
    node.sysctl("net.ipv4.tcp_mtu_probing", value)
    found = diagnose(node).of("tcp_mtu_probing")
    assert found["status"] == "OK"
    assert "UDP, QUIC and tunnels do not" in found["found"]


@pytest.mark.parametrize(("count", "status"), [(800, "OK"), (801, "WARN"), (951, "FAIL")])
def test_conntrack(node: Host, tmp_path: Path, count: int, status: str) -> None:
    """Files stand in for the kernel's, whose limit only the first namespace may set.

    The fix doubles the limit.
    """
    for name, number in (("count", count), ("max", 1000)):
        (tmp_path / name).write_text(f"{number}\n")
    files = "/proc/sys/net/netfilter/nf_conntrack_"
    mount = "".join(f"mount --bind {tmp_path}/{name} {files}{name}; " for name in ("count", "max"))
    before = ("sh", "-c", f'{mount} exec "$@"', "sh")
    bad = diagnose(node, before=before).of("conntrack")
    assert bad["status"] == status
    assert bad["found"] == f"{count} of 1000 connections ({count / 1000:.0%})"
    if status != "OK":
        assert bad["fix"] == "sysctl -w net/netfilter/nf_conntrack_max=2000"
        node.run("sh", "-c", f"{mount} {bad['fix']}")
        assert diagnose(node, before=before).status("conntrack") == "OK"


def test_good_peers(node: Host) -> None:
    """On-link and routed ones are told apart, this node's own address is named."""
    node.net.hosts[1].ip("addr add fd00::5/64 dev to-node nodad", "addr add 10.7.0.1/32 dev lo")
    found = diagnose(node, "--peers", "10.0.0.1,10.7.0.1,fd00::5,10.0.0.2").of("peers")
    assert found == {
        "check": "peers",
        "status": "OK",
        "found": "2 on-link, 1 routed; 10.0.0.2 is this node",
        "fix": "",
    }


def test_peers_that_do_not_answer(node: Host) -> None:
    """Addresses of the link that nobody has, one that drops pings, one far away; in one second.

    What drops pings but has its address is there.
    """
    router = node.net.hosts[1]
    router.ip("addr add 10.7.0.1/32 dev lo")
    router.run(
        "nft",
        "table inet quiet { chain c { type filter hook input priority 0; "
        "icmp type echo-request drop; icmpv6 type echo-request drop; }; }",
    )
    start = time.monotonic()
    found = diagnose(node, "--peers", "10.0.0.1,10.0.0.99,fd00::1,fd00::99,10.7.0.1")
    assert time.monotonic() - start < 5 * PATIENCE
    dead, far = [entry for entry in found.checks if entry["check"] == "peers"]
    text = "10.0.0.99, fd00::99 does not answer, nobody on its link has the address"
    assert dead["status"] == "FAIL"
    assert dead["found"] == text
    shown = node.run("sh", "-c", dead["fix"])
    assert "10.0.0.99" in shown
    assert "fd00::99" in shown
    assert "10.0.0.1 " not in shown
    text = "10.7.0.1 does not answer to ping: nobody has the address, or ping is dropped"
    assert far["status"] == "WARN"
    assert far["found"] == text
    assert far["fix"] == "tracepath -n 10.7.0.1"


def test_check_compares_itself_with_the_daemon(node: Host) -> None:
    """Its interfaces and peers, as its table has them, against the options and the default route."""
    node.ip("link add eth1 type veth peer name far", "link set eth1 up", "link set far up")
    node.net.hosts[1].ip(
        "addr add 10.0.0.3/24 dev to-node", "addr add fd00::3/64 dev to-node nodad"
    )
    peers = ("--peers", "10.0.0.1,10.0.0.2,10.0.0.3,fd00::3")
    options = ("--metrics-port", "0", *peers)
    with daemons([node], "--iface", "eth1", *options):
        bad = diagnose(node)
        wrong = "the daemon takes errors on eth1, not on eth0"
        advice = "where the default route is; if they come in there too, give it both by --iface"
        assert bad.of("daemon_iface")["found"] == f"{wrong}, {advice}"
        assert bad.status("daemon_iface") == "WARN"
        assert bad.code == 1
        assert bad.of("peers")["found"] == "3 on-link, 0 routed"
        other = diagnose(node, "--iface", "eth0").of("daemon_iface")
        assert other["found"] == f"{wrong} as --iface says here; start it with the same"
        same = diagnose(node, "--iface", "eth1", *peers)
        assert not [entry for entry in same.checks if entry["check"].startswith("daemon_")]
        few = diagnose(node, "--iface", "eth1", "--peers", "10.0.0.1,10.0.0.99").of("daemon_peers")
        assert few["status"] == "WARN"
        assert few["found"] == (
            "the daemon lacks 10.0.0.99 of --peers, and has 10.0.0.3, fd00::3 besides; "
            "give all nodes the same list"
        )
    with daemons([node], "--nodename", "x" * 200, *options):
        good = diagnose(node)
        assert not [entry for entry in good.checks if entry["check"].startswith("daemon_")]
        assert good.of("daemon")["found"].endswith(" ...)")


def test_what_is_not_seen_from_here(node: Host, tmp_path: Path) -> None:
    """In a pod, where its processes are not the node's and nft is not installed; never OK."""
    mount = "mount -t tmpfs none /run && mkdir /run/secrets && touch /run/secrets/kubernetes.io"
    inside = f'{mount} && exec "$@"'
    pod = ("unshare", "--mount", "--pid", "--fork", "sh", "-c", inside, "sh")
    path = f"PATH={tmp_path}"
    found = diagnose(node, before=(*pod, "env", path), cni_dir=str(tmp_path / "none")).of("view")
    assert found["status"] == "WARN"
    assert found["found"] == (
        "not seen from here: the rules of others (nft is not installed); the node's processes "
        f"(this is a container); the CNI's configuration ({tmp_path}/none is not here). "
        "Run it on the node as well"
    )
    node.sysctl("net.ipv4.ip_no_pmtu_disc", 1)
    command = [*pod, *doctor_argv((), (), False, "/none")]
    assert "fix, on the node: sysctl -w net/ipv4/ip_no_" in node.run(*command, check=False)


def test_a_table_that_sigkill_left(node: Host) -> None:
    """As before Linux 5.12, where a table has no owner; the printed command replaces it."""
    node.run("sh", "-ec", f"{sys.executable} {PROGRAM} rules | sed -n '1,/^}}/p' | nft -f -")
    found = diagnose(node).of("daemon")
    text = "not running; SIGKILL left its table inet pmtud_33, which the next start replaces"
    assert found["status"] == "WARN"
    assert found["found"] == text
    daemon = run_fix(node, found, "limits:")
    assert daemon
    assert diagnose(node).status("daemon") == "OK"
    assert daemon.stop() == 0


def test_a_nodes_address_on_lo_is_a_good_peer(node: Host) -> None:
    """As with two uplinks: the nodes' addresses are in none of the NICs' networks."""
    node.ip("addr add 10.5.0.1/32 dev lo")
    node.net.hosts[1].ip("addr add 10.5.0.2/32 dev lo")
    found = diagnose(node, "--peers", "10.5.0.1,10.5.0.2").of("peers")
    assert found["status"] == "OK"
    assert found["found"] == "0 on-link, 1 routed; 10.5.0.1 is this node"


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        ("10.96.0.1", "10.96.0.1: a service address on lo, not a node"),
        ("10.8.0.1", "10.8.0.1: no route"),
        ("fd08::1", "fd08::1: no route"),
    ],
)
def test_bad_peers(node: Host, peer: str, words: str) -> None:
    """A VIP or a peer without a route: FAIL; the fix starts pmtud without it."""
    node.ip("route add unreachable 10.8.0.0/24", "route add unreachable fd08::/64")
    bad = diagnose(node, "--peers", f"10.0.0.1,{peer}").of("peers")
    assert bad["status"] == "FAIL"
    assert bad["found"] == f"{words}; take it out of --peers"
    assert diagnose(node, "--peers", "10.0.0.1").status("peers") == "OK"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "file:{}: No such file or directory"),
        ("10.0.0.1\nnonsense_\n", "file:{}: line 2: 'nonsense_' is not an IP address"),
        (
            "10.0.0.1\n10.96.0.1  # ours\n",
            "10.96.0.1: a service address on lo, not a node (in file:{})",
        ),
    ],
)
def test_peer_file(node: Host, tmp_path: Path, text: Optional[str], words: str) -> None:
    """Its complaint is the only finding about peers; the fix opens it in the editor."""
    path = tmp_path / "the peers"
    if text:
        path.write_text(text)
    bad = diagnose(node, "--peers", f"file:{path}").of("peers")
    assert bad["status"] == "FAIL"
    assert bad["found"].startswith(words.format(path))
    assert bad["fix"] == f"${{EDITOR:-vi}} '{path}'"
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\necho 10.0.0.1 >"$1"\n')
    editor.chmod(0o755)
    node.run("sh", "-ec", f"EDITOR={editor}; {bad['fix']}")
    assert diagnose(node, "--peers", f"file:{path}").of("peers")["found"] == "1 on-link, 0 routed"


def test_peer_name_that_nobody_has(node: Host) -> None:
    """The next step asks the resolver."""
    bad = diagnose(node, "--peers", "dns:no-such.invalid").of("peers")
    assert bad["status"] == "FAIL"
    assert bad["fix"] == "getent ahosts no-such.invalid"


def test_ipv6_mtu_under_1280(node: Host) -> None:
    """IPv6 cannot run: FAIL; the fix raises the MTU."""
    node.ip("link set eth0 mtu 1200")
    bad = diagnose(node, "--iface", "eth0").of("ipv6")
    assert bad["status"] == "FAIL"
    assert bad["found"] == "eth0: cannot run, MTU 1200 is under 1280"
    run_fix(node, bad)
    assert diagnose(node, "--iface", "eth0").status("ipv6") == "OK"


def test_ipv6_router_advertisements(node: Host) -> None:
    """accept_ra_mtu 0 on a listening host.

    WARN; forwarding without accept_ra 2 is told; switched off is OK.
    """
    node.sysctls({"net.ipv6.conf.eth0.accept_ra": 1, "net.ipv6.conf.eth0.accept_ra_mtu": 0})
    bad = diagnose(node).of("ipv6")
    assert bad["status"] == "WARN"
    assert bad["fix"] == "sysctl -w net/ipv6/conf/eth0/accept_ra_mtu=1"
    run_fix(node, bad)
    assert (
        diagnose(node).of("ipv6")["found"]
        == "eth0: router advertisements and their MTU are believed"
    )
    node.sysctl("net.ipv6.conf.eth0.forwarding", 1)
    assert diagnose(node).of("ipv6")["found"].endswith("not read (forwarding 1, accept_ra 1)")
    node.sysctl("net.ipv6.conf.eth0.disable_ipv6", 1)
    assert diagnose(node).of("ipv6")["found"] == "eth0: switched off"


REMAKE = "kubectl drain n1 --ignore-daemonsets && kubectl uncordon n1"
CALICO = (
    'kubectl patch installation default --type=merge -p \'{"spec":{"calicoNetwork":{"mtu":%d}}}\''
)


@pytest.mark.parametrize(
    ("nic", "name", "mtu", "status", "found", "step"),
    [
        (1500, "vxlan.calico", 1450, "OK", "vxlan.calico 1450 = eth0 1500 - 50", ""),
        (
            9000,
            "vxlan.calico",
            1450,
            "OK",
            "vxlan.calico 1450 < eth0 9000 - 50 = 8950: jumbo frames left unused",
            "",
        ),
        (9000, "vxlan.calico", 8950, "OK", "vxlan.calico 8950 = eth0 9000 - 50", ""),
        (
            1500,
            "vxlan.calico",
            1500,
            "FAIL",
            "vxlan.calico 1500 > eth0 1500 - 50: packets over 1450 are fragmented or vanish "
            "(black hole)",
            CALICO % 1450,
        ),
        (
            1500,
            "vxlan.calico",
            1400,
            "WARN",
            "vxlan.calico 1400 = eth0 1500 - 50 - 50: the overhead is subtracted twice",
            CALICO % 1450,
        ),
        (1500, "vxlan-v6.calico", 1430, "OK", "vxlan-v6.calico 1430 = eth0 1500 - 70", ""),
        (
            1500,
            "vxlan.calico",
            1430,
            "OK",
            "vxlan.calico 1430 = eth0 1500 - 70, where 50 would do",
            "",
        ),
        (9000, "tunl0", 1480, "OK", "tunl0 1480 fits eth0 9000 - 20", ""),
        (
            1500,
            "tunl0",
            1500,
            "FAIL",
            "tunl0 1500 > eth0 1500 - 20: packets over 1480 are fragmented or vanish (black hole)",
            "ip link set dev tunl0 mtu 1480",
        ),
        (1500, "wireguard.cali", 1440, "OK", "wireguard.cali 1440 = eth0 1500 - 60", ""),
        (
            1500,
            "wg-v6.cali",
            1500,
            "FAIL",
            "wg-v6.cali 1500 > eth0 1500 - 80: packets over 1420 are fragmented or vanish "
            "(black hole)",
            CALICO % 1420,
        ),
        (
            1500,
            "flannel.1",
            1400,
            "WARN",
            "flannel.1 1400 = eth0 1500 - 50 - 50: the overhead is subtracted twice",
            "kubectl -n kube-flannel rollout restart daemonset/kube-flannel-ds",
        ),
        (
            1500,
            "cilium_vxlan",
            1500,
            "OK",
            "cilium_vxlan 1500 is right: Cilium subtracts the 50 in its routes",
            "",
        ),
        (
            1500,
            "cilium_geneve",
            1300,
            "OK",
            "cilium_geneve 1300 < eth0 1500 - 50 = 1450: 150 bytes left unused",
            "",
        ),
        (1500, "cali12ab", 1500, "OK", "cali12ab 1500 = eth0 1500 - 0", ""),
        (
            1500,
            "cali12ab",
            9000,
            "WARN",
            "cali12ab 9000 > eth0 1500 - 0: only ICMP errors from this node tell pods that "
            "1500 is all",
            CALICO % 1500 + "\n" + REMAKE,
        ),
        (
            9000,
            "veth12ab",
            1450,
            "OK",
            "veth12ab 1450 < eth0 9000 - 0 = 9000: jumbo frames left unused",
            "",
        ),
        (1500, "lxc12ab", 1500, "OK", "lxc12ab 1500 = eth0 1500 - 0", ""),
        (1500, "cni0", 1480, "OK", "cni0 1480 = eth0 1500 - 20, where 0 would do", ""),
    ],
)
def test_mtu_by_name(
    node: Host, nic: int, name: str, mtu: int, status: str, found: str, step: str
) -> None:
    """An interface of each CNI, recognised by its name.

    A veth stands in for kinds this kernel may lack.
    """
    node.ip(
        f"link set eth0 mtu {nic}",
        f"link add {name} mtu {mtu} type veth peer name other mtu {mtu}",
        f"link set {name} up",
    )
    found_mtu = diagnose(node, "--nodename", "n1").of("mtu")
    expected = {"check": "mtu", "status": status, "found": found, "fix": ""}
    if step:
        assert found_mtu.pop("risk")
        expected["next_step"] = step
    assert found_mtu == expected


@pytest.mark.parametrize(
    ("options", "best"),
    [("remote 10.0.0.1", 1450), ("remote fd00::1", 1430), ("local fd00::2", 1430)],
)
def test_mtu_of_a_real_vxlan(node: Host, options: str, best: int) -> None:
    """A vxlan of any name, over IPv4 and IPv6; the printed `ip link` turns it OK."""
    node.ip(
        f"link add overlay mtu 1500 type vxlan id 7 dstport 4789 {options}", "link set overlay up"
    )
    bad = diagnose(node).of("mtu")
    assert bad["status"] == "FAIL"
    assert bad["next_step"] == f"ip link set dev overlay mtu {best}"
    run_fix(node, bad)
    assert diagnose(node).of("mtu")["found"] == f"overlay {best} fits eth0 1500 - {1500 - best}"
    node.ip("link set overlay mtu 1400")  # a stranger's may be as small as it likes
    assert diagnose(node).of("mtu")["found"] == f"overlay 1400 fits eth0 1500 - {1500 - best}"


@pytest.mark.parametrize(
    "options",
    [
        "dev eth1",
        "local 10.1.0.2",
        "local fd01::2",
        "remote 10.1.0.9",
        "remote fd01::9",
        "local 10.96.0.1 remote 10.1.0.9",
    ],
)
def test_mtu_under_a_tunnel(node: Host, options: str) -> None:
    """The NIC under a tunnel is its own, not that of the default route.

    Device, own address, or way to the peer.
    """
    node.ip(
        "link add eth1 mtu 9000 type veth peer name far",
        "link set eth1 up",
        "addr add 10.1.0.2/24 dev eth1",
        "addr add fd01::2/64 dev eth1 nodad",
        "link set far up",
        f"link add vxlan.calico mtu 1450 type vxlan id 7 dstport 4789 {options}",
        "link set vxlan.calico up",
        "link add cali0 mtu 1450 type veth peer name c",
        "link set cali0 up",
    )
    best = 8930 if ":" in options else 8950
    found = diagnose(node, "--nodename", "n1")
    text = f"1450 < eth1 9000 - {9000 - best} = {best}: jumbo frames left unused"
    for name in ("vxlan.calico", "cali0"):
        one = found.of("mtu", name)
        assert one["status"] == "OK"
        assert one["found"] == f"{name} {text}"
        assert one["fix"] == ""
    node.ip(f"link set vxlan.calico mtu {best}")
    found = diagnose(node, "--nodename", "n1")
    assert found.of("mtu", "vxlan")["found"] == f"vxlan.calico {best} = eth1 9000 - {9000 - best}"
    node.ip(f"link set cali0 mtu {best + 1}")
    too_much = diagnose(node, "--nodename", "n1").of("mtu", "cali0")
    assert too_much["next_step"] == REMAKE  # what a tunnel gives to pods is not to be patched


def test_mtu_judged_by_a_guess(node: Host) -> None:
    """A tunnel that does not say what is under it, and a NIC wider than the default route's.

    WARN; the fix names it.
    """
    node.ip(
        "link add eth1 mtu 9000 type veth peer name far",
        "link set eth1 up",
        "link set far up",
        "link add cilium_vxlan mtu 9000 type vxlan external dstport 4789",
        "link set cilium_vxlan up",
    )
    bad = diagnose(node).of("mtu", "eth1 has")
    assert bad["status"] == "WARN"
    assert bad["found"] == (
        "eth1 has 9000, judged is by eth0 1500 of the default route; "
        "if the nodes talk over eth1, name it with --iface"
    )
    assert bad["fix"] == f"python3 {PROGRAM} check --iface eth1"
    assert "cilium_vxlan 9000 is right" in node.run("sh", "-c", bad["fix"], check=False)
    again = bad["fix"].split()[3:]
    assert diagnose(node, *again).status("mtu") == "OK"


def run_with_kubectl(host: Host, finding: dict[str, str], folder: Path, script: str) -> None:
    """Run the printed commands with a kubectl that is this script.

    It can say `host` and sees its words.
    """
    (folder / "kubectl").write_text(
        f'#!/bin/sh -e\nhost() {{ ip -n {host.namespace} "$@"; }}\n{script}\n'
    )
    (folder / "kubectl").chmod(0o755)
    host.run("env", f"PATH={folder}:{os.environ['PATH']}", "sh", "-ec", finding["next_step"])


def test_mtu_of_pods_in_other_namespaces(node: Host, tmp_path: Path) -> None:
    """A plain veth whose peer is elsewhere is a pod, which is made anew, never changed at one end.

    One here is not.
    """
    pod = node.net.host("pod")
    node.net.link(node, pod, mtu=9000, names=("whatever", "eth0"))
    node.ip(
        "link add vxlan.calico mtu 1450 type vxlan id 7 dstport 4789 remote 10.0.0.1",
        "link set vxlan.calico up",
        "link add here mtu 9000 type veth peer name there",
        "link set here up",
    )
    bad = diagnose(node, "--nodename", "n1")
    finding = bad.of("mtu", "whatever")
    assert finding["status"] == "WARN"
    assert finding["next_step"] == REMAKE
    told = "only ICMP errors from this node tell pods that 1450 is all"
    assert finding["found"] == f"whatever 9000 > eth0 1500 - 50: {told}"
    assert len([entry for entry in bad.checks if entry["check"] == "mtu"]) == 2
    run_with_kubectl(
        node,
        finding,
        tmp_path,
        f"""[ "$1 $2" != "drain n1" ] || {{ host link del whatever; ip link add
        whatever netns {node.namespace} mtu 1450 type veth peer name eth0 netns {pod.namespace} mtu 1450
        host link set whatever up; ip -n {pod.namespace} link set eth0 up; }}""".replace(
            "add\n", "add "
        ),
    )
    assert diagnose(node).status("mtu", "whatever") == "OK"


def test_mtu_of_docker_containers(node: Host) -> None:
    """Without Kubernetes nobody drains a node: what is wrong is said, without a command."""
    box = node.net.host("box")
    node.net.link(node, box, mtu=9000, names=("veth1a2b3c4", "eth0"))
    node.ip("link add docker0 type bridge", "link set docker0 up")
    node.ip("link set veth1a2b3c4 master docker0")
    found = diagnose(node).of("mtu", "veth1a2b3c4")
    assert found["status"] == "WARN"
    assert found["fix"] == ""
    assert found.get("next_step", "") == ""


def test_mtu_of_calicos_ipip_tunnel(node: Host) -> None:
    """Known by the pods beside it: tunl0 alone may be anybody's."""
    node.ip(
        "link add tunl0 mtu 1460 type veth peer name other",
        "link set tunl0 up",
        "link add cali0 mtu 1460 type veth peer name pod",
        "link set cali0 up",
    )
    found = diagnose(node).of("mtu", "tunl0")
    text = "tunl0 1460 = eth0 1500 - 20 - 20: the overhead is subtracted twice"
    assert found["status"] == "WARN"
    assert found["found"] == text
    assert found["next_step"] == CALICO % 1480


def test_mtu_of_pods_beside_a_strangers_tunnel(node: Host) -> None:
    """Only the CNI's own tunnels, known by name, bear on pods."""
    node.ip(
        "link add wgadmin mtu 1450 type vxlan id 7 dstport 4789 remote 10.0.0.1",
        "link set wgadmin up",
        "link add veth12 mtu 1500 type veth peer name other",
        "link set veth12 up",
    )
    found = diagnose(node)
    assert found.status("mtu", "wgadmin") == "OK"
    assert found.of("mtu", "veth12")["found"] == "veth12 1500 = eth0 1500 - 0"


@pytest.mark.parametrize("stem", ["cali", "veth", "veth%04x"])
def test_mtu_of_hundreds_of_pods_is_one_line(node: Host, stem: str) -> None:
    """Pods with the same MTU are one finding with one fix, whatever they are called."""
    names = [(stem % (i * 251) if "%" in stem else f"{stem}{i:03x}") for i in range(200)]
    commands = [
        f"link add {name} mtu {1300 if i else 1500} type veth peer name p{i}"
        for i, name in enumerate(names)
    ]
    node.ip(
        "link add vxlan.calico mtu 1450 type vxlan id 7 dstport 4789 remote 10.0.0.1",
        "link set vxlan.calico up",
        *commands,
        *(f"link set {name} up" for name in names),
    )
    found = diagnose(node, "--nodename", "n1")
    many = found.of("mtu", "199 pods")
    assert many["found"].startswith("199 pods (")
    assert many["found"].endswith("1300 < eth0 1500 - 50 = 1450: 150 bytes left unused")
    assert many["status"] == "OK"
    assert found.of("mtu", names[0] + " ")["next_step"] == REMAKE
    assert len([entry for entry in found.checks if entry["check"] == "mtu"]) == 3


def test_mtu_of_the_cni_configuration(node: Host, tmp_path: Path) -> None:
    """Any "mtu" at any level.

    Sed repairs a file that no operator owns; pods made before need to be made again.
    """
    folder = tmp_path / "net d"
    folder.mkdir()
    (folder / "10-bridge.conflist").write_text(
        '{"plugins": [{"type": "bridge", "mtu": 9000}, {"mtu": 0}]}'
    )
    (folder / "notes.txt").write_text('"mtu": 5')
    bad = diagnose(node, cni_dir=str(folder)).of("mtu")
    assert bad["status"] == "WARN"
    assert bad["found"].startswith(f"{folder}/10-bridge.conflist 9000 > eth0 1500 - 0")
    run_fix(node, bad)
    assert diagnose(node, cni_dir=str(folder)).status("mtu") == "OK"
    node.ip("link add veth12 mtu 1300 type veth peer name other", "link set veth12 up")
    old = diagnose(node, "--nodename", "n1", cni_dir=str(folder)).of("mtu", "veth12")
    assert old["found"] == "veth12 1300 < eth0 1500 - 0 = 1500: 200 bytes left unused"
    assert old["status"] == "OK"
    (folder / "10-calico.conflist").write_text('{"plugins": [{"type": "calico", "mtu": 1600}]}')
    found = diagnose(node, cni_dir=str(folder)).of("mtu", "calico")
    assert found["next_step"] == CALICO % 1500
    assert found["risk"].startswith("new pods get it")


def test_cni_configuration_that_cannot_be_read(node: Host, tmp_path: Path) -> None:
    """One warning each, and nothing waits or breaks; the file beside them is read."""
    (tmp_path / "dir.conf").mkdir()
    (tmp_path / "dangling.conf").symlink_to("/none")
    os.mkfifo(tmp_path / "fifo.conf")
    (tmp_path / "good.conf").write_text('{"mtu": 1500}')
    (tmp_path / "secret.conf").write_text('{"mtu": 1500}')
    (tmp_path / "secret.conf").chmod(0o600)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.name.startswith(("pytest-", "popen-")):
            parent.chmod(0o755)
    found = diagnose(node, cni_dir=str(tmp_path), runner=NOBODYS)
    for name, words in (
        ("dir", "not a file"),
        ("dangling", "not a file"),
        ("fifo", "not a file"),
        ("secret", "Permission denied"),
    ):
        bad = found.of("mtu", f"{tmp_path}/{name}.conf: {words}")
        assert bad["status"] == "WARN"
        assert bad["fix"] == f"ls -ld {tmp_path}/{name}.conf"
    assert found.status("mtu", "good") == "OK"
    tmp_path.chmod(0o700)
    assert (
        diagnose(node, cni_dir=str(tmp_path), runner=NOBODYS).of("mtu")["found"]
        == f"{tmp_path}: Permission denied"
    )


def test_nics_that_differ(node: Host) -> None:
    """NICs with different MTUs: WARN; the fix makes all of them equal."""
    for i in (1, 2):
        node.ip(
            f"link add eth{i} mtu {[0, 1500, 9000][i]} type veth peer name far{i} mtu 9000",
            f"link set eth{i} up",
        )
    bad = diagnose(node, "--iface", "eth0,eth1,eth2").of("mtu", "NICs")
    assert bad["status"] == "WARN"
    assert bad["found"] == "the NICs differ: eth0 1500, eth1 1500, eth2 9000"
    run_fix(node, bad)
    assert diagnose(node, "--iface", "eth0,eth1,eth2").status("mtu") == "OK"


def test_interface_that_is_down(node: Host) -> None:
    """FAIL; the next step brings it up.  One that is not there is named, with those that are."""
    bad = diagnose(node, "--iface", "eth1").of("interface")
    assert bad["status"] == "FAIL"
    assert bad["found"] == "eth1 is not there, but lo, eth0"
    node.ip("link add eth1 type veth peer name far", "link set far up")
    bad = diagnose(node, "--iface", "eth1").of("interface")
    assert bad["status"] == "FAIL"
    assert bad["found"] == "eth1 is not up"
    run_fix(node, bad)
    assert diagnose(node, "--iface", "eth1").status("rp_filter") == "OK"


def test_no_default_route(node: Host) -> None:
    """The MTU audit says what it needs, and the fix names the widest NIC."""
    node.ip("route del default", "route del ::/0")
    bad = diagnose(node).of("mtu")
    assert bad["found"] == "there is no default route; name the NIC with --iface"
    assert bad["fix"] == f"python3 {PROGRAM} check --iface eth0"
    again = bad["fix"].split()[3:]
    assert diagnose(node, *again).status("mtu") == "OK"


# -- the report


def test_report_fits_80_columns_and_has_no_colours_in_a_pipe(node: Host) -> None:
    """Every line, commands included, which are broken with a backslash and stay runnable."""
    node.sysctls({"net.ipv4.conf.all.rp_filter": 1, "net.ipv4.ip_no_pmtu_disc": 3})
    node.ip(
        "link set eth0 mtu 9000",
        "link add vxlan.calico mtu 1450 type vxlan id 7 dstport 4789 remote 10.0.0.1",
        "link set vxlan.calico up",
    )
    node.ip("link set vxlan.calico mtu 8980")
    text = text_of(node, "--nodename", "n1", "--peers", ",".join(f"10.8.0.{i}" for i in range(9)))
    assert max(map(len, text.splitlines())) < 80
    assert "\033" not in text
    assert (
        "       next step (new pods get it, and the CNI's agents may start anew on every\n"
        "       node):\n        kubectl patch installation default --type=merge -p" in text
    )
    assert "WARN rp_filter: eth0: strict (all 1, eth0 0); an error from" in text
    assert text.splitlines()[-1] == "n1: 11 OK, 4 WARN, 1 FAIL"


def test_report_of_names_that_are_too_long_or_evil(node: Host, tmp_path: Path) -> None:
    """Interfaces `x;id` and ESC, a folder of 200 letters with blanks.

    Under 80 columns, quoted, and sh runs the fix.
    """
    folder = tmp_path / ("long" * 20 + " " + "name" * 30)
    folder.mkdir()
    (folder / "1.conf").write_text('{"mtu": 9000}')
    node.ip(
        "link add x;id mtu 1500 type vxlan id 7 dstport 4789 remote 10.0.0.1", "link set x;id up"
    )
    evil = "e\x1b[31m\u00e9"
    vxlan = ("type", "vxlan", "id", "8", "dstport", "4790", "remote", "10.0.0.1")
    node.run("ip", "link", "add", evil, "mtu", "1500", *vxlan)
    node.run("ip", "link", "set", evil, "up")
    text = text_of(node, cni_dir=str(folder))
    assert max(map(len, text.splitlines())) < 80
    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    assert "e\\x1b[31m\\xe9 1500 > eth0" in text
    assert "ip link set dev 'x;id' mtu 1450" in text
    lines = text[text.index("sed -i") :].splitlines(keepends=True)
    last = next(number for number, line in enumerate(lines) if not line.endswith("\\\n"))
    node.run("sh", "-ec", "".join(lines[: last + 1]))
    assert (folder / "1.conf").read_text() == '{"mtu": 1500}'


def test_report_that_nobody_takes(node: Host, tmp_path: Path) -> None:
    """A closed pipe or full disk is one line and exit 1, here and in `rules`.

    Nothing else is called so.
    """
    for command in ("check", "rules"):
        script = f"{sys.executable} {PROGRAM} {command} >/dev/full; echo $?"
        assert node.run("sh", "-c", f"{{ {script}; }} 2>&1") == (
            "pmtud: cannot write the output: No space left on device\n1\n"
        )


def test_report_has_colours_on_a_terminal(node: Host) -> None:
    """script(1) lends it a terminal."""
    text = node.run(
        "script", "-qec", shlex.join(doctor_argv((), (), False, "/none")), "/dev/null", check=False
    )
    assert "\033[32mOK   \033[0mprivileges:" in text


def test_json_schema(node: Host) -> None:
    """Version, node, summary and one object per finding."""
    answer = json.loads(
        node.run(*doctor_argv(("--nodename", "n1"), (), True, "/none"), check=False)
    )
    assert answer["schema"] == 1
    assert answer["node"] == "n1"
    assert answer["summary"] == {"OK": 15, "WARN": 1, "FAIL": 0}
    keys = {"check", "status", "found", "fix", "next_step", "risk"}
    assert all(set(entry) == keys for entry in answer["checks"])


# -- the path


class PathNet(Net):
    """node --eth0-- router --(thin)-- far.

    Mgmt is a second link between node and router, for errors from elsewhere.
    """

    def build(self) -> None:
        self.node = self.host("node")
        self.router = self.host("router", forward=True)
        self.far = self.host("far")
        self.link(self.node, self.router, names=("eth0", "to-node"))
        self.link(self.node, self.router, names=("mgmt", "mgmt"))
        self.link(self.router, self.far, names=("to-far", "eth0"))
        self.node.ip(
            "addr add 10.0.0.2/24 dev eth0",
            "addr add fd00::2/64 dev eth0",
            "addr add 172.20.20.9/24 dev mgmt",
            "addr add fd20::9/64 dev mgmt",
            "route add default via 10.0.0.1",
            "route add ::/0 via fd00::1",
        )
        self.router.ip(
            "addr add 10.0.0.1/24 dev to-node",
            "addr add fd00::1/64 dev to-node",
            "addr add 172.20.20.2/24 dev mgmt",
            "addr add fd20::2/64 dev mgmt",
            "addr add 10.9.0.1/24 dev to-far",
            "addr add fd09::1/64 dev to-far",
        )
        self.far.ip(
            "addr add 10.9.0.2/24 dev eth0",
            "addr add fd09::2/64 dev eth0",
            "route add default via 10.9.0.1",
            "route add ::/0 via fd09::1",
        )

    def thin(self, mtu: int) -> None:
        """The router's link to far."""
        self.router.ip(f"link set to-far mtu {mtu}")

    def drop_errors(self) -> None:
        """The router says nothing about packets that are too big."""
        self.router.run(
            "nft",
            "table inet quiet { chain out { type filter hook output priority 0; "
            "icmp type destination-unreachable icmp code frag-needed drop; "
            "icmpv6 type packet-too-big drop; }; }",
        )

    def error_from_management(self) -> None:
        """Errors come from 172.20.20.2 or fd20::2, which the node reaches over mgmt.

        Strict RPF drops them.
        """
        self.router.ip(
            "route replace 10.0.0.2 dev to-node src 172.20.20.2",
            "route replace fd00::2 dev to-node src fd20::2",
        )
        self.node.sysctls({f"net.ipv4.conf.{name}.rp_filter": 1 for name in ("all", "eth0")})
        self.node.run(
            "nft",
            "table inet rpf { chain pre { type filter hook prerouting priority -290; "
            "meta nfproto ipv6 icmpv6 type packet-too-big fib saddr . iif oif 0 drop; }; }",
        )


@pytest.fixture
def path() -> Iterator[PathNet]:
    """A fresh PathNet."""
    with PathNet() as net:
        yield net


FAMILIES = pytest.mark.parametrize(
    ("far", "gateway", "mgmt"),
    [("10.9.0.2", "10.0.0.1", "172.20.20.2"), ("fd09::2", "fd00::1", "fd20::2")],
)


def measure(net: PathNet, host: str, *options: str) -> dict[str, str]:
    """The finding about one host."""
    return diagnose(net.node, *options, hosts=(host,)).of("path")


@FAMILIES
def test_path_without_obstacle(path: PathNet, far: str, gateway: str, mgmt: str) -> None:
    """The whole MTU of the interface."""
    found = f"{far}: path MTU 1500, all of eth0"
    assert measure(path, far) == {"check": "path", "status": "OK", "found": found, "fix": ""}


@FAMILIES
@pytest.mark.parametrize("mtu", [1400, 1337])
def test_path_reported_by_a_router(
    path: PathNet, far: str, gateway: str, mgmt: str, mtu: int
) -> None:
    """A thin link whose router says so is healthy."""
    path.thin(mtu)
    found = measure(path, far)
    assert found["status"] == "OK"
    assert found["found"] == f"{far}: path MTU {mtu}, {gateway} reports {mtu}"


@FAMILIES
@pytest.mark.parametrize("mtu", [1500, 1400, 1337, 1280, 1499])
def test_path_black_hole(path: PathNet, far: str, gateway: str, mgmt: str, mtu: int) -> None:
    """The exact size, and a route that works around it."""
    path.node.ip("link set eth0 mtu 9000")
    path.router.ip("link set to-node mtu 9000")
    path.thin(mtu)
    path.drop_errors()
    bad = measure(path, far)
    assert bad["status"] == "FAIL"
    assert (
        bad["found"]
        == f"{far}: path MTU {mtu}; black hole: packets over {mtu} vanish and nobody says so"
    )
    assert bad["fix"] == "sysctl -w net/ipv4/tcp_mtu_probing=1"
    assert bad["next_step"] == f"ip route replace {far} via {gateway} dev eth0 mtu {mtu}"
    run_fix(path.node, bad)
    path.far.sysctl("net.ipv4.icmp_ratelimit", 0)  # it has few answers left for today
    good = measure(path, far)
    assert good["status"] == "OK"
    assert good["found"].endswith(f"this node knows, it uses {mtu}")


@FAMILIES
def test_path_report_dropped_by_reverse_path(
    path: PathNet, far: str, gateway: str, mgmt: str
) -> None:
    """The report arrived and was dropped; the fix runs pmtud, and then it gets through."""
    path.thin(1400)
    path.error_from_management()
    bad = measure(path, far)
    culprit = "rp_filter" if "." in far else "a rule in inet rpf pre"
    assert bad["status"] == "FAIL"
    assert bad["fix"] in STARTS
    assert bad["found"] == (
        f"{far}: path MTU 1400, {mgmt} reports 1400; "
        f"the report arrived here and was dropped by {culprit}"
    )
    run_fix(path.node, bad, "limits:")
    good = measure(path, far)
    assert good["status"] == "OK"
    assert good["found"] == f"{far}: path MTU 1400, {mgmt}, through pmtud, reports 1400"


def test_path_reported_without_an_mtu(path: PathNet) -> None:
    """A router from before RFC 1191: the kernel takes 552, and so do we."""
    path.thin(1400)
    path.router.run(
        "nft",
        "table inet old { chain out { type filter hook output priority 0; "
        "icmp type destination-unreachable icmp mtu set 0; }; }",
    )
    found = measure(path, "10.9.0.2")
    assert found["status"] == "OK"
    assert found["found"] == "10.9.0.2: path MTU 552, 10.0.0.1 reports 552"


@contextlib.contextmanager
def answering(net: PathNet, router: str, swap: bool) -> Iterator[None]:
    """The router's own errors are dropped, and a program on it sends them, with the quoted length's
    bytes swapped.
    """
    net.drop_errors()
    version = ip_address(router).version
    stop = threading.Event()
    plan, field = (V4, 2) if version == 4 else (V6, 4)

    def listen() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        sock.bind(("to-node", {4: 0x0800, 6: 0x86DD}[version]))
        sock.settimeout(0.05)
        return sock

    def answer() -> None:
        while not stop.is_set():
            with suppress(socket.timeout):
                packet, (_, _, kind, *_) = sniffer.recvfrom(9000)
                if kind == socket.PACKET_HOST and len(packet) > 1400:
                    quoted = bytearray(packet[:100])
                    if swap:
                        quoted[field : field + 2] = packet[field + 1], packet[field]
                    node = {4: "10.0.0.2", 6: "fd00::2"}[version]
                    error = mtu_error(plan, src=router, dst=node, quoted=bytes(quoted), mtu=1400)
                    frames.send([error])

    with (
        Frames(net.router, "to-node", net.node, "eth0") as frames,
        net.router.inside(listen) as sniffer,
        ThreadPoolExecutor(1) as pool,
    ):
        running = pool.submit(answer)
        try:
            yield
        finally:
            stop.set()
        running.result()


@FAMILIES
@pytest.mark.parametrize("swap", [False, True])
def test_path_report_with_another_length(
    path: PathNet, far: str, gateway: str, mgmt: str, swap: bool
) -> None:
    """A report that quotes the length in the other byte order is one all the same."""
    path.thin(1400)
    path.error_from_management()
    with answering(path, mgmt, swap):
        found = measure(path, far)
    culprit = "rp_filter" if "." in far else "a rule in inet rpf pre"
    assert found["found"] == (
        f"{far}: path MTU 1400, {mgmt} reports 1400; "
        f"the report arrived here and was dropped by {culprit}"
    )


@FAMILIES
def test_path_to_a_host_that_speaks_tcp_only(
    path: PathNet, far: str, gateway: str, mgmt: str
) -> None:
    """UDP is dropped without a word: the handshake tells what it can."""
    path.far.run(
        "nft",
        "table inet f { chain i { type filter hook input priority 0; meta l4proto udp drop; }; }",
    )
    silent = measure(path, far)
    named = f"[{far}]:443" if ":" in far else f"{far}:443"
    assert silent["status"] == "WARN"
    assert silent["found"] == f"{far}: not measured, it answers nothing to UDP"
    assert silent["fix"] == f"python3 {PROGRAM} check {shlex.quote(named)}"
    refused = measure(path, named)
    assert refused["status"] == "FAIL"
    assert refused["found"].endswith("; TCP port 443: Connection refused")
    server = path.far.start(
        sys.executable,
        "-c",
        "import socket, time; s = socket.create_server(('::', 443), "
        "family=socket.AF_INET6, dualstack_ipv6=True); print('up', flush=True); time.sleep(60)",
    )
    server.wait_for("up")
    found = measure(path, named)
    mss = 1460 if "." in far else 1440
    assert found["status"] == "WARN"
    assert found["found"].endswith(
        f"; TCP port 443 answers: MSS {mss}, as for MTU 1500; the kernel uses 1500"
    )
    path.thin(1400)  # the router's report is followed all the same
    found = measure(path, far)
    text = f"{far}: path MTU 1400, {gateway} reports 1400; the host answers nothing to UDP"
    assert found["status"] == "OK"
    assert found["found"] == text


@FAMILIES
def test_path_unreachable(path: PathNet, far: str, gateway: str, mgmt: str) -> None:
    """A router that knows no way says so; a node without a route says so itself."""
    path.router.ip("route add unreachable 10.66.0.0/16", "route add unreachable fd66::/32")
    away = "10.66.0.1" if "." in far else "fd66::1"
    found = measure(path, away)
    assert found["status"] == "FAIL"
    assert found["found"].startswith(f"{away}: unreachable, {gateway}: ")
    assert found["fix"] == f"ip route get {away}"
    path.node.ip("route del default", "route del ::/0")
    found = measure(path, away)
    assert found["found"] == f"{away}: find a route: Network is unreachable (errno 101)"
    assert found["fix"] == f"ip route get {away}"


def test_path_report_discarded_by_the_kernel_setting(path: PathNet) -> None:
    """ip_no_pmtu_disc 2: the report arrives, the kernel throws it away, even where RPF is strict.

    The fix cures it.
    """
    path.thin(1400)
    path.node.sysctls({"net.ipv4.ip_no_pmtu_disc": 2, "net.ipv4.conf.all.rp_filter": 1})
    found = measure(path, "10.9.0.2")
    assert found["found"].endswith(
        "10.0.0.1 reports 1400; the report arrived here and was dropped by ip_no_pmtu_disc"
    )
    run_fix(path.node, found)
    assert measure(path, "10.9.0.2")["status"] == "OK"


@FAMILIES
def test_path_report_dropped_by_a_firewall(
    path: PathNet, far: str, gateway: str, mgmt: str
) -> None:
    """Strict RPF is not to blame where the report came in on the way back.

    Nor is a setting of IPv4 for IPv6.
    """
    path.thin(1400)
    path.node.sysctl("net.ipv4.conf.all.rp_filter", 1)
    if ":" in far:
        path.node.sysctl("net.ipv4.ip_no_pmtu_disc", 2)
    path.node.run(
        "nft",
        "table inet fw { chain in { type filter hook input priority 0; icmpv6 type packet-too-big "
        "drop; icmp type destination-unreachable icmp code frag-needed drop; }; }",
    )
    found = measure(path, far)
    assert found["found"] == (
        f"{far}: path MTU 1400, {gateway} reports 1400; "
        "the report arrived here and was dropped by a firewall rule"
    )
    assert "packet-too-big drop" in path.node.run("sh", "-ec", found["fix"])


@FAMILIES
def test_path_report_dropped_on_another_interface(
    path: PathNet, far: str, gateway: str, mgmt: str
) -> None:
    """The path does not follow the default route: the fix names its interface, and helps."""
    path.thin(1400)
    path.error_from_management()
    path.node.ip(
        "route add 10.9.0.0/24 via 10.0.0.1",
        "route add fd09::/64 via fd00::1",
        "route replace default via 172.20.20.2",
        "route replace ::/0 via fd20::2",
    )
    bad = measure(path, far)
    assert bad["found"].endswith("; pmtud delivers it with --iface eth0")
    run_fix(path.node, bad, "limits:", "--iface", "eth0")
    assert (
        measure(path, far)["found"] == f"{far}: path MTU 1400, {mgmt}, through pmtud, reports 1400"
    )


def test_path_report_dropped_unseen(path: PathNet) -> None:
    """Without root what is dropped here cannot be told from what was never sent, and the text says
    so.
    """
    path.thin(1400)
    path.error_from_management()
    before = ("setpriv", "--bounding-set=-net_admin,-net_raw")
    found = diagnose(path.node, hosts=("10.9.0.2",), before=before).of("path")
    assert found["status"] == "FAIL"
    assert found["found"] == (
        "10.9.0.2: path MTU 1400; packets over 1400 vanish, and only "
        "root sees whether a router's report is dropped here"
    )
    assert found["fix"] == f"sudo python3 {PROGRAM} check 10.9.0.2"


@pytest.mark.parametrize(
    "route",
    [
        "via 10.77.0.1 dev eth0 onlink",
        "via inet6 fd00::1 dev eth0",
        "nhid 1",
        "nhid 2",
        "nexthop via 10.77.0.1 dev eth0 onlink nexthop via 10.77.0.1 dev eth0 onlink",
    ],
)
def test_path_black_hole_behind_special_gateways(path: PathNet, route: str) -> None:
    """A gateway outside every subnet, and an IPv6 one: the printed route is taken and works."""
    path.node.sysctl("net.ipv4.nexthop_compat_mode", 0)
    path.node.ip(
        "nexthop add id 1 via 10.77.0.1 dev eth0 onlink",
        "nexthop add id 2 via fd00::1 dev eth0",
        "route del default",
        f"route add 10.9.0.0/24 {route}",
    )
    path.router.ip("addr add 10.77.0.1/32 dev to-node")
    path.thin(1400)
    path.drop_errors()
    bad = measure(path, "10.9.0.2", "--iface", "eth0")
    assert "black hole" in bad["found"]
    run_fix(path.node, bad)
    path.far.sysctl("net.ipv4.icmp_ratelimit", 0)
    good = measure(path, "10.9.0.2", "--iface", "eth0")
    assert good["status"] == "OK"
    assert good["found"].endswith("this node knows, it uses 1400")


def test_path_to_a_link_local_address(path: PathNet) -> None:
    """The zone stays: in the probe, the handshake and the command for the next try."""
    address = re.search(
        r"inet6 (fe80::\S+)/", path.router.run("ip", "-6", "addr", "show", "dev", "mgmt")
    )
    assert address
    named = f"{address[1]}%mgmt"
    assert measure(path, named)["found"] == f"{named}: path MTU 1500, all of mgmt"
    path.router.run(
        "nft",
        "table inet f { chain i { type filter hook input priority 0; meta l4proto udp drop; }; }",
    )
    silent = measure(path, named)
    assert silent["fix"] == f"python3 {PROGRAM} check '[{named}]:443'"
    path.router.start(
        sys.executable,
        "-c",
        "import socket, time; s = socket.create_server(('::', 443), "
        "family=socket.AF_INET6); print('up', flush=True); time.sleep(60)",
    ).wait_for("up")
    assert "; TCP port 443 answers: MSS 1440" in measure(path, f"[{named}]:443")["found"]


@FAMILIES
def test_a_measurement_teaches_nothing(
    path: PathNet, far: str, gateway: str, mgmt: str, program: Path
) -> None:
    """The kernel of the node knows no more than before; where it had to learn, the line says so."""
    path.thin(1400)
    found = f"{far}: path MTU 1400, {gateway} reports 1400"
    assert measure(path, far)["found"] == found
    assert "1400" not in path.node.run("ip", "route", "get", far)
    command = [*setpriv(""), sys.executable, str(program), "check", "--json", far]
    checks = json.loads(path.node.run(*command, check=False))["checks"]
    assert checks[-1]["found"] == f"{found}; this node's kernel has now learned it, for 10 minutes"
    assert "1400" in path.node.run("ip", "route", "get", far)


def passages(cluster: Cluster, service: str, family: int, *options: str) -> list[str]:
    """What `check --from` says on each node, behind the addresses."""
    vip = cluster.vip(service, family)
    client = cluster.client_address(1, family)
    with ThreadPoolExecutor() as pool:

        def look(node: Host) -> str:
            asked = (*options, "--from", vip)
            found = diagnose(node, *asked, hosts=(client,)).of("path_from")
            start, _, rest = found["found"].partition(": ")
            assert start == f"{vip} to {client}"
            return f"{found['status']} {rest}"

        return list(pool.map(look, cluster.nodes))


HERE_4 = "OK the error of 10.8.0.1 came here"
ELSEWHERE_4 = (
    "FAIL the error of 10.8.0.1 did not come here within 1 s: the fabric gave it to another node; "
)


@pytest.mark.parametrize("service", ["host", "pod"])
@pytest.mark.parametrize("family", [4, 6])
def test_check_from_a_service_address(cluster: Cluster, family: int, service: str) -> None:
    """One node of three gets the error; with daemons each, and the copies name that node.

    Nothing is learned or tracked for it, the service's address on lo or on no interface at all.
    """
    here = HERE_4
    elsewhere = ELSEWHERE_4
    if family == 6:
        here = here.replace("10.8.0.1", "fd08::1")
        elsewhere = elsewhere.replace("10.8.0.1", "fd08::1")
    before = passages(cluster, service, family)
    assert before.count(here) == 1
    assert sum(found.startswith(elsewhere) for found in before) == 2
    assert all(
        found.endswith(f"and pmtud with the IPv{family} addresses of all as --peers")
        for found in before
        if found != here
    )
    winner = cluster.node_address(1 + before.index(here), family)
    with daemons(cluster.nodes, *peers_of(family), "--metrics-port", "0"):
        after = passages(cluster, service, family)
    copied = f"OK the error of {here.split()[4]} came as a copy from {winner}"
    assert after == [here if found == here else copied for found in before]
    for node in cluster.nodes:
        assert cluster.learned(node, cluster.client_address(1, family)) is None
        assert f"src={cluster.vip(service, family)} " not in node.run(
            "conntrack", "-L", check=False
        )


def test_check_from_a_service_address_where_not_all_is_well(cluster: Cluster) -> None:
    """Daemons that are missing, that do not know each other, or act on some ports only."""
    sender = passages(cluster, "host", 4).index(HERE_4)
    others = [node for i, node in enumerate(cluster.nodes) if i != sender]
    options = ("--metrics-port", "0", "--ports", str(PORT))
    with daemons([cluster.nodes[sender]], *peers_of(4), *options):
        for found in passages(cluster, "host", 4, "--ports", str(PORT)):
            assert found == HERE_4 or found == (
                "WARN the error of 10.8.0.1 came as a copy from "
                f"{cluster.node_address(sender + 1)}, and no pmtud delivers it here: "
                "pods behind NAT do not learn"
            )
        with daemons(others[:1], *peers_of(4), *options):
            assert "OK the error of 10.8.0.1 came as a copy" in str(passages(cluster, "host", 4))
        narrow = ("--service-networks", "10.97.0.0/16")
        with daemons(others[:1], *peers_of(4), *options, *narrow):
            assert ", and it was not delivered: pmtud" in str(passages(cluster, "host", 4))
    with daemons(cluster.nodes, "--metrics-port", "0"):
        alone = [found for found in passages(cluster, "host", 4) if found != HERE_4]
        advice = (
            "let pmtud run on every node, with the IPv4 addresses of all as --peers; "
            "run this on each"
        )
        assert alone == [ELSEWHERE_4 + advice] * 2


def test_check_from_a_service_address_past_strict_rpf(cluster: Cluster) -> None:
    """The error comes in from a management address, and is dropped; the daemon delivers it."""
    cluster.error_from_management()
    cluster.strict_rpf()
    try:
        dropped = "FAIL the error of 172.20.20.2 came here and was dropped by rp_filter"
        for service in ("host", "pod"):
            found = passages(cluster, service, 4)
            assert found.count(dropped) == 1
            here = found.index(dropped)
            with daemons([cluster.nodes[here]], "--metrics-port", "0"):
                assert passages(cluster, service, 4)[here] == HERE_4.replace(
                    "10.8.0.1", "172.20.20.2"
                )
    finally:
        cluster.error_from_management(False)
        cluster.strict_rpf(False)


def test_check_from_a_service_address_without_an_answer(path: PathNet, program: Path) -> None:
    """No narrow link, a black hole, no privileges, another family."""
    path.node.ip("addr add 10.96.0.1/32 dev lo")

    def look() -> tuple[str, str]:
        found = diagnose(path.node, "--from", "10.96.0.1", hosts=("10.9.0.2",)).checks[-1]
        return found["status"], found["found"].partition(": ")[2]

    assert look() == ("OK", "no router on the way is narrower than eth0")
    found = diagnose(path.node, "--from", "fd96::1", hosts=("10.9.0.2",)).checks[-1]["found"]
    assert found == "10.9.0.2 has no ipv6 address, as --from has"
    path.thin(1400)
    path.drop_errors()
    silent = "no router's error came here within 1 s, and none is known to be sent"
    assert look() == ("WARN", silent)
    command = [*setpriv(""), sys.executable, str(program), "check", "--json", "--from", "10.96.0.1"]
    found = json.loads(path.node.run(*command, "10.9.0.2", check=False))["checks"][-1]
    assert found["found"].endswith("only root can send from an address of many nodes")
    assert found["fix"].startswith("sudo ")
    assert found["fix"].endswith("--from 10.96.0.1")


def test_path_names_and_ports() -> None:
    """An own address is this node itself; a name nobody has is a finding."""
    with Net() as net:
        host = net.host("lonely")
        host.ip("addr add 10.9.9.9/32 dev lo")
        for own in ("127.0.0.1", "10.9.9.9", "::1"):
            found = diagnose(host, hosts=(own,)).of("path")
            assert found["status"] == "OK"
            itself = "this node itself, no router is on the way; name a client, or another node"
            assert found["found"] == f"{own}: {itself}"
        for wrong, fix in (
            ("no.such.host.invalid:1", "getent ahosts no.such.host.invalid"),
            ("127.0.0.1:99999", ""),
            ("[::1", "getent ahosts '[::1'"),
            ("", "getent ahosts ''"),
            ("a..b", ""),
            ("x" * 70, ""),
            ("\udcff", ""),
        ):
            found = diagnose(host, hosts=(wrong,)).of("path")
            assert found["status"] == "FAIL"
            assert found["fix"] == fix


def test_path_is_measured_in_time_or_not_claimed(path: PathNet) -> None:
    """A black hole at an odd size on a jumbo path, the slowest case.

    A host that is out of answers is no black hole.
    """
    path.node.ip("link set eth0 mtu 9000")
    path.router.ip("link set to-node mtu 9000", "link set to-far mtu 8777")
    path.far.ip("link set eth0 mtu 9000")
    path.drop_errors()
    for _ in range(4):
        start = time.monotonic()
        found = measure(path, "10.9.0.2")
        assert time.monotonic() - start < 7.0 * PATIENCE
        if "black hole" in found["found"]:
            assert "path MTU 8777;" in found["found"]
        else:
            assert found["status"] == "WARN"
            assert "path MTU at least" in found["found"]
            assert found["found"].endswith("the host limits its answers, ask again in ten seconds")


def test_check_command_line() -> None:
    """The options of the daemon, HOST, --json, the exit code; text for people by default."""
    with Net() as net:
        host = net.host("doctor")
        other = net.host("other")
        net.link(host, other, names=("eth0", "eth0"))
        host.ip("addr add 10.0.0.1/24 dev eth0", "route add default via 10.0.0.2")
        other.ip("addr add 10.0.0.2/24 dev eth0")
        text = host.run(
            sys.executable,
            str(PROGRAM),
            "check",
            "--nodename",
            "n1",
            "--peers",
            "10.0.0.2",
            "10.0.0.2",
            check=False,
        )
        assert text.endswith("\nn1: 16 OK, 1 WARN, 0 FAIL\n")
        assert "\033" not in text
        assert "OK   path: 10.0.0.2: path MTU 1500, all of eth0\n" in text
        answer = json.loads(host.run(sys.executable, str(PROGRAM), "check", "--json", check=False))
        assert answer["summary"] == {"OK": 15, "WARN": 1, "FAIL": 0}
        assert run_to_end(host, "check")[0] == 1
        host.sysctl("net.ipv4.ip_no_pmtu_disc", 2)
        assert run_to_end(host, "check")[0] == 2


# -----------------------------------------------------------------------------
# Section: command line -- options, environment, exit codes

EXAMPLES = {  # two values for each option, neither the default
    "--peers": ("10.0.0.12,file:/x", "fd00::12"),
    "--iface": ("eth7", "eth8"),
    "--nodename": ("n1", "n2"),
    "--nflog-group": ("7", "8"),
    "--metrics-port": ("9000", "0"),
    "--metrics-addr": ("127.0.0.1", "::1"),
    "--ttl": ("3", "4"),
    "--copy-mark": ("none", "0x3000000"),
    "--ignore-networks": ("10.0.0.0/8", "fd00::/8"),
    "--rules": ("off", "auto"),
    "--service-networks": ("203.0.113.0/24", "2001:db8::/32"),
    "--ports": ("443,80", "8443"),
    "--min-mtu": ("576", "600,1300"),
    "--flow-interval": ("0.5", "0"),
    "--source-rate": ("5", "0"),
    "--rate": ("6", "0.5"),
    "--log-level": ("debug", "error"),
    "--log-format": ("json", "text"),
}
FLAGS = ("--no-rescue", "--dry-run")


def parse_options(argv: Sequence[str], **environ: str) -> pmtud.Config:
    """The configuration of a run."""
    asked = pmtud.parse_args(argv, environ)
    assert asked.command == "run"
    return asked.config


@unit
def test_the_examples_name_every_option() -> None:
    actions = pmtud.build_parser()._actions
    options = {
        text for action in actions for text in action.option_strings if text.startswith("--")
    }
    assert options == {*EXAMPLES, *FLAGS, "--from", "--json", "--no-color", "--help", "--version"}


@unit
@pytest.mark.parametrize("option", EXAMPLES)
def test_every_option_has_a_variable_and_the_command_line_wins(option: str) -> None:
    variable = "PMTUD_" + option[2:].replace("-", "_").upper()
    first, second = EXAMPLES[option]
    given = parse_options([option, first])
    assert given != parse_options([])
    assert parse_options([], **{variable: first}) == given
    assert (
        parse_options([f"{option}={second}"], **{variable: first})
        == parse_options([option, second])
        != given
    )
    assert parse_options([], **{variable: ""}) == parse_options([])


@unit
@pytest.mark.parametrize("option", FLAGS)
@pytest.mark.parametrize(
    ("text", "on"),
    [
        ("1", True),
        ("true", True),
        ("YES", True),
        ("on", True),
        ("0", False),
        ("False", False),
        ("no", False),
        ("off", False),
    ],
)
def test_flags_from_the_environment(option: str, text: str, on: bool) -> None:
    variable = "PMTUD_" + option[2:].replace("-", "_").upper()
    base = ["--peers", "10.0.0.12"]
    assert parse_options([*base, option]) != parse_options(base)
    assert parse_options(base, **{variable: text}) == parse_options([*base, option] if on else base)


@unit
def test_repeated_options_add_up() -> None:
    config = parse_options(
        [
            "--peers",
            "10.0.0.12,file:/x",
            "--peers",
            "file:/y,10.0.0.12,10.0.0.13",
            "--iface",
            "a,b",
            "--iface",
            "c",
            "--ports",
            "1-2",
            "--ports",
            "3",
            "--ignore-networks",
            "10.0.0.0/8",
            "--ignore-networks",
            "fd00::/8",
        ]
    )
    assert config.peers == addresses("10.0.0.12", "10.0.0.13")
    assert config.peer_sources == ("file:/x", "file:/y")
    assert config.ifaces == ("a", "b", "c")
    assert config.ports == {1, 2, 3}
    assert config.ignore_networks == (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@unit
def test_defaults() -> None:
    config = parse_options([])
    assert config == pmtud.Config(nodename=socket.gethostname())
    assert config.nflog_group == 33
    assert config.metrics_port == 30040
    assert config.ttl == 10
    assert config.min_mtu == (552, 1280)
    assert config.flow_interval == 0.1
    assert config.source_rate == 500.0
    assert config.rate == 1000.0
    assert config.rules == "auto"
    assert parse_options(["--metrics-port", "30040"]).metrics_required
    assert not parse_options(["--metrics-port", "0"]).metrics_required


BAD_COMMAND_LINES: tuple[tuple[list[str], dict[str, str], str], ...] = (
    (["--ttl", "0"], {}, "argument --ttl: 0 is not between 1 and 255"),
    (
        ["--copy-mark", "0x2c"],
        {},
        "argument --copy-mark: 0x2c is the mark of deliveries, which the guard keeps on this node",
    ),
    (["--copy-mark", "4294967296"], {}, "argument --copy-mark: 4294967296 has more than 32 bits"),
    (
        ["--copy-mark", "calico"],
        {},
        "argument --copy-mark: 'calico' is not auto, none or a mark like 0x3000000",
    ),
    (
        ["--peers", ""],
        {},
        "argument --peers: '' names no peer; without --peers only local rescue is done",
    ),
    (
        ["--peers=,"],
        {},
        "argument --peers: ',' names no peer; without --peers only local rescue is done",
    ),
    (["--nflog-group", "65536"], {}, "argument --nflog-group: 65536 is not between 0 and 65535"),
    (["--metrics-port", "x"], {}, "argument --metrics-port: 'x' is not a whole number"),
    (
        ["--metrics-addr", "x"],
        {},
        "argument --metrics-addr: 'x' does not appear to be an IPv4 or IPv6 address",
    ),
    (
        ["--peers", "127.0.0.1"],
        {},
        "argument --peers: 127.0.0.1" + PEER_HINT + "; a peer is " + KINDS,
    ),
    (["--peers", "dns:no_des"], {}, "argument --peers: 'dns:no_des' is not " + KINDS),
    (["--peers", "file:"], {}, "argument --peers: 'file:' is not " + KINDS),
    (["--iface", "a/b"], {}, "argument --iface: 'a/b' is not an interface name"),
    (["--rules", "maybe"], {}, "argument --rules: invalid choice: 'maybe' (choose from"),
    (["--log-level", "loud"], {}, "argument --log-level: invalid choice: 'loud' (choose from"),
    (["--rate"], {}, "argument --rate: expected one argument"),
    (["--rat=5"], {}, "unknown option --rat; did you mean --rate?"),
    (["--peer", "10.0.0.12"], {}, "unknown option --peer; did you mean --peers?"),
    (["check", "--peeers", "10.0.0.12"], {}, "unknown option --peeers; did you mean --peers?"),
    (["-peers", "10.0.0.12"], {}, "unknown option -peers; did you mean --peers?"),
    (["--interface", "eth0"], {}, "unknown option --interface; did you mean --iface?"),
    (["-v"], {}, "unknown option -v; see pmtud.py --help"),
    (["chekc"], {}, "unknown command chekc; did you mean check?"),
    (["10.0.0.12"], {}, "unknown command 10.0.0.12; see pmtud.py --help"),
    (["run", "10.0.0.12"], {}, "10.0.0.12: only for `pmtud.py check`"),
    (["--ttl", "5", "6"], {}, "unknown command 6; see pmtud.py --help"),
    (["--peers", "10.0.0.12", "10.0.0.13"], {}, "10.0.0.13: separate peers with commas"),
    (["--peers=10.0.0.12", "10.0.0.13"], {}, "10.0.0.13: separate peers with commas"),
    (
        ["run", "--peers", "10.0.0.12", "10.0.0.13", "10.0.0.14"],
        {},
        "10.0.0.13: separate peers with commas",
    ),
    (["rules", "--iface", "eth0", "eth1"], {}, "eth1: separate ifaces with commas"),
    (["--ports", "80", "443", "--ttl", "3"], {}, "443: separate ports with commas"),
    (
        ["check", "--service-networks", "10.0.0.0/8,", "fd00::/8"],
        {},
        "fd00::/8: separate networks with commas",
    ),
    (["check", "--peers", "10.0.0.12", ",10.0.0.13"], {}, ",10.0.0.13: separate peers with commas"),
    (
        ["--peers", "10.0.0.0/24"],
        {},
        "argument --peers: 10.0.0.0/24" + BROADCAST + "10.0.0.255; a peer is " + KINDS,
    ),
    (["--from", "10.96.0.1"], {}, "--from, --json and --no-color: only for `pmtud.py check`"),
    (
        ["check", "--from", "10.96.0.1"],
        {},
        "--from needs the address of a client: check --from ADDRESS HOST",
    ),
    (
        ["check", "--from", "vip", "10.9.0.2"],
        {},
        "argument --from: 'vip' does not appear to be an IPv4 or IPv6 address",
    ),
    (["--no-rescue"], {}, "--no-rescue without --peers leaves nothing to do; give --peers"),
    ([], {"PMTUD_TTL": "0"}, "PMTUD_TTL: 0 is not between 1 and 255"),
    ([], {"PMTUD_RULES": "maybe"}, "PMTUD_RULES: invalid choice: 'maybe' (choose from"),
    ([], {"PMTUD_DRY_RUN": "maybe"}, "PMTUD_DRY_RUN: 'maybe' is not yes or no"),
    ([], {"PMTUD_PORTS": "https"}, "PMTUD_PORTS: 'https'" + PORT_HINT),
    ([], {"PMTUD_PEERS": "dns:no_des"}, "PMTUD_PEERS: 'dns:no_des' is not " + KINDS),
    # kubectl create secret likes to end values with a newline
    ([], {"PMTUD_TTL": "300\n"}, "PMTUD_TTL: 300 is not between 1 and 255"),
)


@unit
@pytest.mark.parametrize(("argv", "environ", "message"), BAD_COMMAND_LINES)
def test_bad_command_lines(
    argv: list[str],
    environ: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, of `check` 64, and one line.

    What follows `choose from` is argparse's and changes with Python.
    """
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    # A test that fails must not start the daemon
    monkeypatch.setattr(pmtud, "run", lambda config: None)
    assert pmtud.main(argv) == (64 if "check" in argv else 2)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    start, choices, _ = output.err.partition("(choose from")
    assert start + choices == f"pmtud: {message}" + ("" if choices else "\n")


# The Services pmtud and pmtud-metrics, as a kubelet describes them to every container
OF_KUBERNETES = {
    "PMTUD_SERVICE_HOST": "10.96.0.7",
    "PMTUD_SERVICE_PORT": "30040",
    "PMTUD_SERVICE_PORT_METRICS": "30040",
    "PMTUD_PORT": "tcp://10.96.0.7:30040",
    "PMTUD_PORT_30040_TCP": "tcp://10.96.0.7:30040",
    "PMTUD_PORT_30040_TCP_PROTO": "tcp",
    "PMTUD_PORT_30040_TCP_PORT": "30040",
    "PMTUD_PORT_30040_TCP_ADDR": "10.96.0.7",
    "PMTUD_METRICS_SERVICE_HOST": "10.96.0.8",
    "PMTUD_METRICS_SERVICE_PORT": "53",
    "PMTUD_METRICS_PORT": "udp://10.96.0.8:53",
    "PMTUD_METRICS_PORT_53_UDP": "udp://10.96.0.8:53",
    "PMTUD_METRICS_PORT_53_UDP_ADDR": "10.96.0.8",
}


@unit
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("PMTUD_PEER", "did you mean PMTUD_PEERS?"),
        ("PMTUD_Peers", "did you mean PMTUD_PEERS?"),
        ("pmtud_dry_run", "did you mean PMTUD_DRY_RUN?"),
        ("PMTUD_INTERFACE", "did you mean PMTUD_IFACE?"),
        ("PMTUD_PORT", "did you mean PMTUD_PORTS?"),
        ("PMTUD_HOSTS", "did you mean PMTUD_PORTS?"),
        ("PMTUD_COLOUR_OF_THE_SKY", "see pmtud.py --help"),
    ],
)
@pytest.mark.parametrize("value", ["", "10.0.0.12"])
def test_variables_that_are_no_options(name: str, advice: str, value: str) -> None:
    asked = pmtud.parse_args([], {"PATH": "/bin", **OF_KUBERNETES, name: value})
    assert asked.warnings == (f"{name} is no option; {advice}",)
    assert asked.config == parse_options([])


@unit
def test_variables_of_options_and_of_kubernetes_are_in_order() -> None:
    given = {option: examples[0] for option, examples in EXAMPLES.items()}
    given.update(dict.fromkeys((*FLAGS, "--json", "--no-color"), "yes"))
    environ = {
        "PMTUD_" + option[2:].replace("-", "_").upper(): text for option, text in given.items()
    }
    assert pmtud.parse_args(["check"], environ).warnings == ()
    assert pmtud.parse_args([], OF_KUBERNETES) == pmtud.parse_args([], {})


@unit
def test_a_warning_about_a_variable_is_one_line_of_the_log() -> None:
    """In the form that the log has; what the command prints stays as it is."""
    line = r"\S+Z WARNING PMTUD_PEER is no option; did you mean PMTUD_PEERS\?\n"
    done = run_program("rules", "--iface", "eth0", PMTUD_PEER="10.0.0.12")
    assert re.fullmatch(line, done.stderr)
    assert done.returncode == 0
    assert done.stdout[:10] == "# nftables"
    done = run_program("check", "--json", PMTUD_PEER="10.0.0.12", PMTUD_LOG_FORMAT="json")
    assert json.loads(done.stderr)["level"] == "warning"
    assert json.loads(done.stdout)["schema"] == 1


@unit
@pytest.mark.parametrize(
    "argv",
    [
        ["check", "10.9.0.2", "fd09::2"],
        ["check", "--peers", "10.0.0.12", "10.9.0.2"],
        ["--iface", "eth0", "check"],
        ["check", "--ttl", "5", "10.9.0.2"],
        ["--peers", "10.0.0.12", "rules"],
        ["run", "--peers", "10.0.0.12"],
        ["--peers", "10.0.0.12,", "check"],
        ["check", "--peers", "10.0.0.12,", "--iface", "eth0"],
    ],
)
def test_words_that_are_in_their_place(argv: list[str]) -> None:
    """A command may come after options, and so may the hosts of `check`."""
    asked = pmtud.parse_args(argv, {})
    assert asked.command in argv
    assert list(asked.hosts) == [word for word in argv if word in ("10.9.0.2", "fd09::2")]


@unit
def test_no_rescue_and_no_peers_is_nothing_to_do_for_the_daemon_only() -> None:
    """The doctor and `rules` have something to say all the same, whoever gave the option."""
    wanted = parse_options([])._replace(rescue=False)
    for command in ("check", "rules"):
        assert pmtud.parse_args([command, "--no-rescue"], {}).config == wanted
        assert pmtud.parse_args([command], {"PMTUD_NO_RESCUE": "yes"}).config == wanted
    for argv in (["check"], ["rules", "--iface", "eth0"]):
        done = run_program(*argv, "--no-rescue")
        assert done.stderr == ""
        assert done.stdout
    with pytest.raises(pmtud.UsageError):
        pmtud.parse_args([], {"PMTUD_NO_RESCUE": "yes"})


@unit
@pytest.mark.parametrize(
    ("argv", "environ", "line"),
    [
        (["--ttl", "256"], {}, "pmtud: argument --ttl: 256 is not between 1 and 255"),
        ([], {"PMTUD_MIN_MTU": "67"}, "pmtud: PMTUD_MIN_MTU: 67 is not between 68 and 65535"),
        (
            ["--peers", "file:/nonexistent/peers", "--iface", "lo"],
            {},
            "pmtud: peers: file:/nonexistent/peers: No such file or directory",
        ),
        (["--iface", "nosuch0"], {}, "pmtud: --iface: there is no interface nosuch0; there are lo"),
    ],
)
def test_bad_options_end_the_program_with_2(
    argv: list[str], environ: dict[str, str], line: str
) -> None:
    done = run_program(*argv, **environ)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(line)


@unit
def test_help_and_version() -> None:
    shown = run_program("--help")
    assert shown.returncode == 0
    assert shown.stderr == ""
    assert all(
        option in shown.stdout
        for option in (*EXAMPLES, *FLAGS, "examples:", "Exit codes: 0", "PMTUD_")
    )
    titles = re.findall(r"^(\S.+):$", shown.stdout, re.MULTILINE)
    titles[1] = titles[1].replace("optional arguments", "options")  # before Python 3.10
    assert titles == ["positional arguments", "options", "check", *pmtud.OPTION_GROUPS, "examples"]
    assert max(map(len, shown.stdout.splitlines())) < 80
    version = run_program("--version")
    assert version.returncode == 0
    assert version.stdout == f"pmtud {pmtud.__version__}\n"


@unit
@pytest.mark.parametrize("rate", [1, 10, 100, 1000, 100_000])
def test_the_kernel_lets_no_more_through_than_the_daemon_acts_on(rate: int) -> None:
    """Or a flood would use up the daemon's own limit.

    Where the rate is low a few bursts more must come through.
    """
    texts = [rule.text for rule in pmtud.shed_rules(rate, bursts=True) if rule.chain == "shed"]
    first, *bursts = (int(re.findall(r"limit rate (\d+)/second", text)[-1]) for text in texts)
    assert len(bursts) == 2  # of one router's hash in each family
    assert len(set(bursts)) == 1
    assert bursts[0] >= min(50, max(1, rate // 2))
    assert first >= max(1, rate // 2)
    assert first + bursts[0] == max(2, rate)  # of one family
    (alone,) = (rule.text for rule in pmtud.shed_rules(rate, bursts=False) if rule.chain == "shed")
    assert alone.startswith(f"limit rate {max(1, rate)}/second burst {rate} packets ")


@unit
def test_rules_without_a_default_route(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pmtud, "default_route_interfaces", lambda: ())
    assert pmtud.main(["rules"]) == 1
    message = (
        "pmtud: there is no default route; name the interface errors come in on with --iface\n"
    )
    assert capsys.readouterr().err == message


@unit
@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--metrics-port", "0"], None),
        ([], None),
        (
            ["--metrics-port", "9000"],
            "--metrics-port and --metrics-addr need prometheus-client: "
            "pip install prometheus-client, or --metrics-port 0",
        ),
    ],
)
def test_metrics_asked_for_and_prometheus_client_missing(
    argv: list[str], problem: Optional[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    try:
        pmtud.check_metrics_library(parse_options(argv))
    except pmtud.UsageError as caught:
        assert str(caught) == problem
    else:
        assert problem is None


# -----------------------------------------------------------------------------
# Section: properties -- whatever the bytes, whatever the order

nets = st.sampled_from([V4, V6])
ports = st.integers(0, 65535)
numbers = st.binary(min_size=16, max_size=16)
versions = st.sampled_from([b"", b"\x45", b"\x4f", b"\x60"])


@unit
@given(versions, st.binary(max_size=300))
def test_no_bytes_break_a_parser(first: bytes, rest: bytes) -> None:
    data = first + rest
    assert isinstance(pmtud.parse(data), (pmtud.MtuError, Reason))
    assert sum(16 + len(payload) for _, _, payload in pmtud.messages(data)) <= len(data)
    assert sum(4 + len(value) for value in pmtud.attributes(data).values()) <= len(data)
    assert len(pmtud.parse_nflog(data)) <= len(data) // 16
    assert isinstance(pmtud.error_number(data), int)


def damaged(source: bytes) -> st.SearchStrategy[bytes]:
    """These bytes cut anywhere, up to six of them changed."""

    def damage(size: int, changes: list[tuple[int, int]]) -> bytes:
        found = bytearray(source[:size])
        for at, value in changes:
            found[at % max(1, size) : at % max(1, size) + 1] = [value]
        return bytes(found[:size])

    change = st.tuples(st.integers(0, len(source)), st.integers(0, 255))
    return st.builds(damage, st.integers(0, len(source)), st.lists(change, max_size=6))


@unit
@given(nets, st.data())
def test_a_damaged_error_is_an_error_or_a_reason(net: Plan, data: st.DataObject) -> None:
    """Bits flipped anywhere and cut anywhere.

    Then the same in the quoted packet, with the checksum right again.
    """
    inner: dict[str, Any] = (
        {} if net is V4 else {"extensions": [EIGHT, fragment_header(0, True), AUTHENTICATED]}
    )
    assert isinstance(
        pmtud.parse(data.draw(damaged(mtu_error(net, inner=inner)))), (pmtud.MtuError, Reason)
    )
    found = pmtud.parse(mtu_error(net, quoted=data.draw(damaged(quote(net, **inner)))))
    assert isinstance(found, pmtud.MtuError) or found.value.startswith("quoted")


@unit
@given(
    st.sampled_from([6, 17, 33, 132, 1, 4, 41, 47, 50, 89]),
    st.binary(min_size=8, max_size=30),
    ports,
    st.data(),
)
def test_the_short_way_finds_what_the_long_way_finds(
    protocol: int, start: bytes, mtu: int, data: st.DataObject
) -> None:
    """plain_ipv4_error() leaves a packet to walk_error() or agrees with it.

    Most of the usual ones it takes itself.
    """
    whole = mtu_error(
        V4, protocol=protocol, transport=start, mtu=mtu, quoted_length=data.draw(ports)
    )
    assert (pmtud.plain_ipv4_error(whole) is None) is (protocol not in (6, 17, 33, 132))
    for packet in (whole, data.draw(damaged(whole))):
        assert pmtud.plain_ipv4_error(packet) in (None, pmtud.walk_error(packet))


@unit
@given(nets, st.binary(max_size=64), st.data())
def test_nflog_survives_damage(net: Plan, prefix: bytes, data: st.DataObject) -> None:
    datagram = nflog_message(mtu_error(net), 1, prefix) + nflog_message(mtu_error(net), 2)
    assert len(pmtud.parse_nflog(datagram)) == 2
    for packet, _, _ in pmtud.parse_nflog(data.draw(damaged(datagram))):
        assert isinstance(pmtud.parse(packet), (pmtud.MtuError, Reason))


NUMBER_HEAD = nla(8, 12)
decoys = st.sampled_from(
    [NUMBER_HEAD, NUMBER_HEAD + b"\0\0\0\7" + nla(200, 9), nla(13, 10) + b"pmtud rpf"]
)
nflog_messages = st.builds(
    nflog_message,
    st.binary(max_size=40),
    st.integers(0, 2**32 - 1),
    st.sampled_from([b"", b"\0", b"pmtud rpf\0", b"pmtud rpf 2\0", b"pmtud rpg\0", b"mine\0"]),
    between=st.lists(st.binary(max_size=9) | decoys, max_size=3),
)


@unit
@given(st.lists(nflog_messages, max_size=8), st.data())
def test_nflog_search_finds_what_a_walk_finds(messages: list[bytes], data: st.DataObject) -> None:
    """Whatever looks like a number or a prefix before the packet or in it.

    The kernel numbers each message, as asked. Of a damaged one something is found, or nothing.
    """
    walked = [pmtud.walk_to_packet(message) for message in messages]
    assert [one for message in messages for one in pmtud.parse_nflog(message)] == walked
    if messages:
        changed = data.draw(damaged(messages[0]))[16:]
        found = pmtud.parse_nflog(nlmsg(16 + len(changed), 0x400, 0, 0, 0) + changed)
        assert len(found) == 1
        assert all(len(packet) <= len(changed) for packet, _, _ in found)


@unit
@given(
    st.binary(max_size=40),
    st.integers(0, 2**32 - 1),
    st.sampled_from([(b"", False), (b"pmtud rpf\0", True), (b"pmtud rpg\0", False)]),
    st.lists(st.binary(max_size=9) | decoys.filter(lambda decoy: b"rpf" not in decoy), max_size=3),
)
def test_nflog_message_comes_back(
    packet: bytes, number: int, prefix: tuple[bytes, bool], between: list[bytes]
) -> None:
    datagram = nflog_message(packet, number, prefix[0], between=between)
    found = [(packet, struct.pack("!I", number), prefix[1])]
    assert pmtud.parse_nflog(datagram) == found
    assert pmtud.parse_nflog(datagram * 2) == found * 2


@unit
@given(nets, st.binary(min_size=8, max_size=600), st.binary(max_size=30), st.booleans())
def test_icmp_is_exactly_the_bytes_of_the_packet(
    net: Plan, transport: bytes, padding: bytes, more: bool
) -> None:
    outer: dict[str, Any] = {"options": ROUTER_ALERT} if net is V4 else {"extensions": [EIGHT]}
    packet = mtu_error(net, transport=transport, outer=outer if more else {})
    found = pmtud.parse(packet + padding)
    assert isinstance(found, pmtud.MtuError)
    assert (
        found.icmp
        == packet[HEADER[net.family.name] + (len(packet) > 0 and more) * (4 if net is V4 else 8) :]
    )


@unit
@given(nets, st.tuples(numbers, numbers), st.tuples(ports, ports), ports, st.booleans())
def test_parse_agrees_with_scapy(
    net: Plan, pair: tuple[bytes, ...], flow: Sequence[int], mtu: int, tcp: bool
) -> None:
    sport, dport = flow
    size = 4 if net is V4 else 16
    router, host = (str(ip_address(number[:size])) for number in pair)
    layer, upper = (
        (IP, ICMP(type=3, code=4, nexthopmtu=mtu))
        if net is V4
        else (IPv6, ICMPv6PacketTooBig(mtu=mtu))
    )
    segment = (TCP if tcp else UDP)(sport=sport, dport=dport)
    dropped = layer(src=host, dst=net.client) / segment / bytes(100)
    found = pmtud.parse(bytes(layer(src=router, dst=host) / upper / dropped))
    assert isinstance(found, pmtud.MtuError)
    assert found[:11] == (
        net.family,
        packed(router),
        packed(host),
        packed(host),
        packed(net.client),
        6 if tcp else 17,
        len(bytes(dropped)),
        sport,
        dport,
        mtu,
        found.icmp,
    )


@unit
@given(nets, st.binary(min_size=2, max_size=200), st.booleans())
def test_checksum_agrees_with_scapy(net: Plan, data: bytes, right: bool) -> None:
    def summed(body: bytes) -> int:
        if net is V4:
            return int(scapy_checksum(body))
        header = IPv6(src=net.router, dst=net.vip)
        return int(in6_chksum(58, header, body))  # type: ignore[no-untyped-call]

    body = b"\x03" + data
    if right:
        body = body[:2] + struct.pack("!H", summed(body[:2] + bytes(2) + body[4:])) + body[4:]
    holds = not pmtud.checksum_remainder(net.family, packed(net.router), packed(net.vip), body)
    assert holds is (summed(body) in (0, 0xFFFF))  # RFC 2460: scapy turns a sum of 0 into 0xffff
    assert holds or not right


pauses = st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 1.0, 5.0])


@unit
@given(
    st.sampled_from([0.25, 1.0, 3.0, 7.5]),
    st.lists(st.tuples(pauses, st.sampled_from("abc")), max_size=80),
)
def test_no_key_gets_more_than_its_rate(rate: float, events: list[tuple[float, str]]) -> None:
    """In any span of t seconds at most rate * t + burst, and never less than one for a key that
    waited.
    """
    buckets = pmtud.TokenBuckets(rate)
    now = 100.0
    passed: dict[str, list[float]] = {}
    for pause, key in events:
        now += pause
        before = passed.setdefault(key, [])
        if buckets.take(key, now):
            before.append(now)
        else:
            assert before
            assert now - before[-1] < 1 / rate + 1e-6
    for times in passed.values():
        for first in range(len(times)):
            for last in range(first, len(times)):
                assert (
                    last - first + 1 <= rate * (times[last] - times[first]) + max(rate, 1.0) + 1e-6
                )


@unit
@given(st.integers(1, 8), st.lists(st.tuples(pauses, st.integers(0, 12)), max_size=80))
def test_recent_is_bounded_and_remembers_long_enough(
    capacity: int, events: list[tuple[float, int]]
) -> None:
    """A key is there for `seconds` unless more than `capacity` others came since."""
    recent = pmtud.Recent(1.0, capacity)
    now = 50.0
    history = []
    for pause, key in events:
        now += pause
        recent.put(key, now, now)
        history.append((now, key))
        assert len(recent) <= 2 * capacity
        later: set[int] = set()
        for when, old in reversed(history):
            if now - when >= 1.0 or len(later) >= capacity:
                break
            newest = max(time_put for time_put, other_key in history if other_key == old)
            assert recent.get(old) == newest
            later.add(old)


# -----------------------------------------------------------------------------
# Section: structure -- what the charter promises about the source

SOURCE = PROGRAM.read_text()
TREE = ast.parse(SOURCE)
FUNCTIONS = [
    node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
]
IMPURE = {
    "socket",
    "time",
    "random",
    "os",
    "select",
    "signal",
    "threading",
    "logging",
    "http",
    "sys",
    "open",
    "print",
    "input",
    "log",
    "LOGGER",
    "exec",
    "eval",
    "globals",
    "__import__",
    "Netlink",
    "Nflog",
    "ctypes",
}
PURE_ATTRIBUTES = re.compile(r"socket\.(AF|IPPROTO)_\w+|os\.strerror|sys\.byteorder")


def section_lines(name: str) -> range:
    """The line numbers of a section, found by its banner."""
    banners = re.finditer(r"^# -{77}\n# Section: ([\w ]+) -- .+$", SOURCE, re.MULTILINE)
    starts = [(match[1], SOURCE[: match.start()].count("\n") + 1) for match in banners]
    names = [start[0] for start in starts]
    after = [*starts, ("end", SOURCE.count("\n") + 2)][names.index(name) + 1]
    return range(dict(starts)[name], after[1])


def impurities(lines: range) -> Iterator[str]:
    """What in these lines could touch a socket, a clock, a file, the log or chance."""
    nodes = [
        node
        for node in ast.walk(TREE)
        if isinstance(node, (ast.expr, ast.stmt)) and node.lineno in lines
    ]
    allowed = {
        id(node.value)
        for node in nodes
        if isinstance(node, ast.Attribute) and PURE_ATTRIBUTES.fullmatch(ast.unparse(node))
    }
    for node in nodes:
        name = isinstance(node, ast.Name) and id(node) not in allowed and node.id in IMPURE
        if name or isinstance(node, (ast.Import, ast.ImportFrom, ast.Global)):
            yield f"{ast.unparse(node)} in line {node.lineno}"


@unit
def test_the_list_of_sections_is_theirs() -> None:
    """In the docstring of this file, in their order."""
    sections = re.findall(r"^# Section: (.+?) -- ", Path(__file__).read_text(), re.MULTILINE)
    listed = " ".join(str(__doc__).partition("Sections: ")[2].split())
    assert listed == f"{', '.join(sections)}."


@unit
@pytest.mark.parametrize("name", ["packets", "netlink codec", "rules", "policy"])
def test_pure_sections_touch_nothing(name: str) -> None:
    lines = section_lines(name)
    assert len(lines) > 50
    assert list(impurities(lines)) == []


@unit
def test_the_purity_scan_sees_what_it_looks_for() -> None:
    assert any(text.startswith("socket in line") for text in impurities(section_lines("kernel")))
    assert any(text.startswith("time in line") for text in impurities(section_lines("daemon")))


@unit
def test_sections_are_in_the_order_of_the_charter() -> None:
    names = [
        "constants",
        "errors",
        "options",
        "packets",
        "netlink codec",
        "rules",
        "policy",
        "counters",
        "log",
        "kernel",
        "peers",
        "forwarder",
        "daemon",
        "doctor",
        "command line",
    ]
    assert re.findall(r"^# Section: ([\w ]+) -- ", SOURCE, re.MULTILINE) == names


def used_too_early(source: str) -> list[str]:
    """The names that a section uses and only a later one defines."""
    starts = [
        number
        for number, line in enumerate(source.splitlines(), 1)
        if line.startswith("# Section: ")
    ]
    tree = ast.parse(source)
    home: dict[str, int] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = [
            name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
        ]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        for name in names:
            home.setdefault(name, bisect_right(starts, node.lineno))
    return [
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name)
        and isinstance(node.ctx, ast.Load)
        and home.get(node.id, 0) > bisect_right(starts, node.lineno)
    ]


@unit
def test_a_section_uses_only_what_stands_above_it() -> None:
    assert used_too_early(SOURCE) == []
    two = "# Section: a\ndef f():\n    g(h)\nh = 1\n# Section: b\ndef g(): f()\n"
    assert used_too_early(two) == ["g"]


@unit
def test_importing_has_no_side_effect() -> None:
    program = """if True:
        import json, logging, os, signal, sys, threading
        def state():
            return [sorted(os.listdir("/proc/self/fd"))[:-1], threading.active_count(), repr(signal.getsignal(15)),
                    len(logging.root.handlers), dict(os.environ), os.getcwd(), repr(sys.excepthook)]
        import argparse, ctypes, http.server, ipaddress, socket  # their side effects are not ours
        before = state()
        import pmtud
        print(json.dumps([before == state(), "prometheus_client" in sys.modules]))
    """
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, cwd=PROGRAM.parent, text=True, capture_output=True, check=True)
    assert json.loads(done.stdout) == [True, False]
    assert done.stderr == ""


@unit
def test_only_the_standard_library_at_the_top() -> None:
    imports = [node for node in TREE.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
    library = sysconfig.get_paths()["stdlib"]
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        origin = spec.origin or ""
        assert origin in ("built-in", "frozen") or (
            origin.startswith(library) and "-packages" not in origin
        ), name


FUNCTION_LINES_MAX = 60


def long_functions(tree: ast.AST) -> Iterator[str]:
    """The names of all functions over the limit, methods and functions in functions too."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES_MAX:
            yield node.name


@unit
def test_functions_are_short() -> None:
    assert set(long_functions(TREE)) <= {"add_options"}  # a table


@unit
@pytest.mark.parametrize(("lines", "found"), [(60, []), (61, ["run"])])
def test_the_scan_for_long_functions_sees_each(lines: int, found: list[str]) -> None:
    """Also one whose name a short one has, too."""
    body = "        pass\n" * (lines - 1)
    text = f"class A:\n    def run():\n{body}class B:\n    def run():\n        pass\n"
    assert list(long_functions(ast.parse(text))) == found


@unit
def test_python_3_9_reads_it() -> None:
    ast.parse(SOURCE, feature_version=(3, 9))


# -----------------------------------------------------------------------------
# Section: trust -- hostile input, faults, long runs

UNLIMITED = ("--flow-interval", "0", "--source-rate", "0", "--rate", "0")


def assert_served(
    cluster: Cluster, cases: Sequence[tuple[int, str]] = ((4, "pod"), (6, "host"))
) -> None:
    """Whatever happened before: every transfer finishes."""
    for family, service in cases:
        cluster.flush()
        assert len(cluster.download(service, family)) == 23, f"{service} over IPv{family}"


def configure_uplink(cluster: Cluster, i: int, address: str = "") -> None:
    """What a node's network scripts do once eth0 is there."""
    others = [j for j in range(1, cluster.size + 1) if j != i]
    cluster.nodes[i - 1].ip(
        "link set eth0 up",
        f"addr replace {address or Cluster.node_address(i)}/24 brd + dev eth0",
        f"addr replace {Cluster.node_address(i, 6)}/64 dev eth0",
        "route replace default via 10.0.0.1",
        "route replace ::/0 via fd00::1",
        *(f"route replace 10.244.{j}.0/24 via {Cluster.node_address(j)}" for j in others),
        *(f"route replace fd44:{j}::/64 via {Cluster.node_address(j, 6)}" for j in others),
    )


# -- faults: what the network does


GROUP_PEERS = "10.0.0.255,ff02::7074%eth0"


@pytest.mark.parametrize("peers", [ALL_PEERS, GROUP_PEERS])
def test_interface_down_and_up(peers: str) -> None:
    """IPv6 addresses and all routes go with it; once the node's network is back, so are we."""
    with Cluster() as net, daemons(net.nodes, "--peers", peers):
        for node in net.nodes:
            node.ip("link set eth0 down")
        for i in (1, 2, 3):
            configure_uplink(net, i)
        assert_served(net)


def no_tentative_address(net: Net) -> bool:
    """Whether duplicate address detection is over everywhere."""
    return not any(
        execute("ip", "-6", "-n", host.namespace, "addr", "show", "tentative") for host in net.hosts
    )


@pytest.mark.parametrize("peers", [ALL_PEERS, GROUP_PEERS])
def test_interface_deleted_and_created_again(peers: str) -> None:
    """A new interface of the same name, its IPv6 address unusable until duplicate address detection
    is over.
    """
    with Cluster() as net, daemons(net.nodes, "--peers", peers):
        for node in net.nodes:
            node.ip("link del eth0")
            node.sysctl("net.ipv6.conf.default.accept_dad", 1)
        for i, node in enumerate(net.nodes, 1):
            net.link(net.fabric, node, names=("", "eth0"))
            net.fabric.ip(f"link set to-{node.name} master nodes", "neigh flush dev nodes")
            configure_uplink(net, i)
        assert poll(lambda: no_tentative_address(net), 10)
        assert_served(net)


def test_address_changed(tmp_path: Path) -> None:
    """A node gets another address, the peer files say so.

    Copies leave from it, nobody calls them misaddressed.
    """
    path = tmp_path / "peers"
    path.write_text(ALL_PEERS.replace(",", "\n"))
    with Cluster() as net, daemons(net.nodes, "--peers", f"file:{path}"):
        net.nodes[0].ip("addr del 10.0.0.11/24 dev eth0")
        configure_uplink(net, 1, "10.0.0.21")
        for node in net.nodes[1:]:
            node.ip("route replace 10.244.1.0/24 via 10.0.0.21")
        net.fabric.ip(
            "route replace 10.96.0.0/24 nexthop via 10.0.0.21 nexthop via 10.0.0.12 nexthop "
            "via 10.0.0.13"
        )
        path.write_text(ALL_PEERS.replace("10.0.0.11", "10.0.0.21").replace(",", "\n"))
        name = 'pmtud_copies_sent_total{peer="10.0.0.21"}'
        assert poll(lambda: all(name in metrics(node) for node in net.nodes[1:]), 5)
        assert_served(net)
        for node in net.nodes:
            assert "misaddressed" not in drops(metrics(node))


def test_default_route_gone_and_moved(cluster: Cluster) -> None:
    """Gone: errors still come in where they did. Moved: the rules follow. Back: as before."""
    with daemons(cluster.nodes, "--peers", ALL_PEERS, patch=QUICK) as processes:
        for node in cluster.nodes:
            node.ip("route del default", "route del ::/0")
        time.sleep(0.6)  # for the housekeeping to see it
        assert [process.output().count("the default route moved") for process in processes] == [
            0,
            0,
            0,
        ]
        for node in cluster.nodes:
            node.ip("route add default via 172.20.20.2", "route add ::/0 via fd20::2")
        for process in processes:
            process.wait_for("the default route moved before=eth0 now=mgmt")
        for i in (1, 2, 3):
            configure_uplink(cluster, i)
        for process in processes:
            process.wait_for("the default route moved before=mgmt now=eth0")
        assert_served(cluster)


def test_peers_that_cannot_be_reached(cluster: Cluster) -> None:
    """Nobody answers ARP, no route, prohibited, EINVAL.

    Each is counted by peer, the good peers get theirs.
    """
    bad = {
        "203.0.113.7": "unreachable",
        "203.0.113.8": "prohibit",
        "203.0.113.9": "blackhole",
        "203.0.113.10": "throw",
    }
    # `throw` ends the lookup in its table; the default route is in the same one, so ENETUNREACH is
    # what remains
    with contextlib.ExitStack() as stack:
        for node in cluster.nodes:
            for address, kind in bad.items():
                node.ip(f"route add {kind} {address}")
                stack.callback(node.ip, f"route del {kind} {address}")
        peers = ",".join([*bad, "10.0.0.99", "fd00::99", ALL_PEERS])
        stack.enter_context(daemons(cluster.nodes, "--peers", peers))
        assert_served(cluster)
        samples = [metrics(node) for node in cluster.nodes]
    for address in bad:
        refused = sum(s[f'pmtud_copy_errors_total{{peer="{address}"}}'] for s in samples)
        assert refused == sum(s['pmtud_copies_sent_total{peer="10.0.0.99"}'] for s in samples) > 0
        assert sum(s[f'pmtud_copies_sent_total{{peer="{address}"}}'] for s in samples) == 0


def test_a_firewall_that_refuses_copies(cluster: Cluster) -> None:
    """EPERM for one peer is counted at that peer.

    The others get theirs; once allowed, transfers finish.
    """
    first = ingress(cluster, 4)
    node = cluster.nodes[first]
    one, other = [i for i in (0, 1, 2) if i != first]
    refuse = f"""table inet refuse {{ chain output {{ type filter hook output priority filter;
                 ip daddr {Cluster.node_address(one + 1)} icmp type destination-unreachable drop; }}; }}"""
    with daemons(cluster.nodes, "--peers", ALL_PEERS):
        node.run("nft", "-f", "-", input=refuse)
        try:
            inject(cluster.router, 4, flow_errors(4))
            received(cluster.nodes[other], ERRORS)
            assert (
                metrics(node)[f'pmtud_copy_errors_total{{peer="{Cluster.node_address(one + 1)}"}}']
                == ERRORS
            )
            assert (
                metrics(node)[
                    f'pmtud_copies_sent_total{{peer="{Cluster.node_address(other + 1)}"}}'
                ]
                == ERRORS
            )
        finally:
            node.run("nft", "delete", "table", "inet", "refuse")
        assert_served(cluster)


@pytest.mark.parametrize(
    ("conntrack", "dropped"), [(True, {}), (False, {"truncated": 1})], ids=["conntrack", "none"]
)
def test_copies_larger_than_the_path_to_a_peer(conntrack: bool, dropped: dict[str, int]) -> None:
    """A 1,428-byte error over a path of 1,300.

    The kernel sends the copy in fragments, never EMSGSIZE. Conntrack puts them together again.
    """
    service = "pod" if conntrack else "host"
    vip = Cluster.vip(service)
    long_error = mtu_error(
        V4,
        src="10.8.0.1",
        dst=vip,
        quoted_src=vip,
        quoted_dst=Cluster.client_address(1),
        transport=tcp_start(80, 40000) + bytes(1360),
    )
    with Cluster(conntrack=conntrack, invalid_drop=conntrack) as cluster:
        first = ingress(cluster, 4, service)
        node = cluster.nodes[first]
        peer = cluster.nodes[(first + 1) % 3]
        address = Cluster.node_address((first + 1) % 3 + 1)
        node.ip(f"route add {address}/32 dev eth0 mtu 1300")
        with (
            daemons(cluster.nodes, "--peers", ALL_PEERS),
            Capture(peer, "eth0") as wire,
        ):
            inject(cluster.router, 4, [long_error])
            samples = received(peer, 1)
            assert total(samples, "pmtud_received_total") == 1
            assert total(samples, "pmtud_acted_total") == 1 - len(dropped)
            assert drops(samples) == dropped
            [first_fragment] = wire.settle()
            assert struct.unpack_from("!H", first_fragment.packet, 6)[0] == MF
            assert total(received(node, 1), "pmtud_copy_errors_total") == 0
            assert_served(cluster, [(4, service), (6, "host")])


def test_queues_full_of_copies_nobody_takes(cluster: Cluster) -> None:
    """ENOBUFS: dead neighbours whose queues swallow the send buffer.

    Refused at once and counted; it recovers.
    """
    node = cluster.nodes[ingress(cluster, 4)]
    jam: dict[str, object] = {
        "net.ipv4.neigh.eth0.unres_qlen_bytes": 1 << 30,
        "net.ipv4.neigh.eth0.mcast_solicit": 200,
    }
    node.sysctls(jam)
    peers = f"{ALL_PEERS},10.0.0.96,10.0.0.97,10.0.0.98,10.0.0.99"

    def copies() -> int:
        samples = metrics(node)
        return total(samples, "pmtud_copy_errors_total") + total(samples, "pmtud_copies_sent_total")

    with daemons(cluster.nodes, "--peers", peers, *UNLIMITED) as processes:
        begun = time.monotonic()
        feed(processes[cluster.nodes.index(node)], cluster.fabric, node, flow_errors(4, count=6000))
        received(node, 6000)
        assert time.monotonic() - begun < 100  # the neighbours are asked for 200 s
        assert poll(lambda: copies() == 6 * 6000, 2)
        assert total(metrics(node), "pmtud_copy_errors_total") > 0
        assert get(node, "/healthz")[1].startswith("ok\ncopies to 10.0.0.")
        node.sysctls(
            {"net.ipv4.neigh.eth0.unres_qlen_bytes": 212992, "net.ipv4.neigh.eth0.mcast_solicit": 3}
        )
        execute("ip", "-n", node.namespace, "neigh", "flush", "dev", "eth0")
        assert_served(cluster)


# -- faults: what the kernel's tables do


class Frames:
    """Raw packets put on a link as Ethernet frames by sendmmsg(), hundreds of thousands a second."""

    def __init__(self, host: Host, interface: str, target: Host, target_interface: str) -> None:
        mac = target.read(f"/sys/class/net/{target_interface}/address")
        self._destination = bytes.fromhex(mac.strip().replace(":", "")) + b"\x02\0\0\0\0\x01"
        self._socket = host.inside(partial(self._open, interface))
        self._send = ctypes.CDLL(None, use_errno=True).sendmmsg
        self._send.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)

    @staticmethod
    def _open(interface: str) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sock.bind((interface, 0))
        return sock

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, packets: Sequence[bytes]) -> None:
        """Put every packet on the link, in order."""
        for start in range(0, len(packets), pmtud.UIO_MAXIOV):
            bodies = packets[start : start + pmtud.UIO_MAXIOV]
            vectors = (pmtud.iovec * len(bodies))()
            heads = []
            for vector, body in zip(vectors, bodies):
                kind = b"\x86\xdd" if body[:1] and body[0] >> 4 == 6 else b"\x08\x00"
                frame = self._destination + kind + body
                vector.iov_base = frame
                vector.iov_len = len(frame)
                heads.append(pmtud.MMSGHDR.pack(0, 0, ctypes.addressof(vector), 1, 0, 0, 0, 0))
            entries = ctypes.create_string_buffer(b"".join(heads))
            done = 0
            while done < len(bodies):
                address = ctypes.addressof(entries) + done * pmtud.MMSGHDR.size
                sent = self._send(self._socket.fileno(), address, len(bodies) - done, 0)
                if sent <= 0:
                    raise OSError(ctypes.get_errno(), "sendmmsg")
                done += sent


def blast(
    host: Host, interface: str, target: Host, target_interface: str, packets: Sequence[bytes]
) -> None:
    """As fast as it goes."""
    with Frames(host, interface, target, target_interface) as frames:
        frames.send(packets)


def unread(process: Process) -> int:
    """Bytes that wait in the daemon's netlink sockets."""
    rows = Path(f"/proc/{process.pid}/net/netlink").read_text().splitlines()[1:]
    return sum(int(row.split()[4]) for row in rows if row.split()[1] == str(NETLINK_NETFILTER))


def feed(process: Process, fabric: Host, node: Host, packets: Sequence[bytes]) -> None:
    """As fast as the node's daemon reads them, so that not one gets lost."""
    with Frames(fabric, f"to-{node.name}", node, "eth0") as frames:
        for start in range(0, len(packets), 200):
            assert poll(lambda: unread(process) < 1 << 20, 30)
            frames.send(packets[start : start + 200])


def settled(host: Host) -> int:
    """How many errors the daemon has received, once it has nothing left to read."""
    counts = [-1, -2, -3]

    def quiet() -> bool:
        counts.append(total(metrics(host), "pmtud_received_total"))
        time.sleep(0.2)
        return len(set(counts[-4:])) == 1

    assert poll(quiet, 30), counts
    return counts[-1]


def test_nflog_overrun_is_counted_exactly(cluster: Cluster) -> None:
    """More errors than the receive buffer holds: received + lost = sent, and the loop goes on."""
    node = cluster.nodes[ingress(cluster, 4)]
    sent = 20_000
    with daemons(cluster.nodes, "--peers", ALL_PEERS, *UNLIMITED) as processes:
        process = processes[cluster.nodes.index(node)]
        os.kill(process.pid, signal.SIGSTOP)
        blast(cluster.fabric, f"to-{node.name}", node, "eth0", flow_errors(4, count=sent))
        os.kill(process.pid, signal.SIGCONT)
        assert settled(node) > 1000
        inject(cluster.router, 4, flow_errors(4, count=1))

        def counted() -> int:
            samples = metrics(node)
            return total(samples, "pmtud_received_total") + total(samples, "pmtud_nflog_lost_total")

        assert poll(lambda: counted() == sent + 1, 5), counted()
        assert 1000 < total(metrics(node), "pmtud_nflog_lost_total") < sent
        assert_served(cluster)


STEAL = """
import pmtud, sys
for command in (2, 4):  # NFULNL_CFG_CMD_UNBIND, NFULNL_CFG_CMD_PF_UNBIND
    with pmtud.Netlink(pmtud.NETLINK_NETFILTER) as thief:
        payload = pmtud.NFGENMSG.pack(2, 0, 33) + pmtud.attribute(pmtud.NFULA_CFG_CMD, bytes([command]))
        kind = pmtud.NFLOG_CONFIG
        try:
            thief.request("unbind", kind, 0, payload)
            print("taken")
        except pmtud.NetlinkError as problem:
            print(problem)
"""


def test_another_process_wants_the_group(cluster: Cluster) -> None:
    """It cannot bind our group, nor unbind it; its own failure names us, and we notice nothing."""
    with daemons(cluster.nodes, "--peers", ALL_PEERS):
        for node in cluster.nodes:
            code, output = run_to_end(node, "--metrics-port", "0")
            assert code == 1
            assert "pmtud already runs here" in output
            env = {"PYTHONPATH": str(HERE)}
            thief = node.start(sys.executable, "-c", STEAL, env=env)
            assert poll(partial(lambda thief: thief.returncode() is not None, thief), 5)
            assert "unbind: Operation not permitted" in thief.output()
        assert_served(cluster)


def test_flush_ruleset_where_tables_cannot_be_owned() -> None:
    """Kernels before 5.12: what `nft flush ruleset` removed is noticed at the next look and
    installed again.
    """
    with (
        Cluster(conntrack=False) as plain,
        daemons(plain.nodes, "--peers", ALL_PEERS, patch=QUICK + UNOWNED) as processes,
    ):
        for node in plain.nodes:
            node.run("nft", "flush", "ruleset")
        for process in processes:
            process.wait_for("our rules were flushed: installed again")
        for node in plain.nodes:
            assert poll(
                partial(lambda node: "log group 33" in node.run("nft", "list", "ruleset"), node), 3
            )
        assert_served(plain, ((4, "host"), (6, "host")))
        assert not [
            process for process in processes if "cannot replace our rules" in process.output()
        ]


def conntrack_entry(number: int) -> bytes:
    """IPCTNL_MSG_CT_NEW of an established, assured TCP connection that no packet belongs to."""

    def part(kind: int, *ports: int) -> bytes:
        addresses = (number.to_bytes(4, "big"), bytes([198, 18, 0, 1]))[:: 1 if kind == 1 else -1]
        ip = pmtud.nested(1, *(pmtud.attribute(1 + n, a) for n, a in enumerate(addresses)))
        proto = pmtud.attribute(1, b"\x06") + b"".join(
            pmtud.be16(2 + n, port) for n, port in enumerate(ports)
        )
        return pmtud.nested(kind, ip, pmtud.nested(2, proto))

    state = pmtud.nested(4, pmtud.nested(1, pmtud.attribute(1, b"\x03")))  # TCP, ESTABLISHED
    body = pmtud.NFGENMSG.pack(socket.AF_INET, 0, 0) + part(1, 1, 2) + part(2, 2, 1)
    # IPS_SEEN_REPLY, ASSURED, CONFIRMED; ten minutes
    body += pmtud.be32(3, 0b1110) + pmtud.be32(7, 600) + state
    return pmtud.message(NFNL_SUBSYS_CTNETLINK << 8, 0x400, 1, body)  # NLM_F_CREATE


def fill_conntrack(entries: int) -> None:
    """Connections until there is no room for another one, in the namespace of the calling thread."""
    model = conntrack_entry(0x0BADCAFE)
    base = 0x0C000000
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
        for start in range(base, base + entries, 256):
            addresses = (number.to_bytes(4, "big") for number in range(start, start + 256))
            netlink.send(
                b"".join(model.replace(b"\x0b\xad\xca\xfe", address) for address in addresses)
            )
            with suppress(OSError):  # what the kernel refuses when the table is full
                while netlink.recv(1 << 16, socket.MSG_DONTWAIT):
                    pass


def test_conntrack_table_full(cluster: Cluster) -> None:
    """Errors need no entry and copies are not tracked.

    All are acted on; transfers finish once there is room.
    """
    first = ingress(cluster, 4)
    node = cluster.nodes[first]
    peer = cluster.nodes[(first + 1) % 3]
    with daemons(cluster.nodes, "--peers", ALL_PEERS):
        room = int(node.read("/proc/sys/net/netfilter/nf_conntrack_max"))
        node.inside(partial(fill_conntrack, room + 1024))
        assert int(node.read(pmtud.CONNTRACK_COUNT)) >= room
        with Capture(cluster.fabric) as wire:
            blast(cluster.fabric, f"to-{node.name}", node, "eth0", flow_errors(4))
            assert poll(lambda: len(node_packets(wire.packets(), 4)) == 2 * ERRORS, 3)
        node.inside(flush_conntrack)  # no new connection until then, a scrape's neither
        assert drops(received(node, ERRORS)) == drops(received(peer, ERRORS)) == {}
        assert metrics(node)['pmtud_delivered_total{family="ipv4",result="owner"}'] == ERRORS
        assert_served(cluster)


# -- faults: what happens to the process


def test_a_peer_file_whose_name_is_no_text(cluster: Cluster, tmp_path: Path) -> None:
    """The path is used as it is; log and metrics show the bytes that are no UTF-8 escaped."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/peers\xff"))
    path.write_text("10.0.0.12")
    with daemons([cluster.nodes[0]], "--peers", f"file:{path}"):
        assert [
            n for k, n in metrics(cluster.nodes[0]).items() if "pmtud_peers{" in k and "udcff" in k
        ] == [1]


def test_file_source_failing_in_each_way(cluster: Cluster, tmp_path: Path) -> None:
    """Gone, unreadable, a directory, a FIFO, too big, not UTF-8, not addresses.

    The last good peers stay in force.
    """
    path = tmp_path / "peers"
    path.write_text(ALL_PEERS)
    node = cluster.nodes[0]
    name = f'pmtud_peers{{source="file:{path}"}}'
    with daemons(cluster.nodes, "--peers", f"file:{path}") as processes:
        for make, problem in FILE_PROBLEMS.values():
            path.unlink() if path.is_file() or path.is_fifo() or path.is_symlink() else path.rmdir()
            make(path)
            os.kill(processes[0].pid, signal.SIGHUP)
            processes[0].wait_for(problem.replace('"', "'"))
            assert metrics(node)[name] == 4
            if not path.exists():
                path.touch()
        assert metrics(node)[f'pmtud_peer_refresh_failures_total{{source="file:{path}"}}'] >= len(
            FILE_PROBLEMS
        )
        assert_served(cluster)


def test_metrics_port_of_another_program(cluster: Cluster) -> None:
    """Taken by somebody else: a warning, no metrics, and every error is handled."""
    with contextlib.ExitStack() as stack:

        def occupy() -> socket.socket:
            return socket.create_server(("::", 30040), family=socket.AF_INET6, dualstack_ipv6=True)

        for node in cluster.nodes:
            stack.enter_context(node.inside(occupy))
        processes = stack.enter_context(daemons(cluster.nodes, "--peers", ALL_PEERS))
        assert_served(cluster)
        assert all(
            "Address already in use); running without, choose" in process.output()
            for process in processes
        )


def connect(
    host: Host, count: int, data: bytes = b"", patience: float = 0.02
) -> list[socket.socket]:
    """Connections to the host's metrics port that say this much and no more."""

    def dial() -> list[socket.socket]:
        clients = [socket.socket() for _ in range(count)]
        for client in clients:
            client.settimeout(patience)  # the backlog is short: some will never be accepted
            with suppress(OSError):
                client.connect(("127.0.0.1", 30040))
                client.sendall(data)  # or hung up already: all places are taken
        return clients

    return host.inside(dial)


LARGE_HEADER = b"A: " + b"b" * 60_000 + b"\r\n"  # http.server takes 100 of 64 kB
HTTP_ATTACKS: dict[str, tuple[int, bytes]] = {
    "silent": (16, b""),
    "many": (100, b"GET /metrics HTTP/1.1\r\n"),
    "huge header": (8, b"GET / HTTP/1.1\r\nA: " + b"a" * (1 << 20)),
    "endless headers": (8, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 50_000),
    "large headers": (16, b"GET / HTTP/1.1\r\n" + LARGE_HEADER * 99 + b"\r\n"),
    "huge request line": (8, b"GET /" + b"a" * (1 << 20)),
    "binary": (8, bytes(range(256)) * 64),
}


HURRIED = f"{QUICK}\npmtud.StatusHandler.timeout = 2.0"


@pytest.mark.parametrize("attack", HTTP_ATTACKS)
def test_http_clients_that_mean_no_good(cluster: Cluster, attack: str) -> None:
    """Errors are handled all the while, memory and threads are bounded, and the port answers again
    within seconds.
    """
    count, data = HTTP_ATTACKS[attack]
    with daemons(cluster.nodes, "--peers", ALL_PEERS, patch=HURRIED) as processes:
        clients = [client for node in cluster.nodes for client in connect(node, count, data)]
        assert_served(cluster, [(4, "pod")])
        assert all(usage(process)["Threads"] <= 16 + 4 for process in processes)
        for node in cluster.nodes:
            assert poll(partial(is_ready, node), 8)
        assert all(usage(process)["VmRSS"] < 100_000 for process in processes)
        for client in clients:
            client.close()


def drip(clients: Sequence[socket.socket], stop: threading.Event) -> None:
    """Slowloris: one byte of a header every half second on each connection."""
    while not stop.wait(0.5):
        for client in clients:
            with suppress(OSError):
                client.send(b"a")


def test_slowloris(cluster: Cluster) -> None:
    """Clients that never stop talking hold all places.

    The oldest gives way, so that no probe fails.
    """
    node = cluster.nodes[0]
    with daemons(cluster.nodes, "--peers", ALL_PEERS) as processes:
        clients = connect(node, 16, b"GET /metrics HTTP/1.1\r\nA: ", patience=2.0)
        stop = threading.Event()
        dripping = threading.Thread(target=drip, args=(clients, stop))
        dripping.start()
        try:
            assert poll(lambda: usage(processes[0])["Threads"] >= 17, 2)
            assert [get(node, path)[0] for path in ("/healthz", "/readyz", "/metrics")] == [
                "200"
            ] * 3
            assert_served(cluster, [(4, "pod")])
            # Five seconds for each, whatever it does
            assert poll(lambda: usage(processes[0])["Threads"] <= 4, 8)
        finally:
            stop.set()
            dripping.join()
            for client in clients:
                client.close()


def test_connections_that_cannot_be_ended_are_bounded_too() -> None:
    """Where all places are taken by answers being made, the newcomer has to go, within a second or
    so.
    """
    free = threading.Event()

    def slow() -> bytes:
        free.wait(300)
        return b"done"

    config = pmtud.Config(metrics_addr="127.0.0.1", metrics_port=0)
    before = threading.active_count()
    with pmtud.open_status_server(config, slow, list, list, list) as server, ExitStack() as stack:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        stack.callback(server.shutdown)
        clients = []
        for _ in range(server.CONNECTIONS_MAX + 1):
            clients.append(
                stack.enter_context(socket.create_connection(server.socket.getsockname()))
            )
            clients[-1].sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        clients[-1].settimeout(60.0)
        assert clients[-1].recv(1) == b""
        assert threading.active_count() == before + 1 + server.CONNECTIONS_MAX
        free.set()
        assert clients[1].makefile("rb").read().endswith(b"\r\n\r\ndone")


def test_a_connection_without_a_thread_gives_its_place_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no thread can be started, twenty times, the server still has all its places."""
    config = pmtud.Config(metrics_addr="127.0.0.1", metrics_port=0)
    server = pmtud.open_status_server(config, lambda: b"", list, list, list)
    with server, monkeypatch.context() as m:

        def fail(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        m.setattr(threading.Thread, "start", fail)
        for _ in range(pmtud.StatusServer.CONNECTIONS_MAX + 4):
            with socket.create_connection(("127.0.0.1", server.socket.getsockname()[1])) as client:
                server.handle_request()
                assert client.recv(1) == b""
        m.undo()
        with socket.create_connection(("127.0.0.1", server.socket.getsockname()[1])) as client:
            client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            server.handle_request()
            assert client.makefile("rb").read().endswith(b"ok\n")


STALLING = f"""
{QUICK}
{UNOWNED}
import os, time
turn = pmtud.Daemon._tick
def tick(self, now):
    turn(self, now)
    while os.path.exists(os.environ["STALL"]):
        time.sleep(0.1)
pmtud.Daemon._tick = tick
"""


def test_what_is_not_ready_is_said(node: Host, tmp_path: Path) -> None:
    """A loop that hangs, rules that somebody else holds, a source that has not answered.

    Each by name.
    """
    stall = tmp_path / "stall"
    peers = ("--peers", "nobody.invalid,10.0.0.9")
    process = patched_daemon(node, STALLING, *peers, env={"STALL": str(stall)})
    process.wait_for("limits:")
    unnamed = "dns:nobody.invalid: Temporary failure in name resolution\n"
    assert poll(lambda: get(node, "/readyz") == ("503", unnamed), 5), get(node, "/readyz")
    assert get(node, "/healthz") == ("200", "ok\n")
    take = "flush ruleset; add table inet pmtud_33 { flags owner; }"
    thief = node.start("sh", "-c", f"(echo '{take}'; exec sleep 60) | exec nft -i")
    process.wait_for("cannot replace our rules")
    rules = "ipv4: our rules are not in force\nipv6: our rules are not in force\n"
    assert poll(lambda: get(node, "/readyz") == ("503", rules + unnamed), 5), get(node, "/readyz")
    os.killpg(thief.pid, signal.SIGKILL)
    assert poll(lambda: get(node, "/readyz") == ("503", unnamed), 5), get(node, "/readyz")
    stall.touch()
    assert poll(lambda: get(node, "/healthz")[0] == "503", 20)
    assert re.fullmatch(r"the packet loop has not turned for \d\d s\n", get(node, "/healthz")[1])
    assert re.fullmatch(
        rf"the packet loop has not turned for \d\d s\n{unnamed}", get(node, "/readyz")[1]
    )
    stall.unlink()
    assert poll(lambda: get(node, "/healthz") == ("200", "ok\n"), 5)
    assert process.stop() == 0


def usage(process: Process) -> dict[str, int]:
    """RSS in kB, threads, descriptors, and CPU time used in ticks."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = {name: int(re.findall(rf"{name}:\s+(\d+)", status)[0]) for name in ("VmRSS", "Threads")}
    times = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return {
        **found,
        "fds": len(os.listdir(f"/proc/{process.pid}/fd")),
        "cpu": int(times[11]) + int(times[12]),
    }


def test_standard_streams_closed(cluster: Cluster) -> None:
    """No standard input, output or error: nothing to log to, everything else works."""
    with daemons(
        cluster.nodes,
        "--peers",
        ALL_PEERS,
        start=("sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-'),
        patch=QUICK,
    ):
        assert_served(cluster)


def test_standard_error_is_a_full_pipe(cluster: Cluster, tmp_path: Path) -> None:
    """Whoever reads our log has stopped.

    Lines are lost, errors are not; when reading goes on, so does the log.
    """
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    start = ("sh", "-c", f'exec "$0" "$@" 2>{shlex.quote(str(fifo))}')
    with daemons(cluster.nodes, "--peers", ALL_PEERS, start=start, patch=QUICK) as processes:
        assert_served(cluster)
        while b"SIGHUP" not in os.read(reader, 1 << 20):
            os.kill(processes[0].pid, signal.SIGHUP)
            time.sleep(0.1)
    os.close(writer)
    os.close(reader)


def test_standard_error_without_a_reader(cluster: Cluster, tmp_path: Path) -> None:
    """A broken pipe is no reason to stop, nor to end with an error."""
    with contextlib.ExitStack() as stack:
        fifo = tmp_path / "log"
        os.mkfifo(fifo)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        start = ("sh", "-c", f'exec "$0" "$@" 2>{shlex.quote(str(fifo))}')
        processes = stack.enter_context(
            daemons(cluster.nodes, "--peers", ALL_PEERS, start=start, patch=QUICK)
        )
        os.close(reader)
        for process in processes:
            os.kill(process.pid, signal.SIGHUP)
        assert_served(cluster)


def limit_descriptors(process: Process, number: int) -> None:
    """What `ulimit -n` would do, to a running process."""
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (number, hard))


def test_file_descriptors_exhausted(cluster: Cluster, tmp_path: Path) -> None:
    """None left: errors are handled, no CPU is burnt.

    A peer change waits until there are some again.
    """
    path = tmp_path / "peers"
    path.write_text("10.0.0.77\n")
    with daemons(cluster.nodes, "--peers", f"file:{path},{ALL_PEERS}", patch=QUICK) as processes:
        assert_served(cluster)
        for process in processes:
            limit_descriptors(process, usage(process)["fds"])
        clients = [
            client
            for node in cluster.nodes
            for client in connect(node, 3, b"GET /metrics HTTP/1.1\r\n\r\n")
        ]
        before = [usage(process)["cpu"] for process in processes]
        for node in cluster.nodes:  # an address change whose meaning cannot be worked out
            node.ip("addr add 10.0.0.77/32 dev lo")
        time.sleep(1.0)
        burnt = [usage(process)["cpu"] - ticks for process, ticks in zip(processes, before)]
        assert max(burnt) < 50, burnt  # of 100 in a second
        assert_served(cluster)
        for process in processes:
            limit_descriptors(process, 1024)
        for client in clients:
            client.close()
        name = f'pmtud_peers{{source="file:{path}"}}'
        try:
            assert poll(lambda: all(metrics(node)[name] == 0 for node in cluster.nodes), 5)
        finally:
            for node in cluster.nodes:
                node.ip("addr del 10.0.0.77/32 dev lo")
        assert_served(cluster)


def test_sighup_storm(cluster: Cluster, tmp_path: Path) -> None:
    """Thousands of SIGHUPs, while the peer file is rewritten and errors come in."""
    path = tmp_path / "peers"
    path.write_text(ALL_PEERS)
    with daemons(cluster.nodes, "--peers", f"file:{path}") as processes:
        for number in range(3000):
            os.kill(processes[number % 3].pid, signal.SIGHUP)
            if number % 100 == 0:
                path.write_text(ALL_PEERS + ",10.0.0.77" * (number % 200 == 0))
        path.write_text(ALL_PEERS)
        name = f'pmtud_peers{{source="file:{path}"}}'
        assert poll(lambda: all(metrics(node)[name] == 4 for node in cluster.nodes), 5)
        assert_served(cluster)
        assert all(len(process.output()) < 200_000 for process in processes)


def test_stopped_and_continued(cluster: Cluster) -> None:
    """SIGSTOP for 30 s: what came meanwhile waits in the kernel and is acted on at SIGCONT.

    Its flows recover.
    """
    with daemons(cluster.nodes, "--peers", ALL_PEERS) as processes:
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)
        assert len(cluster.download("pod", deadline=1.0)) < 23
        for process in processes:
            threading.Timer(30.0, os.kill, (process.pid, signal.SIGCONT)).start()
        cluster.flush()
        assert len(cluster.download("pod", deadline=60.0)) == 23  # begun while we were stopped
        assert all(get(node, "/healthz")[0] == "200" for node in cluster.nodes)
        assert_served(cluster)


def test_memory_limit_under_a_flood(cluster: Cluster) -> None:
    """`ulimit -v` leaves 512 MB.

    A spoofed flood that fills every table stays within it, scrapes and all.
    """
    node = cluster.nodes[ingress(cluster, 4)]
    start = ("sh", "-c", 'ulimit -v 524288; exec "$0" "$@"')
    remember = ("--flow-interval", "60", "--source-rate", "1000000", "--rate", "1000000000")
    with daemons(
        cluster.nodes, "--peers", ALL_PEERS, *remember, start=start, patch=QUICK
    ) as processes:
        process = processes[cluster.nodes.index(node)]
        flood = [
            mtu_error(
                V4,
                src=f"198.{18 + n % 2}.{n // 256 % 256}.{n % 256}",
                dst="10.96.0.1",
                quoted_src="10.96.0.1",
                quoted_dst="10.9.0.1",
                transport=tcp_start(80, n % 65536),
            )
            for n in range(20_000)
        ]
        feed(process, cluster.fabric, node, flood)
        assert get(node, "/metrics")[0] == "200"
        assert poll(lambda: total(metrics(node), "pmtud_received_total") >= len(flood), 5)
        assert usage(process)["VmRSS"] < 128 << 10
        assert_served(cluster)


@pytest.mark.parametrize("family", [4, 6])
def test_a_flood_at_a_nodes_own_address_leaves_room_for_copies(
    cluster: Cluster, family: int
) -> None:
    """The kernel tells copies by who sends them.

    50,000 errors of strangers cost not one of ten copies its place.
    """
    node = cluster.nodes[0]
    own = Cluster.node_address(1, family)
    net = PLANS[family]
    copies = flow_errors(family, src=Cluster.node_address(2, family), dst=own)
    junk = [
        mtu_error(
            net,
            src=str(
                ip_address(int(ip_address({4: "198.18.0.0", 6: "2001:db8:bad::"}[family])) + n)
            ),
            dst=own,
            quoted_src=Cluster.vip("host", family),
            transport=tcp_start(80, n),
        )
        for n in range(5000)
    ]
    with daemons([node], *peers_of(family)):
        begun = time.monotonic()
        with Frames(cluster.fabric, f"to-{node.name}", node, "eth0") as frames:
            for copy in copies[:10]:
                frames.send(junk)
                frames.send([copy])
        seconds = time.monotonic() - begun
        name = f'pmtud_received_total{{family="ipv{family}",origin="peer"}}'
        assert poll(lambda: metrics(node)[name] >= 10, 5), metrics(node)
        samples = metrics(node)
        assert samples[name] == 10
        assert samples[name.replace("peer", "router")] < 3000 + 1500 * seconds


def test_as_many_peers_as_there_may_be(tmp_path: Path) -> None:
    """16,384 of each family are in the kernel's sets, in one transaction, and in as many headers.

    Then fewer are.
    """
    path = tmp_path / "peers"
    most = pmtud.PEERS_MAX
    four, six = (ip_address(text) for text in ("10.64.0.1", "fd64::1"))
    path.write_text("\n".join(str((four if n % 2 else six) + n) for n in range(most)))
    with Net() as net:
        node = net.host("node")
        node.ip(
            "link add eth0 type veth peer name far",
            "link set far up",
            "addr add 10.0.0.11/8 dev eth0",
            "addr add fd00::11/8 dev eth0 nodad",
            "link set eth0 up",
            "route add default via 10.0.0.1",
        )
        process = daemon(node, "--peers", f"file:{path}")
        rules = node.run("nft", "list", "ruleset")
        assert (len(re.findall(r"10\.64\.\d+\.\d+", rules)), len(re.findall("fd64::", rules))) == (
            most // 2,
        ) * 2
        assert f"limit rate {pmtud.COPIES_PER_SECOND // (most // 2)}/second" in rules
        path.write_text("10.64.0.1")
        assert poll(lambda: "fd64::" not in node.run("nft", "list", "ruleset"), 5)
        assert process.stop() == 0


STEPPED_CLOCK = """
import itertools, time
steps, real = itertools.cycle((0, 1e8, -1e8, -2e9)), time.time
time.time = lambda: real() + next(steps)
"""


def test_wall_clock_stepped(cluster: Cluster) -> None:
    """Years forth and back at every look: limits, health and timers go by the monotonic clock."""
    with daemons(cluster.nodes, "--peers", ALL_PEERS, patch=STEPPED_CLOCK):
        assert_served(cluster)
        assert all(get(node, "/healthz")[0] == "200" for node in cluster.nodes)


def test_a_saved_ruleset_is_restored(node: Host, tmp_path: Path) -> None:
    """Our table in it makes the kernel refuse the whole.

    Saved by the README's command it comes back, beside ours.
    """
    (command,) = re.findall(r"`(nft list tables .*) >f`", README)
    saved = [tmp_path / "all", tmp_path / "others"]
    with daemons([node], "--metrics-port", "0"):
        node.run(
            "nft",
            "table ip nat { chain c { tcp dport 1 drop; }; }; table inet fw { chain c { "
            "accept; }; }",
        )
        before = node.run("nft", "list", "ruleset")
        saved[0].write_text(before)
        node.run("sh", "-c", f"{command} >{saved[1]}".replace("\\|", "|"))
        with pytest.raises(CommandFailed, match="Operation not permitted"):
            node.run("nft", "-f", str(saved[0]))
        node.run("nft", "flush ruleset")
        left = node.run("nft", "list", "ruleset")
        assert left.count("table ") == left.count("table inet pmtud_33 ") == 1
        with pytest.raises(CommandFailed, match="Operation not permitted"):
            node.run("nft", "-f", str(saved[0]))
        assert node.run("nft", "list", "ruleset") == left
        node.run("nft", "-f", str(saved[1]))
        after = node.run("nft", "list", "ruleset")
    pattern = re.compile(r"^table [^}]+}\n}|^table inet pmtud_33 ", re.MULTILINE)
    assert sorted(pattern.findall(after)) == sorted(pattern.findall(before))
    assert len(pattern.findall(after)) == 3


# -- when things go wrong: the README's table, row by row

FAULT_TESTS: dict[str, tuple[Callable[..., None], ...]] = {
    "The interface goes down and comes up": (test_interface_down_and_up,),
    "The interface is deleted and created again": (test_interface_deleted_and_created_again,),
    "A node's address changes": (
        test_address_changed,
        test_an_address_that_moves_here_is_removed_from_the_peers,
    ),
    "No default route at the start": (test_start_failures_are_one_line,),
    "The default route goes, or moves": (test_default_route_gone_and_moved,),
    "A peer cannot be reached": (
        test_peers_that_cannot_be_reached,
        test_one_bad_peer_does_not_starve_the_others,
        test_refused_copies_are_named_once_a_minute,
    ),
    "A firewall refuses our copies": (test_a_firewall_that_refuses_copies,),
    "A program or a queue on the interface drops our copies": (test_calicos_ebpf_data_plane,),
    "Calico's eBPF data plane comes or goes": (test_calicos_ebpf_data_plane_comes_and_goes,),
    "Errors circle: this node forwards what it does not own, the fabric returns it": (
        test_errors_that_circle,
    ),
    "A copy is larger than the path to a peer": (test_copies_larger_than_the_path_to_a_peer,),
    "The send buffer is full": (test_queues_full_of_copies_nobody_takes,),
    "Errors come faster than we read": (test_nflog_overrun_is_counted_exactly,),
    "The NFLOG socket breaks": (
        test_a_broken_nflog_socket_is_opened_again,
        test_a_broken_nflog_socket_whose_group_is_taken_ends_the_daemon,
    ),
    "Another process wants our NFLOG group": (
        test_another_process_wants_the_group,
        test_group_held_by_another_program,
    ),
    "pmtud is started a second time": (
        test_second_daemon_names_the_first,
        test_second_daemon_knows_the_first_however_that_was_started,
    ),
    "`nft flush ruleset`, a firewall reload": (
        test_flush_ruleset_leaves_our_table,
        test_flush_ruleset_where_tables_cannot_be_owned,
    ),
    "A firewall loaded later filters or marks at `raw` or `mangle`": (
        test_a_reverse_path_filter_loaded_after_us_drops_nothing_before_us,
        test_a_mark_overwritten_after_us_lets_nothing_out,
        test_a_mark_overwritten_before_the_guard_is_noticed,
    ),
    "The service network has a discard route, or no route": (
        test_discard_routes_and_no_route_refuse_no_delivery,
    ),
    "This node's stack refuses a delivery": (test_a_delivery_that_the_stack_refuses_is_said_once,),
    "A saved ruleset is restored": (test_a_saved_ruleset_is_restored,),
    "Conntrack comes into use after us": (test_conntrack_that_comes_later_is_noticed,),
    "The conntrack table is full": (test_conntrack_table_full,),
    "A peer file is missing or bad": (
        test_file_source_failing_in_each_way,
        test_start_failures_are_one_line,
    ),
    "DNS or the API server fails: no answer, SERVFAIL, garbage, 410, 429, a stall": (
        test_peers_follow_dns,
        test_an_hour_without_the_api_changes_nothing,
        test_kube_source_lists_again_after_410,
        test_kube_source_waits_as_long_as_the_server_wants,
        test_kube_source_gives_a_stalled_answer_up,
    ),
    "The metrics port is taken": (test_metrics_port_of_another_program, test_metrics_port_taken),
    "A Service has the metrics port as its node port": (test_who_answers_where_the_daemon_listens,),
    "prometheus-client is damaged": (test_a_damaged_prometheus_client,),
    "Slow, huge or many HTTP clients": (test_http_clients_that_mean_no_good, test_slowloris),
    "Standard error is closed, or nobody reads it": (
        test_standard_streams_closed,
        test_standard_error_is_a_full_pipe,
        test_standard_error_without_a_reader,
    ),
    "No file descriptors left": (test_file_descriptors_exhausted,),
    "Hundreds of nodes come or go at once": (test_changes_within_a_second_are_taken_together,),
    "A storm of SIGHUPs": (test_sighup_storm,),
    "SIGSTOP, or no CPU for a while": (test_stopped_and_continued,),
    "A memory limit, and a flood": (test_memory_limit_under_a_flood,),
    "The wall clock is stepped": (test_wall_clock_stepped,),
    "SIGKILL, a crash": (test_sigkill_leaves_nothing,),
}


def test_every_row_of_when_things_go_wrong_is_proven() -> None:
    """The README's table and the tests above name the same faults, in the same order."""
    chapter = (
        (HERE / "README.md")
        .read_text()
        .split("\n## When things go wrong\n", 1)[1]
        .split("\n## ", 1)[0]
    )
    rows = [line.split(" | ") for line in chapter.splitlines() if line.startswith("| ")][1:]
    assert [row[0][2:] for row in rows] == list(FAULT_TESTS)
    assert all(len(row) == 3 and all(row) for row in rows)
    facts = [fact for fault, text, _ in rows for fact in unproven(fault[2:], text)]
    assert facts == []


def facts_of(text: str) -> set[str]:
    """What a row promises in the program's own words: metrics, reasons, errno names, exit codes."""
    reasons = "|".join(reason.value for reason in Reason)
    return set(re.findall(rf"pmtud_\w+|`(?:{reasons})`|\bE[A-Z]{{4,}}|[Ee]xit \d", text))


def unproven(fault: str, text: str) -> Iterator[str]:
    """The facts of a row that none of its tests names."""
    source = "".join(map(inspect.getsource, FAULT_TESTS[fault]))
    for fact in sorted(facts_of(text)):
        words = [fact.strip("`")]
        if fact[:4] in ("Exit", "exit"):
            words = ["code", "run_to_end"]
        if hasattr(errno, fact):
            words.append(os.strerror(getattr(errno, fact)))
        if not any(word in source for word in words):
            yield f"{fault}: {fact}"


def test_a_promise_that_no_test_keeps_is_seen() -> None:
    told = "Counted in `pmtud_nflog_lost_total` as `truncated`: ENOBUFS; exit 3."
    assert facts_of(told) == {"pmtud_nflog_lost_total", "`truncated`", "ENOBUFS", "exit 3"}
    assert list(unproven("The wall clock is stepped", told)) == [
        f"The wall clock is stepped: {fact}" for fact in sorted(facts_of(told))
    ]


# -- no weakening: what a forger gains through us that he did not have already


def caches(cluster: Cluster) -> dict[str, list[str]]:
    """Every learned path MTU in the cluster, by namespace."""
    found = {}
    for host in cluster.nodes + cluster.pods:
        text = "".join(
            execute("ip", family, "-n", host.namespace, "route", "show", "cache")
            for family in ("-4", "-6")
        )
        found[host.name] = [line for line in text.splitlines() if "mtu" in line]
    return {name: lines for name, lines in found.items() if lines}


def forged_copies(family: int, service: str, **fields: Any) -> list[bytes]:
    """Errors to each node that look like a copy from its neighbour."""
    nodes = Cluster.node_addresses(family)
    return [
        packet
        for node, peer in zip(nodes, nodes[1:] + nodes[:1])
        for packet in flow_errors(family, service, src=peer, dst=node, **fields)
    ]


@pytest.mark.parametrize("service", ["host", "pod"])
@pytest.mark.parametrize("family", [4, 6])
def test_forged_errors_about_flows_that_do_not_exist(
    cluster: Cluster, family: int, service: str
) -> None:
    """As a router's and as copies: all are acted on, and no cache in any node or pod changes."""
    with invalid_dropped(cluster), daemons(cluster.nodes, "--peers", ALL_PEERS):
        assert_served(cluster, [(family, service)])
        assert caches(cluster)  # the control: what is learned shows here
        cluster.flush()
        assert not caches(cluster)
        before = acted(cluster)
        inject(
            cluster.router,
            family,
            flow_errors(family, service, src={4: "203.0.113.66", 6: "2001:db8::66"}[family]),
        )
        inject(cluster.router, family, forged_copies(family, service, mtu=1399))
        assert poll(lambda: acted(cluster) - before == ERRORS * 3 + ERRORS * 3, 3), (
            acted(cluster) - before
        )
        assert not caches(cluster)


def acted(cluster: Cluster) -> int:
    """Errors acted on by all daemons together."""
    return total_of(cluster.nodes, "pmtud_acted_total")


IDLE_SERVER = """
import socket, time
listener = socket.create_server(("::", 81), family=socket.AF_INET6, dualstack_ipv6=True)
print("listening", flush=True)
open_ones = []
while True:
    open_ones.append(listener.accept()[0])
    open_ones[-1].sendall(b"x" * 100)
"""
TCP_REPAIR = 19  # linux/tcp.h
TCP_REPAIR_QUEUE = 20
TCP_QUEUE_SEQ = 21
TCP_RECV_QUEUE = 1


def next_sequence(client: socket.socket) -> int:
    """The sequence number that the other side sends next."""
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_RECV_QUEUE)
    number = client.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ)
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
    return number & 0xFFFFFFFF


@pytest.mark.parametrize("service", ["host", "pod"])
@pytest.mark.parametrize("family", [4, 6])
def test_forged_errors_outside_the_tcp_window(cluster: Cluster, family: int, service: str) -> None:
    """A real connection, a wrong sequence number.

    TCP itself refuses it on the owner. The right one is believed.
    """
    servers = [
        host.start(sys.executable, "-c", IDLE_SERVER) for host in cluster.nodes + cluster.pods
    ]
    for server in servers:
        server.wait_for("listening")
    vip = Cluster.vip(service, family)
    address = Cluster.client_address(7, family)

    def dial() -> socket.socket:
        return socket.create_connection((vip, 81), 20, (address, 0))

    def forge(sequence: int, mtu: int) -> list[bytes]:
        tcp = struct.pack("!HHII", 81, client.getsockname()[1], sequence, 0) + bytes(8)
        source = {4: "203.0.113.66", 6: "2001:db8::66"}[family]
        return [
            mtu_error(
                PLANS[family],
                src=source,
                dst=vip,
                quoted_src=vip,
                quoted_dst=address,
                mtu=mtu,
                transport=tcp,
            )
        ]

    with (
        invalid_dropped(cluster),
        daemons(cluster.nodes, "--peers", ALL_PEERS),
        cluster.client.inside(dial) as client,
    ):
        assert len(client.recv(1000)) == 100
        sequence = next_sequence(client)
        inject(cluster.router, family, forge((sequence + 100_000) & 0xFFFFFFFF, 1300))
        inject(cluster.router, family, forge((sequence - 100_000) & 0xFFFFFFFF, 1301))
        assert poll(lambda: acted(cluster) == 6, 3), acted(cluster)
        assert not caches(cluster)
        inject(cluster.router, family, forge(sequence, 1302))
        assert poll(lambda: caches(cluster), 3)
        kind = "node" if service == "host" else "pod"
        [owner] = [lines for name, lines in caches(cluster).items() if name.startswith(kind)]
        assert "mtu 1302" in owner[0]
    for server in servers:
        server.stop()


@pytest.mark.parametrize(
    "options", [["--ports", "443"], ["--service-networks", "192.0.2.0/24,2001:db8::/32"]]
)
def test_what_the_options_close_stays_closed(cluster: Cluster, options: list[str]) -> None:
    """No copy and no delivery of what is not served.

    As a router's, as copies, without ports, both families.
    """
    with daemons(cluster.nodes, "--peers", ALL_PEERS, *options), Capture(cluster.fabric) as wire:
        for family in (4, 6):
            for protocol in (6, 17, 50, {4: 1, 6: 58}[family]):
                inject(cluster.router, family, flow_errors(family, protocol=protocol), gap=0)
                inject(
                    cluster.router, family, forged_copies(family, "pod", protocol=protocol), gap=0
                )
        wanted = 2 * 4 * (ERRORS + 3 * ERRORS)
        assert poll(
            lambda: total_of(cluster.nodes, "pmtud_dropped_total") == wanted,
            3,
        )
        assert acted(cluster) == 0
        genuine = set(map(packed, Cluster.node_addresses(4, 6)))
        sources = [
            source_of(s.packet)
            for s in wire.settle()
            if s.interface.startswith("to-node") and s.kind != socket.PACKET_OUTGOING
        ]
        assert not genuine & set(sources)


BOUNDS = {
    # options, changes to the flood, errors a second that may be acted on
    "rate": (["--rate", "50", "--source-rate", "0"], 50),
    "source rate": (["--source-rate", "20", "--rate", "0"], 20),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_amplification_is_bounded(cluster: Cluster, bound: str) -> None:
    """A flood of valid errors.

    Copies on the wire <= peers x limit x (seconds + 1), none below the MTU floor.
    """
    options, limit = BOUNDS[bound]
    node = cluster.nodes[ingress(cluster, 4)]
    flood = flow_errors(4, count=3000) + flow_errors(4, count=3000, mtu=551)
    with (
        daemons(cluster.nodes, *peers_of(4), *options),
        Capture(cluster.fabric) as wire,
    ):
        begun = time.monotonic()
        for start in range(0, len(flood), 500):
            blast(cluster.fabric, f"to-{node.name}", node, "eth0", flood[start : start + 500])
            time.sleep(0.1)
        copies = [s.packet for s in node_packets(wire.settle(), 4)]
        seconds = time.monotonic() - begun
    assert 2 * limit <= len(copies) <= 2 * limit * (seconds + 1)
    assert {struct.unpack_from("!H", copy, 26)[0] for copy in copies} == {1400}


UNCONNECTED = struct.pack("!HHHH", 5353, 9, 100, 0)
FLOWLESS: dict[
    str, tuple[Plan, int, bytes, int]
] = {  # what is quoted, and how many nodes believe it without us
    "IPv4 echo reply": (V4, 1, echo(7, kind=0), 1),
    "IPv4 unconnected UDP": (V4, 17, UNCONNECTED, 1),
    "GRE": (V4, 47, gre(0, 7), 0),
    "6in4": (V4, 41, b"\x60" + bytes(7), 0),
    "IPv6 echo reply": (V6, 58, echo(7, kind=129), 1),
    "IPv6 echo request": (V6, 58, echo(7, kind=128), 1),
    "IPv6 unconnected UDP": (V6, 17, UNCONNECTED, 1),
}


@pytest.mark.parametrize("quoted", FLOWLESS)
def test_what_the_kernel_believes_without_a_flow(cluster: Cluster, quoted: str) -> None:
    """As the README says: one node without us, every node with us, no node of ours with --ports."""
    net, protocol, transport, alone = FLOWLESS[quoted]
    family = net.family.version
    vip = Cluster.vip("host", family)
    forger = {4: "203.0.113.66", 6: "2001:db8::66"}[family]
    client = Cluster.client_address(3, family)
    forged = [
        mtu_error(
            net,
            src=forger,
            dst=vip,
            quoted_src=vip,
            quoted_dst=client,
            protocol=protocol,
            transport=transport,
        )
    ]

    def believers() -> int:
        """The nodes that know the forged MTU.

        Asked by a route look-up: a cache that nothing has looked up since is not listed.
        """
        return sum(
            "mtu 1400" in execute("ip", "-n", node.namespace, "route", "get", client, "from", vip)
            for node in cluster.nodes
        )

    def told() -> int:
        inject(cluster.router, family, forged)
        return believers()

    with contextlib.ExitStack() as stack:
        for node in cluster.nodes:
            unconnected = stack.enter_context(
                node.inside(lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
            )
            unconnected.bind(("::", 5353))
        assert poll(lambda: told() == alone, 2), "the kernel of the node that the fabric chose"
        for options, number in (([], 3), (["--ports", "80"], alone)):
            cluster.flush()
            with daemons(cluster.nodes, "--peers", ALL_PEERS, *options):
                inject(cluster.router, family, forged)
                assert poll(lambda: total_of(cluster.nodes, "pmtud_received_total"), 2)
                assert poll(lambda wanted=number: believers() == wanted, 1)  # type: ignore[misc]


# -- hostile input: malformed, truncated, spoofed and absurd, through a real NFLOG group


class Range(Net):
    """Whoever means harm is in `outside`; the node's only peer is in `inside` and runs nothing.

    outside -- eth0 (node) eth1 -- inside (10.0.0.12, fd00::12)
    """

    VIPS = ("203.0.113.10/32", "2001:db8:2::10/128")

    def build(self) -> None:
        self.outside, self.node, self.inside = (
            self.host(name) for name in ("outside", "node", "inside")
        )
        self.link(self.outside, self.node, names=("eth0", "eth0"))
        self.link(self.inside, self.node, names=("eth1", "eth1"))
        self.node.ip(
            "addr add 10.0.1.1/24 dev eth0",
            "addr add fd01::1/64 dev eth0",
            "route add default via 10.0.1.2",
            "route add ::/0 via fd01::2",
            "addr add 10.0.0.11/24 brd + dev eth1",
            "addr add fd00::11/64 dev eth1",
            *(f"addr add {vip} dev lo" for vip in self.VIPS),
        )
        self.outside.ip("addr add 10.0.1.2/24 dev eth0", "addr add fd01::2/64 dev eth0")
        self.inside.ip("addr add 10.0.0.12/24 dev eth1", "addr add fd00::12/64 dev eth1")


HOSTILE_OPTIONS = (
    "--iface",
    "eth0",
    "--peers",
    "10.0.0.12,fd00::12",
    "--ignore-networks",
    "10.9.0.0/16,fd09::/64",
    "--ports",
    "443,8000-8999",
    "--service-networks",
    "203.0.113.0/24,2001:db8:2::/64,10.0.0.11,fd00::11",
    *UNLIMITED,
)


def any_address(random: Random, net: Plan) -> str:
    """Some router on the Internet."""
    if net is V4:
        first = random.choice((1, 8, 100, 185, 198, 223))
        return f"{first}.{random.randrange(256)}.{random.randrange(256)}.7"
    return f"2600:{random.randrange(1, 65536):x}::{random.randrange(1, 65536):x}"


def any_mtu(random: Random, net: Plan) -> int:
    """An MTU that is believed."""
    return random.randrange(552 if net is V4 else 1280, 1500)


def hostile_kinds(random: Random, net: Plan) -> list[tuple[str, dict[str, Any]]]:
    """What to build with mtu_error() and what must become of it: a Reason's value or an action."""
    transport = tcp_start(443, 7, 8)
    loopback = "127.0.0.1" if net is V4 else "::1"
    junk = random.randbytes(random.randrange(60))
    inner = net.wrap(net.vip, net.client, 6, transport, length=1500)
    bad_protocol = random.choice([n for n in range(61, 256) if n not in net.family.protocols])
    copy = {"src": net.peer, "dst": net.node}
    unknown = UNCOUNTED[net.family.name]
    same_swapped = unknown + 0x0505
    return [
        ("replicate", {}),
        ("replicate", {"quoted_length": 60_000}),
        ("replicate", {"quoted_length": unknown}),
        ("replicate", {"quoted_length": unknown + 0x0006}),
        ("replicate", {"transport": tcp_start(443) + junk}),
        ("replicate", {"quoted_dst": any_address(random, net)}),
        ("replicate", {"protocol": 17}),
        ("deliver", copy),
        ("deliver", {**copy, "transport": tcp_start(8443) + junk}),
        ("deliver", {"dst": net.node, "quoted_src": net.node}),
        ("replicate" if net is V4 else "bad_checksum", {"checksum": random.randrange(1, 0xFFFF)}),
        ("quoted_short", {"quoted": inner[: random.randrange(len(inner))]}),
        ("quoted_short", {"quoted": b""}),
        ("quoted_family", {"quoted": bytes([random.choice((0, 1, 5, 9, 15)) << 4]) + inner[1:]}),
        (
            "quoted_fragment",
            {"inner": {"fragment": random.randrange(1, 0x2000)}}
            if net is V4
            else {"inner": {"extensions": [fragment_header(random.randrange(1, 0x2000), False)]}},
        ),
        ("quoted_proto", {"protocol": bad_protocol}),
        ("mtu_too_small", {"mtu": random.randrange(1, 552 if net is V4 else 1280)}),
        (
            "mtu_not_smaller",
            {"quoted_length": same_swapped, "mtu": random.randrange(same_swapped + 60, 0xFFFF)},
        ),
        ("port_not_listed", {"transport": tcp_start(random.randrange(1, 443), 7, 8)}),
        ("port_not_listed", {"protocol": 50}),
        ("port_not_listed", {"protocol": net.family.icmp_protocol}),
        ("not_service", {"dst": any_address(random, net), "quoted_src": "", "same": True}),
        ("not_service", {**copy, "quoted_src": any_address(random, net)}),
        ("own", {"src": net.node}),
        ("own", {"src": net.vip}),
        ("own", {"src": net.node, "dst": net.node}),
        ("ignored_network", {"src": net.inside}),
        ("ignored_network", {"src": net.peer}),
        ("misaddressed", {"dst": net.node}),
        ("misaddressed", {"quoted_src": any_address(random, net)}),
        ("misaddressed", {**copy, "quoted_src": loopback}),
        ("truncated", {"payload": bytes(net.error) + bytes(random.randrange(6))}),
        (
            "truncated",
            {"outer": {"fragment": 0x2000}}
            if net is V4
            else {"outer": {"extensions": [fragment_header(0, True)]}},
        ),
    ]


class Template(NamedTuple):
    """One hostile packet; `vary` is where its quoted destination port is, 0 where nothing may
    change.
    """

    packet: bytes
    fate: str
    vary: int


def hostile_templates(random: Random, net: Plan) -> Iterator[Template]:
    """One packet of each kind, with the fate that the RFCs and the options give it."""
    for fate, changes in hostile_kinds(random, net):
        fields: dict[str, Any] = {
            "src": any_address(random, net),
            "mtu": any_mtu(random, net),
            **changes,
        }
        if fields.pop("same", False):
            fields["quoted_src"] = fields["dst"]
        fields.setdefault("transport", tcp_start(443, 7))
        packet = mtu_error(net, **fields)
        plain = set(changes) <= {"src", "dst", "quoted_src", "quoted_dst", "transport"}
        quoted_at = 2 * (20 if net is V4 else 40) + 8
        yield Template(packet, fate, quoted_at + 2 if plain else 0)
        # And twice with some bytes of the message overwritten: what it is now, parse() must say
        for _ in range(2):
            start = 20 if net is V4 else 48 if packet[6] == FRAGMENT else 40
            wild = bytearray(packet)
            for _ in range(random.randrange(1, 6)):
                if len(wild) > start + 2:
                    wild[random.randrange(start + 2, len(wild))] = random.randrange(256)
            yield Template(bytes(wild), "", 0)


def fate_of(packet: bytes, policy: pmtud.Policy) -> str:
    """What the pure functions say."""
    error = pmtud.parse(packet)
    fate = error if isinstance(error, Reason) else outcome(error, policy, 0.0)
    return fate.value if isinstance(fate, Reason) else fate


def varied(template: Template, number: int) -> bytes:
    """Another flow under the same checksum.

    One word takes from a sequence number what the port gets.
    """
    packet = template.packet
    at = template.vary
    if not at:
        return packet
    port, sequence = struct.unpack_from("!HH", packet, at)
    other = number % 65000 + 1
    return (
        packet[:at]
        + struct.pack("!HH", other, (sequence + port - other - 1) % 0xFFFF + 1)
        + packet[at + 4 :]
    )


def hostile_policy() -> pmtud.Policy:
    """The policy of the daemon on the range, out of its own command line."""
    config = pmtud.parse_args(HOSTILE_OPTIONS, {}).config
    own = [
        packed(text.partition("/")[0])
        for text in (
            "10.0.1.1",
            "fd01::1",
            "10.0.0.11",
            "fd00::11",
            *Range.VIPS,
            "127.0.0.1",
            "::1",
        )
    ]
    node = frozenset((packed("10.0.0.11"), packed("fd00::11")))
    who = pmtud.WhoIsWho(
        own=frozenset(own),
        unshared=node,
        groups=frozenset((packed("10.0.0.255"),)),
        peers=frozenset(peer.packed for peer in config.peers),
        networks=pmtud.Membership(config.ignore_networks),
    )
    return pmtud.Policy(config, who)


def test_hostile_packets_are_what_they_claim() -> None:
    """The generator against parse() and decide(): each kind meets its fate, varied or not."""
    policy = hostile_policy()
    random = Random(7)
    for net in (V4, V6):
        for _ in range(50):
            for template in hostile_templates(random, net):
                if template.fate:
                    assert fate_of(template.packet, policy) == template.fate, template
                    number = random.randrange(1 << 20)
                    assert fate_of(varied(template, number), policy) == template.fate, template


class Arsenal:
    """An endless, seeded supply of hostile packets, and the account of what must become of them."""

    def __init__(self, seed: int, rounds: int) -> None:
        random = Random(seed)
        policy = hostile_policy()
        templates = [
            t for net in (V4, V6) for _ in range(rounds) for t in hostile_templates(random, net)
        ]
        self.templates = [t._replace(fate=t.fate or fate_of(t.packet, policy)) for t in templates]
        random.shuffle(self.templates)
        self.sent = 0
        self.fates: Counter[str] = Counter()
        self.copies: Counter[bytes] = Counter()

    def take(self, count: int) -> list[bytes]:
        """The next packets."""
        found = []
        for number in range(self.sent, self.sent + count):
            template = self.templates[number % len(self.templates)]
            packet = varied(template, number)
            found.append(packet)
            self.fates[template.fate] += 1
            if template.fate == "replicate":
                self.copies[message_of(packet)] += 1
        self.sent += count
        return found


def message_of(packet: bytes) -> bytes:
    """The ICMP message without its checksum, which covers addresses over IPv6.

    A wrong one over IPv4 stays wrong.
    """
    start = 20 if packet[0] >> 4 == 4 else 40
    return packet[start : start + 2] + packet[start + 4 :]


def test_hostile_flood() -> None:
    """Every packet has exactly one fate, counted; at the peer arrive exactly the copies of the good
    ones.

    PMTUD_TEST_PACKETS=1000000 for the long one.
    """
    wanted = int(ENVIRONMENT.get("PMTUD_TEST_PACKETS", "100000"))
    arsenal = Arsenal(2026, rounds=wanted // 5000)
    with (
        Range() as net,
        daemons([net.node], *HOSTILE_OPTIONS) as [process],
        Capture(net.outside) as outside,
    ):
        metrics(net.node)  # imports what a scrape needs
        usages: list[dict[str, int]] = []
        with Capture(net.inside) as inside, Frames(net.outside, "eth0", net.node, "eth0") as frames:
            while arsenal.sent < wanted:
                frames.send(arsenal.take(1000))
                assert poll(lambda: unread(process) < 1 << 20, 30)
                usages.append(usage(process))
            assert settled(net.node) == arsenal.sent
            samples = metrics(net.node)
            copies = [s.packet for s in inside.settle() if s.kind == socket.PACKET_HOST]
        assert (
            total(samples, "pmtud_nflog_lost_total")
            == total(samples, "pmtud_copy_errors_total")
            == 0
        )
        dropped = Counter(drops(samples))
        actions = Counter(
            {
                a: int(samples[f'pmtud_acted_total{{action="{a}"}}'])
                for a in ("replicate", "deliver")
            }
        )
        assert dropped + actions == arsenal.fates
        # By rule and options
        unmet = {
            "not_frag_needed",
            "circling",
            "limited_flow",
            "limited_source",
            "limited_total",
            "dry_run",
        }
        assert set(arsenal.fates) == {reason.value for reason in Reason} - unmet | {
            "replicate",
            "deliver",
        }
        assert set(map(source_of, copies)) == {
            packed("10.0.0.11"),
            packed("fd00::11"),
        }
        assert Counter(map(message_of, copies)) == arsenal.copies
        assert not [s for s in outside.packets() if s.kind == socket.PACKET_HOST]
        assert_flat(usages, process)


def assert_flat(usages: Sequence[dict[str, int]], process: Process) -> None:
    """No growth: descriptors and threads as at the first fifth, once the last scrape is over.

    RSS within 4 MB of it.
    """
    early = usages[len(usages) // 5]

    def flat() -> bool:
        late = usage(process)
        return late["fds"] <= early["fds"] and late["Threads"] <= early["Threads"]

    assert poll(flat, 2), (early, usage(process))
    print(f"first fifth {early}, end {usage(process)}")
    assert usage(process)["VmRSS"] < early["VmRSS"] + 4096


FUZZ = """
import atheris, sys
with atheris.instrument_imports(include=["pmtud"]):
    import pmtud
config = pmtud.Config(flow_interval=0, source_rate=0, rate=0, service_networks=pmtud.parse_networks("203.0.113.0/24"))
who = pmtud.WhoIsWho(peers=frozenset((bytes([10, 0, 0, 12]),)), own=frozenset((bytes([10, 0, 0, 11]),)))
policy = pmtud.Policy(config, who)
summed = pmtud.checksum_remainder
def judge(packet):
    found = pmtud.parse(packet)
    assert isinstance(found, (pmtud.MtuError, pmtud.Reason))
    if isinstance(found, pmtud.MtuError):
        assert found.icmp in packet and str(found)
        verdict = pmtud.decide(found, policy, 0.0)
        assert verdict.origin in pmtud.ORIGINS and verdict.action in pmtud.ACTIONS
        assert (verdict.action is pmtud.NOTHING) == isinstance(verdict.reason, pmtud.Reason)
def once(data):
    for pmtud.checksum_remainder in (summed, lambda *_: 0):  # no fuzzer guesses a checksum
        judge(data)
    for packet, _, _ in pmtud.parse_nflog(data):
        judge(packet)
    assert sum(map(len, pmtud.attributes(data).values())) <= len(data)
    assert sum(len(payload) for _, _, payload in pmtud.messages(data)) <= len(data)
    pmtud.error_number(data), pmtud.route_hops(pmtud.attributes(data))
atheris.Setup(sys.argv, once)
atheris.Fuzz()
"""


def test_coverage_guided_fuzzing(tmp_path: Path) -> None:
    """libFuzzer through atheris on the parsers and the netlink codec.

    PMTUD_FUZZ_SECONDS, by default 5.
    """
    if importlib.util.find_spec("atheris") is None:
        pytest.skip(
            f"there is no atheris for Python {sys.version_info[:2]} on {os.uname().machine}"
        )
    seconds = int(ENVIRONMENT.get("PMTUD_FUZZ_SECONDS", "5"))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, packet in enumerate(
        packet for net in (V4, V6) for packet, _, _ in hostile_templates(Random(1), net)
    ):
        (corpus / f"packet{number}").write_bytes(packet)
        (corpus / f"nflog{number}").write_bytes(nflog_message(packet, number, b"pmtud rpf"))
    seeds = len(os.listdir(corpus))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            FUZZ,
            f"-max_total_time={seconds}",
            "-seed=1",
            "-timeout=20",
            f"-artifact_prefix={tmp_path}/",
            str(corpus),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        timeout=seconds + 60 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [runs] = re.findall(r"Done (\d+) runs", done.stderr)
    print(f"{runs} runs in {seconds} s")
    assert int(runs) >= seeds > 100  # it begins with all it is given


# -- long runs, and two versions side by side


def churn(random: Random, path: Path) -> None:
    """Some of the peers, some addresses of nobody, one of them listed twice, renamed into place."""
    peers = [
        *ALL_PEERS.split(","),
        *(f"10.0.0.{random.randrange(100, 200)}" for _ in range(random.randrange(30))),
    ]
    chosen = random.sample(peers, random.randrange(1, len(peers)))
    new = path.with_suffix(".new")
    new.write_text("\n".join([*chosen, chosen[0]]))
    new.rename(path)


def account(samples: dict[str, float]) -> tuple[int, int]:
    """Received, and acted + dropped: what must be equal."""
    names = ("received", "acted", "dropped")
    counts = {name: total(samples, f"pmtud_{name}_total") for name in names}
    return counts["received"], counts["acted"] + counts["dropped"]


def load(cluster: Cluster, random: Random) -> None:
    """Between nothing and some thousand errors, of both families, through the fabric or straight to
    a node.
    """
    family = random.choice((4, 6))
    node = random.choice(cluster.nodes)
    errors = flow_errors(
        family,
        random.choice(("host", "pod")),
        random.choice((0, 1, 100, 3000)),
        mtu=random.randrange(1280, 1500),
    )
    blast(cluster.fabric, f"to-{node.name}", node, "eth0", errors)


def test_soak(cluster: Cluster, tmp_path: Path) -> None:
    """Peers churn, load varies, scrapes come in.

    No growth, and the accounts balance. PMTUD_SOAK_SECONDS, here 15.
    """
    path = tmp_path / "peers"
    random = Random(4)
    seconds = float(ENVIRONMENT.get("PMTUD_SOAK_SECONDS", "15"))
    path.write_text(ALL_PEERS)
    with daemons(cluster.nodes, "--peers", f"file:{path}") as processes:
        usages: list[list[dict[str, int]]] = [[], [], []]
        before = [0, 0, 0]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            churn(random, path)
            load(cluster, random)
            if random.random() < 0.05:
                os.kill(random.choice(processes).pid, signal.SIGHUP)
            samples = [metrics(node) for node in cluster.nodes]
            now = [account(s)[0] for s in samples]
            assert all(map(int.__le__, before, now))
            before = now
            for process, row in zip(processes, usages):
                row.append(usage(process))
        path.write_text(ALL_PEERS)
        assert all(settled(node) for node in cluster.nodes)
        accounts = [account(metrics(node)) for node in cluster.nodes]
        print(f"{len(usages[0])} rounds, received and accounted for: {accounts}")
        assert all(got == judged > 0 for got, judged in accounts)
        assert poll(
            lambda: all(
                metrics(n)[f'pmtud_peers{{source="file:{path}"}}'] == 4 for n in cluster.nodes
            ),
            5,
        )
        for process, row in zip(processes, usages):
            assert_flat(row, process)
        assert_served(cluster)


GO_PMTUD_2020 = """
import pmtud, select, socket, sys
config = pmtud.parse_args(sys.argv[1:], {}).config
nflog, firewall = pmtud.Nflog(33), pmtud.Firewall(config, ("eth0",))
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
print("limits:", flush=True)
while True:
    select.select([nflog], [], [])
    for packet, _, _ in nflog.read():
        error = pmtud.parse(packet)
        if error.dst == error.quoted_src:  # else another node sent it
            for peer in config.peers:
                raw.sendto(error.icmp, (str(peer), 0))
"""


@pytest.mark.parametrize("old_is_first", [True, False])
def test_side_by_side_with_the_go_pmtud_of_2020(cluster: Cluster, old_is_first: bool) -> None:
    """Its wire format: outer source the node, outer destination the peer, the message intact; both
    ways.

    What it sends we deliver, to pods too. What we send reaches the sockets of a node that runs it.
    """
    service = "pod" if old_is_first else "host"
    first = ingress(cluster, 4, service)
    with contextlib.ExitStack() as stack:
        for i, node in enumerate(cluster.nodes):
            if (i == first) == old_is_first:
                addresses = Cluster.node_addresses(4)
                del addresses[i]
                others = ",".join(addresses)
                old = node.start(
                    sys.executable,
                    "-c",
                    GO_PMTUD_2020,
                    "--peers",
                    others,
                    env={"PYTHONPATH": str(HERE)},
                )
                stack.callback(old.stop)
                old.wait_for("limits:")
            else:
                stack.enter_context(daemons([node], *peers_of(4)))
        cluster.flush()
        assert len(cluster.download(service)) == 23
        assert_learned(cluster, service, 4)


# -----------------------------------------------------------------------------
# Section: documentation -- what the README says is what the program does


def table(header: str) -> dict[str, list[str]]:
    """A README table by its header's first cell.

    The other cells of each row, by the code in its first one.
    """
    rows = README.split(f"\n| {header} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0].strip("`"): row[1:] for row in cells}


@quick
def test_option_table() -> None:
    """Every option is there and nothing else, with the default that Config or the help text has."""
    rows = table("option")
    options = {
        action.option_strings[0]: action
        for action in pmtud.build_parser()._actions
        if action.option_strings
    }
    assert set(rows) == set(options) - {"-h", "--version", "--from", "--json", "--no-color"}
    config = pmtud.Config()
    for option, field in (
        ("--nflog-group", config.nflog_group),
        ("--metrics-port", config.metrics_port),
        ("--ttl", config.ttl),
        ("--rules", config.rules),
        ("--flow-interval", config.flow_interval),
        ("--source-rate", int(config.source_rate)),
        ("--rate", int(config.rate)),
        ("--min-mtu", ",".join(map(str, config.min_mtu))),
        ("--log-level", config.log_level),
        ("--log-format", config.log_format),
    ):
        assert rows[option][0] == str(field)
        assert f"(default: {field})" in (options[option].help or ""), option


@quick
def test_metric_table() -> None:
    """Names, types and labels."""
    suffix = {"counter": "_total"}
    program = {
        m.name + suffix.get(m.kind, ""): [m.kind, ", ".join(m.labels)] for m in pmtud.METRICS
    }
    assert {name: cells[:2] for name, cells in table("metric").items()} == program


@quick
def test_reason_and_exit_code_tables() -> None:
    """One row for each."""
    assert list(table("reason")) == [reason.value for reason in Reason]
    codes = {"0", str(pmtud.PmtudError.exit_code), str(pmtud.UsageError.exit_code)}
    assert set(table("exit code")) == codes


@quick
def test_rules_in_the_readme_are_the_printed_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word for word."""
    monkeypatch.setattr(pmtud, "default_route_interfaces", lambda: ("eth0",))
    assert pmtud.main(["rules", "--iface", "eth0"]) == 0
    printed = capsys.readouterr().out
    ours = printed[: printed.index("# or iptables")].strip()
    assert ours in README
    assert f"iptables {SEED_RULE}" in README


@quick
def test_go_pmtud_options_exist_with_their_defaults() -> None:
    """The options of the model are ours."""
    config = pmtud.Config()
    assert config.nflog_group == 33
    assert config.metrics_port == 30040
    assert config.ttl == 10
    known = {
        action.option_strings[0][2:]
        for action in pmtud.build_parser()._actions
        if action.option_strings
    }
    assert {
        "peers",
        "iface",
        "nodename",
        "nflog-group",
        "metrics-port",
        "ttl",
        "ignore-networks",
    } <= known


def code_blocks(language: str) -> list[str]:
    """The README's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@quick
def test_every_code_block_ends() -> None:
    """An open one would swallow the rest of the page."""
    fences = re.findall(r"^```(.*)$", README, re.MULTILINE)
    assert len(fences) % 2 == 0
    assert not any(fences[1::2])


def test_alerts_and_queries(tmp_path: Path) -> None:
    """promtool takes them, and every metric and label value in them exists."""
    (rules,) = code_blocks("yaml")
    queries = [line for text in code_blocks("promql") for line in text.splitlines()]
    assert rules.count("- alert:") == 11
    assert len(queries) == 5
    recorded = [
        {"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)
    ]
    (tmp_path / "queries").write_text(
        json.dumps({"groups": [{"name": "queries", "rules": recorded}]})
    )
    (tmp_path / "alerts").write_text(rules)
    for name in ("alerts", "queries"):
        assert "SUCCESS" in execute("promtool", "check", "rules", str(tmp_path / name))
    used = set(re.findall(r"\bpmtud_\w+", "\n".join([rules, *queries])))
    assert used <= {*METRIC_LABELS}
    assert set(re.findall(r'(?:origin|result)="(\w+)"', "\n".join(queries))) == {
        "router",
    }


# -- the same for those who use the Prometheus operator, and would rather look

DASHBOARD = json.loads(OPTIONAL["ConfigMap"]["data"]["pmtud.json"])
# The panels that are empty where all is well
TROUBLE = (
    "Nodes that are not ready",
    "Copies that did not arrive, in ten minutes",
    "Copies refused by the sender's kernel",
    "Peers in trouble, by nodes that say so",
    "Errors shed and lost",
)


def dashboard_lines() -> list[tuple[Any, Any]]:
    """Each query of the dashboard, with its panel."""
    return [(panel, line) for panel in DASHBOARD["panels"] for line in panel["targets"]]


def filled_in(expression: str, variables: dict[str, str]) -> str:
    """As Grafana asks it."""
    for name, value in variables.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


def test_the_manifests_alerts_are_the_readmes() -> None:
    (rules,) = code_blocks("yaml")
    assert OPTIONAL["PrometheusRule"]["spec"] == yaml.safe_load(rules)


def test_the_dashboards_expressions(tmp_path: Path) -> None:
    """promtool takes them, every metric in them exists, and no metric of the program is left out."""
    two = r"(10\\.0\\.0\\.11:30040|worker-1)"  # chosen, as Grafana writes it
    variables = {"$instance": two, "$__rate_interval": "4m", "$__range": "6h"}
    lines = [filled_in(line["expr"], variables) for _, line in dashboard_lines()]
    rules = [{"record": f"line:{number}", "expr": text} for number, text in enumerate(lines)]
    groups = {"groups": [{"name": "lines", "rules": rules}]}
    (tmp_path / "lines").write_text(json.dumps(groups))
    printed = execute("promtool", "check", "rules", str(tmp_path / "lines"))
    assert f"SUCCESS: {len(lines)} rules found" in printed
    recorded = {
        rule["record"]
        for group in OPTIONAL["PrometheusRule"]["spec"]["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    used = set(re.findall(r"\bpmtud[\w:]+", "\n".join(lines)))
    assert used <= {*METRIC_LABELS} | recorded
    shown = {re.sub("_(total|bucket)$", "", name) for name in used}
    assert {metric.name for metric in pmtud.METRICS} - shown == {
        "pmtud_acted",  # received less dropped
        "pmtud_node_info",  # in the recording rules
    }


def test_the_dashboards_panels() -> None:
    """Each has its place, a unit, names for its lines, and a sentence that says what to do."""
    assert OPTIONAL["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"
    panels = DASHBOARD["panels"]
    taken = Counter[tuple[int, int]]()
    assert [panel["id"] for panel in panels] == [*range(1, len(panels) + 1)]
    for panel in panels:
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        taken.update((x + i, y + j) for i in range(width) for j in range(height))
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert re.fullmatch(r".{30,115}\.", panel["description"]), panel["title"]
        assert all("legendFormat" in line for line in panel["targets"][1:])
        assert "> 0" not in str(panel["targets"]) or "noValue" in panel["fieldConfig"]["defaults"]
    assert {*TROUBLE} < {panel["title"] for panel in panels}
    assert set(taken.values()) == {1}
    assert len(taken) == 24 * (1 + max(y for _, y in taken))


def type_faults(value: Any, hint: Any) -> Iterator[str]:
    """Where a value, or a part of it, is not what the types of Grafana's SDK say."""
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if type(value).__module__.startswith("grafana_foundation_sdk."):
        for name, one in typing.get_type_hints(type(value)).items():
            for fault in type_faults(getattr(value, name), one):
                yield f"{name}: {fault}"
    elif origin is Union:
        kinds = [one for one in args if (one is type(None)) == (value is None)]
        yield from min((list(type_faults(value, one)) for one in kinds), key=len)
    elif origin in (list, dict) and isinstance(value, origin):
        for one in value.values() if origin is dict else value:
            yield from type_faults(one, args[-1])
    elif not is_of_type(value, hint):
        yield f"{value!r} is not {hint}"


def is_of_type(value: Any, hint: Any) -> bool:
    """Whether JSON gave what a type without parts says; an enum is read as its value."""
    if hint is object:
        return True
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in {member.value for member in hint}
    return type(value) is hint or (hint is float and type(value) is int)


def lost_fields(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """What is in the one and not, or not so, in the other."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before:
            yield from lost_fields(before[key], after.get(key), f"{place}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after)):
            yield from lost_fields(*pair, f"{place}/{number}")
    elif before != after:
        yield f"{place}: {before!r} became {after!r}"


def dashboard_faults(dashboard: Any) -> list[str]:
    """What Grafana's own types say against it: wrong types, and fields that they do not have."""
    sdk = partial(importlib.import_module, package="grafana_foundation_sdk")
    sdk(".cog.plugins").register_default_plugins()
    model = sdk(".models.dashboard").Dashboard
    read = model.from_json(dashboard)
    written = json.loads(json.dumps(read, cls=sdk(".cog.encoder").JSONEncoder))
    known = {*sdk(".cog.runtime").Runtime().panelcfg_variants}
    units = {text for text in vars(sdk(".models.units")).values() if isinstance(text, str)}
    used = [
        (panel["type"], panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "none"))
        for panel in dashboard["panels"]
    ]
    strange = [f"{kind} {unit}" for kind, unit in used if kind not in known or unit not in units]
    return [*type_faults(read, model), *lost_fields(dashboard, written), *strange]


MISTAKES = {  # that an editor of the dashboard may make, and what is said
    "no such field": ('"title": "Peers"', '"titel": "Peers"', "/panels/15/titel: 'Peers'"),
    "no such option": ('"filterValues"', '"filterValue"', "/panels/8/options/filterValue: "),
    "no such query field": ('"expr": "count(pm', '"query": "count(pm', "/targets/2/query: "),
    "no such drawing": ('"fillOpacity"', '"fillopacity"', "/custom/fillopacity: 30"),
    "a number as text": ('"w": 8', '"w": "8"', "grid_pos: w: '8' is not"),
    "text as a number": ('"title": "Peers"', '"title": 7', "title: 7 is not"),
    "another value": ('"format": "heatmap"', '"format": "heat"', "'heat' is not"),
    "another number": ('"graphTooltip": 1', '"graphTooltip": 9', "graph_tooltip: 9 is not"),
    "another panel": ('"type": "heatmap"', '"type": "heat"', "heat none"),
    "another unit": ('"unit": "pps"', '"unit": "errors"', "timeseries errors"),
}


# Only Grafana 12 and later read what the SDK prefers; all read this.
@pytest.mark.filterwarnings("ignore:Prefer using dashboardv2:DeprecationWarning")
def test_grafanas_types_take_the_dashboard() -> None:
    """Those of its SDK, generated from its schema; ten mistakes are each found."""
    if importlib.util.find_spec("grafana_foundation_sdk") is None:
        pytest.skip(f"there is no grafana-foundation-sdk for Python {sys.version_info[:2]}")
    assert dashboard_faults(DASHBOARD) == []
    for name, (right, wrong, said) in MISTAKES.items():
        text = json.dumps(DASHBOARD)
        assert right in text, name
        faults = dashboard_faults(json.loads(text.replace(right, wrong)))
        assert any(said in fault for fault in faults), (name, faults)


# -- both on a real Prometheus

# By query and name in the legend: the value at each second
Lines = dict[tuple[str, str], dict[int, float]]


def draw_stat(axes: Any, lines: Lines) -> None:
    """The last value of each."""
    text = [f"{values[max(values)]:.3g} {name}" for (_, name), values in lines.items()]
    axes.axis("off")
    axes.text(0, 0.3, "\n".join(text), fontsize=16)


def draw_lines(axes: Any, lines: Lines) -> None:
    """Values over time; the flood is a thousand times the rest."""
    for (_, name), values in lines.items():
        seconds = range(min(values), max(values) + 1)
        axes.plot(seconds, [values.get(at, math.nan) for at in seconds], marker=".", label=name)
    top = max(max(values.values()) for values in lines.values())
    if top > 100:
        axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, 1.2 * top)
    axes.legend(fontsize=8)


def draw_states(axes: Any, lines: Lines) -> None:
    """A row for each, with a mark where it is so."""
    for number, ((_, name), values) in enumerate(lines.items()):
        axes.plot([*values], [number] * len(values), "s", label=name)
    axes.set_yticks([])
    axes.legend(fontsize=8)


def in_buckets(lines: Lines) -> dict[float, list[float]]:
    """By upper bound: what is in the bucket and not in the one below, at each second."""
    bounds = sorted((float(name), [*values.values()]) for (_, name), values in lines.items())
    below = [[0.0] * len(bounds[0][1]), *(counts for _, counts in bounds)]
    return {
        bound: [count - less for count, less in zip(counts, lower)]
        for (bound, counts), lower in zip(bounds, below)
    }


def draw_heatmap(axes: Any, lines: Lines) -> None:
    """A row for each bucket."""
    buckets = in_buckets(lines)
    times = [*next(iter(lines.values()))]
    rows = range(len(buckets))
    axes.pcolormesh(times, rows, [*buckets.values()], cmap="Blues", norm="symlog")
    axes.set_yticks(rows, [f"{bound:g}" for bound in buckets], fontsize=8)


DRAWN = {
    "stat": draw_stat,
    "timeseries": draw_lines,
    "state-timeline": draw_states,
    "heatmap": draw_heatmap,
}


def draw_dashboard(shown: dict[str, Lines], file: Path) -> None:
    """A picture of it, for a human eye: each panel where Grafana has it, over the same seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", str(file.parent))  # where its list of fonts goes
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(24, 30))
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in DASHBOARD["panels"])
    end = max(at for lines in shown.values() for values in lines.values() for at in values)
    for panel in DASHBOARD["panels"]:
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        place = (x + 0.6) / 24, 1 - (y + height - 0.8) / rows, (width - 1) / 24, (height - 2) / rows
        axes = figure.add_axes(place, xlim=(0, end), title=panel["title"])
        if panel["type"] == "timeseries":
            axes.set_ylabel(panel["fieldConfig"]["defaults"]["unit"])
        DRAWN[panel["type"]](axes, shown[panel["title"]])
    figure.savefig(file)


def alerts_soon(folder: Path) -> Path:
    """The README's alerts, over seconds instead of minutes."""
    (rules,) = code_blocks("yaml")
    soon = re.sub(r"\[\d+m\]", "[6s]", re.sub(r"for: \d+[mh]", "for: 1s", rules))
    (folder / "rules.yml").write_text(soon)
    targets = ", ".join(f'"{Cluster.node_address(i)}:30040"' for i in (1, 2, 3))
    (folder / "prometheus.yml").write_text(
        f"global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n"
        f"rule_files: [{folder}/rules.yml]\n"
        f"scrape_configs: [{{job_name: pmtud, static_configs: [{{targets: [{targets}]}}]}}]\n"
    )
    return folder / "prometheus.yml"


def ask_prometheus(host: Host, path: str) -> Any:
    """What its API answers."""
    printed = host.run("curl", "-sS", "-G", f"http://127.0.0.1:9090/api/v1/{path}")
    return json.loads(printed)["data"]


def firing(host: Host) -> set[tuple[str, str]]:
    """The alerts that fire, and what they are about."""
    alerts = ask_prometheus(host, "alerts")["alerts"]
    return {
        (alert["labels"]["alertname"], alert["annotations"]["summary"])
        for alert in alerts
        if alert["state"] == "firing"
    }


def name_of(labels: dict[str, str], line: dict[str, str]) -> str:
    """What the legend calls one of a query's results."""
    text = line.get("legendFormat", "")
    return re.sub(r"{{(\w+)}}", lambda match: labels[match[1]], text)


class Watched:
    """A cluster whose daemons a Prometheus on the fabric scrapes, with the README's alerts."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.running: dict[int, Process] = {}
        self.fired: set[str] = set()
        self.since = time.time()
        self.place = cluster.fabric
        self.place.start(
            "prometheus",
            f"--config.file={alerts_soon(folder)}",
            f"--storage.tsdb.path={folder}/data",
            "--web.listen-address=127.0.0.1:9090",
        )

    def start(self, number: int, *options: str, patch: str = "") -> None:
        """A daemon on this node (from 0), in place of the one before."""
        before = self.running.pop(number, None)
        if before:
            assert before.stop() == 0
        node = self.cluster.nodes[number]
        self.running[number] = patched_daemon(node, patch, *options)
        assert poll(lambda: "limits:" in self.running[number].output(), 10)

    def fires(self, name: str, words: str = "", errors: Sequence[bytes] = ()) -> None:
        """Wait, with errors on their way, until this alert fires about these words."""

        def seen() -> bool:
            inject(self.cluster.router, 4, errors or flow_errors(4, count=3), 0.2)
            with suppress(CommandFailed):  # before it listens
                found = firing(self.place)
                return any(name == one and words in text for one, text in found)
            return False

        assert poll(seen, 60), (name, firing(self.place))
        self.fired.add(name)

    def troubles(self) -> list[str]:
        """The panels that should be empty and were not, in the last two seconds."""
        shown = self.shown(time.time() - 2)
        return [title for title in TROUBLE if shown[title]]

    def shown(self, since: float) -> dict[str, Lines]:
        """What the dashboard's panels show of the time since then."""
        until = time.time()
        variables = {"$instance": ".*", "$__rate_interval": "4s"}
        variables["$__range"] = f"{math.ceil(until - since)}s"
        shown: dict[str, Lines] = {panel["title"]: {} for panel in DASHBOARD["panels"]}
        for panel, line in dashboard_lines():
            query = filled_in(line["expr"], variables)
            asked = urllib.parse.urlencode(
                {"query": query, "start": since, "end": until, "step": 1}
            )
            for one in ask_prometheus(self.place, f"query_range?{asked}")["result"]:
                name = name_of(one["metric"], line)
                values = {round(at - since): float(v) for at, v in one["values"] if v != "NaN"}
                if values:
                    shown[panel["title"]][line["refId"], name] = values
        return shown


def send_errors_of_many_kinds(cluster: Cluster) -> None:
    """Of three MTUs, past strict rp_filter; about pods that learn from copies; and some circle."""
    cluster.strict_rpf()
    for mtu in (1280, 1300, 1450):
        inject(cluster.router, 4, flow_errors(4, count=3, src="172.20.20.2", mtu=mtu))
    cluster.strict_rpf(False)
    inject(cluster.router, 4, [error for _, error in errors_about_pods(cluster)], 0.2)
    inject(cluster.router, 4, flow_errors(4, "pod", count=3))


def look_at_every_panel(watched: Watched, picture: Path) -> None:
    """Each query has shown something above 0; the picture is for whoever changes a panel."""
    shown = watched.shown(watched.since)
    draw_dashboard(shown, picture)
    risen = {
        (title, query)
        for title, lines in shown.items()
        for (query, _), values in lines.items()
        if max(values.values()) > 0
    }
    assert risen == {(panel["title"], line["refId"]) for panel, line in dashboard_lines()}
    assert "circling" in {name for _, name in shown["Errors dropped, by reason"]}
    buckets = in_buckets(shown["Reported MTUs"])
    mtus = {bound for bound, counts in buckets.items() if max(counts) > 0.1}
    assert mtus == {1280, 1300, 1400, 1450}


@contextlib.contextmanager
def copies_refused(node: Host, peer: str) -> Iterator[None]:
    """A rule drops what this node sends to a peer."""
    chain = "type filter hook output priority -400"
    rule = f"ip daddr {peer} icmp type destination-unreachable drop"
    node.run("nft", f"table inet deny {{ chain c {{ {chain}; {rule}; }}; }}")
    yield
    node.run("nft", "delete table inet deny")


@contextlib.contextmanager
def copies_lost(node: Host, peer: str) -> Iterator[None]:
    """What a peer sends does not reach this node's rules."""
    chain = "type filter hook ingress device eth0 priority -10"
    rule = f"ip saddr {peer} icmp type destination-unreachable drop"
    node.run("nft", f"table netdev lose {{ chain c {{ {chain}; {rule}; }}; }}")
    yield
    node.run("nft", "delete table netdev lose")


# The last matplotlib for Python 3.9 takes what a later pyparsing has renamed
@pytest.mark.filterwarnings(r"ignore:'\w+' (argument is )?deprecated:DeprecationWarning")
@alone
def test_every_alert_fires_on_a_real_prometheus(tmp_path: Path) -> None:
    """Each is brought about once on a cluster; before that none of pmtud's own trouble fires.

    The dashboard shows all of it, and no trouble before.
    """
    (rules,) = code_blocks("yaml")
    names = set(re.findall(r"- alert: (\w+)", rules))
    peers = peers_of(4)
    with Cluster() as cluster:
        sender = ingress(cluster, 4)
        watched = Watched(cluster, tmp_path)
        for number in range(3):
            watched.start(number, *peers, "--rate", "20")
        near, far = (number for number in range(3) if number != sender)
        address = {number: cluster.node_address(number + 1) for number in range(3)}
        watched.fires("PathMtuTrouble")
        time.sleep(3.0)
        assert {name for name, _ in firing(watched.place)} == {"PathMtuTrouble"}
        assert poll(lambda: watched.troubles() == [], 10), watched.troubles()

        send_errors_of_many_kinds(cluster)
        inject(cluster.router, 4, flow_errors(4, count=300), 0)
        watched.fires("PmtudShedding", address[sender])

        errors = errors_about_pods(cluster)
        with unreachable_pods(cluster):
            owner, about_it = errors[0]
            watched.fires("PmtudDeliveriesRefused", address[owner], [about_it])

        with copies_refused(cluster.nodes[sender], address[near]):
            watched.fires("PmtudCopiesRefused", address[near])
        with copies_lost(cluster.nodes[far], address[sender]):
            watched.fires("PmtudCopiesLost", f"of {address[sender]}'s copies to {address[far]} ")

        wrong = PEER_LISTS[4].replace(address[far], "10.0.0.99")
        watched.start(sender, "--peers", wrong)
        watched.fires("PmtudPeerDead", "10.0.0.99")
        watched.fires("PmtudPeersDiffer", f"{address[far]} is not a peer of all other nodes")
        watched.fires("PmtudPeersDiffer", "10.0.0.99 is not a peer of all other nodes")

        patch = "pmtud.random.uniform = lambda low, high: 0.3"
        watched.start(far, "--peers", f"{PEER_LISTS[4]},dns:no-such.invalid", patch=patch)
        watched.fires("PmtudPeerSourceFails", "dns:no-such.invalid")
        watched.fires("PmtudNotReady", address[far])

        watched.start(sender, *peers, *UNLIMITED)
        os.kill(watched.running[sender].pid, signal.SIGSTOP)
        node = cluster.nodes[sender]
        blast(cluster.fabric, f"to-{node.name}", node, "eth0", flow_errors(4, count=20_000))
        os.kill(watched.running[sender].pid, signal.SIGCONT)
        watched.fires("PmtudLosing", address[sender])

        watched.running[far].stop()
        watched.fires("PmtudDown", address[far])
        assert watched.fired == names
        look_at_every_panel(watched, tmp_path / "dashboard.png")


def test_promtool_likes_a_live_scrape(cluster: Cluster) -> None:
    """Names, units, help texts: no complaint, with every metric on the page."""
    node = cluster.nodes[0]
    with daemons([node], *peers_of(4)):
        inject(cluster.router, 4, flow_errors(4, count=3))
        page = node.run("curl", "-sS", "http://127.0.0.1:30040/metrics")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=page, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout + done.stderr == ""


def test_the_log_tells_routers_and_mtus(cluster: Cluster) -> None:
    """The README's sed, on a daemon's log."""
    (expression,) = re.findall(r"sed -n '(.*)' \| sort", README)
    node = cluster.nodes[0]
    other = flow_errors(4, count=1, src="172.20.20.2", mtu=1300)
    # Straight to it: the fabric hashes the two routers apart on some machines
    with daemons([node]) as [process]:
        blast(cluster.fabric, f"to-{node.name}", node, "eth0", flow_errors(4, count=2) + other)
        received(node, 3)
        process.wait_for("mtu=1300")
        found = execute("sed", "-n", expression, input=process.output())
    assert sorted(found.splitlines()) == ["10.8.0.1 1400", "10.8.0.1 1400", "172.20.20.2 1300"]


def test_what_was_learned_outlives_the_daemon(cluster: Cluster) -> None:
    """The kernel keeps it; and transfers that start while one node after the other is replaced all
    finish.
    """
    with daemons(cluster.nodes, *peers_of(4)):
        assert len(cluster.download("host")) == 23
    assert_learned(cluster, "host", 4)
    cluster.flush()
    processes = [daemon(node, *peers_of(4)) for node in cluster.nodes]
    with ThreadPoolExecutor(1) as pool:
        transfers = pool.submit(cluster.download, "host", 4, 23, 8.0)
        for number, node in enumerate(cluster.nodes):
            assert processes[number].stop() == 0
            processes[number] = daemon(node, *peers_of(4))
        assert len(transfers.result()) == 23
    assert [process.stop() for process in processes] == [0, 0, 0]


@pytest.mark.parametrize("command", ["", "quick", "unit", "lab", "bench"])
def test_all_that_is_missing_is_named_at_once(command: str, tmp_path: Path) -> None:
    """In the one line that installs it: a machine with curl, and with a Python without venv."""
    (tmp_path / "curl").touch(0o755)
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['ensurepip'] = None")
    environ = {**ENVIRONMENT, "PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    python = os.path.realpath(sys.executable)  # not the virtual environment's
    done = subprocess.run(
        [python, __file__, *command.split()],
        env=environ,
        text=True,
        capture_output=True,
        check=False,
    )
    needed = {PACKAGES[program] for program in PROGRAMS.get(command, tuple(PACKAGES))}
    packages = " ".join(sorted(needed - {"curl"} | {"python3-venv"}))
    message = f"test_pmtud.py: programs are missing: apt-get install {packages}\n"
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == message


def test_where_it_has_run() -> None:
    """The kernels and versions are those that the tools take; each row says how far it was tried."""
    rows = table("what")
    assert all(len(cells) == 3 and any(cells) for cells in rows.values())
    kernels = (HERE / ".ci" / "kernels.py").read_text()
    (known,) = re.findall(r"^KERNELS = (.+)$", kernels, re.MULTILINE)
    gate = (HERE / ".ci" / "run").read_text()
    in_gate, by_hand, _ = (set(re.findall(r"\d+\.\d+", cell)) for cell in rows["Linux"])
    assert set(re.findall(r"--only ([\d.]+)", gate)) | {"6.18"} == in_gate
    assert {name for name in ast.literal_eval(known) if name != "newest"} < by_hand
    (version,) = re.findall(
        r'^KUBERNETES = "(\d+\.\d+)', (HERE / ".ci" / "cluster.py").read_text(), re.M
    )
    assert rows["Kubernetes"][0].startswith(version)
    assert rows["Kubernetes"][1].startswith(version)
    days = re.findall(r"\d{4}-\d\d-\d\d", " ".join(cells[1] for cells in rows.values()))
    assert days
    assert all(day >= "2026-11-26" for day in days)


def test_the_readmes_test_command_installs_what_is_needed() -> None:
    """And so does the gate."""
    needed = {"python3-venv", *PACKAGES.values()}
    [told] = re.findall(
        r"^sudo sh -c 'apt-get install -y (.+) && python3 test_pmtud.py'$", README, re.M
    )
    assert set(told.split()) == needed
    gate = (HERE / ".ci/run").read_text()
    installed, *_ = re.findall(r"apt-get install .*\\\n((?: .*\n)+)", gate)
    assert set(installed.replace("\\", "").split()) == needed | {"python3"}


def visible_text() -> str:
    """What a reader sees of the README before he unfolds anything."""
    return re.sub(r"<details>(<summary>.*?</summary>).*?</details>", r"\1", README, flags=re.DOTALL)


@quick
def test_the_front_door_is_short() -> None:
    """At most 3,200 words; the reference is folded, each block with a title and an end."""
    words = [word for word in visible_text().split() if re.search(r"\w", word)]
    assert len(words) <= 3200
    blocks = re.findall(r"\n\n(<details>(?=<summary>.+</summary>\n\n)|</details>(?=\n\n))", README)
    assert len(blocks) > 20
    assert blocks == ["<details>", "</details>"] * (len(blocks) // 2)
    assert len(blocks) == README.count("details>")
    assert "details>" not in visible_text()
    for header in ("option", "metric", "reason", "exit code", "what happens"):
        assert table(header)
        assert f"\n| {header} |" not in visible_text()


@quick
def test_what_matters_of_the_metrics_and_symptoms() -> None:
    """Eight of the metrics; and what a reader may see is what the program says."""
    names = list(table("look at"))
    assert len(names) == 8
    assert set(names) < set(table("metric"))
    seen = README.partition("## Troubleshooting\n")[2].partition("\n## ")[0]
    reasons = re.findall(r"Reason `(\w+)`", seen)
    assert len(reasons) == 3
    assert all(Reason(reason) for reason in reasons)
    sentences = re.findall(r"(?:Log|Exit 1): `(.+?)`", seen)
    assert len(sentences) == 2
    assert all(sentence in SOURCE for sentence in sentences)


@quick
def test_a_copy_can_be_verified() -> None:
    """The README's hash is that of pmtud.py as it is now; on a mismatch write the new one there."""
    (told,) = re.findall(r"^echo '(\w+)  pmtud.py' \| sha256sum --check$", README, re.MULTILINE)
    assert told == hashlib.sha256(PROGRAM.read_bytes()).hexdigest()
    assert f"This is {pmtud.__version__}; " in README
    assert f"**{pmtud.__version__}** (" in README
    assert f"INFO pmtud {pmtud.__version__} on node1" in README


@quick
def test_links_and_files() -> None:
    """Everything the README points to is there."""
    for target in re.findall(r"\]\(([^)#h][^)]*)\)", README):
        assert (HERE / target).exists(), target
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", README)) <= anchors


# -----------------------------------------------------------------------------
# Section: lab network -- two VLANs, a switch that answers from its management address, pods, an API server

NIC_MTU = 9000  # inner Ethernet 14 + VXLAN 8 + UDP 8 + IP 20
VXLAN_OVERHEAD = 50
CALICO_DEFAULT_MTU = 1450
JUMBO_POD_MTU = NIC_MTU - VXLAN_OVERHEAD
API = "10.10.10.10"
SERVER_POD = "192.168.20.2"
CURL = f"curl -sSk --connect-timeout 3 https://{API}:6443/healthz"

# The handshake is done by the connection's own thread, so that a hung client cannot hold up the
# next.
TLS_SERVER = """
import http.server, socketserver, ssl, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/healthz" else 404)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")
    def log_message(self, *arguments):
        pass
class Server(socketserver.ThreadingTCPServer):  # not HTTPServer, which asks the DNS for its own name
    allow_reuse_address = daemon_threads = True
    def handle_error(self, request, client_address):
        pass  # the client gave up in the handshake
server = Server((sys.argv[1], 6443), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[2])
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
print("listening", flush=True)
server.serve_forever()
"""


def make_chain(folder: str) -> str:
    """A PEM file: the leaf's key, the leaf with the many names an API server has, and two
    intermediates: over 4 KB.
    """
    names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ]
    names += [f"api-{i}.k01.mtu-lab.example.internal" for i in range(60)]
    leaf = "basicConstraints=CA:FALSE\nsubjectAltName=IP:10.10.10.10," + ",".join(
        f"DNS:{name}" for name in names
    )
    authority = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign"
    pem = ""
    for name, issuer, extensions in (
        ("root", "", authority),
        ("zone", "root", authority),
        ("cluster", "zone", authority),
        ("leaf", "cluster", leaf),
    ):
        base = os.path.join(folder, name)
        with open(f"{base}.ext", "w") as file:
            file.write(extensions + "\n")
        request = f"req -new -newkey rsa:2048 -nodes -subj /O=mtu-lab/CN={name}"
        openssl(f"{request} -keyout {base}.key -out {base}.csr")
        by = f"-signkey {base}.key"
        if issuer:
            signer = os.path.join(folder, issuer)
            by = f"-CA {signer}.crt -CAkey {signer}.key"
        sign = f"x509 -req -in {base}.csr -days 2 -set_serial {time.time_ns()}"
        openssl(f"{sign} -extfile {base}.ext -out {base}.crt {by}")
    for part in ("leaf.key", "leaf.crt", "cluster.crt", "zone.crt"):
        with open(os.path.join(folder, part)) as file:
            pem += file.read()
    with open(os.path.join(folder, "chain.pem"), "w") as file:
        file.write(pem)
    return file.name


class State(NamedTuple):
    """What an exercise needs before it starts."""

    overlay_mtu: int = CALICO_DEFAULT_MTU  # of vxlan.calico
    pod_mtu: int = CALICO_DEFAULT_MTU
    svi_mtu: int = NIC_MTU  # of the switch's interface in VLAN 20
    rp_filter: int = 1  # net.ipv4.conf.all.rp_filter of the control plane


class MtuLab(Net):
    """Four nodes in two VLANs and the switch between them.

    Vlan10 and Vlan20 are bridges in the switch: their ports pass 9000 bytes, whatever the MTU of
    the bridge itself, which is the SVI's: it counts only for what the switch routes. Errors leave
    with the preferred source of the route back to the sender, 172.20.20.2, which the nodes reach
    over `mgmt` (as over containerlab's eth0), never over eth1.
    """

    NODES: ClassVar[dict[str, str]] = {
        "control-plane": API,
        "worker": "10.10.10.11",
        "worker2": "10.10.10.12",
        "worker3": "10.10.20.20",
    }
    PODS: ClassVar[dict[str, str]] = {"netshoot-client": "worker", "netshoot-server": "worker3"}

    def build(self) -> None:
        self.at: dict[str, Host] = {
            name: self.host(name, forward=True) for name in (*self.NODES, "ceos01")
        }
        self.at["docker"] = self.host("docker")
        self.daemon: Process | None = None
        self._build_switch()
        for number, name in enumerate(self.NODES, 1):
            self._build_node(number, name)
        for node, other in (("worker", "worker3"), ("worker3", "worker")):
            self._build_overlay(node, other)
        self.make_pods(CALICO_DEFAULT_MTU)
        self._start_server()

    def _build_switch(self) -> None:
        switch = self.at["ceos01"]
        docker = self.at["docker"]
        # arp_announce: the SVI's own address in ARP requests, or strict nodes would not answer the
        # one with 172.20.20.2
        switch.sysctls({"net.ipv4.icmp_ratelimit": 0, "net.ipv4.conf.all.arp_announce": 2})
        docker.ip(
            "link add docker0 type bridge mcast_snooping 0",
            "addr add 172.20.20.1/24 dev docker0",
            "link set docker0 up",
        )
        self.link(docker, switch, names=("to-ceos01", "Management0"))
        docker.ip("link set to-ceos01 master docker0")
        switch.ip("addr add 172.20.20.2/24 dev Management0")
        for vlan in (10, 20):
            switch.ip(
                f"link add Vlan{vlan} type bridge mcast_snooping 0",
                f"link set Vlan{vlan} mtu {NIC_MTU} up",
                f"addr add 10.10.{vlan}.1/24 dev Vlan{vlan}",
                f"route replace 10.10.{vlan}.0/24 dev Vlan{vlan} src 172.20.20.2",
            )

    def _build_node(self, number: int, name: str) -> None:
        node = self.at[name]
        address = self.NODES[name]
        vlan, last = address.split(".")[2:]
        # The larger of this and the interface's own, 0, is in force
        node.sysctl("net.ipv4.conf.all.rp_filter", 1)
        self.link(self.at["ceos01"], node, mtu=NIC_MTU, names=(f"Ethernet{number}", "eth1"))
        self.link(self.at["docker"], node, names=(f"port{number}", "mgmt"))
        self.at["ceos01"].ip(f"link set Ethernet{number} master Vlan{vlan}")
        self.at["docker"].ip(f"link set port{number} master docker0")
        node.ip(
            f"addr add {address}/24 dev eth1",
            f"route add 10.10.0.0/16 via 10.10.{vlan}.1",
            f"addr add 172.20.20.{last}/24 dev mgmt",
            "route add default via 172.20.20.1",
        )

    def _build_overlay(self, node: str, other: str) -> None:
        """As Calico does it: a /32 on vxlan.calico, and the other node's block of pods behind that
        node's /32.
        """
        own, peer = (self.NODES[name].split(".")[3] for name in (node, other))
        self.at[node].ip(
            f"link add vxlan.calico mtu {CALICO_DEFAULT_MTU} type vxlan id 4096 dstport 4789 "
            f"local {self.NODES[node]} remote {self.NODES[other]} dev eth1",
            f"addr add 192.168.{own}.0/32 dev vxlan.calico",
            "link set vxlan.calico up",
            f"route add 192.168.{peer}.0/26 via 192.168.{peer}.0 dev vxlan.calico onlink",
        )

    def make_pods(self, mtu: int) -> None:
        """New pods, in place of the old ones if there are any."""
        for name, node in self.PODS.items():
            if old := self.at.pop(name, None):
                execute("ip", "netns", "delete", old.namespace)
                self.hosts.remove(old)
            pod = self.at[name] = self.host(name)
            address = f"192.168.{self.NODES[node].split('.')[3]}.2"
            # A deleted namespace's interfaces go a little later: the old cali0 may still be there.
            execute("ip", "-n", self.at[node].namespace, "link", "delete", "cali0", check=False)
            self.link(self.at[node], pod, mtu=mtu, names=("cali0", "eth0"))
            self.at[node].sysctls(
                {"net.ipv4.conf.cali0.proxy_arp": 1, "net.ipv4.neigh.cali0.proxy_delay": 0}
            )
            self.at[node].ip(f"route add {address}/32 dev cali0")
            pod.ip(
                f"addr add {address}/32 dev eth0",
                "route add 169.254.1.1 dev eth0 scope link",
                "route add default via 169.254.1.1",
            )

    def _start_server(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            argv = (sys.executable, "-ISc", TLS_SERVER, API, make_chain(folder))
            self.at["control-plane"].start(*argv).wait_for("listening")

    def bring(self, state: State) -> None:
        """Into this state, no daemon running and nothing learned."""
        self.at["ceos01"].ip(f"link set Vlan20 mtu {state.svi_mtu}")
        for node in self.PODS.values():
            self.at[node].ip(f"link set vxlan.calico mtu {state.overlay_mtu}")
        if int(self.at["netshoot-client"].read("/sys/class/net/eth0/mtu")) != state.pod_mtu:
            self.make_pods(state.pod_mtu)
        self.stop_daemon()
        self.at["control-plane"].sysctl("net.ipv4.conf.all.rp_filter", state.rp_filter)
        for name in self.NODES:
            self.at[name].sysctl("net.ipv4.route.flush", 1)

    def start_daemon(self) -> Process:
        """pmtud on the control plane, standalone; ready when this returns."""
        argv = (sys.executable, SCRIPT, "--iface", "eth1")
        self.daemon = self.at["control-plane"].start(*argv)
        self.daemon.wait_for("limits:")
        return self.daemon

    def stop_daemon(self) -> None:
        if self.daemon:
            self.daemon.stop()
            self.daemon = None


# -----------------------------------------------------------------------------
# Section: lab screen -- how the lab is told: plain lines of at most 96 columns, colours only on a terminal

WIDTH = 96
BOLD = "1"
DIM = "2"
RED = "31"
GREEN = "32"
CYAN = "36"
ASCII = str.maketrans("─│┌┐└┘├┤┬┴┼✓✗", "-|+++++++++*x")

VLAN_DRAWING = """
     management network 172.20.20.0/24: interface mgmt of every node, with its default route
  ─────────────────────────────────┬────────────────────────────────────────────────────────────
                                   │ Management0 172.20.20.2: what the switch's errors come from
          ┌────────────────────────┴────────────────────────────┐
  ceos01  │  Vlan10 10.10.10.1 ──── routes ── Vlan20 10.10.20.1 │
          │  MTU 9000                         MTU 9000 or 1500  │
          └───┬──────────────┬──────────────┬──────────────┬────┘
              │ eth1         │ eth1         │ eth1         │ eth1       every NIC: MTU 9000
        control-plane      worker        worker2        worker3         every node: rp_filter 1
         10.10.10.10     10.10.10.11   10.10.10.12    10.10.20.20
         TLS on :6443        │                             │
                      netshoot-client ───── VXLAN ─── netshoot-server   pods: MTU 1450 or 8950
                       192.168.11.2      (50 bytes)    192.168.20.2
"""

ECMP_DRAWING = """
  23 clients ─1400─ router ─1500─ fabric ─┬─ node1 ── pod1  three services, each on every node:
  10.9.0.1..23       │     (ECMP, hash on ├─ node2 ── pod2  host  10.96.0.1 a socket of the node
           its errors say 1400     ports) └─ node3 ── pod3  pod   10.96.0.2 DNAT to its own pod
                                                            cross 10.96.0.3 DNAT to the next's
"""


class Screen:
    """Writes to standard output; `live` also shows how long a command has been running."""

    def __init__(self, color: bool = False, live: bool = False) -> None:
        self.color = color
        self.live = live

    def write(self, text: str = "", style: str = "") -> None:
        encoding = sys.stdout.encoding or "ascii"
        if encoding.lower() not in {"utf-8", "utf8"}:
            text = text.translate(ASCII).encode(encoding, "replace").decode(encoding)
        print(f"\033[{style}m{text}\033[0m" if self.color and style and text else text, flush=True)

    def prose(self, text: str, mark: str = "  ", style: str = "") -> None:
        """Text filled to the width, a mark before its first line."""
        self.write(
            textwrap.fill(
                " ".join(text.split()),
                WIDTH,
                initial_indent=f"  {mark}",
                subsequent_indent="    ",
                break_on_hyphens=False,
            ),
            style,
        )

    def command(self, host: str, line: str) -> None:
        self.write(f"  {host}# {line}", CYAN)

    def output(self, text: str) -> None:
        """A command's output; long lines are folded."""
        for line in text.expandtabs(4).rstrip().splitlines():
            room = WIDTH - 4 - (indent := len(line) - len(line.lstrip()))
            lines = textwrap.wrap(
                line.strip(), room, subsequent_indent="    ", break_on_hyphens=False
            )
            self.write("\n".join(" " * (4 + indent) + part for part in lines))

    def wait(self, condition: Callable[[], bool], limit: float) -> None:
        """Until the condition holds, or well beyond the limit.

        On a terminal: a dot each half second, what is left.
        """
        start = time.monotonic()
        while (
            not poll(condition, 0.5 / PATIENCE)
            and (seconds := time.monotonic() - start) < limit + 5 * PATIENCE
        ):
            if self.live:
                print(
                    f"\r    {'.' * int(seconds * 2)} {max(0, limit - seconds):.0f} s left ",
                    end="",
                    flush=True,
                )
        self.erase()

    def erase(self) -> None:
        """The line that wait() wrote."""
        if self.live:
            print("\r" + " " * (WIDTH - 1) + "\r", end="", flush=True)

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Columns as wide as their widest cell, two spaces between them."""
        cells = [list(map(str, row)) for row in (head, *rows)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
            for row in cells
        ]
        self.write(f"\n  {title}", BOLD)
        for line in (lines[0], "─" * max(map(len, lines)), *lines[1:]):
            self.write(f"    {line}")


# -----------------------------------------------------------------------------
# Section: lab exercises -- each brings its own state, runs real commands, and says whether they did what it claims


class Ran(NamedTuple):
    """What one command did; output has both of its streams."""

    output: str
    status: int
    seconds: float


class Result(NamedTuple):
    """Whether an exercise went as it says, and what was measured on the way."""

    ok: bool
    facts: dict[str, Any]


class Lab:
    """What an exercise works on: the two networks, made when first asked for, and the screen."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.stack = ExitStack()
        self.daemons: list[Process] = []  # of the ECMP cluster

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @cached_property
    def vlans(self) -> MtuLab:
        return self.stack.enter_context(MtuLab())

    @cached_property
    def ecmp(self) -> Cluster:
        return self.stack.enter_context(Cluster())

    def networks(self) -> list[Net]:
        """Those that have been made."""
        # Where cached_property puts them
        return [net for net in vars(self).values() if isinstance(net, Net)]

    def keep(self) -> None:
        """Leave everything standing when this ends."""
        for net in self.networks():
            atexit.unregister(net.close)
        self.stack.pop_all()

    def run(self, host: str, line: str, limit: float = 3) -> Ran:
        """The line, run by a shell in that host of the VLAN lab, shown with all it prints.

        The limit is in seconds.
        """
        self.screen.command(host, line)
        start = time.monotonic()
        process = self.vlans.at[host].start("sh", "-c", line)
        self.screen.wait(lambda: process.returncode() is not None, limit)
        seconds = time.monotonic() - start
        status = process.stop()
        self.screen.output(output := process.output())
        process.close()
        return Ran(output, status, seconds)

    def curl(self, host: str = "worker3") -> Ran:
        return self.run(host, CURL)

    def counter(self, host: str, name: str) -> int:
        """A kernel counter, as nstat shows it."""
        found = re.search(
            rf"{name}\s+(\d+)", self.run(host, f"nstat -asz {name} | tail -n 1").output
        )
        return int(found[1]) if found else -1

    def watch(self, action: Callable[[], Ran], *captures: tuple[str, str]) -> tuple[Ran, list[str]]:
        """What tcpdump printed while action() ran, for each (host, line).

        With a -c in the line it ends by itself.
        """
        started = []
        for host, line in captures:
            self.screen.command(host, f"{line} &")
            # Without --immediate-mode packets come in blocks, up to a second late.
            tcpdump = self.vlans.at[host].start(*shlex.split(line), "--immediate-mode", "-l")
            tcpdump.wait_for("listening on")
            started.append(tcpdump)
        ran = action()
        poll(lambda: all(tcpdump.returncode() is not None for tcpdump in started), 2)
        printed = []
        for (host, _), tcpdump in zip(captures, started):
            tcpdump.stop(signal.SIGINT)
            text = tcpdump.output().partition("listening on")[2].partition("\n")[2]
            printed.append(re.sub(r"(?m)^\d+ packets? .*\n", "", text))
            self.screen.prose(f"tcpdump on {host}:", style=DIM)
            self.screen.output(printed[-1])
        return ran, printed


class Exercise(NamedTuple):
    """One step of the lab. meaning is told afterwards, with the facts filled in."""

    number: str
    title: str
    meaning: str
    needs: State | None  # None: the ECMP cluster
    function: Callable[[Lab], Result]

    def run(self, lab: Lab) -> Result:
        """Brings the lab into the state it needs first, so that each exercise can be run alone."""
        try:
            if self.needs:
                lab.vlans.bring(self.needs)
            return self.function(lab)
        except (CommandFailed, TimeoutError, OSError) as problem:
            return Result(False, {"problem": str(problem)})


EXERCISES: list[Exercise] = []


def exercise(
    number: str, title: str, meaning: str, needs: State | None
) -> Callable[[Callable[[Lab], Result]], Callable[[Lab], Result]]:
    def register(function: Callable[[Lab], Result]) -> Callable[[Lab], Result]:
        EXERCISES.append(Exercise(number, title, meaning, needs, function))
        return function

    return register


def learned(ran: Ran) -> int | None:
    """The path MTU in the output of `ip route get`."""
    found = re.search(r" mtu (\d+)", ran.output)
    return int(found[1]) if found else None


def answered(ran: Ran) -> bool:
    return ran.status == 0 and ran.output == "ok"


def timed_out(ran: Ran) -> bool:
    return ran.status == 28 and "timeout" in ran.output


def transfer(ran: Ran, prefix: str = "") -> dict[str, Any]:
    """The facts about one curl."""
    said = (
        "ok"
        if answered(ran)
        else ran.output.strip().removeprefix("curl: ") or f"exit status {ran.status}"
    )
    return {f"{prefix}curl": said, f"{prefix}seconds": round(ran.seconds, 2)}


def rpf(lab: Lab, change: str = "") -> str:
    """rp_filter of the control plane, changed first if there is a change."""
    name = "net.ipv4.conf.all.rp_filter"
    line = f"sysctl -w {name}={change}" if change else f"sysctl {name}"
    return lab.run("control-plane", line).output.strip()[-1:]


BASIC = State()
PATCHED = State(overlay_mtu=JUMBO_POD_MTU)  # the new MTU is set, the pods are still the old ones
JUMBO = State(overlay_mtu=JUMBO_POD_MTU, pod_mtu=JUMBO_POD_MTU)
BROKEN = State(svi_mtu=1500)
LOOSE = State(svi_mtu=1500, rp_filter=2)
PING = f"ping -c 3 -i 0.2 -s 8900 -M do {SERVER_POD}"
ROUTE_GET = "ip route get 10.10.20.20"


@exercise(
    "1.1",
    "The hosts and the pods",
    "Four nodes, one of them in the other VLAN; a pod on worker and a pod on worker3.",
    BASIC,
)
def the_hosts(lab: Lab) -> Result:
    found = {}
    for name, interface in [(node, "eth1") for node in MtuLab.NODES] + [
        (pod, "eth0") for pod in MtuLab.PODS
    ]:
        found[name] = " ".join(
            re.findall(r"\S+(?=/)", lab.run(name, f"ip -br -4 addr show {interface}").output)
        )
    expected = {**MtuLab.NODES, "netshoot-client": "192.168.11.2", "netshoot-server": SERVER_POD}
    return Result(found == expected, found)


def link_mtu(lab: Lab, host: str, interface: str) -> int:
    found = re.search(r" mtu (\d+)", lab.run(host, f"ip link show {interface}").output)
    return int(found[1]) if found else 0


def shows_mtu(name: str, host: str, interface: str, expected: int) -> Callable[[Lab], Result]:
    def run(lab: Lab) -> Result:
        mtu = link_mtu(lab, host, interface)
        return Result(mtu == expected, {name: mtu})

    return run


exercise(
    "1.2",
    "The pod's interface",
    "{pod} bytes: what Calico gives a pod when nobody tells it otherwise.",
    BASIC,
)(shows_mtu("pod", "netshoot-client", "eth0", CALICO_DEFAULT_MTU))
exercise(
    "1.3",
    "The node's interface",
    "{nic} bytes: the network below could carry packets six times as big.",
    BASIC,
)(shows_mtu("nic", "worker", "eth1", NIC_MTU))


@exercise(
    "1.4", "A small ping", "Small packets get through, which is why nobody notices at first.", BASIC
)
def a_small_ping(lab: Lab) -> Result:
    ran = lab.run("netshoot-client", f"ping -c 3 -i 0.2 {SERVER_POD}")
    return Result(ran.output.count("64 bytes from") == 3, {"status": ran.status})


@exercise(
    "1.5",
    "A large ping",
    "8900 bytes with \"don't fragment\": the pod's own interface refuses them.",
    BASIC,
)
def a_large_ping(lab: Lab) -> Result:
    ran = lab.run("netshoot-client", PING)
    said = re.search(r"message too long, mtu=\d+", ran.output, re.IGNORECASE)
    facts = {"said": said[0] if said else f"exit status {ran.status}"}
    return Result(ran.status == 1 and facts["said"].lower().endswith("too long, mtu=1450"), facts)


@exercise(
    "1.6",
    "Where the large ping ends",
    "worker forwarded {large} packets of the large ping, {small} of a small one (one each "
    "way): the large one "
    "never leaves the pod, so nothing outside, no router and no pmtud, can help it.",
    BASIC,
)
def where_it_ends(lab: Lab) -> Result:
    counts = [lab.counter("worker", "IpForwDatagrams")]
    for size in (8900, 56):
        lab.run(
            "netshoot-client", f"ping -c 1 -W 1 -q -s {size} -M do {SERVER_POD} | grep transmitted"
        )
        counts.append(lab.counter("worker", "IpForwDatagrams"))
    facts = {"large": counts[1] - counts[0], "small": counts[2] - counts[1]}
    return Result(facts == {"large": 0, "small": 2}, facts)


@exercise(
    "1.7",
    "A larger MTU for the overlay",
    "Pod MTU = NIC MTU - VXLAN overhead = 9000 - 50 = 8950. With Calico one line does this on "
    "all nodes: kubectl "
    'patch installation default --type=merge -p \'{{"spec":{{"calicoNetwork":{{"mtu":8950}}}}}}\'. '
    "The pods keep their {pod}.",
    BASIC,
)
def a_larger_overlay(lab: Lab) -> Result:
    for node in MtuLab.PODS.values():
        lab.run(node, f"ip link set vxlan.calico mtu {JUMBO_POD_MTU}")
    facts = {
        "overlay": link_mtu(lab, "worker", "vxlan.calico"),
        "pod": link_mtu(lab, "netshoot-client", "eth0"),
    }
    return Result(facts == {"overlay": JUMBO_POD_MTU, "pod": CALICO_DEFAULT_MTU}, facts)


@exercise(
    "1.8",
    "New pods",
    "A pod gets its MTU when it is made, so both were deleted and made again (kubectl delete "
    "pod, kubectl "
    "apply): new namespaces, new interfaces, and they answer.",
    PATCHED,
)
def new_pods(lab: Lab) -> Result:
    inode = "stat -Lc %i /proc/self/ns/net"
    before = lab.run("netshoot-client", inode).output
    lab.vlans.make_pods(JUMBO_POD_MTU)
    lab.screen.prose("(both pods are deleted and made again)", style=DIM)
    after = lab.run("netshoot-client", inode).output
    ran = lab.run("netshoot-client", f"ping -c 1 -W 1 -q {SERVER_POD} | grep transmitted")
    return Result(
        before != after and " 0% packet loss" in ran.output, {"namespaces": (before, after)}
    )


exercise("1.9", "The new pod's interface", "{pod} bytes.", JUMBO)(
    shows_mtu("pod", "netshoot-client", "eth0", JUMBO_POD_MTU)
)


@exercise(
    "1.10",
    "The large ping again",
    "8900 bytes of data + 8 of ICMP = the 8908 in each reply; + 20 of IP = {inner}, which "
    "worker wraps in VXLAN "
    "and sends as {outer}: {overhead} more, and 9000 is enough.",
    JUMBO,
)
def the_large_ping_again(lab: Lab) -> Result:
    capture = ("worker", "tcpdump -t -i eth1 -nn -v -c 1 'udp port 4789 and greater 1500'")
    ran, (packet,) = lab.watch(lambda: lab.run("netshoot-client", PING), capture)
    lengths = [int(length) for length in re.findall(r"proto .*, length (\d+)\)", packet)]
    outer, inner = lengths if len(lengths) == 2 else (0, 0)
    replies = ran.output.count("8908 bytes from")
    facts = {
        "replies": f"{replies} of 3 replies",
        "outer": outer,
        "inner": inner,
        "overhead": outer - inner,
        "standard": 1500 - (outer - inner),
    }
    return Result(replies == 3 and inner == 8928 and facts["overhead"] == VXLAN_OVERHEAD, facts)


def svis(set_mtu: int | None, expected: list[int]) -> Callable[[Lab], Result]:
    """Sets the MTU of Vlan20 if there is one to set, and shows both."""

    def run(lab: Lab) -> Result:
        if set_mtu:
            lab.run("ceos01", f"ip link set Vlan20 mtu {set_mtu}")
        else:
            lab.run("ceos01", "ip -br -4 addr show up | grep -v '^lo'")
        shown = lab.run("ceos01", "ip -o link show type bridge | cut -d' ' -f2-5").output
        mtus = [int(mtu) for mtu in re.findall(r" mtu (\d+)", shown)]
        return Result(mtus == expected, {"mtus": mtus})

    return run


exercise("2.1", "The switch's VLAN interfaces", "Both routed interfaces carry 9000 bytes.", BASIC)(
    svis(None, [NIC_MTU, NIC_MTU])
)


@exercise(
    "2.2",
    "From worker3 to the API server",
    "Through the switch, from VLAN 20 to VLAN 10: answered.",
    BASIC,
)
def across_vlans(lab: Lab) -> Result:
    ran = lab.curl()
    return Result(answered(ran), transfer(ran))


exercise(
    "2.3",
    "VLAN 20 at 1500",
    "The mistake: one routed interface has the standard MTU, all hosts the jumbo one.",
    BASIC,
)(svis(1500, [NIC_MTU, 1500]))


@exercise(
    "2.4",
    "From worker3 to the API server: fails",
    "The TCP handshake fits, the server's certificates do not; curl gives up after {seconds} "
    "s. The API server "
    "has learned {learned}.",
    BROKEN,
)
def across_vlans_fails(lab: Lab) -> Result:
    ran = lab.curl()
    mtu = learned(lab.run("control-plane", ROUTE_GET))
    return Result(
        timed_out(ran) and ran.seconds > 2.9 and mtu is None,
        {**transfer(ran), "learned": mtu or "nothing"},
    )


@exercise(
    "2.5",
    "From worker, in the API server's own VLAN",
    "Within VLAN 10 the frames are switched, no routed interface is in the way. Of the "
    "handshake one message is "
    "large, Certificate: {certificate} bytes.",
    BROKEN,
)
def within_the_vlan(lab: Lab) -> Result:
    ran = lab.curl("worker")
    handshake = lab.run(
        "worker", f"openssl s_client -connect {API}:6443 -msg </dev/null 2>&1 | grep Handshake"
    )
    messages = [
        (name, "client" if arrow == ">>>" else "server", int(length, 16))
        for arrow, length, name in re.findall(
            r"(...) TLS \S+, Handshake \[length (\w+)\], (\w+)", handshake.output
        )
    ]
    large = [(name, length) for name, _, length in messages if length > 1500]
    facts = {**transfer(ran), "messages": messages, "certificate": large[0][1] if large else 0}
    return Result(
        answered(ran)
        and [name for name, _ in large] == ["Certificate"]
        and facts["certificate"] > 4096,
        facts,
    )


FRAG_NEEDED = "172.20.20.2 > 10.10.10.10: ICMP 10.10.20.20 unreachable - need to frag (mtu 1500)"
ICMP_FILTER = "'icmp[icmptype] == 3 and icmp[icmpcode] == 4'"


@exercise(
    "2.6",
    "Why: the error arrives, and is thrown away",
    "The server's certificates leave with DF, in a packet of {length}, and end at the switch. "
    "It says 1500, but "
    "says it from its management address, and the route to that address is mgmt, not eth1: "
    "strict RPF dropped "
    "all {dropped} errors, silently.",
    BROKEN,
)
def why_it_fails(lab: Lab) -> Result:
    before = lab.counter("control-plane", "TcpExtIPReversePathFilter")
    ran, (arrived, on_switch) = lab.watch(
        lab.curl,
        ("control-plane", f"tcpdump -t -i eth1 -nn -v -c 1 {ICMP_FILTER}"),
        (
            "ceos01",
            "tcpdump -t -i Ethernet1 -nn -q -c 2 'icmp or (src port 6443 and greater 1500)'",
        ),
    )
    dropped = lab.counter("control-plane", "TcpExtIPReversePathFilter") - before
    setting = rpf(lab)
    quoted = re.search(r"flags \[DF\], proto TCP \(6\), length (\d+)", arrived)
    facts = {"length": int(quoted[1]) if quoted else 0, "dropped": dropped, **transfer(ran)}
    seen = FRAG_NEEDED in arrived and FRAG_NEEDED in on_switch and facts["length"] > 1500
    return Result(seen and timed_out(ran) and dropped > 0 and setting == "1", facts)


@exercise(
    "2.7",
    "The usual advice: no RPF, or loose RPF",
    "0: no source is checked. 2: a source is accepted if any interface has a route to it; "
    "172.20.20.2 has one, "
    "over mgmt.",
    BROKEN,
)
def loose_rpf(lab: Lab) -> Result:
    settings = rpf(lab, "0")
    off = lab.curl()
    mtu = learned(lab.run("control-plane", ROUTE_GET))
    lab.run("control-plane", "ip route flush cache")
    settings = settings + rpf(lab, "2")
    loose = lab.curl()
    return Result(
        answered(off) and mtu == 1500 and answered(loose) and settings == "02",
        {**transfer(off, "off_"), "learned": mtu, **transfer(loose, "loose_")},
    )


@exercise(
    "2.8",
    "Path MTU Discovery works",
    "The first connection learns 1500 from the error, half-way. The second knows: worker3's "
    "SYN says mss 8960, "
    "the server's answer mss {mss} = 1500 - 40.",
    LOOSE,
)
def discovery_works(lab: Lab) -> Result:
    first = lab.curl()
    syns = "'port 6443 and tcp[tcpflags] & tcp-syn != 0'"
    second, (packets,) = lab.watch(
        lab.curl, ("control-plane", f"tcpdump -t -i eth1 -nn -c 2 {syns}")
    )
    mtu = learned(lab.run("control-plane", ROUTE_GET))
    mss = [int(value) for value in re.findall(r"mss (\d+)", packets)]
    facts = {**transfer(first), "mss": mss[-1] if mss else None, "learned": mtu}
    return Result(
        answered(first) and answered(second) and mss == [8960, 1460] and mtu == 1500, facts
    )


@exercise(
    "2.9",
    "What was learned",
    "One exception for one destination, forgotten after ten minutes; the neighbour keeps the "
    "full 9000.",
    LOOSE,
)
def what_was_learned(lab: Lab) -> Result:
    ran = lab.curl()
    facts = {
        "worker3": learned(lab.run("control-plane", ROUTE_GET)),
        "worker": learned(lab.run("control-plane", "ip route get 10.10.10.11")),
    }
    return Result(answered(ran) and facts == {"worker3": 1500, "worker": None}, facts)


@exercise(
    "2.10",
    "Strict again",
    "What was learned outlives the setting for a while; once it is gone ({mtu} before the "
    "flush), the failure "
    "is back.",
    LOOSE,
)
def strict_again(lab: Lab) -> Result:
    learner = lab.curl()
    setting = rpf(lab, "1")
    mtu = learned(lab.run("control-plane", ROUTE_GET))
    lab.run("control-plane", "ip route flush cache")
    ran = lab.curl()
    ok = answered(learner) and setting == "1" and mtu == 1500 and timed_out(ran)
    return Result(ok, {"mtu": mtu, **transfer(ran)})


@exercise(
    "2.11",
    "What loose RPF costs",
    "worker2 pretends to be 172.20.20.77 of the management network. Forged packets accepted: "
    "{off} of 1 without "
    "RPF, {strict} of 1 strict, {loose} of 1 loose. That is why rp_filter=2 is no fix.",
    BROKEN,
)
def what_loose_costs(lab: Lab) -> Result:
    lab.run("worker2", "ip addr replace 172.20.20.77/32 dev lo")
    # First an honest one: a strict node does not even answer ARP for a wrong source.
    lab.run("worker2", f"ping -c 1 -W 1 -q {API} | grep transmitted")
    accepted = []
    for mode in "012":
        rpf(lab, mode)
        before = lab.counter("control-plane", "IcmpInEchos")
        lab.run("worker2", f"ping -c 1 -W 0.2 -q -I 172.20.20.77 {API} | grep transmitted")
        accepted.append(lab.counter("control-plane", "IcmpInEchos") - before)
    lab.vlans.at["worker2"].ip("addr del 172.20.20.77/32 dev lo")
    return Result(accepted == [1, 0, 1], dict(zip(("off", "strict", "loose"), accepted)))


exercise(
    "2.12",
    "The cause removed: VLAN 20 at 9000",
    "The same MTU on every hop: the one fix without a catch.",
    BROKEN,
)(svis(NIC_MTU, [NIC_MTU, NIC_MTU]))


@exercise(
    "2.13",
    "From worker3 to the API server: restored",
    "With matching MTUs no error is needed, so rp_filter plays no part.",
    BASIC,
)
def restored(lab: Lab) -> Result:
    strict = lab.curl()
    rpf(lab, "2")
    loose = lab.curl()
    return Result(
        answered(strict) and answered(loose),
        {**transfer(strict, "strict_"), **transfer(loose, "loose_")},
    )


@exercise(
    "2.14",
    "VLAN 20 at 1500, strict RPF, and pmtud",
    "pmtud saw the error before the RPF check and gave it to this node's own stack: the "
    "transfer works, 1500 is "
    "learned, and rp_filter is still {setting}. --iface, because errors come in on eth1 and "
    "the default route is "
    "over mgmt.",
    BROKEN,
)
def with_pmtud(lab: Lab) -> Result:
    lab.screen.command("control-plane", "python3 pmtud.py --iface eth1 &")
    daemon = lab.vlans.start_daemon()
    ran, (packets,) = lab.watch(
        lab.curl, ("control-plane", f"tcpdump -t -i eth1 -nn -c 1 {ICMP_FILTER}")
    )
    mtu = learned(lab.run("control-plane", ROUTE_GET))
    setting = rpf(lab)
    lab.screen.prose("pmtud on control-plane:", style=DIM)
    lab.screen.output(daemon.output())
    ok = answered(ran) and FRAG_NEEDED in packets and mtu == 1500 and setting == "1"
    return Result(
        ok and daemon.returncode() is None, {**transfer(ran), "learned": mtu, "setting": setting}
    )


FLOWS = 23


def ecmp_cluster(lab: Lab, worst: bool, daemons: bool) -> Cluster:
    """The ECMP cluster; worst.

    Strict RPF on every node and errors from the router's management address.
    """
    net = lab.ecmp
    while lab.daemons:
        lab.daemons.pop().stop()
    net.strict_rpf(worst)
    net.error_from_management(worst)
    peers = ",".join(map(net.node_address, range(1, net.size + 1)))
    for node in net.nodes if daemons else ():
        lab.screen.command(node.name, f"python3 pmtud.py --peers {peers} &")
        lab.daemons.append(node.start(sys.executable, SCRIPT, "--peers", peers))
    for daemon in lab.daemons:
        daemon.wait_for("limits:")
    net.flush()
    return net


def download(lab: Lab, net: Cluster, service: str, deadline: float = 10) -> int:
    """How many of the transfers of the service completed."""
    with ThreadPoolExecutor(1) as pool:
        transfers = pool.submit(net.download, service, count=FLOWS, deadline=deadline)
        lab.screen.wait(transfers.done, deadline)
    seconds = transfers.result()
    slowest = f"  slowest {max(seconds) * 1000:.0f} ms" if seconds else ""
    lab.screen.output(
        f"{service:6}{Cluster.vip(service):12}{len(seconds):3} of {FLOWS} clients get 200 "
        f"kB{slowest}"
    )
    return len(seconds)


def who_hears(lab: Lab, net: Cluster, service: str) -> Counter[str]:
    """What `check --from` finds on each node; how many have the verdict OK, WARN or FAIL."""
    vip = net.vip(service)
    client = net.client_address(1)

    def look(node: Host) -> str:
        argv = [sys.executable, SCRIPT, "check", "--from", vip, client]
        printed = node.run(*argv, check=False, timeout=30)
        found = re.search(r"^\w+ +path_from: .*(?:\n {7}(?!fix|next).*)*", printed, re.MULTILINE)
        assert found, printed
        return " ".join(found[0].split())

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(look, net.nodes))
    for node, text in zip(net.nodes, found):
        lab.screen.command(node.name, f"python3 pmtud.py check --from {vip} {client}")
        lab.screen.output(text)
    return Counter(text.split()[0] for text in found)


def heard_and_served(host: Host) -> Counter[str]:
    """How many errors its stack got, and how many connections it accepted."""
    shown = host.run("nstat", "-asz", "IcmpInDestUnreachs", "TcpPassiveOpens")
    return Counter({name: int(value) for name, value in re.findall(r"(\w+)\s+(\d+)", shown)})


@exercise(
    "3.1",
    "A service on three nodes, no daemon",
    "The fabric sends all errors about a service to one node: check --from finds the one. The "
    "flows which that node "
    "serves complete, {host}, {pod} and {cross} by the kernels' own counters, and no other.",
    None,
)
def ecmp_before(lab: Lab) -> Result:
    net = ecmp_cluster(lab, worst=False, daemons=False)
    hears = who_hears(lab, net, "host")
    done: dict[str, int] = {}
    informed: dict[str, list[int]] = {}  # connections of each server that got an error
    for service in Cluster.SERVICES:
        servers = net.nodes if service == "host" else net.pods
        before = [heard_and_served(server) for server in servers]
        done[service] = download(lab, net, service, 3)
        changes = [heard_and_served(server) - old for server, old in zip(servers, before)]
        informed[service] = [
            change["TcpPassiveOpens"] for change in changes if change["IcmpInDestUnreachs"]
        ]
    ok = all(
        len(informed[service]) < 2 and count == sum(informed[service]) < FLOWS
        for service, count in done.items()
    )
    ok = ok and hears == {"OK": 1, "FAIL": net.size - 1}
    return Result(ok, {**done, "informed": informed})


@exercise(
    "3.2",
    "And strict RPF, errors from a management address",
    "Every error is dropped on arrival.",
    None,
)
def ecmp_worst(lab: Lab) -> Result:
    net = ecmp_cluster(lab, worst=True, daemons=False)
    done = {service: download(lab, net, service, 1.5) for service in Cluster.SERVICES}
    return Result(not any(done.values()), done)


COUNTERS = {  # column: what it sums up
    "router": 'received_total{family="ipv4",origin="router"}',
    "peer": 'received_total{family="ipv4",origin="peer"}',
    "limited": 'dropped_total{reason="limited',
    "passing": 'dropped_total{reason="ignored_network"}',
    "copies": "copies_sent_total",
    "owner": 'delivered_total{family="ipv4",result="owner"}',
    "not_owner": 'delivered_total{family="ipv4",result="not_owner"}',
    "rescued": "rpf_rescued_total",
}


def node_counters(node: Host) -> dict[str, int]:
    """The node's counters, summed up by the columns of the table."""
    lines = node.run("curl", "-sS", "http://127.0.0.1:30040/metrics").splitlines()
    return {
        column: int(
            sum(float(line.split()[-1]) for line in lines if line.startswith(f"pmtud_{start}"))
        )
        for column, start in COUNTERS.items()
    }


def balanced(rows: Sequence[dict[str, int]]) -> bool:
    """Whether every copy arrived, and every error was limited, let pass or delivered."""
    copies, arrived = (sum(row[name] for row in rows) for name in ("copies", "peer"))
    return copies == arrived - sum(row["passing"] for row in rows) > 0 and all(
        sum(row[name] for name in ("limited", "passing", "owner", "not_owner"))
        == row["router"] + row["peer"]
        for row in rows
    )


@exercise(
    "3.3",
    "The same, pmtud on every node",
    "Strict RPF, the wrong address, the wrong node: every node hears of the error, and every "
    "transfer completes. "
    "Of the errors those beyond one per "
    "flow in 0.1 s were limited; of the rest each became two copies and each copy arrived.",
    None,
)
def ecmp_with_pmtud(lab: Lab) -> Result:
    net = ecmp_cluster(lab, worst=True, daemons=True)
    hears = who_hears(lab, net, "host")
    done = {service: download(lab, net, service) for service in Cluster.SERVICES}
    lab.screen.command("node1", "curl http://127.0.0.1:30040/metrics")
    lab.screen.prose("(and on node2 and node3: see the table at the end)", style=DIM)
    counts: dict[str, dict[str, int]] = {}

    def settled() -> bool:
        counts.update({node.name: node_counters(node) for node in net.nodes})
        return balanced(list(counts.values()))

    whole = poll(settled, 3)
    whole = whole and any(row["rescued"] for row in counts.values())
    whole = whole and hears == {"OK": net.size}
    return Result(whole and set(done.values()) == {FLOWS}, {**done, "counters": counts})


# -----------------------------------------------------------------------------
# Section: lab command -- the tour, its tables, what stays behind

PARTS = {
    "1": ("Part 1: the MTU of pods", VLAN_DRAWING),
    "2": ("Part 2: the MTU of a VLAN interface", VLAN_DRAWING),
    "3": ("Part 3: many nodes behind one address", ECMP_DRAWING),
}


def tell(lab: Lab, step: Exercise, progress: str) -> Result:
    """Run one exercise and narrate it."""
    lab.screen.write(f"\n{step.number}  {step.title} ({progress})", BOLD)
    start = time.monotonic()
    result = step.run(lab)
    if result.ok:
        lab.screen.prose(step.meaning.format(**result.facts), "✓ ", GREEN)
    else:
        facts = ", ".join(f"{name}={value}" for name, value in result.facts.items())
        lab.screen.prose(
            f"NOT AS IT SHOULD BE after {time.monotonic() - start:.1f} s: {facts}", "✗ ", RED
        )
    return result


# A title, the columns, and the rows: the exercises a row is about, and cells filled in with what
# these have measured.
TABLES: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]], ...] = (
    (
        "8900-byte ping between pods, DF set",
        ("pod MTU", "result"),
        (("1.5", "1450", "{said}"), ("1.10", "8950", "{replies}")),
    ),
    (
        "MTU settings",
        ("NIC", "Calico", "pod"),
        (
            ("1.2, 1.3", "{nic}", "not set", "{pod}"),
            ("1.3, 1.7, 1.9", "{nic}", "{overlay}", "{pod}"),
            ("1.10", "1500", "1500 - {overhead}", "{standard}, computed"),
        ),
    ),
    (
        f"curl to https://{API}:6443/healthz",
        ("from", "SVI 20 MTU", "rp_filter", "pmtud", "result", "time", "learned"),
        (
            ("2.2", "worker3", "9000", "1", "-", "{curl}", "{seconds} s", ""),
            ("2.13", "worker3", "9000", "1", "-", "{strict_curl}", "{strict_seconds} s", ""),
            ("2.13", "worker3", "9000", "2", "-", "{loose_curl}", "{loose_seconds} s", ""),
            ("2.5", "worker", "1500", "1", "-", "{curl}", "{seconds} s", ""),
            ("2.4", "worker3", "1500", "1", "-", "{curl}", "{seconds} s", "{learned}"),
            ("2.7", "worker3", "1500", "0", "-", "{off_curl}", "{off_seconds} s", "{learned}"),
            ("2.8", "worker3", "1500", "2", "-", "{curl}", "{seconds} s", "{learned}"),
            ("2.14", "worker3", "1500", "1", "running", "{curl}", "{seconds} s", "{learned}"),
        ),
    ),
    (
        "200 kB from a service behind ECMP",
        ("", *Cluster.SERVICES),
        tuple(
            (key, label, *(f"{{{service}}} of {FLOWS}" for service in Cluster.SERVICES))
            for key, label in (
                ("3.1", "rp_filter 0, no daemon"),
                ("3.2", "rp_filter 1, management address, no daemon"),
                ("3.3", "rp_filter 1, management address, pmtud"),
            )
        ),
    ),
    (
        "Troubleshooting",
        ("symptom", "cause", "cure"),
        (
            ("1.5, 1.10", "{said}", "pods at 1450", "pods at 8950: {replies}"),
            ("2.4, 2.13", "{curl}", "VLAN 20 at 1500", "VLAN 20 at 9000: {strict_curl}"),
            ("2.6, 2.14", '{dropped} "need to frag" ignored', "strict RPF", "pmtud: {curl}"),
            (
                "2.6, 2.7, 2.11",
                '{dropped} "need to frag" ignored',
                "strict RPF",
                "loose: {loose_curl}, as is {loose} of 1 forged",
            ),
        ),
    ),
)


NEXT_COMMANDS = """
  Next, on your own nodes:
    sudo python3 pmtud.py check --from SERVICE CLIENT   on each: who hears of MTU errors
    sudo python3 pmtud.py --peers NODE,NODE,NODE        on each, with the addresses of all
"""


class Facts(dict[str, Any]):
    """What was measured; ? for what an exercise that failed did not get to."""

    def __missing__(self, name: str) -> str:
        return "?"


def tables(screen: Screen, done: dict[str, Result]) -> None:
    """The summary: only rows all of whose exercises were run."""
    if messages := done["2.5"].facts.get("messages") if "2.5" in done else None:
        screen.table(
            "TLS handshake in 2.5",
            ["message", "from", "bytes", "more than 1500"],
            [(*message, "yes" if message[2] > 1500 else "no") for message in messages],
        )
    if counts := done["3.3"].facts.get("counters") if "3.3" in done else None:
        screen.table(
            "errors on each node in 3.3, by /metrics",
            ["node", *COUNTERS],
            [[name, *row.values()] for name, row in counts.items()],
        )
        screen.prose(
            "router, peer: received from. limited: more than one per flow in 0.1 s. passing: "
            "another node's "
            "delivery on its way to a pod here. copies: sent. owner, not_owner: delivered here,"
            " and whether "
            "the flow was ours. rescued: deliveries of what strict RPF then dropped.",
            style=DIM,
        )
    for title, head, rows in TABLES:
        cells = []
        for keys, *texts in rows:
            if set(numbers := keys.split(", ")) <= set(done):
                facts = Facts(
                    {name: fact for number in numbers for name, fact in done[number].facts.items()}
                )
                cells.append([*(text.format_map(facts) for text in texts), keys])
        if cells:
            screen.table(title, [*head, "in"], cells)


def tour(lab: Lab, steps: Sequence[Exercise]) -> int:
    """Every exercise, then the tables; the number of those that failed."""
    done: dict[str, Result] = {}
    titles: set[str] = set()
    drawings: set[str] = set()
    for number, step in enumerate(steps, 1):
        title, drawing = PARTS[step.number[0]]
        if title not in titles:
            lab.screen.write(f"\n{title}\n{'─' * WIDTH}", BOLD)
        if drawing not in drawings:
            lab.screen.write(drawing.rstrip())
        titles.add(title)
        drawings.add(drawing)
        done[step.number] = tell(lab, step, f"{number} of {len(steps)}")
    lab.screen.write(f"\nSummary\n{'─' * WIDTH}", BOLD)
    tables(lab.screen, done)
    failed = [number for number, result in done.items() if not result.ok]
    lab.screen.write(
        f"\n  {len(done) - len(failed)} of {len(done)} exercises went as they should"
        + (f"; not so: {', '.join(failed)}" if failed else ""),
        RED if failed else GREEN,
    )
    return len(failed)


def explain_keep(lab: Lab) -> None:
    """How to enter each host, and how to remove everything."""
    hosts = [host for net in lab.networks() for host in net.hosts]
    lab.screen.write("\nStill standing; enter a host with:", BOLD)
    for host in hosts:
        lab.screen.write(f"  sudo ip netns exec {host.namespace} bash")
    lab.screen.write("Remove it all with:", BOLD)
    lab.screen.write(
        f"  ip netns | grep -o '^pm{os.getpid()}-[^ ]*' | while read n; do \\\n"
        "      sudo ip netns pids $n | xargs -r sudo kill; sudo ip netns delete $n; done"
    )


def lab_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="test_pmtud.py lab", description="The MTU lab, in network namespaces."
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave it standing, and say how to enter and remove it"
    )
    parser.add_argument(
        "--only",
        action="extend",
        type=lambda text: text.split(","),
        default=[],
        metavar="N",
        help="exercises (2.4) or parts (2), comma-separated and repeatable",
    )
    parser.add_argument("--no-color", action="store_true", help="plain text, also on a terminal")
    options = parser.parse_args(argv)
    chosen = {
        one: [step for step in EXERCISES if f"{step.number}.".startswith(f"{one}.")]
        for one in options.only
    }
    options.steps = [
        step for step in EXERCISES if not chosen or any(step in steps for steps in chosen.values())
    ]
    if unknown := [one for one, steps in chosen.items() if not steps]:
        parser.error(
            f"no exercise {', '.join(unknown)}; there are "
            f"{', '.join(one.number for one in EXERCISES)}"
        )
    if os.geteuid():
        parser.error("network namespaces need root: sudo python3 test_pmtud.py lab")
    if not importlib.util.find_spec("prometheus_client") and any(
        step.number == "3.3" for step in options.steps
    ):
        parser.error("part 3 reads /metrics: pip install prometheus-client, or --only 1,2")
    return options


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt(*_: object) -> None:
    """A signal's handler. What it starts, removing the lab, is not interrupted by the next signal."""
    for sig in SIGNALS:
        signal.signal(sig, signal.SIG_IGN)
    raise KeyboardInterrupt


def lab(argv: Sequence[str]) -> int:
    """The guided tour; 0 if everything went as it says, 1 if not, 130 after a signal.

    Removes what it made.
    """
    options = lab_arguments(argv)
    terminal = sys.stdout.isatty()
    screen = Screen(terminal and not options.no_color and "NO_COLOR" not in os.environ, terminal)
    for sig in SIGNALS:
        if signal.getsignal(sig) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(sig, interrupt)
    try:
        with Lab(screen) as stage:
            screen.write(f"The MTU lab, in network namespaces\n{'─' * WIDTH}", BOLD)
            screen.write("  HOST# COMMAND: run in that host; what it printed follows.")
            failed = tour(stage, options.steps)
            screen.write(NEXT_COMMANDS.rstrip())
            if options.keep:
                explain_keep(stage)
                stage.keep()
    except KeyboardInterrupt:
        with suppress(OSError):  # a terminal that is gone
            screen.erase()
            screen.write("\ninterrupted; everything was removed", RED)
        return 130
    except BrokenPipeError:  # `lab | head`
        # For the interpreter's last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 1 if failed else 0


# -----------------------------------------------------------------------------
# Section: lab tests -- every exercise in order, on one lab, and its command line


@pytest.fixture(scope="module")
def stage() -> Iterator[Lab]:
    """One lab for all exercises; what it prints is shown by pytest where one fails."""
    with Lab(Screen()) as stage:
        yield stage


@pytest.fixture(scope="module")
def done() -> dict[str, Result]:
    """What the exercises that were run have measured."""
    return {}


@in_order
@pytest.mark.parametrize("step", EXERCISES, ids=lambda step: step.number)
def test_lab_exercise(stage: Lab, done: dict[str, Result], step: Exercise) -> None:
    done[step.number] = result = step.run(stage)
    assert result.ok, result.facts
    assert "{" not in re.sub(r"\{\"spec.*\}\}\}", "", step.meaning.format(**result.facts))


@in_order
def test_lab_tables(done: dict[str, Result], capsys: pytest.CaptureFixture[str]) -> None:
    tables(Screen(), done)
    text = capsys.readouterr().out
    assert "?" not in text
    assert max(map(len, ["", *text.splitlines()])) <= WIDTH
    if len(done) == len(EXERCISES):
        assert re.search(r"1500  +1  +running  +ok  +\d+\.\d+ s +1500  +2\.14\n", text)
        assert all(f"\n  {title}\n" in text for title, _, _ in TABLES)


def namespaces_of(pid: int) -> list[str]:
    return [name for name in os.listdir("/run/netns") if name.startswith(f"pm{pid}-")]


def start_lab(*argv: str, **environ: str) -> subprocess.Popen[str]:
    """The default signals: where these tests run under nohup, the lab would ignore SIGHUP."""
    return subprocess.Popen(
        ["env", "--default-signal", sys.executable, __file__, "lab", *argv],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**ENVIRONMENT, **environ},
    )


@pytest.mark.parametrize(
    ("sig", "stop_at"),
    [
        (signal.SIGINT, "The MTU lab"),
        (signal.SIGINT, "2.4 "),
        (signal.SIGTERM, "3.2 "),
        (signal.SIGHUP, "2.4 "),
    ],
)
def test_an_interrupt_removes_the_lab(sig: int, stop_at: str) -> None:
    process = start_lab("--only", "2.4,3.2")
    assert process.stdout
    for line in process.stdout:
        if line.startswith(stop_at):
            break
    process.send_signal(sig)
    text = process.stdout.read()
    assert process.wait(15 * PATIENCE) == 130, text
    assert "interrupted; everything was removed" in text
    assert "Traceback" not in text
    assert namespaces_of(process.pid) == []


def test_a_reader_that_goes_away_ends_the_lab() -> None:
    process = subprocess.Popen(
        [sys.executable, __file__, "lab", "--only", "1"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert process.stdout
    assert process.stderr
    for _ in range(20):
        process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(15 * PATIENCE) == 1
    assert namespaces_of(process.pid) == []


def test_the_lab_in_ascii() -> None:
    text, _ = start_lab("--only", "1.1", PYTHONIOENCODING="ascii").communicate(
        timeout=30 * PATIENCE
    )
    assert text.isascii()
    assert "?" not in text
    assert "\n  * Four nodes" in text
    assert "\n1.1  " in text
    assert " (1 of 1)\n" in text
    assert text.rstrip().splitlines()[-2:] == NEXT_COMMANDS.rstrip().splitlines()[-2:]


def test_keep_says_how_to_enter_and_how_to_remove() -> None:
    process = start_lab("--keep", "--only", "2.14", "--only", "3.3")
    text, _ = process.communicate(timeout=60 * PATIENCE)
    try:
        assert process.returncode == 0 and max(map(len, text.splitlines())) <= WIDTH, text
        hosts = re.findall(r"sudo ip netns exec (\S+) bash", text)
        assert sorted(hosts) == sorted(namespaces_of(process.pid))
        assert len(hosts) == 18
        worker3 = next(host for host in hosts if host.endswith("-worker3"))
        curl = ["ip", "netns", "exec", worker3, "curl", "-sSk", "https://10.10.10.10:6443/healthz"]
        assert (
            subprocess.run(curl, capture_output=True, text=True, timeout=20, check=False).stdout
            == "ok"
        )
    finally:
        removal = text.partition("Remove it all with:\n")[2].replace("sudo ", "")
        subprocess.run(["sh", "-c", removal], timeout=30 * PATIENCE, check=True)
    assert poll(lambda: not namespaces_of(process.pid), 5)


def test_output_is_plain_and_narrow_and_fails_when_an_exercise_fails() -> None:
    process = start_lab("--only", "2.14", PMTUD_SCRIPT="/nonexistent")
    text, _ = process.communicate(timeout=60 * PATIENCE)
    assert process.returncode == 1 and "NOT AS IT SHOULD BE" in text and "not so: 2.14" in text, (
        text
    )
    assert "\033" not in text
    assert "\r" not in text
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--only", "2.4,9"], r"no exercise 9; there are 1\.1, "),
        (["--only", "1.11"], r"no exercise 1\.11; "),
        (["--frob"], r"unrecognized arguments: --frob"),
    ],
)
def test_usage_errors(argv: list[str], text: str) -> None:
    process = start_lab(*argv)
    printed, _ = process.communicate(timeout=10 * PATIENCE)
    assert process.returncode == 2
    assert re.search(text, printed)


@pytest.mark.parametrize("argv", [[], ["--no-color"]])
def test_a_terminal_gets_colours_and_a_countdown(argv: list[str]) -> None:
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, __file__, "lab", "--only", "2.4", *argv],
        stdout=child,
        stderr=child,
        env=ENVIRONMENT,
    )
    os.close(child)
    chunks: list[bytes] = []

    def collect() -> None:
        try:
            while data := os.read(parent, 4096):
                chunks.append(data)
        except OSError:
            pass  # EIO: the other side is closed

    reader = threading.Thread(target=collect)
    reader.start()
    assert process.wait(30 * PATIENCE) == 0
    reader.join(5 * PATIENCE)
    os.close(parent)
    text = b"".join(chunks).decode()
    assert "s left" in text
    assert ("\033[" in text) == (not argv)


def test_check_gives_the_labs_own_answers() -> None:
    """In each state of the lab `check` says what the seed lab's troubleshooting table says, and how
    to repair it.
    """

    def answers(host: str, *hosts: str) -> list[tuple[str, str, str]]:
        options = ("check", "--nodename", host, "--json", *hosts)
        report = net.at[host].run(sys.executable, str(PROGRAM), *options, check=False)
        return [
            (entry["status"], entry["found"], entry["fix"])
            for entry in json.loads(report)["checks"]
        ]

    with MtuLab() as net:
        net.bring(BASIC)
        text = "vxlan.calico 1450 < eth1 9000 - 50 = 8950: jumbo frames left unused"
        assert ("OK", text, "") in answers("worker")
        net.bring(PATCHED)
        text = "cali0 1450 < eth1 9000 - 50 = 8950: jumbo frames left unused"
        assert ("OK", text, "") in answers("worker")
        net.bring(JUMBO)
        assert ("OK", "vxlan.calico 8950 = eth1 9000 - 50", "") in answers("worker")
        net.bring(BROKEN)
        text = (
            "10.10.20.20: path MTU 1500, 172.20.20.2 reports 1500; "
            "the report arrived here and was dropped by rp_filter; pmtud delivers it with "
            "--iface eth1"
        )
        found = answers("control-plane", "10.10.20.20")[-1]
        assert found[:2] == ("FAIL", text)
        assert found[2] in STARTS
        net.bring(LOOSE)
        text = "10.10.20.20: path MTU 1500, 172.20.20.2 reports 1500"
        assert answers("control-plane", "10.10.20.20")[-1] == ("OK", text, "")
        net.bring(BROKEN)
        net.start_daemon()
        text = "10.10.20.20: path MTU 1500, 172.20.20.2, through pmtud, reports 1500"
        assert answers("control-plane", "10.10.20.20")[-1] == ("OK", text, "")


# -----------------------------------------------------------------------------
# Section: bench -- how fast, against a C floor on the same traffic in the same run, counted where it arrives

# The floor: NFLOG in, one raw copy per peer out, nothing else. No parsing, no limits, no delivery,
# no counters.
FLOOR = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_log.h>
#include <linux/netlink.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
static struct { struct nlmsghdr h; struct nfgenmsg g; char attributes[64]; } request;
static void put(int kind, const void *data, int size) {
    struct nlattr *a = (void *)((char *)&request + NLMSG_ALIGN(request.h.nlmsg_len));
    a->nla_type = kind; a->nla_len = sizeof *a + size; memcpy(a + 1, data, size);
    request.h.nlmsg_len = NLMSG_ALIGN(request.h.nlmsg_len) + a->nla_len;
}
static int open_nflog(int group) {
    int s = socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER), size = 4 << 20;
    struct nfulnl_msg_config_cmd bind_group = {NFULNL_CFG_CMD_BIND};
    struct nfulnl_msg_config_mode mode = {htonl(0xffff), NFULNL_COPY_PACKET};
    unsigned int threshold = htonl(1);
    setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);
    request.h = (struct nlmsghdr){NLMSG_LENGTH(sizeof request.g), NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_CONFIG,
                                  NLM_F_REQUEST};
    request.g.res_id = htons(group);
    put(NFULA_CFG_CMD, &bind_group, sizeof bind_group);
    put(NFULA_CFG_MODE, &mode, sizeof mode);
    put(NFULA_CFG_QTHRESH, &threshold, sizeof threshold);
    if (send(s, &request, request.h.nlmsg_len, 0) < 0) { perror("nflog"); exit(1); }
    return s;
}
static char buffer[1 << 16];
static struct sockaddr_in peers[1024];
static struct mmsghdr copies[1024];
int main(int argc, char **argv) {
    int log = open_nflog(atoi(argv[1])), out = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP), count = argc - 2;
    int size = 4 << 20, nothing = -1;
    struct iovec body;
    setsockopt(out, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
    setsockopt(out, 255, 1, &nothing, sizeof nothing); /* SOL_RAW, ICMP_FILTER: receive nothing here */
    for (int i = 0; i < count; i++) {
        peers[i].sin_family = AF_INET;
        inet_pton(AF_INET, argv[i + 2], &peers[i].sin_addr);
        copies[i].msg_hdr = (struct msghdr){&peers[i], sizeof peers[i], &body, 1};
    }
    puts("ready"); fflush(stdout);
    for (;;) {
        int left = recv(log, buffer, sizeof buffer, 0);
        for (struct nlmsghdr *h = (void *)buffer; left > 0 && NLMSG_OK(h, left); h = NLMSG_NEXT(h, left)) {
            char *end = (char *)h + h->nlmsg_len;
            if (h->nlmsg_type != (NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_PACKET)) continue;
            for (struct nlattr *a = (void *)((char *)h + NLMSG_LENGTH(sizeof(struct nfgenmsg))); (char *)a < end;
                 a = (void *)((char *)a + NLMSG_ALIGN(a->nla_len))) {
                if (a->nla_type != NFULA_PAYLOAD) continue;
                char *packet = (char *)(a + 1);
                int header = (packet[0] & 15) * 4;
                body = (struct iovec){packet + header, a->nla_len - sizeof *a - header};
                for (int done = 0, sent; done < count; done += sent > 0 ? sent : 1)
                    sent = sendmmsg(out, copies + done, count - done, 0);
            }
        }
    }
}
"""
FLOOR_RULES = (
    "table inet bench {{ chain c {{ type filter hook prerouting priority raw; "
    "icmp type 3 log group {0}\n}}\n}}"
)
SINK_RULES = (
    'table netdev bench {{ chain {0} {{ type filter hook ingress device "{0}" priority 0; '
    "icmp type 3 drop\n}}\n}}"
)
PACKET_QDISC_BYPASS = 20  # linux/if_packet.h, asm-generic/socket.h
SO_TIMESTAMPNS = 35
libc.sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)
BENCH_VIP = "10.96.0.1"
BENCH_OWNER_PORT = 4433
FANOUT_TARGETS = {1: 0.6, 10: 0.85, 100: 0.92, 1000: 0.92}
NO_LIMITS = ("--flow-interval=0", "--source-rate=0", "--rate=0")


def varied_errors(count: int, sources: int, mac: bytes) -> bytes:
    """Frames with errors, each about another flow, from this many routers in turn; 0: from one
    each.

    All sums stay right: what is added to the client's address and port is taken from the sequence
    number.
    """
    transport = struct.pack("!HHIIBBHHH", 443, 0, 0xFFFFFFFF, 0, 0x50, 0x10, 512, 0, 0)
    plain = mtu_error(
        V4,
        src="0.0.0.0",
        dst=BENCH_VIP,
        quoted_src=BENCH_VIP,
        quoted_dst="100.64.0.0",
        transport=transport,
    )
    words = ~int.from_bytes(plain[10:12], "big") & 0xFFFF  # the header's sum without its source
    frames = []
    for number in range(count):
        router = number % sources if sources else int.from_bytes(os.urandom(4), "big") % (1 << 26)
        high = 0x2000 + (router >> 16)
        low = router & 0xFFFF
        total = words + high + low
        total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
        host = number & 0xFFFF
        port = number * 40503 & 0xFFFF
        frames.append(
            mac
            + b"\x02\0\0\0\0\x01\x08\0"
            + plain[:10]
            + struct.pack("!HHH", total, high, low)
            + plain[16:46]
            + struct.pack("!H", host)
            + plain[48:50]
            + struct.pack("!HHH", port, 0xFFFF - host, 0xFFFF - port)
            + plain[56:]
        )
    return b"".join(frames)


class Traffic:
    """Errors sent from the router's end of a link as fast as can be, or at a rate.

    Prepared frames, sendmmsg().
    """

    CALL = 256  # frames in one system call

    def __init__(
        self, host: Host, interface: str, mac: bytes, sources: int = 1, count: int = 1 << 15
    ) -> None:
        self._frames = ctypes.create_string_buffer(
            frames := varied_errors(count, sources, mac), len(frames)
        )
        self._size = len(frames) // count
        self._count = count
        self._at = 0
        start = ctypes.addressof(self._frames)
        parts = b"".join(
            struct.pack("@PN", start + n * self._size, self._size) for n in range(count)
        )
        self._parts = ctypes.create_string_buffer(parts, len(parts))
        first = ctypes.addressof(self._parts)  # of struct iovec; below: mmsghdr
        heads = b"".join(
            struct.pack("@PIxxxxPNPNixxxxIxxxx", 0, 0, first + 16 * n, 1, 0, 0, 0, 0)
            for n in range(count)
        )
        self._heads = ctypes.create_string_buffer(heads, len(heads))
        self._socket = host.inside(lambda: self._open(interface))
        self.sent = 0

    @staticmethod
    def _open(interface: str) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sock.bind((interface, 0))
        sock.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
        return sock

    def burst(self, count: int) -> None:
        """The next `count` errors, at most CALL of them, at once."""
        count = min(count, self._count - self._at)
        done = libc.sendmmsg(
            self._socket.fileno(), ctypes.addressof(self._heads) + 64 * self._at, count, 0
        )
        if done < 0:
            raise OSError(ctypes.get_errno(), "sendmmsg")
        self._at = (self._at + done) % self._count
        self.sent += done

    def run(self, seconds: float, rate: float = 0) -> float:
        """For a while, at `rate` errors per second, 0: as fast as can be; the rate reached."""
        begin = now = time.monotonic()
        before = self.sent
        while (now := time.monotonic()) < begin + seconds:
            due = int((now - begin) * rate) - (self.sent - before) if rate else self.CALL
            if due > 0:
                self.burst(min(due, self.CALL))
            else:
                time.sleep(0.0005)
        return (self.sent - before) / (now - begin)

    def during(self, seconds: float, rate: float = 0) -> threading.Thread:
        """run() in a thread, on the first processor: the daemon has the last one."""

        def work() -> None:
            os.sched_setaffinity(0, {0})
            self.run(seconds, rate)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        self._socket.close()


class Contender(NamedTuple):
    """A daemon under test, on a node of its own with a link to the routers and a link to its peers."""

    name: str
    number: int
    node: Host


class BenchNet(Net):
    """routers --eth0-- node K --peers-- sink: each contender has a node, so they take turns without
    a restart.

    Node K is 10.5.K.2 on eth0 and 10.K+100.255.254 among its 1,000 peers 10.K+100.x.y, static
    neighbours that all are the sink's end of the link. The sink drops every error in its ingress
    hook, after its interface counted it.
    """

    MAC_NODE = "02:00:00:00:05:{0:02x}"
    MAC_SINK = "02:00:00:00:06:{0:02x}"

    def __init__(self, names: Sequence[str], floor: str = "", against: str = "") -> None:
        """`floor`: path of the compiled floor; `against`: the other daemon's command."""
        super().__init__()
        self.names = names
        self.floor = floor
        self.against = against

    def build(self) -> None:
        self.routers = self.host("routers")
        self.sink = self.host("sink")
        self.contenders = {
            name: Contender(name, k, self.host(name)) for k, name in enumerate(self.names)
        }
        for host in self.hosts:
            host.sysctls(
                {"net.ipv6.conf.all.disable_ipv6": 1, "net.ipv6.conf.default.disable_ipv6": 1}
            )
        for one in self.contenders.values():
            self._build_node(one)

    def _build_node(self, one: Contender) -> None:
        k = one.number
        node = one.node
        self.link(self.routers, node, names=(f"n{k}", "eth0"))
        self.link(self.sink, node, names=(f"n{k}", "peers"))
        self.sink.ip(f"link set n{k} address {self.MAC_SINK.format(k)}")
        self.sink.run("nft", "-f", "-", input=SINK_RULES.format(f"n{k}"))
        node.ip(
            f"link set eth0 address {self.MAC_NODE.format(k)}",
            f"addr add 10.5.{k}.2/24 dev eth0",
            f"addr add {self.address(one)}/16 brd + dev peers",
            f"addr add {BENCH_VIP}/32 dev lo",
            "route add 100.64.0.0/10 dev peers",
            *(
                f"neigh add {peer} lladdr {self.MAC_SINK.format(k)} dev peers nud permanent"
                for peer in self.peers(one, 1000)
            ),
        )

    @staticmethod
    def peers(one: Contender, count: int) -> list[str]:
        return [f"10.{100 + one.number}.{1 + n // 250}.{1 + n % 250}" for n in range(count)]

    @staticmethod
    def address(one: Contender) -> str:
        """The node's address as its peers know it."""
        return f"10.{100 + one.number}.255.254"

    def traffic(self, one: Contender, sources: int = 1, count: int = 1 << 13) -> Traffic:
        """Errors on their way to a contender's node."""
        mac = bytes.fromhex(self.MAC_NODE.format(one.number).replace(":", ""))
        return Traffic(self.routers, f"n{one.number}", mac, sources, count)

    def arrived(self, one: Contender) -> int:
        """Packets that the peers of a contender have received so far."""

        def read() -> int:
            with open("/proc/thread-self/net/dev") as file:
                rows = (line.split(":") for line in file if ":" in line)
                return next(
                    int(fields.split()[1])
                    for name, fields in rows
                    if name.strip() == f"n{one.number}"
                )

        return self.sink.inside(read)

    def start(self, one: Contender, count: int, *options: str) -> Process:
        """Its daemon with this many peers, ready, on the last processor.

        Errors come from NFLOG group 33.
        """
        last = ("taskset", "-c", str((os.cpu_count() or 1) - 1))
        peers = self.peers(one, count)
        if one.name == "pmtud":
            listed = ",".join((self.address(one), *peers))
            process = one.node.start(
                *last,
                sys.executable,
                SCRIPT,
                "--iface=eth0",
                f"--peers={listed}",
                *(options or NO_LIMITS),
            )
            process.wait_for("limits:")
            return process
        one.node.run("nft", "-f", "-", input=FLOOR_RULES.format(33))
        if one.name == "floor":
            process = one.node.start(*last, self.floor, "33", *peers)
            process.wait_for("ready")
        else:
            process = one.node.start(
                *last,
                *shlex.split(self.against.format(iface="eth0", group=33, peers=",".join(peers))),
            )
            time.sleep(1)
        return process

    def stop(self, one: Contender, process: Process) -> None:
        """End a daemon and take away the rule that fed it."""
        process.stop(signal.SIGKILL)
        one.node.run("nft", "flush", "ruleset")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, by its CPU clock (clock_getcpuclockid(3)).

    /proc counts in 10 ms.
    """
    return time.clock_gettime(~pid << 3 | 2)


def resident_mb(pid: int) -> float:
    """VmRSS."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) / 1024 if match else 0.0


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def mark(good: bool) -> str:
    return "ok" if good else "MISSED"


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope of the line with the least relative error through (x, y)."""
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points))
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points)) / spread
    return mean_y - slope * mean_x, slope


class Sample(NamedTuple):
    """One measurement under full load."""

    copies: float  # arrived per second
    cpu: float  # seconds of the daemon's processor time per copy


def measure_copies(
    net: BenchNet, one: Contender, process: Process, traffic: Traffic, seconds: float
) -> Sample:
    """Copies that arrive per second while errors come faster than they can be handled.

    Before and afterwards the daemon is stopped: what it has still queued must not slow the next
    one.
    """
    os.kill(process.pid, signal.SIGCONT)
    load = traffic.during(seconds + 0.4)
    time.sleep(0.2)
    begin = time.monotonic()
    before = net.arrived(one)
    cpu = cpu_seconds(process.pid)
    time.sleep(seconds)
    copies = net.arrived(one) - before
    spent = cpu_seconds(process.pid) - cpu
    passed = time.monotonic() - begin
    load.join()
    os.kill(process.pid, signal.SIGSTOP)
    return Sample(copies / passed, spent / max(copies, 1))


def bench_fanout(net: BenchNet, seconds: float) -> None:
    """Copies per second; the contenders take turns, medians of five rounds.

    The floor delivers nothing, so pmtud does not either (--no-rescue); what delivery adds is
    measured by itself.
    """
    print(
        f"   peers   ratio  target          copies/s: {', '.join(net.contenders)};"
        " us of processor time per error, and with delivery"
    )
    traffic = {name: net.traffic(one) for name, one in net.contenders.items()}
    costs = []
    mine = net.contenders["pmtud"]
    for count, target in FANOUT_TARGETS.items():
        running = {
            name: net.start(one, count, *NO_LIMITS, "--no-rescue")
            for name, one in net.contenders.items()
        }
        rounds = [
            {
                name: measure_copies(net, net.contenders[name], process, traffic[name], seconds)
                for name, process in running.items()
            }
            for _ in range(5)
        ]
        for name, process in running.items():
            net.stop(net.contenders[name], process)
        process = net.start(mine, count)
        delivering = measure_copies(net, mine, process, traffic["pmtud"], seconds).cpu * count * 1e6
        net.stop(mine, process)
        ratio = median(
            [
                one["pmtud"].copies / one["floor"].copies if "floor" in one else math.nan
                for one in rounds
            ]
        )
        rates = "".join(
            f"{median([one[name].copies for one in rounds]):10,.0f}" for name in running
        )
        cpu = {name: median([one[name].cpu for one in rounds]) * count * 1e6 for name in running}
        costs.append((float(count), cpu["pmtud"]))
        print(
            f"   {count:5}   {ratio:5.2f}  {target:4.2f} {mark(ratio >= target):6} {rates}   "
            + "".join(f"{cost:9.1f}" for cost in (*cpu.values(), delivering)),
            flush=True,
        )
    base, each = fit(costs)
    print(f"   growth: {base:.1f} us + {each:.2f} us x peers")


def flow_error(number: int, **fields: Any) -> bytes:
    """An error about the UDP flow VIP:4433 -> 100.64.200.NUMBER:NUMBER."""
    transport = struct.pack("!HHHH", BENCH_OWNER_PORT, number, 1480, 0)
    return mtu_error(
        V4,
        **{
            "src": f"198.51.100.{number}",
            "dst": BENCH_VIP,
            "quoted_src": BENCH_VIP,
            "mtu": 1400,
            "quoted_dst": f"100.64.200.{number}",
            "protocol": UDP_PROTOCOL,
            "transport": transport,
            **fields,
        },
    )


# seconds: a window at once, then with exponential backoff
RETRANSMISSIONS = (0.0,) * 10 + (
    0.2,
    0.6,
    1.4,
    3.0,
)


NEVER = 9.0


def rescue(
    net: BenchNet,
    one: Contender,
    number: int,
    times: Sequence[float],
    patience: float = 3.0,
    **fields: Any,
) -> float:
    """Seconds from the first of some errors about a flow of the node to its socket knowing.

    It is waited for that long after the last of them, and then it is NEVER.
    """

    def connect() -> socket.socket:
        flow = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        flow.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        flow.setsockopt(socket.IPPROTO_IP, pmtud.IP_MTU_DISCOVER, 2)  # IP_PMTUDISC_DO
        flow.bind((BENCH_VIP, BENCH_OWNER_PORT))
        flow.connect((f"100.64.200.{number}", number))
        return flow

    mac = bytes.fromhex(BenchNet.MAC_NODE.format(one.number).replace(":", ""))
    frame = mac + b"\x02\0\0\0\0\x01\x08\0" + flow_error(number, **fields)
    with (
        one.node.inside(connect) as flow,
        net.routers.inside(lambda: Traffic._open(f"n{one.number}")) as wire,
    ):
        begin = time.monotonic()
        todo = list(times)
        while (now := time.monotonic() - begin) < times[-1] + patience:
            while todo and todo[0] <= now:
                wire.send(frame)
                del todo[0]
            if flow.getsockopt(socket.IPPROTO_IP, 14) == 1400:  # IP_MTU
                return now
            time.sleep(0.002)
    return NEVER


class Flood(NamedTuple):
    """What a daemon with default limits does under a flood from this many routers.

    0: each error from another.
    """

    sources: int
    rate: float  # errors per second that came
    core: float  # share of a processor the daemon took
    resident: float  # MB afterwards
    rescues: list[float]  # seconds until a flow that another router reports is rescued
    copies: list[float]  # the same for one that a peer reports, with a single copy


def flood(net: BenchNet, one: Contender, process: Process, sources: int, seconds: float) -> Flood:
    """Flood it, and report genuine flows meanwhile, each by a router (or a peer) of its own."""
    one.node.sysctl("net.ipv4.route.flush", 1)  # what the flood before taught
    traffic = net.traffic(one, sources, 1 << 13 if sources else 1 << 16)
    begin = time.monotonic()
    cpu = cpu_seconds(process.pid)
    load = traffic.during(seconds)
    time.sleep(1)
    numbers = range(10 * (sources % 7), 10 * (sources % 7) + 5)
    with ThreadPoolExecutor(10) as pool:
        routers = [pool.submit(rescue, net, one, 1 + n, RETRANSMISSIONS) for n in numbers]
        peers = [
            pool.submit(
                rescue, net, one, 101 + n, [0.3], src=net.peers(one, 1)[0], dst=net.address(one)
            )
            for n in numbers
        ]
    load.join()
    core = (cpu_seconds(process.pid) - cpu) / (time.monotonic() - begin)
    traffic.close()
    return Flood(
        sources,
        traffic.sent / seconds,
        core,
        resident_mb(process.pid),
        [f.result() for f in routers],
        [f.result() for f in peers],
    )


@pytest.fixture(scope="module")
def flooded() -> Iterator[tuple[BenchNet, Contender, Process]]:
    """A node under strict reverse path filtering, with three peers and default limits."""
    with BenchNet(["pmtud"]) as net:
        one = net.contenders["pmtud"]
        one.node.sysctls(
            {f"net.ipv4.conf.{scope}.rp_filter": 1 for scope in ("all", "default", "eth0", "peers")}
        )
        assert rescue(net, one, 1, RETRANSMISSIONS) == NEVER, "rescued without pmtud"
        yield net, one, net.start(one, 3, "--log-level=info")


def shared_buckets(sources: int) -> int:
    """How many of five routers may go unheard: one in 65 shares the bucket of one of 1,000 sources.

    Two of five do so once in 400 runs.
    """
    return int(sources == 1000)


@alone
@pytest.mark.parametrize("sources", [1, 1000, 0])
def test_genuine_routers_are_heard_in_a_flood(
    flooded: tuple[BenchNet, Contender, Process], sources: int
) -> None:
    """One loud router, 1,000 or any number.

    Five others and a peer get through, and use no budget of the daemon's.
    """
    net, one, process = flooded
    earlier = metrics(one.node)
    begun = time.monotonic()
    got = flood(net, one, process, sources, 4.5)
    unheard = sum(seconds >= NEVER for seconds in got.rescues)
    assert unheard <= shared_buckets(sources) and max(got.copies) < NEVER, got
    samples = metrics(one.node)
    passed = total(samples, "pmtud_received_total") - total(earlier, "pmtud_received_total")
    # The kernel shed the rest
    assert passed < 1.5 * pmtud.Config().rate * (time.monotonic() - begun + 1), got
    limited = 'pmtud_dropped_total{reason="limited_total"}'
    assert samples[limited] == earlier[limited]


def bench_flood(net: BenchNet, seconds: float) -> None:
    """With default limits and strict rp_filter, so that only pmtud can rescue.

    Last without our rules.
    """
    one = net.contenders["pmtud"]
    one.node.sysctls(
        {f"net.ipv4.conf.{scope}.rp_filter": 1 for scope in ("all", "default", "eth0", "peers")}
    )
    print(
        "   peers  sources    errors/s  core < 5 %    memory   rescued within 3 s: router's, "
        "peer's copy  slowest"
    )
    for peers, rules, kinds in (
        (3, "auto", (1, 1000, 0)),
        (1000, "auto", (1000,)),
        (3, "off", (0,)),
    ):
        process = net.start(one, peers, "--metrics-port=0", f"--rules={rules}")
        if rules == "off":
            one.node.run("nft", "-f", "-", input=FLOOR_RULES.format(33))
        for sources in kinds:
            got = flood(net, one, process, sources, 4.5)
            saved = [sum(t <= 3 for t in times) for times in (got.rescues, got.copies)]
            heard = saved[0] >= 5 - shared_buckets(sources) and saved[1] == 5
            # With more peers a third of a core is meant
            good = heard and (got.core < 0.05 or peers > 100)
            print(
                f"   {peers:5}  {sources or 'random':>7}  {got.rate:10,.0f}  {got.core:10.1%}  "
                f"{got.resident:5.1f} MB"
                f"  {saved[0]} of {len(got.rescues)}, {saved[1]} of {len(got.copies)} "
                f"{max(got.rescues):29.2f} s  " + (mark(good) if rules == "auto" else "--rules off")
            )
        net.stop(one, process)


class Clocked:
    """Times single errors from the router's wire to the first copy on the peers' wire, by the
    kernel's time stamps.
    """

    def __init__(self, net: BenchNet, one: Contender) -> None:
        self._traffic = net.traffic(one, 1, 1024)
        self._wire = net.sink.inside(lambda: self._open(f"n{one.number}"))

    @staticmethod
    def _open(interface: str) -> socket.socket:
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        wire.bind((interface, ETH_P_ALL))
        wire.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        wire.settimeout(0.5)
        return wire

    def once(self) -> float:
        """Seconds for one error; 0.5 if no copy came."""
        self._wire.setblocking(False)
        with suppress(BlockingIOError):
            while self._wire.recv(2048):  # the other copies of the last error
                pass
        self._wire.settimeout(0.5)
        begin = time.time_ns()
        self._traffic.burst(1)
        try:
            _, control, _, _ = self._wire.recvmsg(2048, 64)
        except TimeoutError:
            return 0.5
        seconds, nanoseconds = struct.unpack("@qq", control[0][2])
        return float(seconds * 10**9 + nanoseconds - begin) / 1e9

    def close(self) -> None:
        self._traffic.close()
        self._wire.close()


def latencies(net: BenchNet, names: Sequence[str], samples: int) -> dict[str, list[float]]:
    """So many times of single errors for each running contender, in turns, 60 ms apart.

    Nobody is busy.
    """
    clocks = {name: Clocked(net, net.contenders[name]) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(samples):
        for name, clock in clocks.items():
            time.sleep(0.06 / len(clocks))
            found[name].append(clock.once())
    for clock in clocks.values():
        clock.close()
    return {name: sorted(times) for name, times in found.items()}


def scrape_often(net: BenchNet, one: Contender, seconds: float) -> threading.Thread:
    """A scrape of its metrics each second, for a while."""

    def scrape_once() -> None:
        with socket.create_connection(("127.0.0.1", 30040), 5) as client:
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            while client.recv(1 << 16):
                pass

    def work() -> None:
        for _ in range(int(seconds)):
            one.node.inside(scrape_once)
            time.sleep(1)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def kube_daemon(
    net: BenchNet, one: Contender, folder: Path, peers: Sequence[str]
) -> Iterator[tuple[FakeApi, Process]]:
    """pmtud with these peers and no limits, and the API server stand-in that it watches."""
    last = ("taskset", "-c", str((os.cpu_count() or 1) - 1))
    with one.node.inside(lambda: FakeApi(folder)) as api:
        for address in (net.address(one), *peers):
            api.change("ADDED", address, address)
        options = ("--iface", "eth0", *NO_LIMITS, "--peers", "kube:nodes")
        process = patched_daemon(
            one.node, account_in(folder), *options, env=api.environ, start=last
        )
        try:
            process.wait_for("peers changed")
            assert poll(lambda: api.watches == 1, 5)
            yield api, process
        finally:
            net.stop(one, process)
            api.disconnect()
            api.shutdown()


@contextlib.contextmanager
def timed_errors(net: BenchNet, one: Contender) -> Iterator[list[float]]:
    """Some forty errors a second.

    How long each takes to its first copy on the wire, 0.5: or longer.
    """
    times: list[float] = []
    enough = threading.Event()

    def work() -> None:
        clock = Clocked(net, one)
        while not enough.wait(0.02):
            times.append(clock.once())
        clock.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield times
    finally:
        enough.set()
        thread.join()


@alone
def test_a_thousand_nodes_that_join_while_errors_flow(tmp_path: Path) -> None:
    """Errors are copied in time, the peers are complete soon after the last, and few lines tell of
    it.
    """
    with BenchNet(["pmtud"]) as net:
        one = net.contenders["pmtud"]
        first, *others = net.peers(one, 1000)
        with kube_daemon(net, one, tmp_path, [first]) as (api, process):
            begun = time.monotonic()
            with timed_errors(net, one) as times:
                for peer in others:
                    api.change("ADDED", peer, peer)
                    time.sleep(0.005)

            def came() -> list[int]:
                counts = re.findall(r"peers changed: (\d+) came", process.output())
                return [int(count) for count in counts]

            assert poll(lambda: sum(came()) == 1000, 10), came()  # it was 24 s
            took = time.monotonic() - begun
            assert metrics(one.node)['pmtud_peers{source="kube:nodes"}'] == 1000
        assert len(came()) <= took / pmtud.Arranger.CHANGE_GAP + 3
    assert len(times) > 20
    assert median(times) < 0.1
    assert sum(seconds == 0.5 for seconds in times) <= len(times) / 50, sorted(times)[-20:]


def change_peer(api: FakeApi, process: Process, kind: str, address: str) -> float:
    """A node comes or goes, or nothing happens (""); seconds of the daemon's processor time in 1.2
    s.

    That is long enough for each change to come alone, and to be applied at once.
    """
    before = cpu_seconds(process.pid)
    if kind:
        api.change(kind, address, address)
    time.sleep(1.2)
    return cpu_seconds(process.pid) - before


def bench_change(net: BenchNet, seconds: float) -> None:
    """One node of a Kubernetes stand-in comes and goes, first in peace, then while errors flow."""
    one = net.contenders["pmtud"]
    kinds = ("ADDED", "DELETED") * 2
    for count in (10, 100, 1000):
        moving, *others = net.peers(one, count)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            api, process = stack.enter_context(kube_daemon(net, one, folder, others))
            change_peer(api, process, "", moving)
            idle = change_peer(api, process, "", moving)
            cost = median([change_peer(api, process, kind, moving) for kind in kinds]) - idle
            with timed_errors(net, one) as times:
                for kind in kinds:
                    change_peer(api, process, kind, moving)
        target = f" (at most 20: {mark(cost <= 0.02)})" if count == 1000 else ""
        usual = median(times) * 1e3
        slowest = max(times) * 1e3
        print(
            f"   {count:5} peers: {cost * 1e3:4.1f} ms of processor time for a change{target}\n"
            f"      errors meanwhile: median {usual:.1f} ms, slowest {slowest:.1f} ms"
        )


def bench_latency(net: BenchNet, seconds: float) -> None:
    """Single errors; `scraped` is pmtud while its metrics are read once a second."""
    running = {name: net.start(one, 2, "--log-level=info") for name, one in net.contenders.items()}
    found = latencies(net, list(running), 80)
    scraper = scrape_often(net, net.contenders["pmtud"], 5)
    found["scraped"] = latencies(net, ["pmtud"], 80)["pmtud"]
    scraper.join()
    for name, process in running.items():
        net.stop(net.contenders[name], process)
    floor = median(found.get("floor", [math.nan]))
    mine = median(found["pmtud"])
    print(
        f"   ratio {mine / floor:.2f} (at most 1.5: {mark(mine <= 1.5 * floor)}), "
        f"median {mine * 1e6:.0f} us (at most 300: {mark(mine <= 0.0003)})"
    )
    for name, times in found.items():
        most = times[len(times) * 9 // 10]
        print(
            f"   {name:8} median {median(times) * 1e6:5.0f} us, 9 of 10 within {most * 1e6:5.0f} us"
        )


def bench_start(net: BenchNet, seconds: float) -> None:
    """From exec to ready, and resident memory, with metrics (scraped once) and without.

    Medians of five.
    """
    one = net.contenders["pmtud"]
    for name, option, limit in (
        ("with metrics", "--log-level=info", 40),
        ("without", "--metrics-port=0", 30),
    ):
        times = []
        sizes = []
        for _ in range(5):
            begin = time.monotonic()
            process = net.start(one, 3, option)
            times.append(time.monotonic() - begin)
            if limit == 40:
                scrape_often(net, one, 1).join()
            sizes.append(resident_mb(process.pid))
            net.stop(one, process)
        ready = median(times)
        resident = median(sizes)
        print(
            f"   {name:13} ready after {ready * 1000:4.0f} ms (at most 300: {mark(ready <= 0.3)}), "
            f"resident {resident:4.1f} MB (at most {limit}: {mark(resident <= limit)})"
        )


def bench_broadcast(net: BenchNet, seconds: float) -> None:
    """Processor time per error with 100 nodes.

    A copy to each, and one copy to the subnet's broadcast address.
    """
    one = net.contenders["pmtud"]
    cost = []
    traffic = net.traffic(one)
    for count, peers in ((100, []), (0, [f"--peers=10.{100 + one.number}.255.255"])):
        process = net.start(one, count, *NO_LIMITS, "--metrics-port=0", *peers)
        cost.append(measure_copies(net, one, process, traffic, seconds).cpu * max(count, 1) * 1e6)
        net.stop(one, process)
    print(
        f"   ratio {cost[1] / cost[0]:.3f}: {cost[0]:.1f} us per error with 100 addresses, "
        f"{cost[1]:.1f} us with one"
    )


def bench_growth(net: BenchNet, seconds: float) -> None:
    """Limits that count but never bite, one peer."""
    one = net.contenders["pmtud"]
    process = net.start(one, 1, "--rate=1000000000", "--source-rate=1000000000", "--metrics-port=0")
    for what, points in (
        ("errors/s", ((300, 1), (1000, 1), (3000, 1), (10000, 1))),
        ("routers", ((5000, 1), (5000, 1000), (5000, 60000))),
    ):
        costs = []
        for rate, sources in points:
            traffic = net.traffic(one, sources, 1 << 16)
            cpu = cpu_seconds(process.pid)
            traffic.run(seconds, rate)
            time.sleep(0.1)
            spent = (cpu_seconds(process.pid) - cpu) / traffic.sent * 1e6
            costs.append((float(rate if what == "errors/s" else sources), spent))
            traffic.close()
        base, each = fit(costs)
        print(
            f"   {what:9}"
            + "".join(f"{amount:7,.0f}: {cost:5.1f} us " for amount, cost in costs)
            + f"  fit: {base:.1f} us {each * 1000:+.3f} us per 1,000"
        )
    net.stop(one, process)


def bench_suppression(net: BenchNet, seconds: float) -> None:
    """200 downloads through the black hole of the test cluster, windows and retransmissions
    included.
    """
    with Cluster() as cluster, daemons(cluster.nodes, *peers_of(4)):
        cluster.client.ip(
            *(f"addr add {Cluster.client_address(k)}/24 dev to-router" for k in range(24, 201))
        )
        with Capture(cluster.fabric) as wire:
            done = cluster.download("host", count=200, deadline=4)
            seen = wire.settle()
        errors = sum(s.interface == "to-router" and s.kind != socket.PACKET_OUTGOING for s in seen)
        copies = len(node_packets(seen, 4))
    print(
        f"   {copies / max(errors, 1):.2f} copies per error: {errors} errors came, {copies} "
        f"copies left (2 peers); "
        f"{len(done)} of 200 flows\n   finished ({mark(len(done) == 200)}), the slowest after "
        f"{max(done, default=0):.2f} s"
    )


BENCHES: dict[str, tuple[str, Callable[[BenchNet, float], None]]] = {
    "fanout": ("copies per second against the C floor, limits off", bench_fanout),
    "latency": ("one error at a time, from the router's wire to the peers' wire", bench_latency),
    "flood": ("spoofed errors, default limits, strict rp_filter", bench_flood),
    "suppression": ("a page of 200 hung flows through the test cluster", bench_suppression),
    "broadcast": ("100 nodes, an address each or one for all", bench_broadcast),
    "start": ("from exec to ready, and resident memory", bench_start),
    "change": (
        "one peer comes or goes: what it costs, and how long errors wait meanwhile",
        bench_change,
    ),
    "growth": ("processor time per error, one peer, default flow interval", bench_growth),
}


def bench_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="test_pmtud.py bench", description="Measures pmtud.py, in namespaces."
    )
    parser.add_argument(
        "--only", action="append", choices=BENCHES, metavar="NAME", help=", ".join(BENCHES)
    )
    parser.add_argument(
        "--seconds", type=float, default=0.7, help="for each measurement under full load"
    )
    parser.add_argument(
        "--against",
        default="",
        metavar="COMMAND",
        help="another daemon on the same traffic, from an "
        "NFLOG rule; {iface} {group} {peers} in it are filled in",
    )
    options = parser.parse_args(argv)
    if os.geteuid():
        parser.error("network namespaces need root: sudo python3 test_pmtud.py bench")
    return options


def bench(argv: Sequence[str]) -> int:
    """Measure and print, ratios first; 0 whatever the numbers: they belong to this machine."""
    options = bench_arguments(argv)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # each row when it is measured, to a pipe too
    with tempfile.TemporaryDirectory() as folder:
        floor = f"{folder}/floor"
        names = ["pmtud"]
        if shutil.which("gcc"):
            subprocess.run(
                ["gcc", "-O2", "-x", "c", "-o", floor, "-"], input=FLOOR, text=True, check=True
            )
            names.insert(0, "floor")
        else:
            print("no gcc: no C floor to compare with, its ratios are nan (apt-get install gcc)")
        if options.against:
            names.append("against")
            print(
                "--against shows what another daemon makes of the same errors: copies that "
                "arrive, and their cost.\n"
                "It does not show whether they help: it may deliver or validate nothing, or "
                "copy to one address."
            )
        print(
            f"Linux {os.uname().release}, Python {sys.version.split()[0]}, {os.cpu_count()} "
            f"processors (errors come "
            f"on the first,\ndaemons have the last), load {os.getloadavg()[0]:.1f}"
        )
        chosen = options.only or list(BENCHES)
        for number, name in enumerate(chosen, 1):
            text, section = BENCHES[name]
            print(f"{name} ({number} of {len(chosen)}): {text}")
            with BenchNet(names, floor, options.against) as net:
                section(net, options.seconds)
    return 0


# -----------------------------------------------------------------------------
# Section: test command -- all tests, the lab, or the bench


class Verdict:
    """A pytest plugin: under CI a skipped test is a failure, and a run in which nothing passed is
    never green.
    """

    def __init__(self) -> None:
        self.passed = self.skipped = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count."""
        self.passed += report.when == "call" and report.passed
        self.skipped += report.skipped

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Judge."""
        if not self.passed or (self.skipped and os.environ.get("CI")):
            session.exitstatus = session.exitstatus or 1


WORKERS = 4  # the tests mostly wait


class AloneLast(LoadGroupScheduling):  # type: ignore[misc]  # xdist has no types
    """The largest groups first, and the group `alone` when nothing else is left."""

    def _assign_work_unit(self, node: WorkerController) -> None:
        if "alone" in self.workqueue:
            self.workqueue.move_to_end("alone")
        super()._assign_work_unit(node)


class Workers:
    """A pytest plugin: workers for the whole suite; a few tests are not worth their start."""

    @pytest.hookimpl(wrapper=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> Iterator[None]:
        """Before xdist reads its options."""
        option = config.option
        some = option.keyword or option.markexpr
        watched = option.usepdb or option.collectonly or option.capture == "no"
        if option.numprocesses is None and not some and not watched:
            option.numprocesses = WORKERS
        if option.numprocesses and option.dist == "no":
            option.dist = "loadgroup"
        return (yield)

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> LoadGroupScheduling:
        """Who gets which test."""
        return AloneLast(config, log)


def main(argv: Sequence[str]) -> int:
    """Run the lab, the bench, or the tests."""
    command, *rest = argv or [""]
    if command in ("lab", "bench"):
        hide_settings()
        return lab(rest) if command == "lab" else bench(rest)
    if command == "unit":
        argv = ["-m", "unit", *rest]
    if command == "quick":
        argv = ["-m", "unit or quick", "-n2", *rest]
    return int(pytest.main([str(Path(__file__)), *argv], plugins=[Verdict(), Workers()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
