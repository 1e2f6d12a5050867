#!/usr/bin/env python3
"""What .ci/kernels.py proves inside each kernel, on the hosts, links and cluster of test_pmtud.py.

    sudo python3 .ci/scenarios.py [NAME ...]     here, on this machine's kernel, in namespaces

Prints the log of each scenario, and then a line with tabs: CELL, its name, ok or FAIL, what was
counted, seconds. Exit status 1 if any failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Callable, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("PMTUD_PATIENCE", "16")

import test_pmtud as t

t.DOWNLOAD_BYTES = (
    40_000  # more than a path without news of its MTU lets through, and little to translate
)
# The daemon from its bytecode: a translated processor takes seconds to compile the script.
DAEMON = ("-W", "error", "-c", "import sys, pmtud; sys.exit(pmtud.main(sys.argv[1:]))")
SCENARIOS: dict[str, Callable[[], str]] = {}


def scenario(function: Callable[[], str]) -> Callable[[], str]:
    """Registers a scenario: it returns what it counted, and raises if that is wrong."""
    SCENARIOS[function.__name__.replace("_", "-")] = function
    return function


# -----------------------------------------------------------------------------
# Section: counting -- transfers that finish, with and without the daemon


@contextlib.contextmanager
def everywhere(cluster: t.Cluster, *options: str, start: Sequence[str] = ()) -> Iterator[None]:
    """A daemon on every node, behind the words in start; shows their logs if the block fails."""
    argv = [*start, sys.executable, *DAEMON, *(options or ("--peers", t.ALL_PEERS))]
    processes = [node.start(*argv, env={"PYTHONPATH": str(t.HERE)}) for node in cluster.nodes]
    try:
        for process in processes:
            process.wait_for("limits:", 20)
        yield
    except BaseException:
        print(traceback.format_exc())  # what may happen at their end would hide it
        for process in processes:
            print(process.output()[-3000:])
        raise
    finally:
        codes = [process.stop() for process in processes]
    assert codes == [0] * len(processes), processes[0].output()


# Seconds: what is served is so long before the one, what hangs still hangs after the other.
GENEROUS = 40
SHORT = 8


def finished(
    cluster: t.Cluster, cases: Sequence[tuple[int, str]], deadline: float
) -> dict[str, int]:
    """How many of 23 transfers finish, for each family and service."""
    counts = {}
    for family, service in cases:
        cluster.flush()
        counts[f"{service}{family}"] = len(cluster.download(service, family, deadline=deadline))
    return counts


CASES4 = [(4, service) for service in t.Cluster.SERVICES]
CASES6 = [(6, service) for service in t.Cluster.SERVICES]
ALL_CASES = CASES4 + CASES6


def as_text(counts: dict[str, int]) -> str:
    """host4 23, pod4 5."""
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def expect(what: str, counts: dict[str, int], right: Callable[[int], bool]) -> str:
    """The counts as text, if all of them are right."""
    text = f"{what} {as_text(counts)}"
    print(text, flush=True)
    if not all(right(count) for count in counts.values()):
        raise AssertionError(text)
    return text


def served(
    cluster: t.Cluster, cases: Sequence[tuple[int, str]], *options: str, start: Sequence[str] = ()
) -> str:
    """Transfers hang without the daemon and finish with it, also those that strict RPF stops."""
    without = expect("without", finished(cluster, cases, SHORT), lambda count: count < 20)
    cluster.strict_rpf()
    cluster.error_from_management()
    four = [case for case in cases if case[0] == 4]
    expect("strict, without", finished(cluster, four, SHORT), lambda count: count == 0)
    with everywhere(cluster, *options, start=start):
        strict = finished(cluster, four, GENEROUS)
        cluster.strict_rpf(False)
        cluster.error_from_management(False)
        loose = finished(cluster, cases, GENEROUS)
        print("strict, with", as_text(strict), "and with", as_text(loose), flush=True)
        expect("strict, with", strict, lambda count: count == 23)
        expect("with", loose, lambda count: count == 23)
    return f"23 of each ({without})"


# -----------------------------------------------------------------------------
# Section: ECMP -- the cluster of the tests


@scenario
def ecmp() -> str:
    """Socket, own pod, another node's pod."""
    with t.Cluster() as cluster:
        return served(cluster, CASES4)


@scenario
def ecmp_ipv6() -> str:
    """The same over IPv6."""
    with t.Cluster() as cluster:
        return served(cluster, CASES6)


