"""Which models read an attention mask between the mask function and the attention function.

Reads the source of a modeling file: follows what ``create_causal_mask`` and its like return,
through names, containers, and the arguments of functions and modules of the same file, and collects
every expression that does more with a mask than to hand it on.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_CONTAINER = {"get", "items", "values", "keys", "update", "append", "pop"}
_LIBRARIES = {"torch", "nn", "F", "math", "np"}


def reads(path: Path) -> set[str]:
    """``function: expression`` of all that reads a finished mask in a modeling file."""
    return set(_File(ast.parse(path.read_text())).reads())


@dataclass
class _Function:
    """A function or method.

    Attributes:
        masks: the names of finished masks in it, and the line from which they are that.
        passed: the keywords under which masks come in ``**kwargs``.
        makers: the names that stand for functions that make masks, or for containers of them.
    """

    owner: str
    node: ast.FunctionDef
    masks: dict[str, int] = field(default_factory=dict)
    passed: set[str] = field(default_factory=set)
    returns_mask: bool = False

    def __post_init__(self):
        arguments = self.node.args
        names = [x.arg for x in (*arguments.posonlyargs, *arguments.args)]
        self.name = f"{self.owner}.{self.node.name}" if self.owner else self.node.name
        self.parameters = names[1:] if self.owner and names[:1] == ["self"] else names
        self.keywords = {*self.parameters, *(x.arg for x in arguments.kwonlyargs)}
        self.nodes = list(ast.walk(self.node))
        self.calls = [x for x in self.nodes if isinstance(x, ast.Call)]
        self.made_of = set().union(*(_made_of(x) for x in self.nodes))
        self.rest = arguments.kwarg.arg if arguments.kwarg else None
        self.makers = {
            _name(node.targets[0])
            for node in self.nodes
            if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call)
            if any(_makes(_name(x)) for x in ast.walk(node.value))
        }

    def add(self, name: str, line: int) -> None:
        self.masks[name] = min(line, self.masks.get(name, line))


class _File:
    def __init__(self, tree: ast.Module):
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        self.bases = {x.name: [_name(base) for base in x.bases] for x in classes}
        self.functions = [
            _Function("", node) for node in tree.body if isinstance(node, ast.FunctionDef)
        ]
        for cls in classes:
            self.functions += [
                _Function(cls.name, node) for node in cls.body if isinstance(node, ast.FunctionDef)
            ]
        self.attention = {"eager_attention_forward"} | {
            _name(argument)
            for function in self.functions
            for call in function.calls
            if _name(call.func) == "get_interface"
            for argument in call.args
        }
        self.modules = self._modules()
        before = -1
        while before != (before := self._found()):
            for function in self.functions:
                self._follow(function)

    def _found(self) -> int:
        return sum(len(x.masks) + len(x.passed) + x.returns_mask for x in self.functions)

    def _modules(self) -> dict[tuple[str, str], set[str]]:
        """The classes in this file that an attribute of a class may hold, by (class, attribute)."""
        found: dict[tuple[str, str], set[str]] = {}
        for function in self.functions:
            for node in function.nodes:
                if isinstance(node, ast.Assign):
                    targets, values = node.targets, [node.value]
                elif isinstance(node, ast.Call) and _name(node.func) == "append":
                    targets, values = [node.func.value], node.args
                else:
                    continue
                names = {_name(x) for value in values for x in ast.walk(value)} & self.bases.keys()
                for target in targets:
                    if isinstance(target, ast.Attribute) and _name(target.value) == "self":
                        found.setdefault((function.owner, target.attr), set()).update(names)
        return found

    def reads(self) -> Iterator[str]:
        for function in self.functions:
            if function.node.name in self.attention or not function.masks:
                continue
            parents = {
                child: parent for parent in function.nodes for child in ast.iter_child_nodes(parent)
            }
            for node in function.nodes:
                if isinstance(node, ast.expr) and self._is_mask(node, function):
                    found = _read(node, parents)
                    if found is not None:
                        yield f"{function.name}: {ast.unparse(found)}"

    def _follow(self, function: _Function) -> None:
        for node in function.nodes:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value, node.end_lineno, function)
            elif isinstance(node, ast.Return) and node.value is not None:
                function.returns_mask |= self._is_mask(node.value, function)
        for call in function.calls:
            given = [*enumerate(call.args), *((x.arg or "", x.value) for x in call.keywords)]
            places = [at for at, value in given if self._is_mask(value, function)]
            if any(x.arg is None and _name(x.value) == function.rest for x in call.keywords):
                places += function.passed
            for called in self._called(call, function) if places else ():
                for at in places:
                    if isinstance(at, int):
                        at = called.parameters[at] if at < len(called.parameters) else ""
                    if not re.search("mask|bias", at):
                        continue
                    if at in called.keywords - called.made_of:
                        called.add(at, 0)
                    elif at not in called.keywords and called.rest:
                        called.passed.add(at)

    def _assign(self, target: ast.expr, value: ast.expr, line: int, function: _Function) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for part, given in zip(target.elts, value.elts, strict=False):
                self._assign(part, given, line, function)
        elif self._is_mask(value, function):
            for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                while isinstance(part, ast.Subscript):
                    part = part.value
                if isinstance(part, ast.Name) and ("mask" in part.id or part is target):
                    function.add(part.id, line)

    def _called(self, call: ast.Call, function: _Function) -> list[_Function]:
        name = _name(call.func)
        if isinstance(call.func, ast.Name):
            local = [x for x in self.functions if not x.owner and x.node.name == name]
            return local or self._forwards(self._in_loop(name, function))
        if not isinstance(call.func, ast.Attribute) or _makes_mask(call):
            return []
        if _name(call.func.value) == "self":
            owners = [function.owner, *self.bases.get(function.owner, ())]
            methods = [x for x in self.functions if x.owner in owners and x.node.name == name]
            held = [self.modules.get((owner, name), set()) for owner in owners]
            return methods or self._forwards(set().union(*held))
        return [] if _root(call.func) in _LIBRARIES else self._forwards(set())

    def _in_loop(self, name: str, function: _Function) -> set[str]:
        """What a variable of a loop over ``self.layers`` may hold."""
        found = set()
        for node in function.nodes:
            if isinstance(node, (ast.For, ast.Assign)):
                targets = [node.target] if isinstance(node, ast.For) else node.targets
                source = node.iter if isinstance(node, ast.For) else node.value
                if any(_name(x) == name for target in targets for x in ast.walk(target)):
                    for x in ast.walk(source):
                        if isinstance(x, ast.Attribute) and _name(x.value) == "self":
                            found |= self.modules.get((function.owner, x.attr), set())
        return found

    def _forwards(self, classes: set[str]) -> list[_Function]:
        """The forwards of these classes; without any, of all that are no models of their own."""
        if not classes:
            classes = {
                name
                for name, bases in self.bases.items()
                if not any("PreTrainedModel" in base or base in self.bases for base in bases)
            }
        found = []
        for name in classes:
            line = [name, *self.bases.get(name, ())]
            own = [x for at in line for x in self.functions if x.owner == at]
            found += [x for x in own if x.node.name == "forward"][:1]
        return found

    def _is_mask(self, node: ast.expr, function: _Function) -> bool:
        def is_mask(part: ast.expr | None) -> bool:
            return part is not None and self._is_mask(part, function)

        if isinstance(node, ast.Name):
            after = function.masks.get(node.id)
            return after is not None and node.lineno > after and isinstance(node.ctx, ast.Load)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in _CONTAINER:
                return is_mask(node.func.value)
            name = _name(node.func)
            if _makes(name) or _root(node.func) in function.makers:
                return True
            made = [x for x in self.functions if x.returns_mask and x.node.name == name]
            return name != "forward" and bool(made)
        if isinstance(node, ast.IfExp):
            return is_mask(node.body) or is_mask(node.orelse)
        if isinstance(node, (ast.BoolOp, ast.Dict)):
            return any(map(is_mask, node.values))
        if isinstance(node, (ast.Tuple, ast.List)):
            return any(map(is_mask, node.elts))
        if isinstance(node, ast.DictComp):
            sources = (x for part in node.generators for x in ast.walk(part.iter))
            return is_mask(node.value) or any(_name(x) in function.makers for x in sources)
        if isinstance(node, (ast.NamedExpr, ast.Subscript)):
            return is_mask(node.value)
        return False


def _read(node: ast.expr, parents: dict[ast.AST, ast.AST]) -> ast.AST | None:
    """The expression that reads the mask ``node``; None if it is handed on."""
    parent = parents.get(node)
    if isinstance(parent, ast.Attribute):
        return None if parent.attr in _CONTAINER else parents[parent]
    if isinstance(parent, (ast.BinOp, ast.AugAssign, ast.UnaryOp)):
        return None if isinstance(getattr(parent, "op", None), ast.Not) else parent
    if isinstance(parent, ast.Compare):
        names = (ast.Is, ast.IsNot, ast.In, ast.NotIn)
        return None if all(isinstance(op, names) for op in parent.ops) else parent
    if isinstance(parent, ast.Subscript) and parent.value is node:
        return parent if _slices(parent.slice) else None
    if isinstance(parent, ast.Call) and _name(parent.func) == "isinstance":
        return None if _name(parent.args[1]) == "dict" else parent
    if isinstance(parent, ast.Call) and parent.func is not node:
        return parent if _root(parent.func) in _LIBRARIES else None
    return None


def _makes_mask(call: ast.Call) -> bool:
    return _makes(_name(call.func))


def _makes(name: str) -> bool:
    # That of recurrent layers is [batch, tokens] under every implementation.
    return re.match("create_(?!recurrent).*mask", name) is not None


def _made_of(node: ast.AST) -> set[str]:
    """The names that a mask function is given as ``attention_mask``, by itself or in a dict."""
    if isinstance(node, ast.Call) and _makes_mask(node):
        return {_name(x) for x in (*node.args, *(keyword.value for keyword in node.keywords))}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {_name(x) for key, x in pairs if getattr(key, "value", None) == "attention_mask"}
    return set()


def _name(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def _root(node: ast.AST) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return _name(node)


def _slices(index: ast.expr) -> bool:
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return any(
        isinstance(part, ast.Slice)
        or (isinstance(part, ast.Constant) and (part.value is None or part.value is ...))
        for part in parts
    )
