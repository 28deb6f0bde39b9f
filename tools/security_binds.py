"""Which calls open a socket on all addresses of a machine. For ``tools/security_lint.py``."""

from __future__ import annotations

import ast
import ipaddress
import re
import socket
from collections.abc import Iterator

from tools.security_names import Names
from tools.security_rules import arguments

BINDERS = frozenset(
    """
    bind bind_to_random_port create_server start_server HTTPServer ThreadingHTTPServer TCPServer ThreadingTCPServer
    ForkingTCPServer UDPServer ThreadingUDPServer ForkingUDPServer SimpleXMLRPCServer DocXMLRPCServer make_server
    add_insecure_port add_secure_port create_datagram_endpoint TCPStore Listener serve run run_app run_simple listen
    TCPSite WSGIServer start_http_server start_wsgi_server serve_tcp open_tcp_listeners create_tcp_listener start_unix
    SimpleServer bind_sockets sctp_bind launch
    """.split()  # noqa: SIM905 (a list of words)
)
"""Last parts of the names of what opens a listening socket."""
_HOSTS = ("host", "hostname", "address", "addr", "local_addr", "local_host", "interface", "server_address", "host_name",
          "bind", "server_name", "bind_address", "bind_addr", "ip")  # fmt: skip
NAMES = re.compile(
    r"-{0,2}(?:(?:\w+[_-])?(?:host|hostname|bind|listen|interface|ip)|(?:bind|listen|server|local|_?node_ip)[_-]addr(?:ess)?)",
    re.IGNORECASE,
)
"""Names of arguments, keys and options that say where something listens."""
_BEHIND_HANDLER = ("start_server", "serve", "start_http_server", "start_wsgi_server", "TCPSite")
_NO_HOST_FIRST = (*_BEHIND_HANDLER, "run", "run_app", "launch", "serve_tcp", "open_tcp_listeners")
_EVERYWHERE = {
    "asyncio.start_server": 1,
    "websockets.serve": 1,
    "websockets.asyncio.server.serve": 1,
    "websockets.server.serve": 1,
    "websockets.legacy.server.serve": 1,
    "websockets.sync.server.serve": 1,
    "prometheus_client.start_http_server": 1,
    "prometheus_client.start_wsgi_server": 1,
    "prometheus_client.exposition.start_http_server": 1,
    "aiohttp.web.TCPSite": 1,
    "aiohttp.web.run_app": 9,
    "trio.serve_tcp": 9,
    "trio.open_tcp_listeners": 9,
    "anyio.create_tcp_listener": 9,
    "http.server.test": 4,
}
"""What listens on all addresses where it is given none, and the place of its address (9: it has no place)."""
_PLACES = frozenset({*_HOSTS, "sock", "path", "fd", "socket", "unix"})

NAMED_WILDCARD = re.compile(
    r"(?:^|[/@\[\s=,])(?:0\.0\.0\.0|\[::\])(?::|/|,|\s|$)|^(?:tcp|udp|ws|wss|epgm|pgm|http|https|grpc)://(?:\*|0)(?::|/|$)"
)
_ENDPOINT = re.compile(
    r"^(?:[a-z0-9+]+://)?(\[[0-9a-fA-F:.]*\]|[^:/\[\]]*|[0-9a-fA-F:.]*::[0-9a-fA-F:.]*)(?::[^/]*)?(?:/.*)?$"
)


def is_wildcard(host: str) -> bool:
    """Whether a text names all addresses of this machine, as a host or as an endpoint such as tcp://*:5555."""
    text = host.strip()
    if text in ("", "*") or NAMED_WILDCARD.search(text) or re.fullmatch(r"\*?:\d+", text):
        return True
    if text.startswith(("inproc:", "ipc:", "unix:", "file:")):
        return False
    found = _ENDPOINT.match(text)
    inside = found[1].strip("[]") if found else text
    if "://" in text and inside in ("", "*"):
        return True
    return _is_unspecified(text.strip("[]")) or _is_unspecified(inside)