@scenario
def standalone() -> str:
    """One node without peers: only its own reverse path filter is in the way."""
    with t.Cluster(1) as cluster:
        return rescued(cluster, CASES4)


def rescued(
    cluster: t.Cluster,
    cases: Sequence[tuple[int, str]],
    afterwards: Optional[Callable[[], object]] = None,
) -> str:
    """What strict reverse path filters stop, the daemon delivers; also after this is done."""
    cluster.strict_rpf()
    cluster.error_from_management()
    expect("without", finished(cluster, cases, SHORT), lambda count: count == 0)
    with everywhere(cluster, "--nodename", "alone"):
        text = expect("with", finished(cluster, cases, GENEROUS), lambda count: count == 23)
        if afterwards:
            afterwards()
            expect("later", finished(cluster, cases, GENEROUS), lambda count: count == 23)
    return f"{text} (0 without)"


# -----------------------------------------------------------------------------
# Section: IPVS -- services as kube-proxy --proxy-mode=ipvs sets them up

# Of its iptables rules those that a service's packets meet. {six} is 6- in the names of IPv6 sets.
IPVS_NAT = """*nat
:KUBE-SERVICES - [0:0]
:KUBE-LOAD-BALANCER - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-SERVICES -m set --match-set KUBE-{six}LOAD-BALANCER dst,dst -j KUBE-LOAD-BALANCER
-A KUBE-SERVICES -m set --match-set KUBE-{six}LOAD-BALANCER dst,dst -j ACCEPT
-A KUBE-LOAD-BALANCER -m set --match-set KUBE-{six}LOAD-BALANCER-LOCAL dst,dst -j RETURN
-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
*filter
:KUBE-FORWARD - [0:0]
:KUBE-IPVS-FILTER - [0:0]
-A FORWARD -j KUBE-FORWARD
-A INPUT -m conntrack --ctstate NEW -j KUBE-IPVS-FILTER
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A KUBE-IPVS-FILTER -m set --match-set KUBE-{six}LOAD-BALANCER dst,dst -j RETURN
-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW -m set --match-set KUBE-{six}IPVS-IPS dst -j REJECT
COMMIT
"""
IPVS_SETTINGS = {
    "conntrack": 1,
    "conn_reuse_mode": 0,
    "expire_nodest_conn": 1,
    "expire_quiescent_template": 1,
}


class IpvsCluster(t.Cluster):
    """`pod` (externalTrafficPolicy Local) and `cross` (Cluster) are IPVS's, `host` a socket's."""

    def build_services(self, node: t.Host, i: int) -> None:
        t.execute("modprobe", "ip_vs_rr")
        node.ip("link add kube-ipvs0 type dummy")  # it stays down, as kube-proxy leaves it
        node.sysctls({f"net.ipv4.vs.{key}": value for key, value in IPVS_SETTINGS.items()})
        node.sysctls({"net.ipv4.conf.all.arp_ignore": 1, "net.ipv4.conf.all.arp_announce": 2})
        for family, pod in ((4, "10.244.{}.2"), (6, "[fd44:{}::2]")):
            self._build_sets(node, family)
            for service, at in (("pod", i), ("cross", i % self.size + 1)):
                self._build_virtual_server(node, family, service, pod.format(at))
            command = "iptables-restore" if family == 4 else "ip6tables-restore"
            node.run(command, "--noflush", input=IPVS_NAT.format(six="" if family == 4 else "6-"))

    def _build_sets(self, node: t.Host, family: int) -> None:
        six, inet = ("", "inet") if family == 4 else ("6-", "inet6")
        lines = [
            f"create KUBE-{six}LOAD-BALANCER hash:ip,port family {inet}",
            f"create KUBE-{six}LOAD-BALANCER-LOCAL hash:ip,port family {inet}",
            f"create KUBE-{six}IPVS-IPS hash:ip family {inet}",
        ]
        for service in ("pod", "cross"):
            lines.append(f"add KUBE-{six}LOAD-BALANCER {self.vip(service, family)},tcp:80")
            lines.append(f"add KUBE-{six}IPVS-IPS {self.vip(service, family)}")
        lines.append(f"add KUBE-{six}LOAD-BALANCER-LOCAL {self.vip('pod', family)},tcp:80")
        node.run("ipset", "restore", input="\n".join(lines) + "\n")

    def _build_virtual_server(self, node: t.Host, family: int, service: str, pod: str) -> None:
        vip = self.vip(service, family)
        node.ip(f"addr add {vip}/{32 if family == 4 else 128} dev kube-ipvs0")
        address = f"{vip}:80" if family == 4 else f"[{vip}]:80"
        node.run("ipvsadm", "-A", "-t", address, "-s", "rr")
        node.run("ipvsadm", "-a", "-t", address, "-r", f"{pod}:80", "-m")


