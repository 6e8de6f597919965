"""Whether a chat template only copies what the turns say: a proof from its syntax tree.

Three kinds of values are told apart: `messages` (the list, a part of it, or one message), a content or something with a
content in it, and all others, which depend on nothing but roles and their order. A content may be put out, joined to
other text, asked whether it is there, and trimmed; a template that does anything else with one looks at it, and so does
one whose tree holds what is not known here. Names count by their spelling, wherever they are set.
"""

from jinja2 import nodes

OTHER, MESSAGES, CONTENT, JOINED = range(4)

KINDS_OF_VALUES = frozenset({"defined", "undefined", "none", "string", "mapping", "iterable", "sequence"})
"""Tests that depend on a value's type alone."""

METHODS = frozenset({"get", "items", "keys", "values", "pop", "popitem", "copy", "update", "setdefault"})


class _Looks(Exception):
    """The template does something with a content that may depend on what it says."""


class Copying:
    """`copies`: whether the template only copies contents; `trims`: whether it trims some; `roles`: those whose turns
    must not be there for that."""

    def __init__(self, tree: nodes.Template) -> None:
        self.trims = False
        self.roles: set[str] = set()
        self.in_macro = self.sets_tools = False
        self.names = {"messages": MESSAGES}
        self.copies = True
        try:
            known: object = None
            while known != (
                now := (self.names.copy(), self.sets_tools)
            ):  # what is set late may be read early in a loop
                known = now
                self._all(tree.body)
        except _Looks:
            self.copies = False

    def _all(self, statements: list[nodes.Node]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: nodes.Node) -> None:
        match node:
            case nodes.Output():
                # What a macro writes is a text that somebody else may look at.
                kinds = (OTHER,) if self.in_macro else (OTHER, CONTENT, JOINED)
                for part in node.nodes:
                    self._require(part, *kinds)
            case nodes.If():
                self._kind(node.test)
                self._branch(node.test, node.body)
                self._all([*node.elif_, *node.else_])
            case nodes.For():
                kind = self._require(node.iter, OTHER, MESSAGES)
                self._set(node.target, kind)
                if node.test is not None:
                    self._kind(node.test)
                self._all([*node.body, *node.else_])
            case nodes.Assign():
                self._set(node.target, self._kind(node.node))
                self.sets_tools = self.sets_tools or (
                    isinstance(node.target, nodes.Name) and node.target.name == "tools"
                )
            case nodes.Scope():
                self._all(node.body)
            case nodes.Macro():
                inside, self.in_macro = self.in_macro, True
                self._all(node.body)
                self.in_macro = inside
            case nodes.ExprStmt():
                self._require(node.node, OTHER)
            case nodes.Break() | nodes.Continue():
                pass
            case _:
                raise _Looks

    def _branch(self, test: nodes.Node, body: list[nodes.Node]) -> None:
        """What is done only for some roles, or for tool calls, does not matter where there are none."""
        try:
            self._all(body)
        except _Looks:
            if not any(self._needs_more(condition) for condition in _conjuncts(test)):
                raise

    def _needs_more(self, condition: nodes.Node) -> bool:
        """Whether a condition holds only where there are tool calls or tools, or turns of a role, which is noted."""
        match condition:
            case nodes.Compare(
                expr=nodes.Getattr(node=owner, attr="role") | nodes.Getitem(node=owner, arg=nodes.Const(value="role")),
                ops=[nodes.Operand(op="eq", expr=nodes.Const(value=str() as role))],
            ) if self._kind(owner) == MESSAGES:
                self.roles.add(role)
                return True
            case (
                nodes.Getattr(node=owner, attr="tool_calls")
                | nodes.Getitem(node=owner, arg=nodes.Const(value="tool_calls"))
            ):
                return self._kind(owner) == MESSAGES
            case nodes.Name(name="tools"):
                return not self.sets_tools
            case _:
                return False

    def _set(self, target: nodes.Node, kind: int) -> None:
        if kind == OTHER:
            return
        match target:
            case nodes.Name():
                name = target.name
            case nodes.NSRef():
                name = f"{target.name}.{target.attr}"
            case _:
                raise _Looks
        known = self.names.setdefault(name, kind)
        if known != kind:
            if MESSAGES in (known, kind):
                raise _Looks
            self.names[name] = JOINED

    def _require(self, node: nodes.Node, *kinds: int) -> int:
        if (kind := self._kind(node)) not in kinds:
            raise _Looks
        return kind

    def _kind(self, node: nodes.Node) -> int:
        match node:
            case nodes.Name():
                return self.names.get(node.name, OTHER)
            case nodes.Getattr():
                return self._field(node.node, node.attr)
            case nodes.Getitem():
                if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
                    return self._field(node.node, node.arg.value)
                self._require(node.arg, OTHER)
                kind = self._require(node.node, OTHER, MESSAGES)
                if kind == MESSAGES and not _counts(node.arg):
                    raise _Looks
                return kind
            case nodes.Call() if (
                isinstance(node.node, nodes.Getattr) and node.node.attr == "strip" and not (node.args or node.kwargs)
            ):
                return self._trimmed(node.node.node)
            case nodes.Filter(name="trim", node=nodes.Expr() as inner) if not (node.args or node.kwargs):
                return self._trimmed(inner)
            case nodes.Filter(name="length" | "count", node=nodes.Expr() as inner):
                self._require(inner, OTHER, MESSAGES)
                return OTHER
            case nodes.Filter(name="list" | "first" | "last", node=nodes.Expr() as inner):
                return self._require(inner, OTHER, MESSAGES)
            case nodes.Filter(
                name="selectattr" | "rejectattr",
                node=nodes.Expr() as inner,
                args=[nodes.Const(value="role" | "tool_calls"), *more],
            ) if not node.kwargs:
                for argument in more:
                    self._require(argument, OTHER)
                return self._require(inner, OTHER, MESSAGES)
            case nodes.Test() if node.name in KINDS_OF_VALUES:
                self._kind(node.node)
                return OTHER
            case nodes.Not():
                self._kind(node.node)
                return OTHER
            case nodes.Add() | nodes.Concat():
                parts = node.nodes if isinstance(node, nodes.Concat) else [node.left, node.right]
                found = [self._require(part, OTHER, CONTENT, JOINED) for part in parts]
                return JOINED if any(found) else OTHER
            case nodes.And() | nodes.Or():
                return _either(self._kind(node.left), self._kind(node.right))
            case nodes.CondExpr():
                self._kind(node.test)
                return _either(self._kind(node.expr1), self._kind(node.expr2) if node.expr2 else OTHER)
            case _:
                for child in node.iter_child_nodes():
                    self._require(child, OTHER)
                return OTHER

    def _field(self, owner: nodes.Expr, name: str) -> int:
        if name in ("previtem", "nextitem"):
            return MESSAGES  # if it is a loop over them
        if isinstance(owner, nodes.Name) and f"{owner.name}.{name}" in self.names:
            return self.names[f"{owner.name}.{name}"]
        if self._require(owner, OTHER, MESSAGES) == OTHER:
            return OTHER
        if name in METHODS:
            raise _Looks
        return CONTENT if name == "content" else OTHER

    def _trimmed(self, node: nodes.Expr) -> int:
        kind = self._require(node, OTHER, CONTENT)
        self.trims = self.trims or kind == CONTENT
        return kind


def _either(one: int, other: int) -> int:
    """The kind of a value that is one of two."""
    kinds = {one, other}
    if kinds == {OTHER}:
        return OTHER
    if MESSAGES in kinds:
        if kinds <= {OTHER, MESSAGES}:
            return MESSAGES
        raise _Looks
    return CONTENT if kinds == {CONTENT} else JOINED


def _conjuncts(node: nodes.Node) -> list[nodes.Node]:
    """What must all be true for a condition to be."""
    return [*_conjuncts(node.left), *_conjuncts(node.right)] if isinstance(node, nodes.And) else [node]


def _counts(node: nodes.Node) -> bool:
    """Whether an index is made of numbers alone: constants, `loop.index0` and the like."""
    match node:
        case nodes.Const():
            return node.value is None or isinstance(node.value, int)
        case nodes.Getattr(node=nodes.Name(name="loop")):
            return True
        case nodes.Slice() | nodes.Neg() | nodes.Add() | nodes.Sub():
            return all(_counts(inner) for inner in node.iter_child_nodes())
        case _:
            return False
