"""Docstrings in the package's source against its functions' arguments: read as syntax trees, without importing anything."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tests.docs.docstrings import sections

Function = ast.FunctionDef | ast.AsyncFunctionDef
Node = ast.Module | ast.ClassDef | Function
REFERENCE = re.compile(r"[Aa]rguments as of\s+``(?P<name>[\w.]+)``")
"""A docstring may refer to another function's arguments."""
MANY = 3
"""Functions with so many arguments have ``Args:`` (or a reference); those with fewer may name them in their text."""
VERB = re.compile(r"^[A-Z][a-z]+s,?$")
NO_VERBS = frozenset(
    (
        *(
            "Whether",
            "Parameters",
            "As",
            "Ranks",
            "Numbers",
            "Gradients",
            "Weights",
            "Bias",
            "Rows",
            "Columns",
            "Backends",
        ),
        *(
            "Images",
            "Biases",
            "Is",
            "This",
            "Lines",
            "Labels",
            "Modules",
            "Projections",
            "Flags",
            "Tensors",
            "Class",
            "Bytes",
        ),
        *(
            "Operations",
            "Tables",
            "Keys",
            "Scores",
            "Queries",
            "Methods",
            "Cores",
            "Roots",
            "Views",
            "Names'",
            "Context",
            "Tells",
        ),
    )
)
QUESTIONS = frozenset(("What", "Which", "How", "Where", "Whether", "Of", "Is", "From", "Some", "Holds"))
SHORTEST = 5
"""Words of a first line: with fewer it says nothing that the name does not."""


@dataclass(frozen=True)
class Definition:
    """A module, class or function, with where it is.

    Attributes:
        module: dotted name.
        name: dotted name inside the module; empty for the module itself.
        node: its syntax tree.
        parent: the class or module around it; None for a module.
    """

    module: str
    name: str
    node: Node
    parent: Node | None = None

    @property
    def place(self) -> str:
        """Returns the full dotted name."""
        return f"{self.module}.{self.name}".rstrip(".")

    @property
    def is_public(self) -> bool:
        """Returns whether no part of the name starts with an underscore."""
        return not any(part.startswith("_") for part in self.name.split("."))

    @cached_property
    def text(self) -> str:
        """Returns the docstring, empty without one."""
        return ast.get_docstring(self.node) or ""

    @cached_property
    def arguments(self) -> dict[str, str]:
        """Returns the names of the arguments with their annotations."""
        if isinstance(self.node, ast.Module | ast.ClassDef):
            return {}
        given = self.node.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        return {
            one.arg: ast.unparse(one.annotation) if one.annotation else ""
            for one in every
            if one is not None and one.arg not in ("self", "cls")
        }

    @property
    def is_command(self) -> bool:
        """Returns whether it is a command's function, whose only argument is the parsed command line."""
        return "argparse.Namespace" in self.arguments.values()


def definitions(module: str, tree: ast.Module) -> Iterator[Definition]:
    """Yields a module with its classes and functions, those inside functions left out."""

    def inside(node: ast.AST, prefix: str, parent: Node) -> Iterator[Definition]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | Function):
                yield Definition(module, prefix + child.name, child, parent)
                if isinstance(child, ast.ClassDef):
                    yield from inside(child, f"{prefix}{child.name}.", child)
            elif isinstance(child, ast.If | ast.Try):
                yield from inside(child, prefix, parent)

    yield Definition(module, "", tree)
    yield from inside(tree, "", tree)