@scenario
def ipvs() -> str:
    """kube-proxy's IPVS mode: pods learn whichever node they are on."""
    with IpvsCluster() as cluster:
        return served(cluster, CASES4)


@scenario
def ipvs_ipv6() -> str:
    """The same over IPv6."""
    with IpvsCluster() as cluster:
        return served(cluster, CASES6)


# -----------------------------------------------------------------------------
# Section: uplinks -- what errors come in on

UPLINKS = {
    "vlan": (),
    "active-backup": ("link add eth0 type bond mode active-backup miimon 100",),
    "balance-xor": ("link add eth0 type bond mode balance-xor miimon 100",),
    "bridge": ("link add eth0 type bridge",),
}


class UplinkCluster(t.Cluster):
    """eth0 of each node is not a NIC but lies on one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def link(
        self, a: t.Host, b: t.Host, mtu: int = 1500, names: tuple[str, str] = ("", "")
    ) -> None:
        if a is not self.fabric or names[1] != "eth0":
            super().link(a, b, mtu, names)
            return
        outer = f"to-{b.name}"
        if self.kind == "vlan":
            super().link(a, b, mtu, (f"trunk-{b.name}", "nic"))
            a.ip(
                f"link add link trunk-{b.name} name {outer} type vlan id 10", f"link set {outer} up"
            )
            b.ip("link add link nic name eth0 type vlan id 10", "link set eth0 up")
            return
        super().link(a, b, mtu, (outer, "nic"))
        b.ip(
            *UPLINKS[self.kind],
            "link set nic down",
            "link set nic master eth0",
            "link set nic up",
            "link set eth0 up",
        )


def uplink(kind: str) -> str:
    """One kind of uplink, all services."""
    with UplinkCluster(kind) as cluster:
        return served(cluster, CASES4)


for each in UPLINKS:
    SCENARIOS[each] = partial(uplink, each)


class TwoUplinksCluster(t.Cluster):
    """Two NICs a node, default routes over both; peers know a node by its address on lo."""

    def _build_fabric(self) -> None:
        super()._build_fabric()
        self.fabric.ip(
            "link add second type bridge mcast_snooping 0",
            "link set second up",
            "addr add 10.1.0.1/24 dev second",
        )

    def _build_node(self, i: int) -> None:
        super()._build_node(i)
        node = self.nodes[i - 1]
        self.link(self.fabric, node, names=(f"second-{i}", "eth1"))
        self.fabric.ip(f"link set second-{i} master second")
        hops = "nexthop via 10.0.0.{0} nexthop via 10.1.0.{0}"
        node.ip(
            f"addr add 10.1.0.{10 + i}/24 dev eth1",
            f"addr add 10.5.0.{i}/32 dev lo",
            f"route replace default {hops.format(1)}",
        )
        self.fabric.ip(f"route add 10.5.0.{i}/32 {hops.format(10 + i)}")


@scenario
def two_uplinks() -> str:
    """Errors come in on either of them, copies on either, too."""
    with TwoUplinksCluster() as cluster:
        return served(cluster, CASES4, "--peers", "10.5.0.1,10.5.0.2,10.5.0.3")


class NexthopCluster(t.Cluster):
    """The nodes' default routes name nexthop objects, and the kernel does not spell them out."""

    def _build_node(self, i: int) -> None:
        super()._build_node(i)
        node = self.nodes[i - 1]
        node.sysctl("net.ipv4.nexthop_compat_mode", 0)
        node.ip(
            "nexthop add id 4 via 10.0.0.1 dev eth0",
            "nexthop add id 6 via fd00::1 dev eth0",
            "route replace default nhid 4",
            "route del ::/0",
            "route add ::/0 nhid 6",
        )


