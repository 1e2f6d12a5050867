#!/usr/bin/env python3
"""Everything that proves pmtud.py, on real kernel traffic in network namespaces.

    sudo python3 test_pmtud.py               all tests (arguments are pytest's: -k udp, -x, -v)

The first run makes a virtual environment beside this file (.venv) with what the tests need. The namespace
tests need root and the programs ip, nft, iptables, iptables-legacy, tcpdump, conntrack, curl and ping.
Nothing outside the namespaces it makes is touched: no sysctl, no rule, no route of this machine.
"""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "pmtud.py"
VENV = HERE / ".venv"
REQUIREMENTS = ("pytest>=8,<10", "hypothesis>=6,<7", "scapy>=2.5,<3", "prometheus-client>=0.16,<1")


def prepare() -> None:
    """Make the virtual environment if need be, and go on in it; explains what is missing."""
    python, stamp = VENV / "bin" / "python", VENV / "requirements.txt"
    wanted = "\n".join((sys.version, *REQUIREMENTS))
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"preparing {VENV} ...", flush=True)
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(VENV)],
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS],
        ):
            if subprocess.run(command, check=False).returncode:
                sys.exit(f"test_pmtud.py: {' '.join(command)} failed; on Debian: apt-get install python3-venv")
        stamp.write_text(wanted)
    os.execv(python, [str(python), *sys.argv])


if __name__ == "__main__" and Path(sys.prefix) != VENV:
    prepare()

import atexit
import contextlib
import ctypes
import errno
import json
import re
import signal
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Callable, NamedTuple, Optional, TypeVar

import pytest

sys.path.insert(0, str(HERE))

def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += bytes(len(data) & 1)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def error(family: int, src: str, dst: str, quoted_src: str, quoted_dst: str, mtu: int = 1400,
          sport: int = 80, dport: int = 40000, length: int = 1500) -> bytes:
    af = socket.AF_INET if family == 4 else socket.AF_INET6
    s, d, qs, qd = (socket.inet_pton(af, a) for a in (src, dst, quoted_src, quoted_dst))
    tcp = struct.pack("!HHIIHHHH", sport, dport, 1, 1, 0x5010, 1000, 0, 0) + bytes(100)
    if family == 4:
        quoted = struct.pack("!BBHHHBBH4s4s", 0x45, 0, length, 1, 0x4000, 60, 6, 0, qs, qd) + tcp
        icmp = struct.pack("!BBHHH", 3, 4, 0, 0, mtu) + quoted
        icmp = icmp[:2] + struct.pack("!H", checksum(icmp)) + icmp[4:]
        return struct.pack("!BBHHHBBH4s4s", 0x45, 0xC0, 20 + len(icmp), 0, 0, 64, 1, 0, s, d) + icmp
    quoted = struct.pack("!IHBB16s16s", 6 << 28, length - 40, 6, 60, qs, qd) + tcp
    icmp = struct.pack("!BBHI", 2, 0, 0, mtu) + quoted
    c = checksum(s + d + struct.pack("!II", len(icmp), 58) + icmp)
    icmp = icmp[:2] + struct.pack("!H", c) + icmp[4:]
    return struct.pack("!IHBB16s16s", 6 << 28, len(icmp), 58, 64, s, d) + icmp


T = TypeVar("T")
N = TypeVar("N", bound="Net")

CLONE_NEWNET = 0x40000000  # <linux/sched.h>
ETH_P_ALL = 0x0003  # <linux/if_ether.h>
SO_ATTACH_FILTER, SO_RCVBUFFORCE = 26, 33  # <asm-generic/socket.h>
SOL_PACKET, PACKET_STATISTICS = 263, 6  # <linux/if_packet.h>
NETLINK_NETFILTER, NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE = 12, 1, 2  # <linux/netfilter/nfnetlink*.h>
NLM_F_REQUEST, NLM_F_ACK = 1, 4  # <linux/netlink.h>

libc = ctypes.CDLL(None, use_errno=True)
libc.setns.argtypes, libc.setns.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
libc.bind.argtypes, libc.bind.restype = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32), ctypes.c_int


def poll(condition: Callable[[], T], timeout: float) -> T:
    """The first true value of condition(), or its last value once timeout seconds have passed."""
    deadline = time.monotonic() + timeout
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


class CommandFailed(RuntimeError):
    """A command ended with an error; the text carries the command, its input and all it printed."""


def execute(*argv: str, check: bool = True, timeout: float = 20, input: str | None = None) -> str:
    """What the command wrote to its standard output."""
    try:
        done = subprocess.run(argv, input=input or "", capture_output=True, encoding="utf-8", errors="replace",
                              timeout=timeout)
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"") + (error.stderr or b"")
        raise CommandFailed(f"{' '.join(argv)}: not finished after {timeout} s\n{printed!r}") from None
    if check and done.returncode:
        raise CommandFailed(f"{' '.join(argv)}: exit status {done.returncode}\n{input or ''}{done.stdout}{done.stderr}")
    return done.stdout


class Process:
    """A background process; what it prints (both streams) collects in an unnamed file."""

    def __init__(self, argv: list[str], env: dict[str, str] | None) -> None:
        self._file = tempfile.TemporaryFile()
        self._final = ""
        self._name = " ".join(argv)[:200]
        # A session of its own: Ctrl-C in a terminal reaches the tests only, and they stop what they started.
        self._popen = subprocess.Popen(argv, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL,
                                       stdout=self._file, stderr=subprocess.STDOUT, start_new_session=True)
        self.pid = self._popen.pid

    def output(self) -> str:
        """All it has printed so far."""
        if self._file.closed:
            return self._final
        # pread, because the file offset is shared with the process
        return os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0).decode(errors="replace")

    def returncode(self) -> int | None:
        """None while it runs."""
        return self._popen.poll()

    def wait_for(self, text: str, timeout: float = 10) -> str:
        """The output, as soon as text is in it. TimeoutError if the process ends or time runs out first."""
        poll(lambda: text in self.output() or self.returncode() is not None, timeout)
        if text not in (output := self.output()):
            state = "running" if self.returncode() is None else f"ended with {self.returncode()}"
            raise TimeoutError(f"{self._name} ({state}) did not print {text!r} but:\n{output}")
        return output

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 10) -> int:
        """Its exit status after sig. TimeoutError if it outlives timeout; it has been killed by then."""
        if self._popen.poll() is None:
            self._popen.send_signal(sig)
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
            raise TimeoutError(f"{self._name} outlived signal {sig} by {timeout} s:\n{self.output()}") from None

    def close(self) -> None:
        """Kill it if need be; output() keeps working."""
        self.stop(signal.SIGKILL)
        if not self._file.closed:
            self._final = self.output()
            self._file.close()


