"""Python files that stand alone: definitions of this repository with all that they use of it."""

import ast
import builtins
import dis
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
    known = {*dir(builtins), *parts.names.values(), *(known for *_, known in parts.imports)}
    if missing := global_names(compile(source, path.name, "exec")) - known:
        raise ValueError(f"{path.name} has no {' and '.join(sorted(missing))} at its top level")
    return source


def global_names(code):
    """The names that the functions in compiled code take from around them."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
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
            elif isinstance(node, ast.Assign):
                names = [leaf.id for target in node.targets for leaf in ast.walk(target)
                         if isinstance(leaf, ast.Name)]
                self.nodes |= dict.fromkeys(names, node)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.nodes[node.name] = node

    def place(self, module):
        """The path of a module of this repository, or None for another package's."""
        for folder in (self.path.parent, ROOT):
            path = folder.joinpath(*module.split(".")).with_suffix(".py")
            if path.is_file():
                return path
        return None

    def source(self, node, names):
        """The text of a definition with the comment above it. names: (part, text) of it, a text
        that is not None replaces the part's."""
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", ())])
        lines = [line.encode() for line in self.lines[:node.end_lineno]]
        changed = [(part, text) for part, text in names if text]
        for part, text in sorted(changed, key=lambda pair: -pair[0].col_offset):
            line = lines[part.lineno - 1]
            lines[part.lineno - 1] = (line[:part.col_offset] + text.encode()
                                      + line[part.end_col_offset:])
        while first > 1 and lines[first - 2].startswith(b"#"):
            first -= 1
        return b"\n".join(lines[first - 1:]).decode()


def imported(node):
    """{name: (module, name in it or None)} of an import."""
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name: (alias.name, None) for alias in node.names}
    module = "." * node.level + (node.module or "")
    return {alias.asname or alias.name: (module, alias.name) for alias in node.names}


class _Definitions:
    """Definitions in the order of their use, each under a name of its own."""

    def __init__(self):
        self.files, self.names, self.sources, self.imports = {}, {}, [], set()

    def add(self, path, name):
        """Add a definition after all that it refers to; returns its name in the new file."""
        if (path, name) in self.names:
            return self.names[path, name]
        if path not in self.files:
            self.files[path] = _File(path)
        file = self.files[path]
        if name not in file.nodes:
            raise ValueError(f"{path.name} has no {name} at its top level")
        node, taken = file.nodes[name], set(self.names.values())
        for other in (other for other in file.nodes if file.nodes[other] is node):
            self.names[path, other] = f"{path.stem}_{other}" if other in taken else other
        changed = [(part, self.refer(file, part)) for part in ast.walk(node)]
        source, new = file.source(node, changed), self.names[path, name]
        if not isinstance(node, ast.Assign):
            source = source.replace(f" {name}", f" {new}", 1)  # after def or class
        self.sources.append(source)
        return new

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
            self.imports.add((module, name, part.id))
        return None

    def import_lines(self):
        """The imports of other packages, Python's own first."""
        whole, parts = defaultdict(list), defaultdict(list)
        for module, name, known in sorted(self.imports, key=str):
            foreign = module.split(".")[0] not in sys.stdlib_module_names
            text = name or module
            text += f" as {known}" if known != text else ""
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
