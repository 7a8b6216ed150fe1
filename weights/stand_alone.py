"""Python files that stand alone: definitions of this repository with all that they use of it."""

import ast
import builtins
import dis
import re
import sys
import types
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent


def stand_alone(path, name):
    """The source of a function or class of the file at path, and of all that it refers to in this
    repository, in an order in which Python can run it. Imports of other packages stay imports.

    Raises ValueError for what cannot be carried over.
    """
    parts = _Definitions()
    parts.add(path, name)
    source = "\n\n\n".join(["\n".join(parts.import_lines()), *parts.sources]) + "\n"
    known = {*dir(builtins), "__file__", *parts.names.values(), *parts.imports}
    if missing := global_names(compile(source, path.name, "exec")) - known:
        raise ValueError(f"{path.name} has no {' and '.join(sorted(missing))} at its top level")
    return source


def global_names(code):
    """The names that compiled code, and the functions and classes in it, take from around them."""
    steps = [*dis.get_instructions(code)]
    names = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")} - {
        step.argval for step in steps if step.opname == "STORE_NAME"}
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return names.union(*map(global_names, inner))


class _File:
    """A file of this repository, and what the names of its top level stand for."""

    def __init__(self, path):
        self.path, self.lines = path, path.read_text(encoding="utf-8").split("\n")
        self.nodes, self.imports = {}, {}  # name -> definition; name -> (module, name in it)
        for node in ast.parse("\n".join(self.lines)).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports |= imported(node)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = getattr(node, "targets", None) or [node.target]
                self.nodes |= dict.fromkeys(stored(*targets), node)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self.nodes[node.name] = node

    def place(self, module):
        """The path of a module of this repository, or None for another package's."""
        for folder in (self.path.parent, ROOT):
            path = folder.joinpath(*module.split(".")).with_suffix(".py")
            if path.is_file():
                return path
        return None

    def source(self, node, changed):
        """The text of a definition with the comment above it. changed: (part, text), the text
        replaces that of the part."""
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", ())])
        lines = [line.encode() for line in self.lines[:node.end_lineno]]
        for part, text in sorted(changed, key=lambda pair: -pair[0].col_offset):
            if part.end_lineno != part.lineno:
                raise ValueError(f"{self.path.name} has a name on two lines, {part.lineno} and on")
            line = lines[part.lineno - 1]
            lines[part.lineno - 1] = (line[:part.col_offset] + text.encode()
                                      + line[part.end_col_offset:])
        while first > 1 and lines[first - 2].startswith(b"#"):
            first -= 1
        return b"\n".join(lines[first - 1:]).decode()


def stored(*nodes):
    """The names that these nodes give to values, but for those of functions and classes."""
    parts = [part for node in nodes for part in ast.walk(node)]
    return {part.id for part in parts if isinstance(part, ast.Name) and
            isinstance(part.ctx, ast.Store)} | {part.arg for part in parts
                                                if isinstance(part, ast.arg)}


def imported(node):
    """{name: (module, name in it or None)} of an import."""
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name.split(".")[0]: (alias.name, None)
                for alias in node.names}
    module = "." * node.level + (node.module or "")
    return {alias.asname or alias.name: (module, alias.name) for alias in node.names}


class _Definitions:
    """Definitions in the order of their use, each under a name of its own."""

    def __init__(self):
        self.files, self.names, self.sources = {}, {}, []
        self.imports = {}  # of other packages: name -> (module, name in it or None)

    def add(self, path, name):
        """Add a definition after all that it refers to; returns its name in the new file."""
        if (path, name) in self.names:
            return self.names[path, name]
        if path not in self.files:
            self.files[path] = _File(path)
        file = self.files[path]
        if name not in file.nodes:
            raise ValueError(f"{path.name} has no {name} at its top level")
        node, stem = file.nodes[name], re.sub(r"\W", "_", path.stem)
        taken = {*self.names.values(), *self.imports}
        for other in (other for other in file.nodes if file.nodes[other] is node):
            self.names[path, other] = f"{stem}_{other}" if other in taken else other
        changed = [(part, text) for part in ast.walk(node) if (text := self.refer(file, part))]
        new = self.names[path, name]
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            self.refuse_local(path, node, changed)
        source = re.sub(rf"^((async )?def|class) {name}\b", rf"\g<1> {new}",
                        file.source(node, changed), count=1, flags=re.MULTILINE)
        self.sources.append(source)
        return new

    @staticmethod
    def refuse_local(path, node, changed):
        """Raise ValueError where a name has another text in the new file, and is also one of a
        local value, of which the new file would lose track."""
        renamed = {part.id for part, text in changed
                   if isinstance(part, ast.Name) and text != part.id}
        if twice := renamed & stored(node):
            raise ValueError(f"{path.name} has local values of names that it imports, "
                             f"{' and '.join(sorted(twice))}")

    def refer(self, file, part):
        """The text of a part of a definition in the new file, where it refers to another one."""
        if isinstance(part, ast.Import | ast.ImportFrom):
            if any(module[0] == "." or file.place(module) for module, _ in imported(part).values()):
                raise ValueError(f"{file.path.name} imports a file of its own within a function")
        elif isinstance(part, ast.Attribute):
            module, name = file.imports.get(getattr(part.value, "id", None), ("", None))
            if module and name is None and (place := file.place(module)):
                return self.add(place, part.attr)
        elif isinstance(part, ast.Name) and part.id in file.nodes:
            return self.add(file.path, part.id)
        elif isinstance(part, ast.Name) and part.id in file.imports:
            module, name = file.imports[part.id]
            if place := file.place(module):
                return name and self.add(place, name)
            known = self.imports.setdefault(part.id, (module, name))
            if known != (module, name) or part.id in self.names.values():
                raise ValueError(f"{part.id} of {file.path.name} has another meaning elsewhere")
        return None

    def import_lines(self):
        """The imports of other packages, Python's own first."""
        whole, parts = defaultdict(list), defaultdict(list)
        for known, (module, name) in sorted(self.imports.items()):
            foreign = module.split(".")[0] not in sys.stdlib_module_names
            text = name or module
            text += f" as {known}" if known not in (text, text.split(".")[0]) else ""
            if name is None:
                whole[foreign].append(f"import {text}")
            else:
                parts[foreign, module].append(text)
        lines = []
        for foreign in (False, True):
            lines += ["", *whole[foreign],
                      *(f"from {module} import {', '.join(names)}"
                        for (is_foreign, module), names in sorted(parts.items())
                        if is_foreign == foreign)]
        return lines[1:]
