"""Evaluation of a parsed template, node by node, under a budget.

jinja2's parser gives the tree, so what a template may say is decided by jinja2 itself; nothing is
compiled to Python, and nothing runs that is not written in this room. A visit of a node costs one
unit, whatever is built costs its size.

Scopes follow jinja2: a name set inside a for, a macro or a set block is not seen outside; one set
inside an if is. Not offered, because no chat template is known to need them: include, import,
extends, block, call, filter, with, autoescape, recursive loops, varargs. They are refused by
name, never skipped.
"""

import operator
from collections import ChainMap
from collections.abc import Callable
from typing import Any

from jinja2 import Undefined, nodes

from chalot.text.jinja import filters, values
from chalot.text.jinja.budget import Budget, Fault

Scope = ChainMap[str, Any]


class Break(Fault):
    """{% break %}; a fault where no loop catches it."""


class Continue(Fault):
    """{% continue %}; a fault where no loop catches it."""


class Macro:
    """A function from values to text, in the scope that it was defined in."""

    __slots__ = ("evaluator", "node", "scope")

    def __init__(self, evaluator: "Evaluator", node: nodes.Macro, scope: Scope) -> None:
        self.evaluator, self.node, self.scope = evaluator, node, scope

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        parameters = [parameter.name for parameter in self.node.args]
        scope = self.scope.new_child(dict(zip(parameters, args, strict=False)))
        unknown = kwargs.keys() - set(parameters[len(args) :])
        if unknown or len(args) > len(parameters):
            raise Fault(
                f"found {len(args)} arguments and {sorted(kwargs)} for the macro {self.node.name}, "
                f"expected {', '.join(parameters) or 'none'}"
            )
        defaults = dict(zip(parameters[::-1], self.node.defaults[::-1], strict=False))
        for name in parameters[len(args) :]:
            if name in kwargs:
                scope[name] = kwargs[name]
            elif name in defaults:
                scope[name] = self.evaluator.value(defaults[name], scope)
            else:
                scope[name] = Undefined(f"parameter {name!r} was not provided", name=name)
        return self.evaluator.captured(self.node.body, scope)

    def __repr__(self) -> str:
        return "<macro>"


