"""Definitions of the project as text: what build.py puts into a notebook for a line such as `# SHOW aim.Adapter`."""

import ast
import symtable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def find(target):
    """common.ViT.embed -> the dotted name of its module, the module's text, the syntax tree of the definition"""
    parts = target.split(".")
    for k in range(1, len(parts)):
        file = ROOT.joinpath(*parts[:k]).with_suffix(".py")
        if file.is_file():
            break
    else:
        raise ValueError(f"{target} names no definition in a file of the project")
    text = file.read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in parts[k:]:
        node = next((child for child in node.body if part in defined(child)), None)
        if node is None:
            raise ValueError(f"{file.name} has no {'.'.join(parts[k:])}")
    return ".".join(parts[:k]), text, node


def defined(statement):
    """The names that a statement defines or imports"""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.split(".")[0] for alias in statement.names]
    if isinstance(statement, ast.Assign):
        return [name.id for target in statement.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [statement.name] if isinstance(statement, (ast.ClassDef, ast.FunctionDef)) else []


def global_names(code):
    """The global names that a piece of code reads or writes"""
    tables, names = [symtable.symtable(code, "cell", "exec")], set()
    for table in tables:  # grows while it is read
        tables += table.get_children()
        names |= {s.get_name() for s in table.get_symbols() if s.is_global() or table.get_type() == "module"}
    return names


def source(target):
    """The text of a definition, decorators included, moved to the left margin"""
    _, text, node = find(target)
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return "\n".join(line[node.col_offset :] for line in text.splitlines()[first - 1 : node.end_lineno])


def show(targets, known):
    """The code of a SHOW cell: imports of what is not among the names `known`, definitions, their use in the project"""
    own = {target.split(".")[-1] for target in targets}
    imports, definitions, uses = [], [], []
    for target in targets:
        module, text, _ = find(target)
        folder, _, short = module.rpartition(".")
        definitions.append(source(target))
        there = {name for statement in ast.parse(text).body for name in defined(statement)}
        needed = sorted(global_names(definitions[-1]) & there - known - own)
        if short not in known:
            imports.append(f"from {folder} import {short}" if folder else f"import {short}")
        if needed:
            imports.append(f"from {module} import {', '.join(needed)}")
        known |= {short, *needed}
        place = target.removeprefix(f"{folder}.")
        uses.append(f"{place} = {place.split('.')[-1]}  # from here on, the project uses what this cell defines")
    known |= own
    return "\n\n\n".join(part for part in ("\n".join(imports), *definitions, "\n".join(uses)) if part)


def link(target, base):
    """The Markdown link to a definition's line"""
    module, _, node = find(target)
    return f"[`{target}`]({base}/{module.replace('.', '/')}.py#L{node.lineno})"
