"""The lint follows variables, formats, functions and keyword dictionaries, and reads scripts and settings."""

from __future__ import annotations

import pytest

from tools.security_lint import check_source, check_tree
from tools.security_texts import check_text

BAD = {
    "unpickle": r"""
import pickle; getattr(pickle, "sdaol"[::-1])(b)
import pickle; getattr(pickle, "%s" % "loads")(b)
import pickle; getattr(pickle, "{}".format("loads"))(b)
import pickle; pickle.__getattribute__("loads")(b)
import pickle; vars(pickle).get("loads")(b)
import pickle; object.__getattribute__(pickle, "loads")(b)
import pickle; pickle.__dict__.get("loads")(b)
import inspect, pickle; inspect.getattr_static(pickle, "loads")(b)
import pkgutil; pkgutil.resolve_name("pickle:loads")(b)
import pydoc; pydoc.locate("pickle.loads")(b)
import pickle\ndef m(): return pickle\nm().loads(b)
import pickle; (lambda: pickle)().loads(b)
import pickle\ndef f(m): return m.loads(b)\nf(pickle)
import pickle; [m.loads(b) for m in {pickle: 1}]
import shelve; shelve.Unpickler(f).load()
import cloudpickle; cloudpickle.pickle.loads(b)
import torch; torch.serialization.pickle.loads(b)
import multiprocessing.reduction as r; r.pickle.loads(b)
import multiprocessing.queues as q; q._ForkingPickler.loads(b)
import torch; torch.storage._load_from_bytes(b)
import torch.utils.model_zoo as z; z.load_url(u)
import torch.distributed.checkpoint as dcp; dcp.load(s, checkpoint_id=p)
import torch; torch.serialization._legacy_load(f, None, p)
import pandas.compat.pickle_compat as pc; pc.load(f)
import pandas as pd; pd.read_hdf("x")
import torch; torch.ops.load_library(path)
import pickle as p\nclass A:\n  codec = p\n  def f(self, b): return self.codec.loads(b)
import multiprocessing.connection as c; c._ForkingPickler.loads(b)
""",
    "torch-load": r"""
import torch\ndef t(): return torch\nt().load(f)
import torch; torch.load(f, weights_only=True, **kw)
import os; os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
""",
    "eval": r"""
eval = eval; list(map(eval, texts))
exec = exec; handlers = {"x": exec}
class A:\n  def exec(self): pass\nexec(text)
class A:\n  def compile(self): pass\ncompile(text, "x", "exec")
class A:\n  def eval(self): pass\nrun = eval
import builtins; builtins.__dict__.get("eval")(x)
import timeit; timeit.Timer(x).timeit()
import timeit; timeit.repeat(x)
import code; code.compile_command(x)
import codeop; codeop.Compile()(x, "f", "exec")
import types; types.FunctionType(code, {})()
import importlib.machinery as m; m.SourceFileLoader("m", path).load_module()
import sympy; sympy.S(text)
import sympy; sympy.simplify(text)
import sympy; sympy.N(text)
frame.query(text)
import jinja2; jinja2.Template(text).render()
import pandas as pd; pd.DataFrame.eval(frame, text)
import logging.config; logging.config.fileConfig(path)
import operator; operator.methodcaller("eval", text)(frame)
import ctypes; ctypes.pythonapi.PyRun_SimpleString(text)
import builtins as bi; getattr(bi, name)(x)
df.query(f"a > {x}")
""",
    "shell": r"""
import ctypes; ctypes.CDLL(None).system(b"ls")
import subprocess; subprocess.Popen("ls", -1, None, None, None, None, None, True, True)
import subprocess; subprocess.run(c, **dict([("shell", True)]))
import subprocess\ndef f(**k): subprocess.run(c, **k)
options.setdefault("shell", True)
import subprocess; subprocess.run(["bash", "-c"] + [x])
import subprocess; argv = ["bash", "-c", x]; subprocess.run(argv)
import subprocess; subprocess.run(["bash", "-e", "-c", x])
import subprocess; subprocess.run(["bash", "-o", "pipefail", "-c", x])
import subprocess; subprocess.run("bash -c x".split())
import subprocess; subprocess.run([SHELL, "-c", x])
import os, subprocess; subprocess.run([os.environ["SHELL"], "-c", x])
import subprocess; subprocess.run(["env", "-S", f"bash -c {x}"])
import subprocess; subprocess.run(["su", "-c", x])
import subprocess; subprocess.run(["bash"], input=x)
import subprocess; subprocess.run(x, executable="/bin/bash")
import pipes; pipes.Template().open("x", "r")
import subprocess; cmd = ["bash", "-c"]; cmd.append(x); subprocess.run(cmd)
import subprocess; subprocess.Popen(["sh"], stdin=subprocess.PIPE)
import shlex, subprocess; subprocess.run(shlex.split("bash -c 'x'"))
import subprocess; base = ["bash"]; subprocess.run(base + ["-c", x])
import subprocess as s; s.run(f"bash -c {x}".split())
K = [("shell", True)]
""",
    "yaml": r"""
import yaml; yaml.constructor.UnsafeConstructor
from yaml.constructor import UnsafeConstructor, FullConstructor
import yaml; yaml.SafeLoader.add_multi_constructor("tag:yaml.org,2002:python/", f)
from ruamel.yaml import YAML; YAML(typ=["unsafe"])
from ruamel.yaml import YAML; YAML(typ=kind)
import yaml\ndef y(): return yaml\ny().load(x)
""",
    "wildcard": r"""
import os; s.bind((os.environ.get("HOST", ""), 80))
ADDRESS = ("", 80); s.bind(ADDRESS)
from http.server import HTTPServer; A = ("", 80); HTTPServer(A, H)
s.bind((str(), 80))
loop.create_server(P, port=80)
loop.create_server(P, None, 80)
import asyncio; asyncio.get_running_loop().create_server(P, host=None, port=80)
import asyncio; asyncio.streams.start_server(cb, None, 80)
import websockets; websockets.serve(h, None, 80)
zs.bind("tcp://%s:5" % "*")
zs.bind("tcp://{}:5".format("*"))
zs.bind("tcp://{host}:5".format(host="*"))
zs.bind("".join(["tcp://", "*", ":5"]))
ep = f"tcp://{HOSTS['all']}:5"; HOSTS = {"all": "*"}; zs.bind(ep)
import socketserver\nclass S(socketserver.TCPServer):\n  def __init__(self): super().__init__(("", 80), H)
import socketserver; socketserver.TCPServer.__init__(s, ("", 80), H)
from aiohttp import web; web.run_app(app)
from aiohttp import web; web.TCPSite(runner, port=80)
import prometheus_client as p; p.start_http_server(8000)
import trio; trio.serve_tcp(h, 80)
import subprocess; subprocess.run(["python", "-m", "http.server"])
import http.server; http.server.test()
import ray; ray.init(dashboard_host="")
s.bind(address)\naddress = ["", 80]
class C:\n  address = ("", 80)\n  def f(self): self.s.bind(self.address)
def f(host): s.bind((host, 80))\nf("")
s.bind(tuple(["", 80]))
s.bind((os.getenv("H", "::"), 80))
s.bind((cfg.get("host", ""), 80))
import asyncio; asyncio.start_server(cb, ["127.0.0.1", "::"], 80)
for h in ("", "127.0.0.1"): s.bind((h, 80))
s.bind(("%s" % "", 80))
socket.socket.bind(s, ("", 80))
from prometheus_client import start_http_server; start_http_server(8000)
from prometheus_client import start_http_server; start_http_server(8000, addr="::")
parser.add_argument("--host", default="::")
HOST = "::"
subprocess.run(["vllm", "serve", "--host", "::"])
from tornado.web import Application; Application().listen(8080)
settings = {"host": "", "port": 80}
K = {"host": "::"}
s.bind(":5555")
import socketserver; A = {"all": ("", 80)}; socketserver.TCPServer(A["all"], H)
""",
    "tls": r"""
import requests; requests.get(u, verify=0)
context.verify_mode = 0
import ssl; ssl.SSLContext()
import urllib3; urllib3.PoolManager(cert_reqs="CERT_NONE")
import aiohttp; aiohttp.TCPConnector(ssl=False)
import requests; s = requests.Session(); s.verify = False
import httpx; K = {"verify": False}; httpx.get(u, **K)
import ssl; ssl.SSLContext(ssl.PROTOCOL_TLS)
K = {"check_hostname": False}
""",
    "remote-code": r"""
setattr(config, "trust_remote_code", True)
import subprocess; subprocess.run(["vllm", "serve", m, "--trust-remote-code"])
o = dict([("trust_remote_code", True)])
config |= {"trust_remote_code": flag}
cfg["trust_remote_code"] = flag
class Model:\n  trust_remote_code: bool = True
trust_remote_code = True
x = "vllm.trust_remote_code=true"
f(["--trust-remote-code=true"])
""",
    "pyobj": r"""
getattr(s, "recv_%s" % "pyobj")()
""",
    "numpy-load": r"""
import numpy as np\ndef n(): return np\nn().load(f)
import numpy as np; np.lib.npyio.NpzFile(f, True, True)
import numpy as np; np.load(f, allow_pickle=False, **kw)
""",
    "pickle": r"""
import pickle
import pickle as p; p.dumps(x)
from ray import cloudpickle
from joblib import Parallel
import multiprocessing.reduction
__import__("marshal")
import importlib; m = importlib.import_module("dill")
""",
}

