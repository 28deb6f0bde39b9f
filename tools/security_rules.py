"""What ``tools/security_lint.py`` looks for: names that are never used, arguments that must or must not be given."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping

from tools.security_names import Names

FIXES: Mapping[str, str] = {
    "unpickle": "exchange JSON, msgpack with a schema, or safetensors",
    "torch-load": "pass weights_only=True, as a constant, and no pickle_module",
    "numpy-load": "pass allow_pickle=False, as a constant",
    "pickle": "do not even import it: exchange JSON, msgpack with a schema, or safetensors",
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
        pandas.io.pickle.read_pickle torch.jit.load torch.export.load torch.package.PackageImporter torch.hub.load
        torch.distributed.checkpoint.load_state_dict torch.distributed.checkpoint.load torch.storage._load_from_bytes
        torch.distributed.checkpoint.FileSystemReader torch.utils.model_zoo.load_url torch._legacy_load
        torch.ops.load_library torch.classes.load_library ForkingPickler.loads _ForkingPickler.loads
        multiprocessing.reduction.loads sklearn.externals.joblib.load skops.io.load skops.io.loads copyreg.__newobj__
        shelve.Unpickler shelve.DbfilenameShelf pandas.compat.pickle_compat.load pandas.compat.pickle_compat.loads
        pandas.compat.pickle_compat.Unpickler pandas.read_hdf pandas.HDFStore jsonpickle.Unpickler keras.models.load_model
        tensorflow.keras.models.load_model hickle.load compress_pickle.load compress_pickle.loads srsly.pickle_loads
        diskcache.Cache dill._dill.Unpickler marshal._load pickle._Pickler.loads mlflow.pyfunc.load_model
        """
    ),
    "connection": _words(
        """
        multiprocessing.connection.Listener multiprocessing.connection.Client multiprocessing.connection.SocketListener
        multiprocessing.connection.SocketClient multiprocessing.managers.BaseManager multiprocessing.managers.SyncManager
        multiprocessing.Manager multiprocessing.managers.Server multiprocessing.connection.answer_challenge
        multiprocessing.connection.deliver_challenge multiprocessing.managers.SharedMemoryManager
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
        sympy.parsing.sympy_parser.parse_expr sympy.parsing.sympy_parser.eval_expr sympy.parsing.parse_expr
        sympy.parsing.mathematica.parse_mathematica
        timeit.timeit timeit.Timer timeit.repeat timeit.main cProfile.run cProfile.runctx profile.run profile.runctx
        pdb.run pdb.runeval pdb.runctx bdb.Bdb trace.Trace code.compile_command code.InteractiveConsole.push
        codeop.Compile codeop.CommandCompiler types.FunctionType types.CodeType imp.load_source imp.load_module
        imp.load_compiled importlib.machinery.SourceFileLoader importlib.machinery.SourcelessFileLoader
        importlib.machinery.ExtensionFileLoader logging.config.listen logging.config.fileConfig ctypes.pythonapi
        hydra.utils.instantiate hydra.utils.call jinja2.Template typing._eval_type numpy.safe_eval asteval.Interpreter
        simpleeval.simple_eval
        """
    ),
    "shell": _words(
        """
        os.system os.popen os.popen2 os.popen3 os.popen4 subprocess.getoutput subprocess.getstatusoutput
        ctypes.CDLL.system ctypes.CDLL.popen pipes.Template invoke.run platform.popen pexpect.runu
        asyncio.create_subprocess_shell commands.getoutput commands.getstatusoutput popen2.popen2 popen2.popen3
        """
    ),
    "yaml": _words(
        """
        yaml.unsafe_load yaml.unsafe_load_all yaml.full_load yaml.full_load_all yaml.UnsafeLoader yaml.FullLoader yaml.Loader
        yaml.CLoader yaml.CFullLoader yaml.CUnsafeLoader yaml.UnsafeConstructor yaml.FullConstructor
        yaml.Constructor ruamel.yaml.UnsafeConstructor ruamel.yaml.Constructor ruamel.yaml.unsafe_load_all
        ruamel.yaml.unsafe_load ruamel.yaml.Loader ruamel.yaml.UnsafeLoader
        """
    ),
    "mktemp": frozenset({"tempfile.mktemp", "os.tempnam", "os.tmpnam"}),
    "tls": _words(
        """
        ssl._create_unverified_context ssl._create_stdlib_context ssl.CERT_NONE ssl.VerifyMode.CERT_NONE
        ssl.wrap_socket paramiko.AutoAddPolicy paramiko.client.AutoAddPolicy
        """
    ),
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
    "full_load_all": "yaml",
    "unsafe_load_all": "yaml",
    "read_hdf": "unpickle",
    "_load_from_bytes": "unpickle",
    "runctx": "eval",
    "runeval": "eval",
    "getstatusoutput": "shell",
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
    "assert_hostname": ("tls", True),
    "ssl": ("tls", True),
    "cert_reqs": ("tls", True),
    "verify_mode": ("tls", True),
}
"""Arguments and keys: (rule, whether the value must be true rather than false)."""
ONLY_CALLS = frozenset({"verify", "ssl"})
"""Those of them that are other words' names where they are no argument."""
_VARIES = (ast.Name, ast.Attribute, ast.Subscript, ast.Call, ast.IfExp, ast.BoolOp, ast.Compare, ast.UnaryOp)
NEVER_VARY = frozenset({"shell", "torch-load", "numpy-load", "remote-code"})

