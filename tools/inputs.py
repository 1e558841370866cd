"""What a notebook or a test file depends on, read from its source: the files of the checkout that it imports, runs or reads.

Nothing is executed. What is imported is followed from file to file, wherever the import stands. What is named in a string is followed,
too: a module that a program in a string imports, a path beside the checkout's root, a file of the package's data. Code that knows where
the checkout lies (`__file__`, `Path.cwd()`, or a name made from these) and builds a path from something else than words written there
may read anything: it depends on every file. So does what cannot be parsed. When in doubt, a file depends on too much.

Not seen: what lies outside the checkout (data sets, a browser, the processor), and files that git ignores.
"""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGE = "lmbook"
ALWAYS = ("constraints.txt", "pyproject.toml")
CLAIMS = f"{PACKAGE}/data/claims.toml"
RUNS = {"import_module", "__import__", "exec", "eval", "subprocess", "runpy", "Popen"}  # by these, a string becomes an import
ANY_MODULE = {"__package__", "pkgutil"}  # by these, a package imports what it does not name
MEASURED = "measured_once"  # reads the results of the benchmark that its caller names, and nothing else; its result is a Measured
PLACES = {"Path", "files", "joinpath", "join", "open", "listdir", "scandir", "walk", "glob", "iglob", "rglob", "copytree", "import_module"}


@dataclass
class Found:
    "What the source of one file says."

    imports: dict[str, set[str]] = field(default_factory=dict)  # file -> the names taken from it ("*": any)
    named: set[str] = field(default_factory=set)  # files that its strings name
    modules: set[str] = field(default_factory=set)  # of these, the modules
    places: set[str] = field(default_factory=set)  # variables that hold where the checkout lies
    anything: bool = False  # it may read any file