GOOD = r"""
import subprocess; subprocess.run(["git", "-c", "a=b", "log"])
import subprocess; subprocess.run(["bash", "tools/x.sh", "-c"])
import subprocess; subprocess.run(["bash", "/tools/x.sh", "-c", "y"])
import subprocess; subprocess.run([sys.executable, "-c", x], input=y)
import subprocess; K = {"check": True}; subprocess.run(c, **K)
import subprocess; subprocess.run(c, **kw, shell=False)
import subprocess; subprocess.run(["python", "-m", "http.server", "--bind", "127.0.0.1"])
loop.create_server(P, "127.0.0.1", 80)
loop.create_server(P, sock=s)
factory.create_server(x)
import ssl; ssl.create_default_context()
import ssl; ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
s.listen(128)
context.verify_mode = ssl.CERT_REQUIRED
tokenizer.query(x)
session.query(User)
d.get("loads")
cache.pop("eval")
from ruamel.yaml import YAML; YAML(); YAML(typ="safe")
import sympy; sympy.simplify(a + b); sympy.Symbol("x"); sympy.S(1); sympy.S.One
import importlib; importlib.import_module(name).run()
class A:\n  def exec(self): pass\nA().exec()
class A:\n  def eval(self, x): return self\n  def f(self): return self.eval
def f(host=""): connect(host)
config = {"host": "", "path": "x"}
uvicorn.run(app, host="127.0.0.1")
import prometheus_client as p; p.start_http_server(8000, addr="127.0.0.1")
parser.add_argument("--host", default="")
times(verify=0.1, ssl=None)
import websockets; websockets.serve(h, "127.0.0.1", 80)
import http.server; http.server.HTTPServer(("127.0.0.1", 0), H)
class S(Base):\n  def __init__(self): super().__init__(("", "x"))
import subprocess; subprocess.run(["bash", "tools/install.sh"])
import tokenize; tokens = {"shell": "a word about it"}
def compile(x): return x\ncompile("x")
from re import compile; compile("x")
"""


