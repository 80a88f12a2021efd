"""Holds the tree to what STYLE.md says and a machine can check, by syntax tree.

``findings(path, source)`` is the whole checker: a function over text, so that each rule is itself
tested below with a planted violation. A rule that cannot fail is not a rule.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kvcache", "client", "server", "eviction", "tests", "benchmarks", ".ci")
PACKAGES = ("kvcache", "client", "server", "eviction")
TEXTS = ("*.md", "*.toml", "Makefile", ".ci/run", "docs/*.md", "requirements/*.txt")
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60

# Who may import whom. "above" is cli.py, demo.py and the contract of stores: they see all, and nothing
# sees them.
ARROWS: dict[str, frozenset[str]] = {
    "kvcache": frozenset({"kvcache"}),
    "eviction": frozenset({"eviction", "kvcache"}),
    "client": frozenset({"client", "kvcache"}),
    "server": frozenset({"server", "eviction", "kvcache"}),
    "above": frozenset({"above", "server", "client", "eviction", "kvcache"}),
}
ABOVE = re.compile(
    r"kvcache/(cli|demo)(_\w+)?\.py|kvcache/(cli|demo)/.*|kvcache/__main__\.py"
    r"|kvcache/testing/(slices|stores\w*|threaded)\.py|kvcache/simulation/.*"
)

# A heavy or replaceable library is imported in the files named for it, and nowhere else. The engine that
# the demo starts is a process of its own, and this one file is what runs in it.
DEMO_ENGINE = r"|kvcache/demo_engine_worker\.py"
HEAVY: dict[str, str] = {
    "aiohttp": r"server/http\w*\.py",
    "cuda": r"kvcache/device/vmm\.py",
    "lmdb": r"kvcache/tiers/nvme_index_child\.py",
    "msgpack": r"kvcache/packing\.py",
    "prometheus_client": r"kvcache/metrics\w*\.py",
    "redis": r"kvcache/redis\.py",
    "sglang": r"client/connectors/sglang\w*\.py",
    "torch": r"client/connectors/\w+\.py|kvcache/device/\w+\.py|kvcache/tiers/hbm\.py" + DEMO_ENGINE,
    "triton": r"kvcache/device/kernels\.py",
    "transformers": r"client/connectors/transformers\w*\.py" + DEMO_ENGINE,
    "nixl_cu12": r"kvcache/transport/nixl\.py",
    "nixl_cu13": r"kvcache/transport/nixl\.py",
    "ucxx": r"kvcache/transport/ucx\.py",
    "uvloop": r"server/(node|cli)\.py",
    "vllm": r"client/connectors/vllm\w*\.py" + DEMO_ENGINE,
    "xxhash": r"kvcache/sums\w*\.py",
    "zmq": r"kvcache/engine_events/zmq\w*\.py",
}

# Where a broad ``except`` that does not raise again may stand: the borders to engines' and policies'
# code, and the top of the node's tasks.
BORDERS = re.compile(
    r"client/connectors/\w+\.py|server/node\.py|kvcache/guard\.py|kvcache/cli_policy\.py|tests/.*|benchmarks/.*"
)
PRINTERS = re.compile(
    r"(kvcache|server|client)/(cli|demo)(_\w+)?\.py|eviction/commands/.*|benchmarks/.*|tests/.*|\.ci/.*"
)

BANNED_MODULES = frozenset({"pickle", "marshal", "shelve", "dill", "cloudpickle"})
BANNED_CALLS = frozenset({"eval", "exec", "hash", "torch.load"})
WORDS = ("FIX" + "ME", "TO" + "DO", "XX" + "X", "HA" + "CK")
UNFINISHED = re.compile(rf"\b({'|'.join(WORDS)})\b")
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|root|home/\w+|Users/\w+)/")

Rule = Callable[[str, ast.Module], Iterator[tuple[int, str]]]


def findings(path: str, source: str) -> list[str]:
    """What is wrong with the file at ``path`` (relative to the root, real folders), one line each."""
    tree = ast.parse(source)
    found = [(line, text) for rule in RULES for line, text in rule(path, tree)]
    found += text_findings(source)
    if (lines := source.count("\n")) > FILE_LINES_MAX:
        found.append((lines, f"file is over {FILE_LINES_MAX} lines"))
    found += comment_findings(source)
    return [f"{path}:{line}: {text}" for line, text in sorted(found)]


def text_findings(source: str) -> list[tuple[int, str]]:
    """What no text file may hold, whatever its language."""
    return [
        (number, f"machine path {match.group()!r}")
        for number, line in enumerate(source.splitlines(), 1)
        if (match := MACHINE_PATH.search(line))
    ]


def comment_findings(source: str) -> Iterator[tuple[int, str]]:
    """Unfinished work in comments and strings. ``todo`` in lower case is a field of our errors."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING) and UNFINISHED.search(token.string):
            yield token.start[0], "unfinished: say it in an issue"


def layer(path: str) -> str:
    """The layer a file of the package stands in."""
    return "above" if ABOVE.fullmatch(path) else PurePosixPath(path).parts[0]


