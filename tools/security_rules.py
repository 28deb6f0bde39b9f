"""What ``tools/security_lint.py`` looks for: names that are never used, arguments that must or must not be given."""

from __future__ import annotations

import ast
import ipaddress
import re
import socket
from collections.abc import Callable, Mapping

from tools.security_names import Names

FIXES: Mapping[str, str] = {
    "unpickle": "exchange JSON, msgpack with a schema, or safetensors",
    "torch-load": "pass weights_only=True, as a constant, and no pickle_module",
    "numpy-load": "pass allow_pickle=False, as a constant",
    "pyobj": "send checked msgpack headers and raw frames (actors/transports/wire.py)",
    "connection": "use a pipe between parent and child; over a network, actors/transports",
    "objects": "send tensors or checked bytes: this unpickles what other processes sent",
    "eval": "look names up in a table, or parse with ast.literal_eval or json",
    "shell": "pass an argv list, without a shell",
    "yaml": "use yaml.safe_load",
    "remote-code": "leave trust_remote_code False: a model folder is data",
    "safetensors": "load safetensors only",
    "wildcard": "bind 127.0.0.1 or the address of this node",
    "mktemp": "use tempfile.TemporaryDirectory, mkdtemp or NamedTemporaryFile",
    "weak-hash": "use hashlib.sha256 or blake2b; xxhash where only accidents count",
    "tls": "leave certificates checked",
    "extract": "pass filter='data', or unpack files one by one under checked names",
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALWAYS: Mapping[str, frozenset[str]] = {
    "unpickle": _words(
        """
        pickle.load pickle.loads pickle._load pickle._loads pickle.Unpickler pickle._Unpickler cloudpickle.load
        cloudpickle.loads dill.load dill.loads dill.Unpickler dill.load_session dill.load_module dill.load_module_asdict
        marshal.load marshal.loads shelve.open shelve.Shelf shelve.BsdDbShelf shelve.DbfilenameShelf joblib.load
        jsonpickle.decode jsonpickle.loads jsonpickle.unpickler.decode jsonpickle.unpickler.Unpickler pandas.read_pickle
        pandas.io.pickle.read_pickle torch.jit.load torch.package.PackageImporter torch.hub.load
        torch.distributed.checkpoint.load_state_dict multiprocessing.reduction.ForkingPickler.loads
        multiprocessing.reduction.loads sklearn.externals.joblib.load skops.io.load copyreg.__newobj__
        """
    ),
    "connection": _words(
        """
        multiprocessing.connection.Listener multiprocessing.connection.Client multiprocessing.connection.SocketListener
        multiprocessing.connection.SocketClient multiprocessing.managers.BaseManager multiprocessing.managers.SyncManager
        xmlrpc.server.SimpleXMLRPCServer xmlrpc.server.DocXMLRPCServer
        """
    ),
    "objects": _words(
        """
        torch.distributed.broadcast_object_list torch.distributed.all_gather_object torch.distributed.gather_object
        torch.distributed.scatter_object_list torch.distributed.recv_object_list torch.distributed.send_object_list
        torch.distributed.rpc.init_rpc
        """
    ),
    "eval": _words(
        """
        eval exec code.interact code.InteractiveConsole code.InteractiveInterpreter codeop.compile_command runpy.run_path
        pandas.eval numexpr.evaluate sympy.sympify sympy.parse_expr sympy.core.sympify.sympify
        sympy.parsing.sympy_parser.parse_expr sympy.parsing.sympy_parser.eval_expr timeit.timeit cProfile.run profile.run
        """
    ),
    "shell": _words(
        """
        os.system os.popen os.popen2 os.popen3 os.popen4 subprocess.getoutput subprocess.getstatusoutput
        asyncio.create_subprocess_shell commands.getoutput commands.getstatusoutput popen2.popen2 popen2.popen3
        """
    ),
    "yaml": _words(
        """
        yaml.unsafe_load yaml.unsafe_load_all yaml.full_load yaml.full_load_all yaml.UnsafeLoader yaml.FullLoader yaml.Loader
        yaml.CLoader yaml.CFullLoader yaml.CUnsafeLoader yaml.UnsafeConstructor yaml.FullConstructor
        ruamel.yaml.unsafe_load ruamel.yaml.Loader ruamel.yaml.UnsafeLoader
        """
    ),
    "mktemp": frozenset({"tempfile.mktemp", "os.tempnam", "os.tmpnam"}),
    "tls": frozenset({"ssl._create_unverified_context", "ssl.CERT_NONE"}),
}
"""Names of which every mention counts, by rule."""

METHODS: Mapping[str, str] = {
    "recv_pyobj": "pyobj",
    "send_pyobj": "pyobj",
    "read_pickle": "unpickle",
    "subprocess_shell": "shell",
    "create_subprocess_shell": "shell",
    "unsafe_load": "yaml",
    "full_load": "yaml",
}
"""Attributes of which every mention counts, whoever has them."""

KEYWORDS: Mapping[str, tuple[str, bool]] = {
    "shell": ("shell", False),
    "trust_remote_code": ("remote-code", False),
    "allow_pickle": ("numpy-load", False),
    "weights_only": ("torch-load", True),
    "use_safetensors": ("safetensors", True),
    "verify": ("tls", True),
    "verify_ssl": ("tls", True),
    "check_hostname": ("tls", True),
}
"""Arguments and keys: (rule, whether the value must be true rather than false)."""

SAFE_LOADERS = frozenset({"yaml.SafeLoader", "yaml.CSafeLoader", "yaml.BaseLoader", "yaml.CBaseLoader"})
NUMPY_LOADS = frozenset({"numpy.load", "numpy.lib.format.read_array"})
TORCH_LOADS = frozenset({"torch.load", "torch.hub.load_state_dict_from_url"})
YAML_LOADS = frozenset({"yaml.load", "yaml.load_all", "ruamel.yaml.load", "ruamel.yaml.load_all"})
HASHES = re.compile(r"(?:hashlib\.|Crypto(?:dome)?\.Hash\.)(md5|sha1|MD5|SHA1?)(?:\.new)?$")
NEED_CALL = NUMPY_LOADS | TORCH_LOADS | YAML_LOADS | {"compile"}
"""What is safe with the right arguments, and cannot be judged where it is handed on without them."""

BINDERS = _words(
    """
    bind bind_to_random_port create_server start_server HTTPServer ThreadingHTTPServer TCPServer ThreadingTCPServer
    ForkingTCPServer UDPServer ThreadingUDPServer SimpleXMLRPCServer DocXMLRPCServer make_server add_insecure_port
    add_secure_port create_datagram_endpoint TCPStore Listener serve run run_app run_simple listen TCPSite WSGIServer
    """
)
"""Last parts of the names of what opens a listening socket."""
_HOSTS = ("host", "hostname", "address", "addr", "local_addr", "interface", "server_address", "host_name", "bind")
_OPTIONAL_HOST = frozenset({"asyncio.start_server"})

NAMED_WILDCARD = re.compile(
    r"(?:^|[/@\[\s=,])(?:0\.0\.0\.0|\[::\])(?::|/|,|\s|$)|^(?:tcp|udp|ws|wss|epgm|pgm|http|https|grpc)://(?:\*|0)(?::|/|$)"
)
_ENDPOINT = re.compile(
    r"^(?:[a-z0-9+]+://)?(\[[0-9a-fA-F:.]*\]|[^:/\[\]]*|[0-9a-fA-F:.]*::[0-9a-fA-F:.]*)(?::[^/]*)?(?:/.*)?$"
)
SHELLS = re.compile(r"^(?:.*/)?(?:sh|bash|zsh|dash|ksh|csh|fish|cmd|cmd\.exe|powershell|pwsh)$")


def is_wildcard(host: str) -> bool:
    """Whether a text names all addresses of this machine, as a host or as an endpoint such as tcp://*:5555."""
    text = host.strip()
    if text in ("", "*") or NAMED_WILDCARD.search(text):
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


def truth(node: ast.AST | None) -> bool | None:
    """Of a constant; None for what is only known when it runs."""
    if isinstance(node, ast.Constant):
        return bool(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = truth(node.operand)
        return None if inner is None else not inner
    return None


def arguments(call: ast.Call) -> tuple[dict[str, ast.expr], bool]:
    """Keyword arguments, those of ``**{...}`` and ``**dict(...)`` too; whether others may come from a ``**`` that is not read
    here."""
    found: dict[str, ast.expr] = {}
    unread = False
    for keyword in call.keywords:
        if keyword.arg is not None:
            found[keyword.arg] = keyword.value
        elif isinstance(keyword.value, ast.Dict):
            for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    found[key.value] = value
                else:
                    unread = True
        elif isinstance(keyword.value, ast.Call) and not keyword.value.args:
            inner, more = arguments(keyword.value)
            found |= inner
            unread = unread or more
        else:
            unread = True
    return found, unread


def judge_call(names: Names, called: set[str], call: ast.Call) -> str | None:
    """The rule that a call breaks by its arguments. called: what is called; for functools.partial(f, ...) it is f."""
    given, _ = arguments(call)
    for known, check in _CALLS:
        if called & known and (rule := check(names, call, given)):
            return rule
    if any(HASHES.search(name) for name in called) and truth(given.get("usedforsecurity")) is not False:
        return "weak-hash"
    return None


def _torch_load(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    fine = truth(given.get("weights_only")) is True and "pickle_module" not in given and len(call.args) < 3
    return None if fine else "torch-load"


def _numpy_load(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    allowed = given.get("allow_pickle", call.args[2] if len(call.args) > 2 else None)
    return None if truth(allowed) is False else "numpy-load"


def _yaml_load(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    loader = given.get("Loader", call.args[1] if len(call.args) > 1 else None)
    found = names.of(loader)
    return None if found and found <= SAFE_LOADERS else "yaml"


def _ruamel(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    kind = names.text(given.get("typ", call.args[0] if call.args else None))
    return "yaml" if kind == "unsafe" else None


def _compile(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    flags = given.get("flags", call.args[3] if len(call.args) > 3 else None)
    return None if "ast.PyCF_ONLY_AST" in names.of(flags) else "eval"


def _run_module(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    name = given.get("mod_name", call.args[0] if call.args else None)
    return None if names.text(name) is not None else "eval"


def _new_hash(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    values = [*call.args, *given.values()]
    weak = any((names.text(v) or "").lower() in ("md5", "sha1", "sha-1") for v in values)
    weak = weak or any(HASHES.search(name) for v in values for name in names.of(v))
    return "weak-hash" if weak and truth(given.get("usedforsecurity")) is not False else None


def _store(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    """torch binds every address unless it is given a socket."""
    master = given.get("is_master", call.args[3] if len(call.args) > 3 else None)
    serves = truth(master) is not False and master is not None
    return "wildcard" if serves and "master_listen_fd" not in given else None


def _process_group(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    """Without a store, rank 0 opens one on every address."""
    return None if "store" in given or len(call.args) > 5 else "wildcard"


def _unpack(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    return None if "filter" in given else "extract"


_CALLS: tuple[tuple[frozenset[str], Callable[[Names, ast.Call, Mapping[str, ast.expr]], str | None]], ...] = (
    (TORCH_LOADS, _torch_load),
    (NUMPY_LOADS, _numpy_load),
    (YAML_LOADS, _yaml_load),
    (frozenset({"ruamel.yaml.YAML"}), _ruamel),
    (frozenset({"compile"}), _compile),
    (frozenset({"runpy.run_module"}), _run_module),
    (frozenset({"hashlib.new", "hashlib.file_digest", "hmac.new", "hmac.digest"}), _new_hash),
    (frozenset({"torch.distributed.TCPStore"}), _store),
    (frozenset({"torch.distributed.init_process_group"}), _process_group),
    (frozenset({"shutil.unpack_archive"}), _unpack),
)


def binds_wildcard(names: Names, called: set[str], last: str, call: ast.Call) -> bool:
    """Whether a call of something in BINDERS opens a socket on all addresses. last: the last part of its name."""
    given, unread = arguments(call)
    hosts = [given[name] for name in _HOSTS if name in given]
    if last in ("start_server", "serve") or (last == "create_server" and not _is_pair(call)):
        hosts += call.args[1:2]  # behind a handler
    if last not in ("run", "serve", "run_app", "start_server"):
        hosts += call.args[:1]
    if any(is_wildcard(text) for host in hosts for text in _host_texts(names, host)):
        return True
    is_asyncio = bool(called & _OPTIONAL_HOST)
    if is_asyncio and len(call.args) < 2 and not ({"host", "sock", "path"} & given.keys()) and not unread:
        return True
    return is_asyncio and any(isinstance(host, ast.Constant) and host.value is None for host in hosts)


def _is_pair(call: ast.Call) -> bool:
    return bool(call.args) and isinstance(call.args[0], ast.Tuple | ast.List)


def _host_texts(names: Names, node: ast.expr) -> set[str]:
    """What the host in an argument may be: of (host, port) the first part."""
    if isinstance(node, ast.Tuple | ast.List):
        return _host_texts(names, node.elts[0]) if node.elts else set()
    if isinstance(node, ast.Attribute) and "socket.INADDR_ANY" in names.of(node):
        return {"*"}
    return names.any_texts(node)