def snippets(text: str) -> list[str]:
    return [line.replace("\\n", "\n") for line in text.strip().splitlines()]


@pytest.mark.parametrize("rule", BAD)
def test_every_spelling_is_found(rule):
    missed = [code for code in snippets(BAD[rule]) if rule not in {f.rule for f in check_source(code)}]
    assert not missed, f"not found as {rule}: {missed}"


def test_nothing_is_found_in_what_is_fine():
    found = {code: [str(f) for f in check_source(code)] for code in snippets(GOOD)}
    assert not {code: f for code, f in found.items() if f}


def test_a_test_may_pickle_but_not_unpickle():
    assert not check_source("import pickle; pickle.dumps(x)", is_test=True)
    assert {f.rule for f in check_source("import pickle; pickle.loads(x)", is_test=True)} == {"unpickle"}


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('"trust_remote_code": true', "remote-code"),
        ("vllm: {trust_remote_code: yes}", "remote-code"),
        ("- trust-remote-code: true", "remote-code"),
        ('args = ["--trust-remote-code"]', "remote-code"),
        ('host: "::"', "wildcard"),
        ("dashboard_host: ''", "wildcard"),
        ("  host: ::", "wildcard"),
        ('"host": "0.0.0.0",', "wildcard"),
        ('bind = "*"', "wildcard"),
        ("endpoint: tcp://0:5", "wildcard"),
        ("x: !!python/object/apply:os.system [ls]", "yaml"),
        ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1", "torch-load"),
        ("weights_only: false", "torch-load"),
        ("verify_ssl: false", "tls"),
    ],
)
def test_settings_are_read(line, rule):
    assert [(1, rule)] == [found[:2] for found in check_text(line, is_script=False)]
    assert not list(check_text(f"# {line}", is_script=False))


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('eval "$command"', "eval"),
        ("python -c 'exec(open(1).read())'", "eval"),
        ("curl -s https://x.example | sh", "shell"),
        ("curl --insecure https://x.example", "tls"),
        ("python -m http.server 80", "wildcard"),
        ("vllm serve model --host 0.0.0.0", "wildcard"),
        ("ray start --dashboard-host=::", "wildcard"),
        ("vllm serve model --trust-remote-code", "remote-code"),
        ("python -c 'import pickle; pickle.loads(b)'", "unpickle"),
    ],
)
def test_scripts_are_read(line, rule):
    assert rule in {found[1] for found in check_text(line, is_script=True)}