class Host:
    """One network namespace. Made by Net.host()."""

    def __init__(self, net: Net, name: str) -> None:
        self.net, self.name, self.namespace = net, name, f"pm{os.getpid()}-{net.serial}-{name}"

    def __repr__(self) -> str:
        return self.namespace

    def run(self, *argv: str, check: bool = True, timeout: float = 20, input: str | None = None) -> str:
        """What the command, run in here, wrote to its standard output."""
        return execute("ip", "netns", "exec", self.namespace, *argv, check=check, timeout=timeout, input=input)

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
        with ThreadPoolExecutor(1) as pool:  # the thread ends with the block; it never serves another namespace
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
    """Owns hosts and processes; removes them on leaving the `with` block or the interpreter. May close twice."""

    made = 0

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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def build(self) -> None:
        """For subclasses: what to make on entering."""

    def close(self) -> None:
        for process in self.processes:
            process.close()
        # Whoever is left in our namespaces is a child of ours, or one that an interrupt kept off the list.
        for pid in self._for_each_host("netns pids").split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self._for_each_host("netns delete")
        self.hosts.clear()
        atexit.unregister(self.close)

    def _for_each_host(self, command: str) -> str:
        lines = "".join(f"{command} {host.namespace}\n" for host in self.hosts)  # -force: some may not exist
        return execute("ip", "-force", "-batch", "-", check=False, input=lines)

    def host(self, name: str, forward: bool = False) -> Host:
        """A new namespace: loopback up, no reverse path filter, no duplicate address detection, no redirects."""
        host = Host(self, name)
        self.hosts.append(host)  # before it is made, so that an interrupt cannot lose it
        execute("ip", "netns", "add", host.namespace)
        settings: dict[str, object] = {f"net.ipv4.conf.{scope}.{key}": 0  # a new namespace inherits these
                                       for scope in ("all", "default") for key in ("rp_filter", "send_redirects")}
        settings.update({f"net.ipv6.conf.{scope}.accept_dad": 0 for scope in ("all", "default")})
        settings.update({"net.ipv4.ip_forward": int(forward), "net.ipv6.conf.all.forwarding": int(forward)})
        settings["net.ipv4.tcp_no_metrics_save"] = 1  # or the last test's hung flows slow the next test's
        host.sysctls(settings)
        host.ip("link set lo up")
        return host

    def link(self, a: Host, b: Host, mtu: int = 1500, names: tuple[str, str] = ("", "")) -> None:
        """A veth pair, up; the interfaces are called to-PEER unless named (a's name first).

        gso_max_segs 1: each TCP segment is a packet and gets its own ICMP error, as on a wire.
        """
        name_a, name_b = names[0] or f"to-{b.name}", names[1] or f"to-{a.name}"
        settings = f"mtu {mtu} gso_max_segs 1"
        a.ip(f"link add {name_a} {settings} type veth peer name {name_b} {settings} netns {b.namespace}",
             f"link set {name_a} up")
        b.ip(f"link set {name_b} up")


class Seen(NamedTuple):
    """One captured packet."""

    interface: str
    kind: int  # socket.PACKET_HOST, PACKET_BROADCAST, PACKET_OTHERHOST, PACKET_OUTGOING
    packet: bytes  # from the IP header on


# Classic BPF (code, jump if true, jump if false, operand): IPv4 ICMP 3/4 and ICMPv6 2, so data cannot fill the buffer.
ICMP_ERRORS = (
    (0x30, 0, 0, 0), (0x54, 0, 0, 0xF0), (0x15, 0, 6, 0x40),  # 0: A = version; not 4: go to 9
    (0x30, 0, 0, 9), (0x15, 0, 10, 1),  # 3: protocol is ICMP
    (0xB1, 0, 0, 0), (0x48, 0, 0, 0), (0x15, 0, 7, 0x0304), (0x06, 0, 0, 0xFFFF),  # 5: X = header length; type, code
    (0x15, 0, 5, 0x60), (0x30, 0, 0, 6), (0x15, 0, 3, 58),  # 9: version 6, next header ICMPv6
    (0x30, 0, 0, 40), (0x15, 0, 1, 2), (0x06, 0, 0, 0xFFFF),  # 12: type
    (0x06, 0, 0, 0),  # 15: not wanted
)