def target_path(module: str) -> str:
    """``kvcache.client.store`` is written in ``client/store.py``. REQUIRES: ``module`` is ours."""
    parts = module.split(".")[1:]
    if not parts or parts[0] not in PACKAGES:
        parts = ["kvcache", *parts]
    return "/".join(parts) + (".py" if len(parts) > 1 else "/__init__.py")


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every module named by an import, wherever it stands. ``from a import b`` names a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or attribute, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (inner := dotted(node.value)):
        return f"{inner}.{node.attr}"
    return ""


def calls(tree: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, dotted(node.func)


def docstring_rule(_: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if not ast.get_docstring(tree):
        yield 1, "a module opens by saying what it is for"


def arrow_rule(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if not path.startswith(tuple(f"{package}/" for package in PACKAGES)):
        return
    allowed = ARROWS[layer(path)]
    seen: set[tuple[int, str]] = set()
    for line, module in imports(tree):
        if module.split(".")[0] in ("client", "server", "eviction"):
            yield line, f"imports {module}: its name is kvcache.{module}"
        elif module.split(".")[0] == "kvcache":
            target = layer(target_path(module))
            if target not in allowed and (line, target) not in seen:
                seen.add((line, target))
                yield line, f"{layer(path)} imports {target} ({module})"
            users = ("kvcache/testing/", "kvcache/cli", "kvcache/demo")
            if module.startswith("kvcache.testing") and not path.startswith(users):
                yield line, f"{path} imports the test tools ({module})"


def relative_rule(_: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "relative import"


def heavy_rule(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if not path.startswith(tuple(f"{package}/" for package in PACKAGES)):
        return
    for line, module in sorted({(line, module.split(".")[0]) for line, module in imports(tree)}):
        if module in HEAVY and not re.fullmatch(HEAVY[module], path):
            yield line, f"{module} is imported in {HEAVY[module]} only"


def length_rule(_: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """A function's length is its body's; a docstring is a contract and does not count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body and (body[-1].end_lineno or 0) - body[0].lineno + 1 > FUNCTION_LINES_MAX:
                yield node.lineno, f"{node.name} is over {FUNCTION_LINES_MAX} lines"


def banned_rule(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for line, module in sorted({(line, module.split(".")[0]) for line, module in imports(tree)}):
        if module in BANNED_MODULES:
            yield line, f"{module} is banned: it runs what it reads, or hashes what it should not"
    for call, name in calls(tree):
        if name == "numpy.load" or name == "np.load":
            if not any(word.arg == "allow_pickle" and is_false(word.value) for word in call.keywords):
                yield call.lineno, "numpy.load without allow_pickle=False"
        elif name in BANNED_CALLS:
            yield call.lineno, f"{name}() is banned"
        elif name == "print" and not PRINTERS.fullmatch(path):
            yield call.lineno, "print in a library: raise, return or count"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def sleep_rule(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if not path.startswith("tests/"):
        return
    for call, name in calls(tree):
        if name == "time.sleep":
            yield call.lineno, "a test sleeps: hand it a clock, or wait for the event"
    for line, module in imports(tree):
        if module == "time.sleep":
            yield line, "a test imports sleep"


def broad_rule(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """A broad ``except`` either raises again as its last act or stands at a border."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler) or BORDERS.fullmatch(path):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        broad = any(kind is None or dotted(kind) in ("Exception", "BaseException") for kind in caught)
        if broad and not isinstance(node.body[-1], ast.Raise):
            yield node.lineno, "a broad except swallows: name the errors, or raise again"


RULES: tuple[Rule, ...] = (
    docstring_rule,
    arrow_rule,
    relative_rule,
    heavy_rule,
    length_rule,
    banned_rule,
    sleep_rule,
    broad_rule,
)


def python_files() -> list[Path]:
    """Each file once, under its real folder."""
    linked = {ROOT / "kvcache" / name for name in ("client", "server", "eviction")}
    files = [ROOT / "setup.py"] if (ROOT / "setup.py").exists() else []
    for folder in FOLDERS:
        files += [
            path
            for path in sorted((ROOT / folder).rglob("*.py"))
            if not linked & set(path.parents) and "__pycache__" not in path.parts
        ]
    return files


def test_the_tree_is_tidy() -> None:
    found = [
        finding
        for path in python_files()
        for finding in findings(path.relative_to(ROOT).as_posix(), path.read_text())
    ]
    assert not found, "\n" + "\n".join(found)


def test_no_text_names_a_machine() -> None:
    paths = [path for pattern in TEXTS for path in ROOT.glob(pattern)]
    assert len(paths) > 3
    found = [(path.name, *finding) for path in paths for finding in text_findings(path.read_text())]
    assert not found


def test_the_sisters_are_links_and_know_their_names() -> None:
    for name in ("client", "server", "eviction"):
        assert (ROOT / "kvcache" / name).readlink() == Path("..") / name
        assert f'assert __name__ == "kvcache.{name}"' in (ROOT / name / "__init__.py").read_text()


PLANTED = [
    ("kvcache/a.py", "import kvcache.server.node", "kvcache imports server"),
    ("kvcache/a.py", "from kvcache import client", "kvcache imports client"),
    ("kvcache/a.py", "from kvcache.eviction.lru import Lru", "kvcache imports eviction"),
    ("eviction/a.py", "from kvcache.server import node", "eviction imports server"),
    ("eviction/a.py", "def f() -> None:\n    from kvcache.client import store", "eviction imports client"),
    ("client/a.py", "import kvcache.server", "client imports server"),
    ("client/a.py", "from kvcache.eviction import lru", "client imports eviction"),
    ("server/a.py", "from kvcache.client.store import BlockStore", "server imports client"),
    ("server/a.py", "import client.store", "its name is kvcache.client.store"),
    ("server/a.py", "from kvcache.cli import main", "server imports above"),
    ("client/a.py", "from kvcache import demo", "client imports above"),
    ("kvcache/a.py", "from kvcache.demo_trace import x", "kvcache imports above"),
    ("kvcache/routing/a.py", "from kvcache.simulation import run", "kvcache imports above"),
    ("kvcache/a.py", "from kvcache.testing import contract", "imports the test tools"),
    ("kvcache/a.py", "from . import block", "relative import"),
    ("kvcache/a.py", "import aiohttp.web", "aiohttp is imported in"),
    ("kvcache/ledger.py", "import torch", "torch is imported in"),
    ("kvcache/demo_engine.py", "import vllm", "vllm is imported in"),
    ("client/connectors/hf.py", "import vllm", "vllm is imported in"),
    ("server/node.py", "def f() -> None:\n    import msgpack", "msgpack is imported in"),
    ("kvcache/engine_events/feed.py", "import zmq.asyncio", "zmq is imported in"),
    ("kvcache/a.py", "import pickle", "pickle is banned"),
    ("tests/test_a.py", "from marshal import loads", "marshal is banned"),
    ("kvcache/a.py", "eval('1')", "eval() is banned"),
    ("kvcache/a.py", "exec('1')", "exec() is banned"),
    ("kvcache/a.py", "x = hash(b'1')", "hash() is banned"),
    ("client/connectors/vllm.py", "import torch\ntorch.load('x')", "torch.load() is banned"),
    ("benchmarks/a.py", "import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle=False"),
    ("kvcache/a.py", "print('x')", "print in a library"),
    ("server/handlers.py", "print('x')", "print in a library"),
    ("tests/test_a.py", "import time\ntime.sleep(1)", "a test sleeps"),
    ("tests/test_a.py", "from time import sleep", "a test imports sleep"),
    ("kvcache/a.py", "try:\n    pass\nexcept Exception:\n    pass", "a broad except"),
    ("kvcache/a.py", "try:\n    pass\nexcept:\n    x = 1", "a broad except"),
    ("server/http.py", "try:\n    pass\nexcept (OSError, BaseException):\n    x = 1", "a broad except"),
    ("kvcache/a.py", f"x = 1  # {WORDS[1]}: more", "unfinished"),
    ("kvcache/a.py", f'"""Doc. {WORDS[0]}."""', "unfinished"),
    ("kvcache/a.py", "x = '/{}/models'".format("root"), "machine path"),
    ("kvcache/a.py", "\n" * (FILE_LINES_MAX + 1), "file is over"),
    ("kvcache/a.py", "def f() -> None:\n" + "    x = 1\n" * (FUNCTION_LINES_MAX + 1), "f is over"),
]


@pytest.mark.parametrize(("path", "source", "expected"), PLANTED)
def test_a_planted_violation_is_found(path: str, source: str, expected: str) -> None:
    document = source if source.startswith('"""') else f'"""Doc."""\n{source}'
    assert any(expected in finding for finding in findings(path, document))


def test_a_module_without_a_docstring_is_found() -> None:
    assert findings("kvcache/a.py", "x = 1\n") == ["kvcache/a.py:1: a module opens by saying what it is for"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("server/node.py", "from kvcache.eviction.lru import Lru\nfrom kvcache.ledger import Ledger"),
        ("client/a.py", "from kvcache.client.store import Lease\nfrom kvcache import wire"),
        ("kvcache/cli.py", "import kvcache.server.node\nimport kvcache.client.store\nprint('x')"),
        ("kvcache/__main__.py", "from kvcache.cli import main"),
        ("kvcache/demo.py", "from kvcache.cli import main\nfrom kvcache.testing import processes"),
        ("kvcache/guard.py", "try:\n    pass\nexcept Exception:\n    x = 1"),
        ("kvcache/a.py", "try:\n    pass\nexcept BaseException:\n    x = 1\n    raise"),
        ("client/connectors/vllm.py", "import torch, vllm\ntry:\n    pass\nexcept Exception:\n    x = 1"),
        ("server/http.py", "from aiohttp import web"),
        ("tests/test_a.py", "from kvcache.client import x\nfrom kvcache.server import y\nimport torch"),
        ("kvcache/a.py", "raise BadInput('x', todo='more')"),
        ("benchmarks/a.py", "import numpy as np\nnp.load('x', allow_pickle=False)"),
    ],
)
def test_what_is_allowed_is_not_found(path: str, source: str) -> None:
    assert findings(path, f'"""Doc."""\n{source}\n') == []