class Evaluator:
    """One rendering: what it may still cost, and the text written so far."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.out: list[str] = []

    def value(self, node: nodes.Node, scope: Scope) -> Any:
        """Evaluate an expression."""
        self.budget.spend(1)
        evaluate = EXPRESSIONS.get(type(node))
        if evaluate is None:
            raise Fault(
                f"found the expression {type(node).__name__}, which chat templates do not need"
            )
        return evaluate(self, node, scope)

    def run(self, body: list[nodes.Node], scope: Scope) -> None:
        """Run statements one after the other."""
        for node in body:
            self.budget.spend(1)
            self.budget.line = node.lineno
            execute = STATEMENTS.get(type(node))
            if execute is None:
                raise Fault(
                    f"found the statement {type(node).__name__}, which chat templates do not need"
                )
            execute(self, node, scope)

    def captured(self, body: list[nodes.Node], scope: Scope) -> str:
        """The text that statements write."""
        outer, self.out = self.out, []
        try:
            self.run(body, scope)
            return "".join(self.out)
        finally:
            self.out = outer

    def assign(self, target: nodes.Node, value: Any, scope: Scope) -> None:
        if isinstance(target, nodes.Name):
            scope[target.name] = value
        elif isinstance(target, nodes.NSRef):
            space = lookup(target.name, scope)
            if type(space) is not values.Namespace:
                raise Fault(
                    f"found {target.name}.{target.attr} = ..., expected {target.name} a namespace"
                )
            space.names[target.attr] = value
        elif isinstance(target, nodes.Tuple):
            for part, one in zip(target.items, values.as_list(self.budget, value), strict=True):
                self.assign(part, one, scope)

    def arguments(
        self, node: nodes.Call | nodes.Filter | nodes.Test, scope: Scope
    ) -> tuple[list[Any], dict[str, Any]]:
        args = [self.value(argument, scope) for argument in node.args]
        kwargs: dict[str, Any] = {}
        for pair in node.kwargs:
            kwargs[str(pair.key)] = self.value(pair.value, scope)
        if node.dyn_args:
            args += values.as_list(self.budget, self.value(node.dyn_args, scope))
        if node.dyn_kwargs:
            kwargs |= self.value(node.dyn_kwargs, scope)
        return args, kwargs


# -------------------------------------------------------------------------------------- statements


def write(ev: Evaluator, node: nodes.Output, scope: Scope) -> None:
    for part in node.nodes:
        ev.budget.line = part.lineno
        text = values.to_text(ev.budget, ev.value(part, scope))
        ev.budget.spend(len(text))
        ev.out.append(text)


def assign(ev: Evaluator, node: nodes.Assign, scope: Scope) -> None:
    ev.assign(node.target, ev.value(node.node, scope), scope)


def assign_block(ev: Evaluator, node: nodes.AssignBlock, scope: Scope) -> None:
    text = ev.captured(node.body, scope.new_child())
    ev.assign(node.target, apply(ev, node.filter, text, scope) if node.filter else text, scope)


def condition(ev: Evaluator, node: nodes.If, scope: Scope) -> None:
    for arm in (node, *node.elif_):
        if ev.value(arm.test, scope):
            ev.run(arm.body, scope)
            return
    ev.run(node.else_, scope)


def for_loop(ev: Evaluator, node: nodes.For, scope: Scope) -> None:
    if node.recursive:
        raise Fault("found a recursive loop, which chat templates do not need")
    items = []
    for one in values.as_list(ev.budget, ev.value(node.iter, scope)):
        inner = scope.new_child()
        ev.assign(node.target, one, inner)
        if node.test is None or ev.value(node.test, inner):
            items.append(one)
    loop = values.Loop(items)
    for position, one in enumerate(items):
        loop.index0 = position
        inner = scope.new_child({"loop": loop})
        ev.assign(node.target, one, inner)
        try:
            ev.run(node.body, inner)
        except Continue:
            continue
        except Break:
            break
    if not items:
        ev.run(node.else_, scope.new_child())


def macro(ev: Evaluator, node: nodes.Macro, scope: Scope) -> None:
    scope[node.name] = Macro(ev, node, scope)


def nested(ev: Evaluator, node: nodes.Scope, scope: Scope) -> None:
    ev.run(node.body, scope.new_child())


def leave(reason: type[Exception]) -> Callable[[Evaluator, Any, Scope], None]:
    def execute(ev: Evaluator, node: nodes.Stmt, scope: Scope) -> None:
        raise reason("found break or continue outside of a loop")

    return execute


STATEMENTS: dict[type[nodes.Node], Callable[[Evaluator, Any, Scope], None]] = {
    nodes.Assign: assign,
    nodes.AssignBlock: assign_block,
    nodes.Break: leave(Break),
    nodes.Continue: leave(Continue),
    nodes.For: for_loop,
    nodes.If: condition,
    nodes.Macro: macro,
    nodes.Output: write,
    nodes.Scope: nested,
}


# ------------------------------------------------------------------------------------- expressions


def lookup(name: str, scope: Scope) -> Any:
    try:
        return scope[name]
    except KeyError:
        return Undefined(name=name)


def mapping(ev: Evaluator, node: nodes.Dict, scope: Scope) -> dict[Any, Any]:
    found = {}
    for pair in node.items:
        key = ev.value(pair.key, scope)
        ev.budget.walk(key)  # hashing visits all of it
        found[key] = ev.value(pair.value, scope)
    return found


def either(ev: Evaluator, node: nodes.CondExpr, scope: Scope) -> Any:
    if ev.value(node.test, scope):
        return ev.value(node.expr1, scope)
    return ev.value(node.expr2, scope) if node.expr2 else Undefined("an if without else was false")


def concat(ev: Evaluator, node: nodes.Concat, scope: Scope) -> str:
    return values.join(
        ev.budget, "", [values.to_text(ev.budget, ev.value(n, scope)) for n in node.nodes]
    )


COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
}


def compare(ev: Evaluator, node: nodes.Compare, scope: Scope) -> Any:
    left, result = ev.value(node.expr, scope), True
    for operand in node.ops:
        right = ev.value(operand.expr, scope)
        if operand.op in ("in", "notin"):
            result = values.contains(ev.budget, left, right) == (operand.op == "in")
        else:
            values.pay_to_compare(ev.budget, left, right)
            result = COMPARISONS[operand.op](left, right)
        if not result:
            break
        left = right
    return result


def slice_of(ev: Evaluator, node: nodes.Slice, scope: Scope) -> slice:
    return slice(*(part and ev.value(part, scope) for part in (node.start, node.stop, node.step)))


def call(ev: Evaluator, node: nodes.Call, scope: Scope) -> Any:
    function = ev.value(node.node, scope)
    if isinstance(function, Undefined):
        values.fail(function)
    if not isinstance(function, (Macro, values.Function)):
        raise Fault(f"found a call of {values.kind_of(function)}, expected a macro or a function")
    args, kwargs = ev.arguments(node, scope)
    return function(*args, **kwargs)


def apply(ev: Evaluator, node: Any, value: Any, scope: Scope) -> Any:
    if (
        node.node is not None
    ):  # in `{% set x | upper %}` the block's text is at the end of the chain
        value = (
            apply(ev, node.node, value, scope) if value is not None else ev.value(node.node, scope)
        )
    args, kwargs = ev.arguments(node, scope)
    return filters.call_filter(ev.budget, node.name, value, *args, **kwargs)


def test(ev: Evaluator, node: nodes.Test, scope: Scope) -> bool:
    value = ev.value(node.node, scope)
    args, kwargs = ev.arguments(node, scope)
    return filters.call_test(ev.budget, node.name, value, *args, **kwargs)


def binary(compute: Callable[[Budget, Any, Any], Any]) -> Callable[[Evaluator, Any, Scope], Any]:
    return lambda ev, node, scope: compute(
        ev.budget, ev.value(node.left, scope), ev.value(node.right, scope)
    )


EXPRESSIONS: dict[type[nodes.Node], Callable[[Evaluator, Any, Scope], Any]] = {
    nodes.Add: binary(values.add),
    nodes.And: lambda ev, node, scope: ev.value(node.left, scope) and ev.value(node.right, scope),
    nodes.Call: call,
    nodes.Compare: compare,
    nodes.Concat: concat,
    nodes.CondExpr: either,
    nodes.Const: lambda ev, node, scope: node.value,
    nodes.Dict: mapping,
    nodes.Div: binary(lambda budget, left, right: left / right),
    nodes.Filter: lambda ev, node, scope: apply(ev, node, None, scope),
    nodes.FloorDiv: binary(lambda budget, left, right: left // right),
    nodes.Getattr: lambda ev, node, scope: values.attribute(
        ev.budget, ev.value(node.node, scope), node.attr
    ),
    nodes.Getitem: lambda ev, node, scope: values.item(
        ev.budget, ev.value(node.node, scope), ev.value(node.arg, scope)
    ),
    nodes.List: lambda ev, node, scope: [ev.value(part, scope) for part in node.items],
    nodes.Mod: binary(values.modulo),
    nodes.Mul: binary(values.multiply),
    nodes.Name: lambda ev, node, scope: lookup(node.name, scope),
    nodes.Neg: lambda ev, node, scope: -ev.value(node.node, scope),
    nodes.Not: lambda ev, node, scope: not ev.value(node.node, scope),
    nodes.Or: lambda ev, node, scope: ev.value(node.left, scope) or ev.value(node.right, scope),
    nodes.Pos: lambda ev, node, scope: +ev.value(node.node, scope),
    nodes.Pow: binary(values.power),
    nodes.Slice: slice_of,
    nodes.Sub: binary(lambda budget, left, right: left - right),
    nodes.TemplateData: lambda ev, node, scope: node.data,
    nodes.Test: test,
    nodes.Tuple: lambda ev, node, scope: tuple([ev.value(part, scope) for part in node.items]),
}