class LinkLocalCluster(t.Cluster):
    """The nodes' IPv4 default route goes over the fabric's link-local IPv6 address (RFC 8950)."""

    def _build_node(self, i: int) -> None:
        super()._build_node(i)
        if i == 1:
            self.fabric.ip("addr add fe80::1/64 dev nodes")
        self.nodes[i - 1].ip("route replace default via inet6 fe80::1 dev eth0")


@scenario
def nexthop_objects() -> str:
    """nexthop_compat_mode 0."""
    with NexthopCluster() as cluster:
        return served(cluster, ALL_CASES)


@scenario
def link_local_nexthop() -> str:
    """IPv4 over an IPv6 next hop."""
    with LinkLocalCluster() as cluster:
        return served(cluster, ALL_CASES)


class VrfCluster(t.Cluster):
    """eth0, mgmt and the pod are in the VRF blue, the service addresses on its device."""

    def _build_node(self, i: int) -> None:
        super()._build_node(i)
        node = self.nodes[i - 1]
        others = [j for j in range(1, self.size + 1) if j != i]
        node.sysctls(
            {
                "net.ipv4.tcp_l3mdev_accept": 1,
                "net.ipv4.raw_l3mdev_accept": 1,
                **{
                    f"net.ipv6.conf.{name}.keep_addr_on_down": 1
                    for name in ("eth0", "mgmt", "to-pod")
                },
            }
        )
        node.ip(
            "link add blue type vrf table 10",
            "link set blue up",
            *(f"link set {name} master blue" for name in ("eth0", "mgmt", "to-pod")),
            *(
                f"addr del {self.vip('host', family)}/{size} dev lo"
                for family, size in ((4, 32), (6, 128))
            ),
            *(
                f"addr add {self.vip('host', family)}/{size} dev blue"
                for family, size in ((4, 32), (6, 128))
            ),
            "route add default via 10.0.0.1 vrf blue",
            "route add ::/0 via fd00::1 vrf blue",
            *(f"route add 10.244.{j}.0/24 via {self.node_address(j)} vrf blue" for j in others),
            *(f"route add fd44:{j}::/64 via {self.node_address(j, 6)} vrf blue" for j in others),
        )


@scenario
def vrf() -> str:
    """The uplink in a VRF, the daemon started there."""
    with VrfCluster() as cluster:
        return served(
            cluster,
            CASES4,
            "--iface",
            "eth0",
            "--peers",
            t.ALL_PEERS,
            start=("ip", "vrf", "exec", "blue"),
        )


@scenario
def vrf_outside() -> str:
    """The daemon started without `ip vrf exec` says how to start it, and ends with exit code 2."""
    with VrfCluster() as cluster:
        argv = [sys.executable, *DAEMON, "--iface", "eth0", "--peers", t.ALL_PEERS]
        process = cluster.nodes[0].start(*argv, env={"PYTHONPATH": str(t.HERE)})
        assert t.poll(lambda: process.returncode() is not None, 20), process.output()
        assert process.returncode() == 2
        assert "start it with `ip vrf exec blue`" in process.output()
    return "refused, with advice"


# -----------------------------------------------------------------------------
# Section: endpoints -- tunnels of the kernel whose outer packets are too large

ENDPOINTS = {
    "ipip": "type ipip local {local} remote {remote}",
    "fou": "type ipip local {local} remote {remote} encap fou encap-sport auto encap-dport 5555",
    "gre": "type gre local {local} remote {remote}",
    "gretap": "type gretap local {local} remote {remote}",
    "vxlan": "type vxlan id {number} local {local} remote {remote} dstport 4789 df set",
    "geneve": "type geneve id {number} remote {remote} df set",  # its source is the node's address
}


def build_endpoints(cluster: t.Cluster) -> None:
    """On each node a tunnel of each kind, from the service address to a client of its own."""
    t.execute("modprobe", "fou")
    for i, node in enumerate(cluster.nodes):
        node.ip("fou add port 5555 ipproto 4")
        for n, (kind, form) in enumerate(ENDPOINTS.items()):
            number = 1 + 3 * n + i
            words = form.format(
                local=cluster.vip("host"), remote=cluster.client_address(number), number=number
            )
            node.ip(
                f"link add {kind}9 mtu 1440 {words}",
                f"link set {kind}9 up",
                f"addr add 192.168.{number}.1/24 dev {kind}9",
            )
            if kind not in ("ipip", "fou", "gre"):
                node.ip(f"neigh add 192.168.{number}.2 lladdr 02:00:00:00:00:02 dev {kind}9")


