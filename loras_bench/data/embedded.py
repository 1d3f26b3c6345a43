"""Real text that every Python carries: its language reference, and the docstrings of its standard library.

Nothing is downloaded, and the library's modules are parsed, never imported. The texts differ a little between Python
versions, so the record names the version and the content hash.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from loras_bench.catalog import SPLITS, DatasetSpec
from loras_bench.data.sources import Split
from loras_bench.errors import UserError

# Tests, vendored packages, parts that distributions leave out or Python 3.13 removed, and tables without docstrings.
_SKIPPED = frozenset(
    """test tests idle_test idlelib tkinter turtledemo lib2to3 distutils ensurepip encodings pydoc_data
    site-packages dist-packages lib-dynload __pycache__ __phello__""".split()  # noqa: SIM905 (a list of 16 lines)
)

# What a docstring is about, by the top-level module that it comes from.
_GROUPS = {
    "text": """email xml html json csv difflib textwrap re sre_compile sre_parse string stringprep configparser
        plistlib tomllib codecs locale gettext shlex pprint reprlib mailbox base64 quopri binhex netrc mimetypes
        optparse argparse getopt _markupbase fileinput colorsys""",
    "data": """_pydecimal decimal fractions statistics numbers random datetime _pydatetime _strptime calendar
        collections _collections_abc heapq bisect enum operator functools dataclasses copy copyreg weakref _weakrefset
        uuid zoneinfo graphlib typing types abc _py_abc contextlib pickle shelve dbm sqlite3 hashlib hmac secrets
        array""",
    "network": """http urllib wsgiref xmlrpc imaplib smtplib ftplib poplib ssl socket socketserver webbrowser ipaddress
        nntplib telnetlib cgi smtpd asyncore asynchat""",
    "concurrency": """asyncio concurrent multiprocessing threading _threading_local subprocess queue sched selectors
        signal contextvars""",
    "testing": """unittest doctest pdb bdb cmd pydoc inspect trace traceback timeit profile cProfile pstats tracemalloc
        ast dis symtable tokenize token pickletools pyclbr code codeop warnings linecache py_compile compileall
        modulefinder tabnanny opcode keyword""",
    "system": """importlib logging pathlib os posixpath ntpath genericpath shutil tempfile platform tarfile zipfile gzip
        bz2 lzma _compression ctypes sysconfig site venv stat _pyio io pkgutil runpy zipimport zipapp glob fnmatch
        filecmp getpass pty tty pipes curses""",
}
MODULE_GROUPS: Mapping[str, str] = {module: group for group, modules in _GROUPS.items() for module in modules.split()}
_SHORTEST_WORDS = 5
# Chosen among 4,000, before any training, so that each group has 5 to 15 % of its docstrings in each held-out split
# under Python 3.11, 3.12 and 3.13: modules differ so much in size that most salts leave some group almost no test.
_MODULE_SALT = "1718 "


def read_embedded(spec: DatasetSpec) -> dict[str, Split]:
    """The splits of `python-topics`, `python-docstrings` or `python-docstring-modules`.

    Language modelling: a document belongs to a split by the SHA-256 of its text. Classification: all docstrings of a
    module go to the same split, by the SHA-256 of the module's salted name, so that a test docstring comes from a
    module that training never saw.

    Raises:
        UserError: This Python was installed without the files.
    """
    if spec.name == "python-topics":
        rows: list[tuple[str, str, str]] = [(text, text, "") for text in _topics()]
    elif spec.name == "python-docstrings":
        rows = [(text, text, "") for _, text in docstrings()]
    else:
        rows = [
            (_MODULE_SALT + module, text, group)
            for module, text in docstrings()
            if (group := MODULE_GROUPS.get(module.partition(".")[0])) and len(text.split()) >= _SHORTEST_WORDS
        ]
    if not rows:
        raise UserError(
            f"this Python lacks the files for `{spec.name}`", "use one with its standard library as .py files"
        )
    splits = {}
    for name in SPLITS:
        part = [(text, group) for key, text, group in rows if split_of(key) == name]
        labels = [spec.label_names.index(group) for _, group in part] if spec.label_field else None
        splits[name] = Split(([text for text, _ in part],), labels)
    return splits


def split_of(key: str) -> str:
    """The split of a document or module: 80 % train, 10 % validation, 10 % test by the first bytes of its SHA-256."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) / 2**32
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python has no pydoc_data.topics", "install the rest of its standard library") from error
    return [topics[name] for name in sorted(topics)]


def docstrings() -> list[tuple[str, str]]:
    """(module name, docstring) of every module, class and function of the standard library, without repetitions.

    In the order of module names and, within a module, of the source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = sorted((_module_name(path.relative_to(root)), path) for path in _source_files(root))
    seen: set[str] = set()
    found: list[tuple[str, str]] = []
    for module, path in modules:
        for text in _docstrings_of(path.read_bytes()):
            if text not in seen:
                seen.add(text)
                found.append((module, text))
    return found


def _source_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED and not name.startswith("config-")]
        yield from (Path(folder) / name for name in names if name.endswith(".py"))


def _module_name(path: Path) -> str:
    """`email/header.py` is email.header; `pathlib/__init__.py` is pathlib, as `pathlib.py` was before Python 3.13."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _docstrings_of(source: bytes) -> Iterator[str]:
    if b'"""' not in source and b"'''" not in source:
        return
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield text
        # Definitions stand in statements only: leaving the expressions out halves the time.
        pending += [child for child in reversed(list(ast.iter_child_nodes(node))) if isinstance(child, ast.stmt)]