def _is_unspecified(host: str) -> bool:
    """Also of 0, 0x0 and 0.0, which the system's resolver takes."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            return bool(re.fullmatch(r"[0-9a-fA-FxX.]+", host)) and socket.inet_aton(host) == bytes(4)
        except OSError:
            return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_unspecified or (mapped is not None and mapped.is_unspecified)


def opens_wildcard(names: Names, called: set[str], last: str, call: ast.Call) -> bool:
    """last: the name that is called, without what is before its dot."""
    if last == "__init__":  # of a server's base class
        return any(_is_wild_pair(names, one) for argument in call.args for one in names.literals(argument))
    found = {last, *(name.rsplit(".", 1)[-1] for name in called)} & BINDERS
    return bool(
        any(_binds(names, name, call) for name in found)
        or _misses_host(names, called, found, call)
        or _is_module_server(names, call)
    )


def _is_wild_pair(names: Names, node: ast.expr) -> bool:
    """("", 80)."""
    if not isinstance(node, ast.Tuple) or len(node.elts) not in (2, 4):
        return False
    host, port = node.elts[:2]
    is_port = (isinstance(port, ast.Constant) and isinstance(port.value, int)) or "port" in ast.unparse(port).lower()
    return is_port and any(map(is_wildcard, names.texts(host)))


def _binds(names: Names, last: str, call: ast.Call) -> bool:
    given, _ = arguments(call)
    hosts = [given[name] for name in _HOSTS if name in given]
    if last in _BEHIND_HANDLER or (last == "create_server" and not _is_pair(names, call)):
        hosts += call.args[1:2]
    if last not in _NO_HOST_FIRST:
        hosts += call.args[:1]
    if last == "bind" and any(_is_wild_pair(names, one) for host in call.args[1:2] for one in names.literals(host)):
        return True  # socket.socket.bind(s, ("", 80))
    return any(is_wildcard(text) for host in hosts for text in _host_texts(names, host))


def _misses_host(names: Names, called: set[str], found: set[str], call: ast.Call) -> bool:
    """Whether the address is left out, or None, where that is all of them."""
    given, unread = arguments(call)
    is_given = bool(_PLACES & given.keys())
    where = min((_EVERYWHERE[name] for name in called & _EVERYWHERE.keys()), default=0)
    if not where and "create_server" in found and "socket.create_server" not in called and call.args:
        where = 1 if "port" in given or len(call.args) > 2 else 0  # an event loop's
    if {"listen", "bind_sockets"} & found and any(
        name.startswith("tornado") for x in names.bound.values() for name in x
    ):
        where = 1
    if not where:
        return False
    if len(call.args) > where:
        return _is_none(call.args[where])
    if is_given:
        return all(_is_none(value) for name, value in given.items() if name in _PLACES)
    return not unread


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_module_server(names: Names, call: ast.Call) -> bool:
    """["python", "-m", "http.server"] without its --bind."""
    for argument in call.args:
        for words in names.literals(argument):
            if isinstance(words, ast.List | ast.Tuple):
                said = [names.text(word) for word in words.elts]
                if "http.server" in said[1:] and not {"-b", "--bind"} & set(said):
                    return said[said.index("http.server") - 1] == "-m"
    return False


def names_wildcard(names: Names, name: str | None, value: ast.AST | None, may_be_empty: bool = True) -> bool:
    """Whether what is called ``host``, ``--host`` or the like is given all addresses. may_be_empty: "" says nothing."""
    if name is None or not NAMES.fullmatch(name):
        return False
    found = {text.strip() for text in names.texts(value)}
    return any(is_wildcard(text) and (text not in ("", "*") or not may_be_empty) for text in found)


def _is_pair(names: Names, call: ast.Call) -> bool:
    return bool(call.args) and any(isinstance(x, ast.Tuple | ast.List) for x in names.literals(call.args[0]))


def _host_texts(names: Names, node: ast.expr) -> Iterator[str]:
    """What the host in an argument may be: of (host, port) the first part."""
    yield from names.texts(node)
    if isinstance(node, ast.Attribute) and "socket.INADDR_ANY" in names.of(node):
        yield "*"
    for one in names.literals(node):
        if isinstance(one, ast.Tuple | ast.List) and one.elts:
            yield from _host_texts(names, one.elts[0])
        if isinstance(one, ast.List):  # of hosts
            yield from (text for host in one.elts[1:] for text in names.texts(host) if not text.isdigit())