def endpoints_that_learned(cluster: t.Cluster) -> dict[str, int]:
    """How many of the three nodes know the MTU of the path under their tunnel, for each kind."""
    cluster.flush()
    learned = dict.fromkeys(ENDPOINTS, 0)
    for i, node in enumerate(cluster.nodes):
        for n, kind in enumerate(ENDPOINTS):
            number = 1 + 3 * n + i
            far = f"192.168.{number}.2"
            remote = cluster.client_address(number)
            node.run(
                "ping",
                "-c",
                "2",
                "-i",
                "0.3",
                "-W",
                "1",
                "-M",
                "do",
                "-s",
                "1400",
                far,
                check=False,
            )
            learned[kind] += t.poll(partial(cluster.learned, node, remote), 0.1) == 1400
    return learned


@scenario
def endpoints() -> str:
    """IPIP, GRE, gretap, VXLAN and Geneve with DF learn on each node, also under strict RPF."""
    with t.Cluster() as cluster:
        build_endpoints(cluster)
        without = endpoints_that_learned(cluster)
        print("without", as_text(without), flush=True)
        with everywhere(cluster):
            loose = endpoints_that_learned(cluster)
            print("with", as_text(loose), flush=True)
            cluster.strict_rpf()
            cluster.error_from_management()
            cluster.router.ip("route add 10.0.0.0/24 via 10.8.0.2 src 172.20.20.2")  # for Geneve
            strict = endpoints_that_learned(cluster)
            print("strict, with", as_text(strict), flush=True)
            for node in cluster.nodes:
                counted = {
                    name: int(n) for name, n in t.metrics(node).items() if n and "delivered" in name
                }
                print(node.name, counted, flush=True)
        strict_without = endpoints_that_learned(cluster)
        expect("strict, without", strict_without, lambda count: count == 0)
        expect("with", loose, lambda count: count == 3)
        expect("strict, with", strict, lambda count: count == 3)
    return f"3 of 3 ({as_text(without)} without)"


# -----------------------------------------------------------------------------
# Section: life -- the table in the kernel, and what the doctor says


def tables(node: t.Host) -> str:
    """The node's nftables rules."""
    return node.run("nft", "list", "ruleset")


def start_daemon(node: t.Host) -> t.Process:
    """A daemon whose table stands."""
    process = node.start(sys.executable, *DAEMON, env={"PYTHONPATH": str(t.HERE)})
    process.wait_for("limits:", 20)
    assert "pmtud_33" in tables(node)
    return process


@scenario
def kill_9() -> str:
    """The table goes with the process; before 5.12 check names it, the next start replaces it."""
    with t.OneNode() as net:
        process = start_daemon(net.node)
        owned = "flags owner" in tables(net.node)
        process.stop(signal.SIGKILL)
        if owned:
            assert t.poll(lambda: "pmtud" not in tables(net.node), 2)
        else:
            assert "pmtud_33" in tables(net.node)
            verdicts = [
                entry for entry in t.diagnose(net.node).checks if "pmtud_33" in entry["found"]
            ]
            print(verdicts)
            assert verdicts and all(entry["status"] != "OK" for entry in verdicts)
        again = start_daemon(net.node)
        net.node.run("nft", "flush", "ruleset")
        assert t.poll(lambda: "pmtud_33" in tables(net.node), 40)
        assert again.stop() == 0
        assert "pmtud" not in tables(net.node)
    return "owned" if owned else "not owned: replaced, and back after a flush"


class PatientCluster(t.Cluster):
    """For a test that does not say how long a transfer may take."""

    def download(
        self, service: str, family: int = 4, count: int = 23, deadline: float = GENEROUS
    ) -> list[float]:
        return super().download(service, family, count, deadline)


@scenario
def systemd_unit() -> str:
    """The unit as it is, under a systemd that runs as process 1 of a container."""
    with PatientCluster() as cluster, tempfile.TemporaryDirectory() as folder:
        t.test_under_systemd(cluster, Path(folder))
    return "23 of each; reload, watchdog, stop"


# A bus without services that it could start; polkit would wait for a systemd
BUS = """<busconfig>
  <type>system</type> <listen>{}</listen> <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/> <allow own="*"/> <allow send_destination="*"/> <allow receive_sender="*"/>
  </policy>
</busconfig>
"""