class Tree:
    "The files of a checkout that git does not ignore, and what each depends on."

    def __init__(self, root: Path):
        self.root, self._found, self._digests = root, dict[str, Found](), dict[str, str]()
        self.files = sorted(self._walk())
        self.known = set(self.files)
        self.folders = {"/".join(parts[:i]) for parts in (f.split("/") for f in self.files) for i in range(1, len(parts))}
        self.packages = sorted({f.split("/")[0] for f in self.files if "/" in f and f.endswith(".py")})
        self.data = [f for f in self.files if f.startswith(f"{PACKAGE}/") and not f.endswith(".py")]

    def _walk(self) -> Iterator[str]:
        "All files but those that .gitignore names. (Its lines are names, patterns of names, or paths of folders.)"
        try: lines = (self.root / ".gitignore").read_text(encoding="utf-8").split()
        except FileNotFoundError: lines = []
        ignored = [".git", *(line.strip("/") for line in lines)]

        def kept(path: str) -> bool: return not any(path == i or fnmatch.fnmatch(path.rpartition("/")[2], i) for i in ignored)

        for folder, folders, names in os.walk(self.root):
            here = Path(folder).relative_to(self.root).as_posix()
            prefix = "" if here == "." else f"{here}/"
            folders[:] = [f for f in folders if kept(prefix + f)]
            yield from (prefix + n for n in names if kept(prefix + n))

    def digest(self, path: str) -> str:
        "A name for the content of a file."
        if path not in self._digests: self._digests[path] = digest(self.root / path)
        return self._digests[path]

    # ------------------------------------------------------------------------------------------------------------- names to files

    def module(self, name: str) -> set[str]:
        "The files that are run when a module is imported: its packages' and its own. Empty for a module from elsewhere."
        found, parts = set(), name.split(".")
        for i in range(1, len(parts) + 1):
            path = "/".join(parts[:i])
            found |= {f for f in (f"{path}/__init__.py", f"{path}.py") if f in self.known}
            if path not in self.folders: break
        return found

    def below(self, folder: str) -> set[str]: return {f for f in self.files if f.startswith(f"{folder}/")}

    def at(self, path: str) -> set[str]:
        "A file, or all that a folder holds."
        path = path.strip("/")
        return {path} if path in self.known else self.below(path) if path in self.folders else set()

    def ending(self, path: str) -> set[str]:
        "The same for a path that begins anywhere in the checkout."
        path = path.strip("/")
        files = {f for f in self.files if f"/{f}".endswith(f"/{path}")}
        return files.union(*(self.below(d) for d in self.folders if f"/{d}".endswith(f"/{path}")))

    # ------------------------------------------------------------------------------------------------------------- what a file says

    def found(self, path: str) -> Found:
        "What a Python file or a notebook says. (Of others, nothing.)"
        if path not in self._found:
            self._found[path] = Found()  # files that import each other end here
            if path.endswith((".py", ".ipynb")):
                try: tree = self._parse(path)
                except (SyntaxError, ValueError, KeyError, TypeError): self._found[path] = Found(anything=True)
                else: self._found[path] = _Reader(self, path, tree).found
        return self._found[path]

    def _parse(self, path: str) -> ast.Module:
        text = (self.root / path).read_text(encoding="utf-8")
        if path.endswith(".py"): body = ast.parse(text).body
        else:
            cells = ["".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
            body = [node for cell in cells for node in _cell(cell).body]
        return ast.Module([node for node in body if getattr(node, "name", "") not in (MEASURED, "Measured")], [])

    @cached_property
    def judges(self) -> set[str]:
        "What judges every run: each conftest.py, the plugins that it names, and what these import. (A test file judges only itself.)"
        queue, seen = [f for f in self.files if f.rpartition("/")[2] == "conftest.py"], set()
        while queue:
            path = queue.pop()
            if path in seen or path.startswith(f"{PACKAGE}/") or is_test(path): continue
            seen.add(path)
            queue += [*self.found(path).imports, *(self.found(path).modules if path.endswith("conftest.py") else ())]
        return seen

    def reached(self, unit: str) -> set[str]:
        "The files on which a notebook or a test file depends."
        queue, seen = [unit], set()
        while queue:
            path = queue.pop()
            if path in seen: continue
            seen.add(path)
            if path.endswith(".ipynb") and path != unit: continue  # it is read, not run
            found = self.found(path)
            if found.anything: return set(self.files)
            queue += [*found.imports, *found.named]
        spread = f"{unit.rpartition('/')[0]}/.spread/{Path(unit).stem}.json"
        return seen | self.judges | {f for f in (*ALWAYS, spread) if f in self.known}

    def inputs(self, unit: str) -> dict[str, str]:
        "What a notebook or a test file depends on, with a digest of each."
        found = {path: self.digest(path) for path in sorted(self.reached(unit))}
        if CLAIMS in found and (part := self.claims_checked(unit, set(found))): found[CLAIMS] = part
        return found

    def claims_checked(self, unit: str, files: Iterable[str]) -> str:
        """Of the list of claims a notebook that does no more than `check_claim` depends on those that it names: their digest.

        Without this, a verdict on one claim would run every notebook that checks another. Empty where the whole list counts.
        """
        readers = {f for f in files if f.endswith(".py") and CLAIMS in self.found(f).named}
        users = [f for f in files if f not in readers and f not in self.judges]
        taken = [names for f in users for to, names in self.found(f).imports.items() if to in readers]
        if not unit.endswith(".ipynb") or CLAIMS in self.found(unit).named or not all(names <= {"check_claim"} for names in taken):
            return ""
        text = (self.root / unit).read_text(encoding="utf-8")
        rows = re.split(r"(?m)^(?=\[\[claim\]\])", (self.root / CLAIMS).read_text(encoding="utf-8"))
        mine = [row for row in rows if (name := re.search(r'(?m)^id = "(.+)"$', row)) and name[1] in text]
        return hashlib.sha256("".join(mine).encode()).hexdigest()[:16]


def digest(path: Path) -> str:
    "A name for the content of a file; empty where there is none."
    try: return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError: return ""


def _cell(source: str) -> ast.Module:
    "The syntax tree of a cell, its magics turned into calls where there are any."
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    try: return compile(source, "cell", "exec", flags)
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager

        return compile(TransformerManager().transform_cell(source), "cell", "exec", flags)


def is_test(path: str) -> bool: return bool(re.fullmatch(r"tests/(.*/)?(test_[^/]*|[^/]*_test)\.py", path))


class _Reader:
    "Reads the syntax tree of one file."

    def __init__(self, tree: Tree, path: str, syntax: ast.Module):
        self.tree, self.path, self.found = tree, path, Found()
        self.parents: dict[ast.AST, ast.AST] = {}
        self.kinds: dict[type, list] = defaultdict(list)  # the nodes by their type
        queue: list[ast.AST] = [syntax]
        for node in queue:  # it grows
            self.kinds[type(node)].append(node)
            for name in node._fields:
                value = getattr(node, name, None)
                for child in value if type(value) is list else (value,):
                    if isinstance(child, ast.AST) and name not in ("ctx", "op", "ops"):
                        self.parents[child] = node
                        queue.append(child)
        self.outside: set[str] = set()  # names of what comes from elsewhere
        for node in self._all_of(ast.Import, ast.ImportFrom, ast.Attribute): self._import(node)
        names = {n.id for n in self.kinds[ast.Name]} | {n.attr for n in self.kinds[ast.Attribute]} | self.outside
        self.in_package = path.startswith(f"{PACKAGE}/")
        if self.in_package and ANY_MODULE & names: self.found.named |= tree.below(PACKAGE)
        if not self.in_package and "pkgutil" in names: self.found.anything = True
        self.followed = not self.in_package or bool(RUNS & names)  # the package's own strings are messages, unless something runs them
        self.foreign = {p for f in self.found.imports if f != path for p in tree.found(f).places}  # places of other files
        self.found.places = {n for names in self.found.imports.values() for n in names} & self.foreign
        self.strings = [n for n in self.kinds[ast.Constant] if isinstance(n.value, str)]
        self.in_path: set[ast.AST] = set()  # strings that are part of a path built with `/`
        self.paths: set[str] = set()  # variables that hold a path whose words are written there
        for _ in range(3): self._places()
        for node in self.kinds[ast.BinOp]: self._path(node)
        if {"__file__", "cwd", "getcwd", *self.foreign} & names or any(n.value == ".." for n in self.strings):
            for node in self._all_of(ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.Call): self._use(node)
        for node in self.strings: self._string(node)
        for node in self.kinds[ast.Call]: self._measured(node)
        if any(f"{PACKAGE}.data" in n.value for n in self.strings) and not self.found.named & set(tree.data):
            self.found.named |= set(tree.data)  # it names the folder and no file

    def _all_of(self, *kinds: type) -> Iterator: return (node for kind in kinds for node in self.kinds[kind])

    def _measured(self, node: ast.Call) -> None:
        "Results of a benchmark that are shown."
        if (node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")) != MEASURED: return
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Constant): self.found.named |= {f"benchmarks/results/{first.value}.json"} & self.tree.known
        else: self.found.anything = True

    # ---------------------------------------------------------------------------------------------------------------------- imports

    def _add(self, module: str, names: set[str]) -> None:
        files = self.tree.module(module)
        for f in files: self.found.imports.setdefault(f, set()).update(names)
        if not files: self.outside.add(module.split(".")[0])

    def _import(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for a in node.names:
                self._add(a.name, {"*"})
                if not self.tree.module(a.name) and a.asname: self.outside.add(a.asname)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level: base = ".".join([*self.path.split("/")[: -node.level], *([base] if base else [])])
            names = {a.name for a in node.names}
            self._add(base, names)
            if not self.tree.module(base): self.outside |= {a.asname or a.name for a in node.names}
            for name in names - {"*"}:
                if files := self.tree.module(f"{base}.{name}") - self.tree.module(base):
                    for f in files: self.found.imports.setdefault(f, set()).add("*")
            if "*" in names and f"{(folder := base.replace('.', '/'))}/__init__.py" in self.tree.known:
                for f in self.tree.below(folder):
                    if f.endswith(".py"): self.found.imports.setdefault(f, set()).add("*")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in self.tree.packages:
            self._add(f"{node.value.id}.{node.attr}", {"*"})  # `import lmbook` above, and `lmbook.x` here

    # ------------------------------------------------------------------------------------------------------- where the checkout lies

    def _place(self, node: ast.AST) -> bool:
        "Whether an expression is a folder of the checkout, found by asking where this file or this process is."
        if isinstance(node, ast.Name): return node.id == "__file__" or node.id in self.found.places
        if isinstance(node, ast.Attribute):
            if node.attr == "__file__": return not (isinstance(base := _first(node), ast.Name) and base.id in self.outside)
            return node.attr in self.foreign or node.attr in ("parent", "parents") and (self._place(node.value) or self._named(node.value))
        if isinstance(node, ast.Subscript): return self._place(node.value)
        if isinstance(node, ast.Constant): return node.value == ".." and _called(self.parents.get(node)) == "Path"
        if not isinstance(node, ast.Call): return False
        if _called(node) in ("cwd", "getcwd"): return True
        if _called(node) == "Path": return any(map(self._place, node.args))
        return _called(node) in ("resolve", "absolute") and isinstance(node.func, ast.Attribute) and self._place(node.func.value)

    def _named(self, node: ast.AST) -> bool:
        "Whether an expression is a path that begins at such a folder and goes on in words that are written there."
        if isinstance(node, ast.Name): return node.id in self.paths
        return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and (self._place(node.left) or self._named(node.left))

    def _places(self) -> None:
        "The variables that hold such a folder, or such a path."
        for node in self._all_of(ast.Assign, ast.AnnAssign):
            if node.value is None: continue
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                pairs = zip(target.elts, node.value.elts) if both else [(target, node.value)]
                for t, value in pairs:
                    if isinstance(t, ast.Name) and self._place(value): self.found.places.add(t.id)
                    elif isinstance(t, ast.Name) and self._named(value): self.paths.add(t.id)

    def _path(self, node: ast.BinOp) -> None:
        "A path built with `/`: its words are looked up together."
        if not isinstance(node.op, ast.Div): return
        if isinstance(above := self.parents.get(node), ast.BinOp) and isinstance(above.op, ast.Div) and above.left is node: return
        words: list[str | None] = []
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            literal = isinstance(node.right, ast.Constant) and isinstance(node.right.value, str)
            words.insert(0, node.right.value if literal else None)
            if literal: self.in_path.add(node.right)
            node = node.left
        path = "/".join(words[: words.index(None)] if None in words else words).strip("/")
        if self._place(node):
            self.found.named |= self.tree.ending(path) if path else set()
            self.found.anything |= not path
        elif "/" in path: self.found.named |= self.tree.at(path)

    def _use(self, node: ast.AST) -> None:
        "Whatever is done with such a folder, beyond telling a process where it is, may read any file."
        if not self._place(node) or isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load): return
        above = self.parents[node]
        if isinstance(above, ast.expr) and self._place(above): return  # looked at as a whole
        if isinstance(above, ast.Attribute):
            call = self.parents[above]
            if above.attr in ("mkdir", "exists", "name") or isinstance(call, ast.expr) and self._place(call): return
        match above:
            case ast.BinOp(op=ast.Div()) | ast.FormattedValue() | ast.Compare() | ast.Assign() | ast.AnnAssign() | ast.Expr(): return
            case ast.Tuple() if isinstance(self.parents[above], ast.Assign): return
            case ast.keyword(arg="cwd"): return
            case ast.Call() if _called(above) in ("str", "fspath", "chdir", "relative_to"): return
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="path"), attr="insert")): return  # sys.path
        self.found.anything = True

    # ---------------------------------------------------------------------------------------------------------------------- strings

    def _data(self, text: str) -> None:
        "Files of the package's data, by their names; or as matplotlib names its styles, `lmbook.data.book`."
        for f in self.tree.data:
            if f.rpartition("/")[2] in text or f.rpartition(".")[0].replace("/", ".") in text: self.found.named.add(f)

    def _string(self, node: ast.Constant) -> None:
        text, above, tree = node.value, self.parents[node], self.tree
        if isinstance(above, ast.Expr): return  # a docstring
        self._data(text)
        if self.followed: self._modules(text, isinstance(above, ast.JoinedStr | ast.BinOp))
        if _called(above) in ("import_module", "__import__") and (text.startswith(".") or text in tree.packages):
            self._all(text if text in tree.packages else self.path.split("/")[0])
        if node in self.in_path or self.in_package and _called(above) not in PLACES: return
        for word in re.findall(r"[^\s'\"`(),;:=<>|\[\]{}*]+", text):
            path = re.sub(r"^(\.{1,2}/)+", "", word).rstrip("/")
            if "/" in path or word != path or _called(above) in PLACES: self.found.named |= tree.at(path)
            if path and self.path.endswith(".ipynb"): self.found.named |= tree.at(f"{self.path.rpartition('/')[0]}/{path}")

    def _modules(self, text: str, more: bool) -> None:
        "The modules that a string names; all of a package where the name goes on outside the string."
        tree, found = self.tree, set[str]()
        for package in tree.packages:
            if package not in text: continue
            for name in re.findall(rf"(?<![\w./-]){package}(?:\.\w+)+", text): found |= tree.module(name)
            for names in re.findall(rf"from {package} import \(?([\w\s,]*|\*)", text):
                found |= tree.module(package).union(*(tree.module(f"{package}.{n}") for n in re.findall(r"\w+", names)))
                if names == "*" or not names.strip(): self._all(package)
            if re.search(rf"(?<![\w./-]){package}\.(?=[{{%]{'|$' if more else ''})", text): self._all(package)
            if re.search(rf"\bimport {package}\b", text): found |= tree.module(package)
        self.found.named |= found
        self.found.modules |= found

    def _all(self, package: str) -> None: self.found.named |= self.tree.below(package)


def _called(node: ast.AST | None) -> str:
    "The name under which something is called; empty for what is no call."
    if not isinstance(node, ast.Call): return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _first(node: ast.AST) -> ast.AST:
    "What stands before all dots."
    while isinstance(node, ast.Attribute): node = node.value
    return node