PICKLES = _words(
    """
    pickle cPickle _pickle pickle5 cloudpickle ray.cloudpickle dill joblib marshal shelve jsonpickle hickle compress_pickle
    pickleshare multiprocessing.reduction pandas.compat.pickle_compat sklearn.externals.joblib diskcache
    """
)
"""Modules that make objects from bytes: outside tests they are not even imported."""
SAID = (
    (re.compile(r"^--trust[-_]remote[-_]code(?:$|[= ](?:1|true|yes|on)$)|\btrust_remote_code=(?:1|true|yes|on)\b", re.I),
     "remote-code"),
    (re.compile(r"tag:yaml\.org,2002:python/|!{2}python/"), "yaml"),
    (re.compile(r"^TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD$|^VLLM_ALLOW_INSECURE_SERIALIZATION$"), "torch-load"),
    (re.compile(r"^PYTHONHTTPSVERIFY$"), "tls"),
    (re.compile(r"^\w*TRUST_REMOTE_CODE$"), "remote-code"),
)  # fmt: skip
"""Texts that switch something on, with their rules."""

_SYMPY_PARSES = re.compile(r"sympy\.(?:[\w.]+\.)?(?:simplify|N|S|expand|factor|solve|nsimplify|lambdify)")
SAFE_LOADERS = frozenset({"yaml.SafeLoader", "yaml.CSafeLoader", "yaml.BaseLoader", "yaml.CBaseLoader"})
NUMPY_LOADS = frozenset({"numpy.load", "numpy.lib.format.read_array"})
TORCH_LOADS = frozenset({"torch.load", "torch.hub.load_state_dict_from_url"})
YAML_LOADS = frozenset({"yaml.load", "yaml.load_all", "ruamel.yaml.load", "ruamel.yaml.load_all"})
HASHES = re.compile(r"(?:hashlib\.|Crypto(?:dome)?\.Hash\.)(md5|sha1|MD5|SHA1?)(?:\.new)?$")
NEED_CALL = NUMPY_LOADS | TORCH_LOADS | YAML_LOADS | {"compile"}
"""What is safe with the right arguments, and cannot be judged where it is handed on without them."""


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