class Capture:
    """Every ICMP "packet too big" error on one interface, or on all ("": a forwarded packet then counts on each)."""

    def __init__(self, host: Host, interface: str = "") -> None:
        self._host, self._interface = host, interface
        self._seen: list[Seen] = []
        self._lost = 0
        self._stop = threading.Event()

    def __enter__(self) -> Capture:
        self._socket = self._host.inside(self._open)
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._lost += self._dropped()
        self._socket.close()

    def _open(self) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)  # protocol 0: nothing arrives before bind()
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in ICMP_ERRORS))
        program = struct.pack("@HP", len(ICMP_ERRORS), ctypes.addressof(code))
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
        index = socket.if_nametoindex(self._interface) if self._interface else 0  # 0: Python's bind() cannot say "all"
        address = struct.pack("=HHiHBB8s", socket.AF_PACKET, socket.htons(ETH_P_ALL), index, 0, 0, 0, b"")
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
        return int(struct.unpack("=II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[1])

    def packets(self) -> list[Seen]:
        """All so far, also after the `with` block. RuntimeError if any was lost."""
        if self._socket.fileno() >= 0:
            self._lost += self._dropped()
        if self._lost or not (self._thread.is_alive() or self._stop.is_set()):
            raise RuntimeError(f"capture on {self._host} {self._interface} lost {self._lost} packets or its thread")
        return list(self._seen)

    def settle(self, quiet: float = 0.3, timeout: float = 10) -> list[Seen]:
        """All packets, once none has come for quiet seconds. TimeoutError if they keep coming."""
        count, since = len(self._seen), time.monotonic()

        def is_quiet() -> bool:
            nonlocal count, since
            if len(self._seen) != count:
                count, since = len(self._seen), time.monotonic()
            return time.monotonic() - since >= quiet
        if not poll(is_quiet, timeout):
            raise TimeoutError(f"{count} packets and more on {self._host} after {timeout} s")
        return self.packets()


PORT, DOWNLOAD_BYTES = 80, 200_000

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

# A refused, reset or never opened connection is a broken test bed, not a black hole: it ends the program.
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
        data = key.fileobj.recv(1 << 18)
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

# {i} this node, {j} the next one; clients reach `cross` through one node and are served by the pod of the next.
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
INVALID_DROP_RULES = "table inet invalid {\n" + "".join(
    f"chain {hook} {{ type filter hook {hook} priority filter; ct state invalid drop; }}\n"
    for hook in ("input", "forward", "output")) + "}\n"


class Cluster(Net):
    """An ECMP cluster whose clients sit behind a thin link.

    client --1500/1400-- router --1500-- fabric --+-- node1 -- pod1      fabric hashes on addresses and ports
    10.9.0.1..23   10.8.0.1     10.8.0.2 10.0.0.1 +-- node2 -- pod2      node i: eth0 10.0.0.1i, mgmt 172.20.20.1i
    (router .254)  172.20.20.2 on mgmt            +-- node3 -- pod3      pod i: 10.244.i.2
    IPv6: fd09::k, fd08::1 and ::2, fd00::1 and ::1i, fd20::2 and ::1i, fd44:i::2.

    The router's interface towards the client has MTU 1400, the client's own 1500 (its SYN says mss 1460), so the router
    sends errors to the service's address, and the fabric takes all those of one service to one node.
    Services, routed to every node: `host` (a socket of the node), `pod` (DNAT to the node's own pod), `cross` (DNAT to
    the next node's pod and masquerade). A `cross` pod learns the path MTU of the *node's* address, once for all clients
    that come through that node. An error about a pod's flow that lands on a wrong node is routed back to the fabric,
    and from there to the same node, until its TTL ends (unless invalid_drop).
    """

    SERVICES = {"host": 1, "pod": 2, "cross": 3}

    def __init__(self, nodes: int = 3, invalid_drop: bool = False, conntrack: bool = True) -> None:
        """Without conntrack: the `host` service only, and no rule that tracks connections on any node."""
        super().__init__()
        self.size, self.invalid_drop, self.conntrack = nodes, invalid_drop, conntrack

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

    def build(self) -> None:
        self.client, self.mgmt = self.host("client"), self.host("mgmt")
        self.router, self.fabric = self.host("router", forward=True), self.host("fabric", forward=True)
        numbers = range(1, self.size + 1)
        self.nodes = [self.host(f"node{i}", forward=True) for i in numbers]
        self.pods = [self.host(f"pod{i}") for i in numbers if self.conntrack]
        self._build_outside()
        self._build_fabric()
        for i in numbers:
            self._build_node(i)
        servers = [host.start(sys.executable, "-ISc", SERVER, str(PORT), str(DOWNLOAD_BYTES))
                   for host in self.nodes + self.pods]
        for server in servers:
            server.wait_for("listening")

    def _build_outside(self) -> None:
        for bridge, host in (("mgmt", self.mgmt), ("nodes", self.fabric)):
            host.ip(f"link add {bridge} type bridge mcast_snooping 0", f"link set {bridge} up")
        self.link(self.client, self.router)
        self.link(self.router, self.fabric)
        self.link(self.mgmt, self.router, names=("to-router", "mgmt"))
        self.mgmt.ip("link set to-router master mgmt")
        self.client.ip(*(f"addr add {self.client_address(k)}/24 dev to-router" for k in range(1, 24)),
                       *(f"addr add {self.client_address(k, 6)}/64 dev to-router" for k in range(1, 24)),
                       "route add default via 10.9.0.254", "route add ::/0 via fd09::fe")
        self.router.ip("addr add 10.9.0.254/24 dev to-client", "addr add fd09::fe/64 dev to-client",
                       "addr add 10.8.0.1/24 dev to-fabric", "addr add fd08::1/64 dev to-fabric",
                       "addr add 172.20.20.2/24 dev mgmt", "addr add fd20::2/64 dev mgmt",
                       "route add default via 10.8.0.2", "route add ::/0 via fd08::2")
        self.router_mtu(1400)
        known = self.router.inside(lambda: os.listdir("/proc/sys/net/ipv4"))  # older kernels: global, not in here
        budget = [key for key in ("icmp_msgs_per_sec", "icmp_msgs_burst") if key in known]
        self.router.sysctls({"net.ipv4.icmp_ratelimit": 0, "net.ipv6.icmp.ratelimit": 0,
                             **{f"net.ipv4.{key}": 1_000_000 for key in budget}})

    def _build_fabric(self) -> None:
        self.fabric.sysctls({f"net.{ip}.fib_multipath_hash_policy": 1 for ip in ("ipv4", "ipv6")})
        hops = [" ".join(f"nexthop via {self.node_address(i, family)}" for i in range(1, self.size + 1))
                for family in (4, 6)]
        self.fabric.ip("addr add 10.8.0.2/24 dev to-router", "addr add fd08::2/64 dev to-router",
                       "addr add 10.0.0.1/24 dev nodes", "addr add fd00::1/64 dev nodes",
                       "route add default via 10.8.0.1", "route add ::/0 via fd08::1",
                       f"route add 10.96.0.0/24 {hops[0]}", f"route add fd96::/64 {hops[1]}")

    def _build_node(self, i: int) -> None:
        node = self.nodes[i - 1]
        self.link(self.fabric, node, names=("", "eth0"))
        self.link(self.mgmt, node, names=("", "mgmt"))
        self.fabric.ip(f"link set to-{node.name} master nodes")
        self.mgmt.ip(f"link set to-{node.name} master mgmt")
        node.ip(f"addr add {self.node_address(i)}/24 brd + dev eth0", f"addr add {self.node_address(i, 6)}/64 dev eth0",
                f"addr add 172.20.20.{10 + i}/24 dev mgmt", f"addr add fd20::{10 + i}/64 dev mgmt",
                f"addr add {self.vip('host')}/32 dev lo", f"addr add {self.vip('host', 6)}/128 dev lo",
                "route add default via 10.0.0.1", "route add ::/0 via fd00::1")
        if self.conntrack:
            self._build_pod(i)

    def _build_pod(self, i: int) -> None:
        node, pod = self.nodes[i - 1], self.pods[i - 1]
        self.link(node, pod, names=("to-pod", "eth0"))
        pod.ip(f"addr add 10.244.{i}.2/24 dev eth0", f"addr add fd44:{i}::2/64 dev eth0",
               f"route add default via 10.244.{i}.1", f"route add ::/0 via fd44:{i}::1")
        others = [j for j in range(1, self.size + 1) if j != i]
        node.ip(f"addr add 10.244.{i}.1/24 dev to-pod", f"addr add fd44:{i}::1/64 dev to-pod",
                *(f"route add 10.244.{j}.0/24 via {self.node_address(j)}" for j in others),
                *(f"route add fd44:{j}::/64 via {self.node_address(j, 6)}" for j in others))
        rules = NAT_RULES.format(i=i, j=i % self.size + 1)
        node.run("nft", "-f", "-", input=rules + (INVALID_DROP_RULES if self.invalid_drop else ""))

    def router_mtu(self, mtu: int) -> None:
        """On the router's link to the client: 1400 makes the black hole, 1500 removes it, below 1280 ends IPv6."""
        self.router.ip(f"link set to-client mtu {mtu}")

    def error_from_management(self, on: bool = True) -> None:
        """The router's errors then come from 172.20.20.2, which nodes reach over mgmt, but still arrive on eth0."""
        for service, via, source in (("10.96.0.0/24", "10.8.0.2", "172.20.20.2"), ("fd96::/64", "fd08::2", "fd20::2")):
            self.router.ip(f"route replace {service} via {via}" + (f" src {source}" if on else ""))

    def strict_rpf(self, on: bool = True) -> None:
        """rp_filter 1 (or 0) for all, default and each interface of each node."""
        for node in self.nodes:
            scopes = node.inside(lambda: os.listdir("/proc/sys/net/ipv4/conf"))
            node.sysctls({f"net/ipv4/conf/{scope}/rp_filter": int(on) for scope in scopes})

    def download(self, service: str, family: int = 4, count: int = 23, deadline: float = 2.5) -> list[float]:
        """The seconds each completed transfer took, of count started at once, each from an address of its own."""
        sources = [self.client_address(k, family) for k in range(1, count + 1)]
        options = [self.vip(service, family), str(PORT), str(DOWNLOAD_BYTES), str(deadline)]
        printed = self.client.run(sys.executable, "-ISc", CLIENT, *options, *sources, timeout=deadline + 20)
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
        routes: list[dict[str, Any]] = json.loads(execute("ip", "-j", "-n", host.namespace, "route", "get", address))
        mtu = [metric["mtu"] for metric in routes[0].get("metrics", ()) if "mtu" in metric]
        return int(mtu[0]) if mtu else None


def flush_conntrack() -> None:
    """What `conntrack -F` does: IPCTNL_MSG_CT_DELETE without a tuple, in the namespace of the calling thread."""
    header = struct.pack("=IHHIIBBH", 20, NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE, NLM_F_REQUEST | NLM_F_ACK,
                         1, 0, socket.AF_UNSPEC, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
        netlink.send(header)
        (code,) = struct.unpack_from("=i", netlink.recv(4096), 16)
    if code:
        raise OSError(-code, "flush conntrack")
# -----------------------------------------------------------------------------
# Section: daemon in namespaces -- the whole promise, on real traffic

PEER_LISTS = {4: ",".join(Cluster.node_address(i, 4) for i in (1, 2, 3)),
              6: ",".join(Cluster.node_address(i, 6) for i in (1, 2, 3))}  # fmt: skip
ALL_PEERS = ",".join(PEER_LISTS.values())
CASES = [(family, service) for family in (4, 6) for service in Cluster.SERVICES]
ERRORS = 23


def daemon(host: Host, *options: str, env: Optional[dict[str, str]] = None, ready: bool = True) -> Process:
    """pmtud.py running in a host; with `ready`, errors are handled from when this returns."""
    process = host.start(sys.executable, "-W", "error", str(PROGRAM), *options, env=env)
    if ready:
        process.wait_for("limits:")
    return process


@contextlib.contextmanager
def daemons(hosts: Sequence[Host], *options: str) -> Iterator[list[Process]]:
    """A daemon in each host; on the way out each must stop cleanly and leave no table behind."""
    processes = [daemon(host, *options) for host in hosts]
    try:
        yield processes
    except BaseException:
        for process in processes:
            print(process.output()[-4000:])
        raise
    finally:
        codes = [process.stop() for process in processes]
    assert codes == [0] * len(processes), processes[0].output()
    for host, process in zip(hosts, processes):
        assert "Traceback" not in process.output()
        assert "pmtud" not in host.run("nft", "list", "tables")


def metrics(host: Host, port: int = 30040) -> dict[str, float]:
    """Every sample of a host's /metrics, by `name{labels}`."""
    text = host.run("curl", "-sS", "--max-time", "5", f"http://127.0.0.1:{port}/metrics")
    rows = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in rows}


def received(host: Host, at_least: int) -> dict[str, float]:
    """The metrics once the daemon has received this many errors."""
    def arrived() -> Optional[dict[str, float]]:
        now = metrics(host)
        return now if sum(n for k, n in now.items() if k.startswith("pmtud_received_total")) >= at_least else None
    found = poll(arrived, 5)
    assert found is not None, metrics(host)
    return found


def drops(samples: dict[str, float]) -> dict[str, int]:
    """The reasons with a count, without their metric's name."""
    rows = {k: int(n) for k, n in samples.items() if k.startswith("pmtud_dropped_total") and n}
    return {re.findall('"(.*)"', name)[0]: count for name, count in rows.items()}


def inject(host: Host, family: int, packets: Sequence[bytes], gap: float = 0.002) -> None:
    """Send raw IP packets from a host, as they are, one after the other."""
    def send() -> None:
        af = socket.AF_INET if family == 4 else socket.AF_INET6
        with socket.socket(af, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender:
            for packet in packets:
                destination = packet[16:20] if family == 4 else packet[24:40]
                sender.sendto(packet, (socket.inet_ntop(af, destination), 0))
                time.sleep(gap)
    host.inside(send)


def flow_errors(family: int, service: str = "host", count: int = ERRORS, **fields: Any) -> list[bytes]:
    """Errors of the cluster's router about `count` flows from a service's address."""
    fields = {"src": {4: "10.8.0.1", 6: "fd08::1"}[family], "mtu": 1400, **fields}
    return [error(family, dst=fields.get("dst", Cluster.vip(service, family)), quoted_src=Cluster.vip(service, family),
                  quoted_dst=Cluster.client_address(1 + n % 23, family), dport=40000 + n,
                  **{k: v for k, v in fields.items() if k != "dst"}) for n in range(count)]  # fmt: skip


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Cluster]:
    """Three nodes behind an ECMP fabric; shared, because every test starts with flush()."""
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """The shared cluster, as if nothing had happened yet."""
    shared_cluster.strict_rpf(False)
    shared_cluster.error_from_management(False)
    shared_cluster.flush()
    return shared_cluster


def learners(cluster: Cluster, service: str, family: int) -> list[Host]:
    """The hosts whose stacks own a service's flows."""
    return cluster.nodes if service == "host" else cluster.pods


def assert_learned(cluster: Cluster, service: str, family: int) -> None:
    """`ip route get` in the owners' namespaces shows the MTU the router reported, for each client."""
    if service == "cross":  # a masqueraded pod knows its clients by their node's address
        clients = [Cluster.node_address(i, family) for i in (1, 2, 3)]
        needed = 1
    else:
        clients = [Cluster.client_address(k, family) for k in range(1, 24)]
        needed = 23
    owners = learners(cluster, service, family)
    learned = [client for client in clients if any(cluster.learned(host, client) == 1400 for host in owners)]
    assert len(learned) >= needed, f"{len(learned)} of {len(clients)} learned"


@pytest.mark.parametrize("family,service", CASES)
def test_without_the_daemon_transfers_hang(cluster: Cluster, family: int, service: str) -> None:
    """The negative control of every test below: the fabric takes the router's errors to one node only."""
    finished = cluster.download(service, family)
    assert len(finished) < 20, f"{len(finished)} of 23 finished: there is no black hole here"


@pytest.mark.parametrize("drop_invalid", [False, True])
@pytest.mark.parametrize("family,service", CASES)
def test_with_the_daemon_all_transfers_finish(
    cluster: Cluster, family: int, service: str, drop_invalid: bool
) -> None:
    """Socket, DNAT to the own pod, DNAT + MASQUERADE to another node's pod; also where conntrack INVALID is dropped."""
    with contextlib.ExitStack() as stack:
        if drop_invalid:
            stack.enter_context(invalid_dropped(cluster))
        stack.enter_context(daemons(cluster.nodes, "--peers", ALL_PEERS))
        assert len(cluster.download(service, family)) == 23
        assert_learned(cluster, service, family)


@contextlib.contextmanager
def invalid_dropped(cluster: Cluster) -> Iterator[None]:
    """Nodes that drop what conntrack calls INVALID in input, forward and output.

    Without that, a node that does not own a pod's flow routes the router's error back to the fabric, which hashes
    it to the same node again, until its TTL ends: 300 errors became 9,000.
    """
    for node in cluster.nodes:
        node.run("nft", "-f", "-", input=INVALID_DROP_RULES)
    try:
        yield
    finally:
        for node in cluster.nodes:
            node.run("nft", "delete", "table", "inet", "invalid")


@pytest.mark.parametrize("service", Cluster.SERVICES)
def test_strict_rpf_and_an_error_from_a_management_address(cluster: Cluster, service: str) -> None:
    """No flow learns without the daemon, all with it, and rp_filter is still strict afterwards."""
    cluster.strict_rpf()
    cluster.error_from_management()
    assert cluster.download(service) == []
    cluster.flush()
    with daemons(cluster.nodes, "--peers", PEER_LISTS[4]):
        assert len(cluster.download(service)) == 23
        assert_learned(cluster, service, 4)
        assert sum(metrics(node)["pmtud_rpf_rescued_total"] for node in cluster.nodes) > 0
    for node in cluster.nodes:
        assert node.read("/proc/sys/net/ipv4/conf/eth0/rp_filter").strip() == "1"
        assert node.read("/proc/sys/net/ipv4/conf/all/rp_filter").strip() == "1"


def test_standalone_rescues_from_strict_rpf(cluster: Cluster) -> None:
    """Without peers: what reaches the right node and fails RPF is delivered there; nothing is sent to others."""
    cluster.strict_rpf()
    cluster.error_from_management()
    with Capture(cluster.fabric) as wire, daemons(cluster.nodes):
        finished = cluster.download("host", deadline=1.5)
        assert 0 < len(finished) < 20
        seen = wire.settle()
    assert not node_packets(seen, 4)


def test_standalone_without_rescue_option(cluster: Cluster) -> None:
    """--no-rescue leaves the receiving node alone: with strict RPF only the peers' copies are delivered."""
    cluster.strict_rpf()
    cluster.error_from_management()
    with daemons(cluster.nodes, "--peers", PEER_LISTS[4], "--no-rescue"):
        assert 0 < len(cluster.download("host", deadline=1.5)) < 23
        samples = [metrics(node) for node in cluster.nodes]
    assert sum(s["pmtud_rpf_rescued_total"] for s in samples) == 0


def node_packets(seen: Sequence[Seen], family: int) -> list[Seen]:
    """Of a capture on all interfaces of the fabric: the errors that came out of a node's eth0 from an address of its own."""
    sources = {socket.inet_pton(AF[family], Cluster.node_address(i, family)) for i in (1, 2, 3)}
    at = slice(12, 16) if family == 4 else slice(8, 24)
    arrived = (s for s in seen if s.interface.startswith("to-node") and s.kind != socket.PACKET_OUTGOING)
    return [s for s in arrived if s.packet[at] in sources]


AF = {4: socket.AF_INET, 6: socket.AF_INET6}
DST = {4: slice(16, 20), 6: slice(24, 40)}


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
    """23 errors make 23 copies to each peer, none to a VIP, and nothing answers a copy, with 2 and with 3 daemons."""
    first = ingress(cluster, family, service)
    running = [cluster.nodes[(first + n) % 3] for n in range(size)]
    listed = [Cluster.node_address(1 + (first + n) % 3, family) for n in range(size)]
    with daemons(running, "--peers", ",".join(listed), *options) as processes:
        with Capture(cluster.fabric) as wire:
            inject(cluster.router, family, flow_errors(family, service))
            for host in running[1:]:
                received(host, ERRORS)
            seen = node_packets(wire.settle(1.0), family)
        destinations = Counter(socket.inet_ntop(AF[family], s.packet[DST[family]]) for s in seen)
        sources = {node.name for node, samples in ((h, metrics(h)) for h in running)
                   if sum(v for k, v in samples.items() if "copies_sent" in k)}  # fmt: skip
        assert sources == {running[0].name}
    assert destinations == {peer: ERRORS for peer in listed[1:]}, processes[0].output()


@pytest.mark.parametrize("lists", [("10.0.0.12,10.0.0.13", "", ""), ("10.0.0.12", "10.0.0.13", "10.0.0.11"), ("10.0.0.255",) * 3])
def test_no_loop_with_odd_peer_lists(cluster: Cluster, lists: tuple[str, str, str]) -> None:
    """One-sided lists, a ring of lists, broadcast: every error the router sent is on the wire a bounded number of times."""
    processes = [daemon(node, *(["--peers", peers] if peers else [])) for node, peers in zip(cluster.nodes, lists)]
    with Capture(cluster.fabric) as wire:
        inject(cluster.router, 4, flow_errors(4, "pod"))
        seen = wire.settle(1.0)
    assert [process.stop() for process in processes] == [0, 0, 0]
    sent = node_packets(seen, 4)
    vips = [s for s in sent if s.packet[16:19] == bytes([10, 96, 0])]
    assert not vips
    assert len(sent) <= ERRORS * 2


def test_delivered_counts_tell_the_owner(cluster: Cluster) -> None:
    """Every error is owned exactly once in the cluster: the EPERM of the guard says so, per error."""
    with daemons(cluster.nodes, "--peers", PEER_LISTS[4]):
        assert len(cluster.download("pod")) == 23
        samples = [metrics(node) for node in cluster.nodes]
    owner = sum(s['pmtud_delivered_total{family="ipv4",result="owner"}'] for s in samples)
    other = sum(s['pmtud_delivered_total{family="ipv4",result="not_owner"}'] for s in samples)
    acted = sum(s['pmtud_acted_total{action="replicate"}'] for s in samples)
    assert owner == acted >= 23
    assert other == 2 * acted
    assert sum(s['pmtud_delivered_total{family="ipv4",result="error"}'] for s in samples) == 0


@pytest.mark.parametrize("family", [4, 6])
def test_conntrack_not_in_use_stays_so(family: int) -> None:
    """Host services only, no rule that tracks: all transfers finish, and not one connection gets tracked."""
    with Cluster(conntrack=False) as plain:
        count = "/proc/sys/net/netfilter/nf_conntrack_count"
        with daemons(plain.nodes, "--peers", ALL_PEERS):
            assert len(plain.download("host", family)) == 23
            assert [node.read(count).strip() for node in plain.nodes] == ["0"] * 3
            ruleset = plain.nodes[0].run("nft", "list", "ruleset")
            assert "pmtud_33" in ruleset and "ct state" not in ruleset


@pytest.mark.parametrize("family", [4, 6])
def test_conntrack_that_comes_later_is_noticed(cluster: Cluster, family: int) -> None:
    """kube-proxy may start after us: the guard asks conntrack from the first refused delivery on."""
    with daemons(cluster.nodes, "--peers", ALL_PEERS) as processes:
        assert len(cluster.download("pod", family)) == 23
        assert any("conntrack came into use" in process.output() for process in processes)
        assert any("ct state related" in node.run("nft", "list", "ruleset") for node in cluster.nodes)


@pytest.mark.parametrize("family", [4, 6])
def test_udp_socket_gets_emsgsize(cluster: Cluster, family: int) -> None:
    """A connected UDP socket that sends DF datagrams from the VIP learns the MTU on whichever node it is."""
    discover, do, mtu_option = ((10, 2, 14), (23, 2, 24))[family == 6]  # IP_MTU_DISCOVER, IP_PMTUDISC_DO, IP_MTU
    level = socket.IPPROTO_IP if family == 4 else socket.IPPROTO_IPV6
    client = Cluster.client_address(5, family)

    def open_sender() -> socket.socket:
        sender = socket.socket(AF[family], socket.SOCK_DGRAM)
        sender.setsockopt(level, discover, do)
        sender.bind((Cluster.vip("host", family), 0))
        sender.connect((client, 9))
        return sender

    def refused(sender: socket.socket) -> bool:
        try:
            sender.send(bytes(1410))
        except OSError as problem:
            assert problem.errno == errno.EMSGSIZE
            return True
        return False

    with contextlib.ExitStack() as stack:
        def open_senders() -> list[socket.socket]:
            return [stack.enter_context(node.inside(open_sender)) for node in cluster.nodes]
        assert sum([poll(lambda s=s: refused(s), 0.5) for s in open_senders()]) == 1, "only the node the fabric chose"
        cluster.flush()
        with daemons(cluster.nodes, "--peers", PEER_LISTS[family]):
            for sender in open_senders():
                assert poll(lambda s=sender: refused(s), 2.5)
                assert sender.getsockopt(level, mtu_option) == 1400
                sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # a second report of the same error
                assert sender.send(bytes(1400 - (28 if family == 4 else 48))) > 0


@pytest.mark.parametrize("family,peer", [(4, "10.0.0.255"), (6, "ff02::7074%eth0")])
@pytest.mark.parametrize("service", Cluster.SERVICES)
def test_one_group_copy_reaches_every_node(cluster: Cluster, family: int, peer: str, service: str) -> None:
    """A subnet broadcast or link multicast peer: one copy per error on the wire, and every owner learns."""
    group = socket.inet_pton(AF[family], peer.partition("%")[0])
    with invalid_dropped(cluster), daemons(cluster.nodes, "--peers", peer), Capture(cluster.fabric) as wire:
        assert len(cluster.download(service, family)) == 23
        arrived = [s for s in wire.settle() if s.interface.startswith("to-node") and s.kind != socket.PACKET_OUTGOING]
        samples = [metrics(node) for node in cluster.nodes]
    copies = sum(s.packet[DST[family]] == group for s in arrived)
    assert copies == sum(s[f'pmtud_copies_sent_total{{peer="{peer}"}}'] for s in samples)
    assert copies == sum(s['pmtud_acted_total{action="replicate"}'] for s in samples) > 0
    assert_learned(cluster, service, family)


def test_own_addresses_with_nonlocal_bind(cluster: Cluster) -> None:
    """ip_nonlocal_bind lets any bind succeed: peers must not be taken for this node."""
    node = cluster.nodes[0]
    node.sysctl("net.ipv4.ip_nonlocal_bind", 1)
    try:
        with daemons([node], "--peers", PEER_LISTS[4]) as [process]:
            assert "peers: 2 (10.0.0.12, 10.0.0.13)" in process.output()
            assert "own address removed from peers: 10.0.0.11" in process.output()
    finally:
        node.sysctl("net.ipv4.ip_nonlocal_bind", 0)


def test_nodes_with_several_addresses(cluster: Cluster) -> None:
    """Peers listed by their management addresses: copies leave from the listed address and are taken for copies."""
    peers = ",".join(f"172.20.20.{10 + i}" for i in (1, 2, 3))
    with daemons(cluster.nodes, "--peers", peers, "--iface", "eth0,mgmt"):
        assert len(cluster.download("pod")) == 23
        assert [drops(metrics(node)).get("misaddressed", 0) for node in cluster.nodes] == [0, 0, 0]


def test_a_peers_other_address_is_named_once(cluster: Cluster) -> None:
    """A copy from an address that is not listed is dropped, and one line says what to add."""
    first = ingress(cluster, 4)
    receiver = cluster.nodes[(first + 1) % 3]
    stranger = cluster.nodes[first]
    with daemons([receiver], "--peers", "172.20.20.254") as [process]:
        copy = flow_errors(4, src=Cluster.node_address(first + 1), dst=Cluster.node_address((first + 1) % 3 + 1))
        inject(stranger, 4, copy)
        assert drops(received(receiver, ERRORS)) == {"misaddressed": ERRORS}
        lines = [line for line in process.output().splitlines() if "add it to --peers" in line]
        assert len(lines) == 1 and Cluster.node_address(first + 1) in lines[0]


def test_dry_run_sends_nothing(cluster: Cluster) -> None:
    """--dry-run decides, counts and logs, and not one packet leaves or is delivered."""
    node = cluster.nodes[ingress(cluster, 4)]
    with daemons([node], "--peers", PEER_LISTS[4], "--dry-run") as [process]:
        with Capture(cluster.fabric) as wire, Capture(node, "lo") as loopback:
            inject(cluster.router, 4, flow_errors(4))
            assert drops(received(node, ERRORS)) == {"dry_run": ERRORS}
            assert not node_packets(wire.settle(), 4)
            assert not loopback.packets()
        assert process.output().count("dry run: would replicate") == ERRORS
        samples = metrics(node)
        assert sum(v for k, v in samples.items() if "copies_sent" in k or "delivered" in k) == 0


OPTION_EFFECTS = [
    # options, changes to the injected errors, expected drops (of 23 errors, 2 ms apart)
    ([], {}, {}),
    (["--min-mtu", "1401"], {}, {"mtu_too_small": 23}),
    (["--ports", "443,8000-8100"], {}, {"port_not_listed": 23}),
    (["--ports", "443,80"], {}, {}),
    (["--service-networks", "10.97.0.0/16"], {}, {"not_service": 23}),
    (["--service-networks", "10.96.0.0/16"], {}, {}),
    (["--ignore-networks", "10.8.0.0/24"], {}, {"ignored_network": 23}),
    (["--source-rate", "1"], {}, {"limited_source": 22}),
    (["--rate", "1", "--source-rate", "0"], {}, {"limited_total": 22}),
    ([], {"dport_step": 0}, {"limited_flow": 22}),
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
    with daemons([node], "--peers", PEER_LISTS[4], *options):
        before = drops(metrics(node))
        assert before == {}
        if expected.get("limited_total"):
            inject(cluster.router, 4, packets, gap=0)  # the kernel's own limit sheds some of these
        else:
            inject(cluster.router, 4, packets)
        wanted = ERRORS if not expected.get("limited_total") else 2
        assert poll(lambda: sum(drops(received(node, wanted)).values()) >= min(sum(expected.values()), wanted - 1), 3) is not None
        found = drops(metrics(node))
        if expected.get("limited_total"):
            assert set(found) == {"limited_total"}
        else:
            assert found == expected


def test_ttl_source_and_bytes_of_a_copy(cluster: Cluster) -> None:
    """--ttl is on the wire; the outer source is the node, and the ICMP message is byte for byte the router's."""
    for family in (4, 6):
        first = ingress(cluster, family)
        node, peer = cluster.nodes[first], Cluster.node_address((first + 1) % 3 + 1, family)
        packets = flow_errors(family, mtu=1333)
        with daemons([node], "--peers", peer, "--ttl", "7"), Capture(node, "eth0") as wire:
            inject(cluster.router, family, packets)
            received(node, ERRORS)
            copies = [s.packet for s in wire.settle() if s.kind == socket.PACKET_OUTGOING]
        assert len(copies) == ERRORS
        assert {copy[8 if family == 4 else 7] for copy in copies} == {7}
        assert {copy[DST[family]] for copy in copies} == {socket.inet_pton(AF[family], peer)}
        own = socket.inet_pton(AF[family], Cluster.node_address(first + 1, family))
        assert {copy[12:16] if family == 4 else copy[8:24] for copy in copies} == {own}
        start = 20 if family == 4 else 40
        without_checksum = {copy[start:start + 2] + copy[start + 4:] for copy in copies}
        assert without_checksum == {packet[start:start + 2] + packet[start + 4:] for packet in packets}
        if family == 4:
            assert {copy[20:] for copy in copies} == {packet[20:] for packet in packets}


# -- rules


SEED_RULE = "-t raw -A PREROUTING -i eth0 -p icmp -m icmp --icmp-type 3/4 -j NFLOG --nflog-group 33"


def feed_by_nft(node: Host) -> None:
    """The operator's own rule, nftables."""
    node.run("nft", "-f", "-", input="table ip operator { chain raw { type filter hook prerouting priority raw; "
             'iifname "eth0" icmp type destination-unreachable icmp code frag-needed log group 33; }; }')  # fmt: skip


FEEDS = {
    "iptables-nft": lambda node: node.run("iptables-nft", *SEED_RULE.split()),
    "iptables-legacy": lambda node: node.run("iptables-legacy", *SEED_RULE.split()),
    "nft": feed_by_nft,
}


@pytest.mark.parametrize("tool", FEEDS)
def test_rules_off_with_the_operators_own_rule(tool: str) -> None:
    """The seed's one rule alone: host sockets are served; pods are not, and no packet leaks, because nothing guards."""
    with Cluster() as cluster:
        for node in cluster.nodes:
            FEEDS[tool](node)
        with daemons_keeping_rules(cluster, "--peers", PEER_LISTS[4], "--rules", "off") as processes:
            assert len(cluster.download("host")) == 23
            assert all("no guard on mark" in process.output() for process in processes)
            with Capture(cluster.fabric) as wire:
                assert len(cluster.download("pod", deadline=1.0)) < 20
                leaked = [s for s in node_packets(wire.settle(), 4) if s.packet[16:19] == bytes([10, 96, 0])]
            assert not leaked


@contextlib.contextmanager
def daemons_keeping_rules(cluster: Cluster, *options: str) -> Iterator[list[Process]]:
    """Daemons that must not touch the ruleset at all."""
    before = [node.run("nft", "-s", "list", "ruleset") for node in cluster.nodes]
    processes = [daemon(node, *options) for node in cluster.nodes]
    yield processes
    assert [process.stop() for process in processes] == [0] * len(processes)
    assert [node.run("nft", "-s", "list", "ruleset") for node in cluster.nodes] == before


@pytest.mark.parametrize("tool", ["nft", "iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize("family", [4, 6])
def test_printed_rules_do_what_the_daemons_own_do(tool: str, family: int) -> None:
    """`pmtud.py rules`, pasted: with --rules off everything works, the rescue from strict RPF included."""
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
                assert sum(metrics(node)["pmtud_rpf_rescued_total"] for node in cluster.nodes) > 0


def paste_rules(node: Host, tool: str) -> None:
    """Run one half of what `pmtud.py rules` prints, as an operator would."""
    nft, _, iptables = node.run(sys.executable, str(PROGRAM), "rules").partition("# or iptables")
    if tool == "nft":
        node.run("nft", "-f", "-", input=nft)
        return
    for line in iptables.splitlines()[1:]:
        command = line.replace("ip6tables", tool.replace("iptables", "ip6tables"), 1) if line[:3] == "ip6" else line.replace(
            "iptables", tool, 1)
        node.run("sh", "-c", command)


def test_installed_rules_are_the_printed_rules(cluster: Cluster) -> None:
    """What the daemon installs over netlink lists exactly as the printed text does once loaded by nft."""
    node = cluster.nodes[0]
    node.run("ping", "-c1", "127.0.0.1")  # so that conntrack is in use
    with daemons([node]):
        installed = node.run("nft", "list", "table", "inet", "pmtud_33")
        printed = node.run(sys.executable, str(PROGRAM), "rules").partition("# or iptables")[0]
    node.run("nft", "-f", "-", input=printed)
    loaded = node.run("nft", "list", "table", "inet", "pmtud_33")
    node.run("nft", "delete", "table", "inet", "pmtud_33")
    body = [line for line in installed.splitlines() if "flags owner" not in line and line.strip()]
    body[0] = body[0].partition(" # progname")[0]
    assert body == [line for line in loaded.splitlines() if line.strip()]


def test_flush_ruleset_leaves_our_table(cluster: Cluster) -> None:
    """`nft flush ruleset`, a firewall reload beside us: an owned table stays."""
    with Cluster(conntrack=False) as plain, daemons(plain.nodes, "--peers", PEER_LISTS[4]):
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


def test_table_without_ownership_is_replaced_and_removed(cluster: Cluster) -> None:
    """Kernels before 5.12: what SIGKILL leaves behind is replaced by the next start and removed by its end."""
    node = cluster.nodes[0]
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
    with daemons([node]):  # its own, owned table takes the place of the stale one, and daemons() sees it go
        assert "flags owner" in node.run("nft", "list", "table", "inet", "pmtud_33")
    final = node.start(sys.executable, "-c", OLD_KERNEL, env=env)
    assert poll(lambda: final.returncode() is not None, 5) and final.returncode() == 0
    assert "pmtud" not in node.run("nft", "list", "ruleset")


# -- start, stop, and what it says


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_clean_stop(cluster: Cluster, number: int) -> None:
    """Exit 0 in under a second, table gone, group free for the next one."""
    node = cluster.nodes[0]
    process = daemon(node, "--peers", PEER_LISTS[4])
    begun = time.monotonic()
    assert process.stop(number) == 0
    assert time.monotonic() - begun < 1.0
    assert "pmtud" not in node.run("nft", "list", "ruleset")
    assert node.read("/proc/net/netfilter/nfnetlink_log") == ""
    assert process.output().splitlines()[-1].split()[2] == "stopped"


def test_sigkill_leaves_nothing(cluster: Cluster) -> None:
    """The kernel removes the table and frees the group."""
    node = cluster.nodes[0]
    process = daemon(node, "--peers", PEER_LISTS[4])
    assert "pmtud_33" in node.run("nft", "list", "ruleset")
    process.stop(signal.SIGKILL)
    assert poll(lambda: "pmtud" not in node.run("nft", "list", "ruleset"), 2)
    assert node.read("/proc/net/netfilter/nfnetlink_log") == ""
    with daemons([node]):
        pass


def run_to_end(host: Host, *options: str, env: Optional[dict[str, str]] = None, python: Sequence[str] = ()) -> tuple[int, str]:
    """Exit code and whole output of a program run that ends by itself."""
    process = host.start(*(python or (sys.executable,)), str(PROGRAM), *options, env=env)
    assert poll(lambda: process.returncode() is not None, 10), process.output()
    code = process.returncode()
    assert code is not None
    return code, process.output()


def test_second_daemon_names_the_holder(cluster: Cluster) -> None:
    """Exit 1 and one line with port id, pid and what to do."""
    node = cluster.nodes[0]
    with daemons([node]) as [first]:
        code, output = run_to_end(node)
        assert code == 1 and output.count("\n") == 1
        assert f"NFLOG group 33 is taken by port id {first.pid}, pid {first.pid} (" in output
        assert "pmtud.py) (see /proc/net/netfilter/nfnetlink_log); choose another with --nflog-group" in output
        with daemon_of_group(node, 34, "--metrics-port", "0"):
            pass


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
    (["--peers", "file:/nonexistent"], 2, "--peers: file:/nonexistent: No such file or directory"),
    (["--no-rescue"], 2, "--no-rescue without --peers leaves nothing to do; give --peers"),
    ([], 1, "there is no default route; name the interface errors come in on with --iface"),
]


@pytest.mark.parametrize("options,code,text", START_FAILURES)
def test_start_failures_are_one_line(options: list[str], code: int, text: str) -> None:
    """In a namespace with nothing but a loopback interface."""
    with Net() as net:
        assert run_to_end(net.host("bare"), *options) == (code, f"pmtud: {text}\n")


def setpriv(capabilities: str) -> tuple[str, ...]:
    """The start of a command line that leaves root these capabilities and no others."""
    return ("setpriv", f"--bounding-set=-all{capabilities}", f"--inh-caps=-all{capabilities}", "--no-new-privs")


@pytest.mark.parametrize("capabilities", ["", ",+net_raw", ",+net_admin"])
def test_without_privileges(cluster: Cluster, capabilities: str) -> None:
    """Without one of the two capabilities: exit 1, and the line names both."""
    code, output = run_to_end(cluster.nodes[0], python=(*setpriv(capabilities), sys.executable))
    assert code == 1 and output.count("\n") == 1
    assert output.endswith("CAP_NET_ADMIN and CAP_NET_RAW are needed: run as root, or grant both\n")
    assert "pmtud" not in cluster.nodes[0].run("nft", "list", "ruleset")


def test_with_the_two_capabilities_and_nothing_else(cluster: Cluster) -> None:
    """CAP_NET_ADMIN and CAP_NET_RAW are enough for the whole job."""
    command = (*setpriv(",+net_admin,+net_raw"), sys.executable, str(PROGRAM), "--peers", ALL_PEERS)
    processes = [node.start(*command) for node in cluster.nodes]
    for process in processes:
        process.wait_for("limits:")
    for family in (4, 6):
        assert len(cluster.download("pod", family)) == 23
    status = Path(f"/proc/{processes[0].pid}/status").read_text()
    assert re.findall(r"CapEff:\s+(\w+)", status) == ["0000000000003000"]  # bits 12 and 13
    assert [process.stop() for process in processes] == [0, 0, 0]
    assert [node.run("nft", "list", "tables").count("pmtud") for node in cluster.nodes] == [0, 0, 0]


def test_default_route_over_several_interfaces(cluster: Cluster) -> None:
    """A multipath default route: errors may come in on any of its interfaces."""
    node = cluster.nodes[0]
    node.ip("route replace default nexthop via 10.0.0.1 dev eth0 nexthop via 172.20.20.2 dev mgmt")
    try:
        with daemons([node]) as [process]:
            assert "errors come in on eth0, mgmt," in process.output()
    finally:
        node.ip("route replace default via 10.0.0.1")


# -- HTTP and logs


def get(host: Host, path: str, port: int = 30040, address: str = "127.0.0.1") -> tuple[str, str]:
    """Status code and body."""
    text = host.run("curl", "-sS", "--max-time", "5", "-w", "\n%{http_code}", f"http://{address}:{port}{path}", check=False)
    body, _, code = text.rpartition("\n")
    return code, body


def test_http(cluster: Cluster) -> None:
    """/metrics, /healthz, /readyz; --metrics-port and --metrics-addr; 0 turns it off."""
    node = cluster.nodes[0]
    with daemons([node], "--peers", PEER_LISTS[4]):
        assert get(node, "/healthz") == ("200", "ok\n")
        assert get(node, "/readyz") == ("200", "ok\n")
        assert get(node, "/metrics", address="[::1]")[0] == "200"
        assert get(node, "/etc/passwd")[0] == "404"
        assert metrics(node)['pmtud_peers{source="static"}'] == 2
    with daemons([node], "--metrics-port", "31000", "--metrics-addr", "10.0.0.11"):
        assert get(node, "/healthz", 31000, "10.0.0.11") == ("200", "ok\n")
        assert get(node, "/healthz", 31000)[0] == "000"
    with daemons([node], "--metrics-port", "0"):
        assert get(node, "/healthz")[0] == "000"


def test_metrics_port_taken(cluster: Cluster) -> None:
    """By default a warning, and the errors are still handled; a failure if the port was asked for."""
    node = cluster.nodes[0]
    first = daemon(node, "--nflog-group", "40")
    with daemon_of_group(node, 42, "--metrics-port", "0"):
        pass
    with contextlib.closing(first), contextlib.closing(daemon(node)) as second:
        assert "metrics port 30040 cannot be bound (Address already in use); running without metrics" in second.output()
        code, output = run_to_end(node, "--nflog-group", "41", "--metrics-port", "30040")
        assert code == 1
        assert output == ("pmtud: metrics port 30040 cannot be bound (Address already in use); "
                          "choose another with --metrics-port, 0 for none\n")  # fmt: skip


def test_without_prometheus_client(cluster: Cluster) -> None:
    """The whole job without the library (python -S sees no site-packages), and exit 2 if metrics were asked for."""
    python = (sys.executable, "-S")
    processes = [node.start(*python, str(PROGRAM), "--peers", PEER_LISTS[4]) for node in cluster.nodes]
    for process in processes:
        process.wait_for("limits:")
    assert len(cluster.download("pod")) == 23
    assert get(cluster.nodes[0], "/metrics") == ("503", "prometheus-client is not installed: pip install prometheus-client\n")
    assert get(cluster.nodes[0], "/readyz") == ("200", "ok\n")
    assert [process.stop() for process in processes] == [0, 0, 0]
    assert processes[0].output().count("prometheus-client is not installed: running without metrics") == 1
    code, output = run_to_end(cluster.nodes[0], "--metrics-port", "30040", python=python)
    assert code == 2
    assert output == "pmtud: --metrics-port needs prometheus-client: pip install prometheus-client, or --metrics-port 0\n"


def test_json_log(cluster: Cluster) -> None:
    """Every line is an object with time, level and message; a router's MTU is told once."""
    node = cluster.nodes[ingress(cluster, 4)]
    with daemons([node], "--log-format", "json") as [process]:
        inject(cluster.router, 4, flow_errors(4, count=1) * 3, gap=0.15)
        received(node, 3)
    entries = [json.loads(line) for line in process.output().splitlines()]
    assert all({"time", "level", "message"} <= set(entry) for entry in entries)
    news = [entry for entry in entries if entry["message"] == "a router reports an MTU"]
    assert len(news) == 1
    assert {k: news[0][k] for k in ("router", "destination", "mtu")} == {
        "router": "10.8.0.1", "destination": "10.9.0.1", "mtu": 1400}  # fmt: skip


# -- peers that change


def test_peer_file_is_followed(cluster: Cluster, tmp_path: Path) -> None:
    """A changed file is read by itself, SIGHUP forces it; a bad file keeps the old peers and says why."""
    node, path = cluster.nodes[0], tmp_path / "peers"
    path.write_text("10.0.0.12  # worker\n\n10.0.0.11, 10.0.0.13\n")

    def count() -> float:
        return metrics(node)[f'pmtud_peers{{source="file:{path}"}}']
    with daemons([node], "--peers", f"file:{path}") as [process]:
        assert count() == 2
        path.write_text("10.0.0.12\n")
        assert poll(lambda: count() == 1, 5)
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
        os.kill(process.pid, signal.SIGHUP)
        process.wait_for("SIGHUP: reading the peer sources again")
        assert count() == 2


def test_an_address_that_moves_here_is_removed_from_the_peers(cluster: Cluster) -> None:
    """Own addresses are followed: what becomes ours stops being a peer, and comes back when it leaves."""
    node = cluster.nodes[0]
    with daemons([node], "--peers", "10.0.0.12,10.0.0.77"):
        assert metrics(node)['pmtud_peers{source="static"}'] == 2
        node.ip("addr add 10.0.0.77/24 dev eth0")
        assert poll(lambda: metrics(node)['pmtud_peers{source="static"}'] == 1, 3)
        node.ip("addr del 10.0.0.77/24 dev eth0")
        assert poll(lambda: metrics(node)['pmtud_peers{source="static"}'] == 2, 3)


def test_one_bad_peer_does_not_starve_the_others(cluster: Cluster) -> None:
    """No route to one peer: its copies are counted as refused, every other peer still gets all of its own."""
    first = ingress(cluster, 4)
    node, peer = cluster.nodes[first], (first + 1) % 3
    node.ip("route add unreachable 203.0.113.7")
    try:
        with daemons([node], "--peers", f"203.0.113.7,{Cluster.node_address(peer + 1)}"), daemons(
            [cluster.nodes[peer]], "--peers", PEER_LISTS[4]
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
# Section: command line -- all tests


class Verdict:
    """A pytest plugin: under CI a skipped test is a failure, and a run in which nothing passed is never green."""

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


def main(argv: Sequence[str]) -> int:
    """Run the tests."""
    options = ["-q", "-ra", "-p", "no:cacheprovider", "-W", "error::DeprecationWarning", str(Path(__file__)), *argv]
    return int(pytest.main(options, plugins=[Verdict()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