@scenario
def firewalld() -> str:
    """A real firewalld, which filters IPv6 by reverse path; before and after its reload."""
    with t.Cluster(1) as cluster, tempfile.TemporaryDirectory() as folder:
        node = cluster.nodes[0]
        bus = f"unix:path={folder}/bus"  # of its own: one of this machine is not disturbed
        on_bus = ("env", f"DBUS_SYSTEM_BUS_ADDRESS={bus}")
        config = f"--system-config={folder}"
        Path(folder, "bus.conf").write_text(BUS.format(bus))
        node.start("dbus-daemon", f"--config-file={folder}/bus.conf", "--nofork", "--nopidfile")
        assert t.poll(lambda: os.path.exists(f"{folder}/bus"), 10)
        interfaces = [f"--add-interface={name}" for name in ("eth0", "to-pod")]
        t.execute("firewall-offline-cmd", config, "--zone=trusted", *interfaces, timeout=60)
        daemon = node.start(*on_bus, "firewalld", "--nofork", "--nopid", config)
        ask = (*on_bus, "firewall-cmd", "--state")
        running = t.poll(lambda: "running" in node.run(*ask, check=False, timeout=60).split(), 10)
        assert running, daemon.output()
        assert "firewalld" in tables(node)

        def reload() -> None:
            # A slow machine answers later than D-Bus waits
            node.run(*on_bus, "firewall-cmd", "--reload", check=False, timeout=60)
            time.sleep(10)
            assert t.poll(lambda: "firewalld" in tables(node), 10)
            cluster.build_services(node, 1)  # it flushes what iptables installed; kube-proxies know

        reload()
        return rescued(cluster, ALL_CASES, reload)


TUNNELS = {
    "wg9": "mtu 1420 type wireguard",
    "ipip9": "mtu 1480 type ipip local 10.0.0.2 remote 10.0.0.3",
    "fou9": "mtu 1472 type ipip local 10.0.0.2 remote 10.0.0.4 encap fou encap-dport 5555",
    "gre9": "mtu 1476 type gre local 10.0.0.2 remote 10.0.0.5",
    "gretap9": "mtu 1462 type gretap local 10.0.0.2 remote 10.0.0.6",
    "geneve9": "mtu 1450 type geneve id 9 remote 10.0.0.7",
    "genevex": "mtu 1450 type geneve external dstport 6082",
    "vxlanx": "mtu 1450 type vxlan external dstport 4790",
}


def complaints(node: t.Host) -> list[str]:
    """What is not OK, but for what every Linux before 5.12 lacks."""
    found = [entry for entry in t.diagnose(node).checks if entry["status"] != "OK"]
    return [entry["found"] for entry in found if "no table ownership" not in entry["found"]]


@scenario
def check() -> str:
    """All OK on a good node, also with tunnels of each kind; not once their MTU is too large."""
    with t.OneNode() as net:
        daemon = start_daemon(net.node)
        assert complaints(net.node) == []
        t.execute("modprobe", "fou")
        net.node.ip(
            *(f"link add {name} {words}" for name, words in TUNNELS.items()),
            *(f"link set {name} up" for name in TUNNELS),
        )
        assert complaints(net.node) == []
        net.node.ip(*(f"link set {name} mtu 1500" for name in TUNNELS if not name.endswith("x")))
        net.node.ip("link set fou9 mtu 1480")  # right without UDP around it
        found = "\n".join(complaints(net.node))
        assert not [name for name in TUNNELS if not name.endswith("x") and name not in found], found
        assert daemon.stop() == 0
    return f"no false alarm with {len(TUNNELS)} tunnels"


# -----------------------------------------------------------------------------
# Section: command line


def attempt(name: str) -> bool:
    """Run one scenario and print its cell."""
    start = time.monotonic()
    print(f"{name}:", flush=True)
    try:
        text = SCENARIOS[name]()
        state = "ok"
    except Exception as problem:  # whatever it is, the next scenario gets its turn
        print(traceback.format_exc(), flush=True)
        text = f"{type(problem).__name__}: {problem}".partition("\n")[0]
        state = "FAIL"
    print("CELL", name, state, text, f"{time.monotonic() - start:.0f}", sep="\t", flush=True)
    return state == "ok"


def main(argv: Sequence[str]) -> int:
    """0 if every scenario was proved."""
    names = list(argv or SCENARIOS)
    print("PLAN", *names, sep="\t", flush=True)
    results = [attempt(name) for name in names]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