def is_wrong(names: Names, name: str, value: ast.expr, in_call: bool) -> bool:
    """Whether the rule of KEYWORDS is broken by giving this name this value. What must never vary must be a constant in calls,
    trust_remote_code everywhere."""
    rule, wanted = KEYWORDS[name]
    if name in ("cert_reqs", "verify_mode"):
        none = isinstance(value, ast.Constant) and value.value in (0, "CERT_NONE") and value.value is not None
        return none or "ssl.CERT_NONE" in names.of(value)
    if isinstance(value, ast.Constant) and value.value is None and (not wanted or rule == "tls"):
        return False
    if rule in NEVER_VARY and (in_call or (rule == "remote-code" and isinstance(value, _VARIES))):
        return truth(value) is not wanted
    is_flag = isinstance(value, ast.UnaryOp) or (isinstance(value, ast.Constant) and isinstance(value.value, int))
    return is_flag and truth(value) is (not wanted)


def judge_call(names: Names, called: set[str], call: ast.Call) -> str | None:
    """The rule that a call breaks by its arguments. called: what is called; for functools.partial(f, ...) it is f."""
    given, _ = arguments(call)
    for known, check in _CALLS:
        if called & known and (rule := check(names, call, given)):
            return rule
    if any(HASHES.search(name) for name in called) and truth(given.get("usedforsecurity")) is not False:
        return "weak-hash"
    return _parsed(names, called, call)


def _torch_load(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    fine = truth(given.get("weights_only")) is True and "pickle_module" not in given and len(call.args) < 3
    return None if fine and not arguments(call)[1] else "torch-load"


def _numpy_load(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    allowed = given.get("allow_pickle", call.args[2] if len(call.args) > 2 else None)
    return None if truth(allowed) is False and not arguments(call)[1] else "numpy-load"


def _npz(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    allowed = given.get("allow_pickle", call.args[2] if len(call.args) > 2 else None)
    return None if allowed is None or truth(allowed) is False else "numpy-load"


def _yaml_load(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    loader = given.get("Loader", call.args[1] if len(call.args) > 1 else None)
    found = names.of(loader)
    return None if found and found <= SAFE_LOADERS else "yaml"


def _ruamel(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    kind = given.get("typ", call.args[0] if call.args else None)
    kinds = kind.elts if isinstance(kind, ast.List | ast.Tuple) else [kind]
    fine = kind is None or all(names.text(one) in ("safe", "rt", "pure", "string") for one in kinds)
    return None if fine and not arguments(call)[1] else "yaml"


def _parsed(names: Names, called: set[str], call: ast.Call) -> str | None:
    """sympy's functions evaluate texts; what is no text by its spelling may be one."""
    if not call.args or not any(_SYMPY_PARSES.fullmatch(name) for name in called):
        return None
    is_made = isinstance(call.args[0], ast.Call | ast.BinOp | ast.UnaryOp | ast.Constant)
    is_made = is_made and not names.texts(call.args[0])
    return None if is_made else "eval"


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


def _tls_context(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    protocol = given.get("protocol", call.args[0] if call.args else None)
    fine = {"ssl.PROTOCOL_TLS_CLIENT", "ssl.PROTOCOL_TLS_SERVER", "ssl._SSLMethod.PROTOCOL_TLS_CLIENT"}
    return None if names.of(protocol) & fine else "tls"


def _unpack(names: Names, call: ast.Call, given: Mapping[str, ast.expr]) -> str | None:
    return None if "filter" in given else "extract"


_CALLS: tuple[tuple[frozenset[str], Callable[[Names, ast.Call, Mapping[str, ast.expr]], str | None]], ...] = (
    (TORCH_LOADS, _torch_load),
    (NUMPY_LOADS, _numpy_load),
    (frozenset({"numpy.NpzFile"}), _npz),
    (YAML_LOADS, _yaml_load),
    (frozenset({"ruamel.yaml.YAML"}), _ruamel),
    (frozenset({"compile"}), _compile),
    (frozenset({"runpy.run_module"}), _run_module),
    (frozenset({"hashlib.new", "hashlib.file_digest", "hmac.new", "hmac.digest"}), _new_hash),
    (frozenset({"torch.distributed.TCPStore"}), _store),
    (frozenset({"torch.distributed.init_process_group"}), _process_group),
    (frozenset({"ssl.SSLContext"}), _tls_context),
    (frozenset({"shutil.unpack_archive"}), _unpack),
)