@pytest.mark.parametrize(
    "line",
    [
        "host: 127.0.0.1",
        "host: 10.0.0.1",
        "hosts: 0",
        "ghost: 0",
        "trust_remote_code: false",
        "--trust-remote-code false",
        "python -m http.server --bind 127.0.0.1",
        "curl -fsSL -o kind https://x.example",
        "python -m evaluate --eval x",
        "retries: 0",
    ],
)
def test_ordinary_settings_and_scripts_stay(line):
    assert not list(check_text(line, is_script=True))


def test_folders_are_skipped_on_top_alone_and_no_kind_of_file_is_forgotten(tmp_path):
    for name, text in {
        "hapo_async/runs/a.py": "eval(x)",
        "hapo_async/build/b.py": "eval(x)",
        "tools/dist/c.sh": "eval $x",
        "tool": "#!/usr/bin/env python3\neval(x)",
        "Makefile": "all:\n\teval x",
        "x.toml": "trust_remote_code = true",
        "x.json": '{"trust_remote_code": true}',
        ".ci/run": "#!/bin/sh\neval x",
        "runs/d.py": "eval(x)",
        "build/e.py": "eval(x)",
        ".venv/f.py": "eval(x)",
        "hapo_async/node_modules/g.py": "eval(x)",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "odd.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "zero.py").write_bytes(b"x = 1\x00\n")
    found = {f.path: f.rule for f in check_tree(tmp_path)}
    assert {path for path, rule in found.items() if rule == "eval"} == {
        "hapo_async/runs/a.py", "hapo_async/build/b.py", "tools/dist/c.sh", "tool", "Makefile", ".ci/run",
    }  # fmt: skip
    assert found["x.toml"] == found["x.json"] == "remote-code" and found["odd.py"] == found["zero.py"] == "syntax"
    assert len(found) == 10