@dataclass
class Package:
    """All definitions of a package, and its classes and functions by name.

    Attributes:
        every: in the order of the files.
    """

    every: list[Definition]
    classes: dict[str, list[ast.ClassDef]] = field(default_factory=dict)
    functions: dict[str, list[Definition]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for one in self.every:
            last = one.name.rpartition(".")[2]
            if isinstance(one.node, ast.ClassDef):
                self.classes.setdefault(last, []).append(one.node)
            elif isinstance(one.node, Function):
                for name in dict.fromkeys((one.name, last)):
                    self.functions.setdefault(name, []).append(one)

    @classmethod
    def of(cls, files: Mapping[str, str]) -> "Package":
        """Returns the definitions in source texts by module name."""
        return cls([one for name, text in files.items() for one in definitions(name, ast.parse(text))])

    def described(self, one: Definition) -> set[str]:
        """Returns the arguments that a docstring describes itself, or by reference to another function's."""
        own = set(sections(one.text).get("Args", {}))
        reference = REFERENCE.search(one.text)
        if reference is not None:
            parts = reference["name"].split(".")
            name = ".".join(parts[-2:]) if len(parts) > 1 and parts[-2][0].isupper() else parts[-1]
            others = [other for other in self.functions.get(name, []) if other.node is not one.node]
            own |= {argument for other in others for argument in sections(other.text).get("Args", {})}
        if reference is not None or len(one.arguments) < MANY:
            own |= {name for name in one.arguments if f"``{name}``" in one.text}
        return own

    def inherited(self, cls: ast.AST, method: str) -> set[str]:
        """Returns the arguments of a method that the docstrings of the classes that ``cls`` derives from describe."""
        found: set[str] = set()
        for base in getattr(cls, "bases", []):
            name = ast.unparse(base).partition("[")[0].rpartition(".")[2]
            for other in self.classes.get(name, []):
                own = (one for one in self.functions.get(f"{name}.{method}", []) if one.parent is other)
                found |= {argument for one in own for argument in self.described(one)}
                found |= self.inherited(other, method) if other is not cls else set()
        return found

    def missing(self, one: Definition) -> list[str]:
        """Returns the arguments of a function that nothing describes, and names in ``Args:`` that are no arguments."""
        known = self.described(one) | self.inherited(one.parent, one.name.rpartition(".")[2]) if one.parent else set()
        extra = set(sections(one.text).get("Args", {})) - one.arguments.keys()
        return [*(name for name in one.arguments if name not in known), *sorted(extra)]


def tensors(one: Definition) -> list[str]:
    """Returns the arguments that are tensors or lists of them; functions and dicts of tensors have no shape to state."""
    named = ("str, Tensor", "str, Mapping", "str, list", "Callable[")
    return [
        name
        for name, annotation in one.arguments.items()
        if "Tensor" in annotation and not any(part in annotation for part in named)
    ]


def without_shape(one: Definition) -> list[str]:
    """Returns the tensors among a function's arguments whose description has no shape in parentheses."""
    described = sections(one.text).get("Args", {})
    return [name for name in tensors(one) if name in described and "(" not in described[name]]


def unnamed_errors(one: Definition) -> list[str]:
    """Returns the errors that a function raises by name and that neither its docstring nor its class's names."""
    around = ast.get_docstring(one.parent) or "" if isinstance(one.parent, ast.ClassDef) else ""
    found: list[str] = []
    waiting: list[ast.AST] = list(getattr(one.node, "body", []))
    while waiting:
        node = waiting.pop()
        if isinstance(node, Function | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found.append(node.exc.func.id)
        waiting += ast.iter_child_nodes(node)
    classes = (name for name in dict.fromkeys(found) if name[0].isupper())
    return [name for name in classes if not any(word in one.text + around for word in (name, "VitTuckerError"))]


def first_line_problem(one: Definition) -> str | None:
    """Returns why a docstring's first line is no sentence that a stranger understands; None if it is, or without one."""
    if not one.text:
        return None
    first = one.text.partition("\n\n")[0]
    words = first.split()
    if "\n" in first:
        return "is longer than a line"
    if not first.endswith((".", "?", ":")):
        return "has no full stop"
    if len(words) < SHORTEST:
        return f"has fewer than {SHORTEST} words"
    if isinstance(one.node, Function) and (not VERB.match(words[0]) or words[0].rstrip(",") in NO_VERBS):
        return f"does not start with a verb, but with {words[0]!r}"
    if not isinstance(one.node, Function) and words[0] in QUESTIONS:
        return f"starts with {words[0]!r}"
    return None


def read_package(folder: Path) -> Package:
    """Reads all modules below a package's folder."""
    files = sorted(folder.rglob("*.py"))
    names = {file: ".".join(file.relative_to(folder.parent).with_suffix("").parts) for file in files}
    return Package.of({names[file].removesuffix(".__init__"): file.read_text() for file in files})
