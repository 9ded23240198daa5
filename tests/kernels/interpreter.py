"""Triton's interpreter on CPU tensors, mended: kernels run without a GPU and compute what compiled ones do.

TRITON_INTERPRET=1 counts only before triton is imported: a process interprets or compiles. `tests/conftest.py` sets it
where there is no GPU.

What the stock interpreter of triton 3.6 to 3.9 gets wrong, each mended by one class below:
- bfloat16 is kept as raw 16-bit integers. Arithmetic, `tl.dot` and atomics compute on these integers (errors of 1e10),
  and a cast from fp32 cuts the low bits off where hardware rounds to the nearest even.
- `tl.associative_scan` and reductions with a function of one's own go element by element, ten times slower.
- A loop's variable and a float argument stay Python numbers, on which `.to(...)` fails.
- `a and b`, `a or b`, `not a` on blocks ask for Python's truth, so the first operand is lost.
- A module's alias of a builtin (`exp = tl.exp`) is not made to interpret; `libdevice` is missing.
- `autotune` with several configurations asks for a GPU. `tl.device_assert` does nothing.
- 3.6 fails under numpy 2.4, which turns no array of one element into a number.
- Every call of a device function patches the whole language once more.

What stays: `tl.max` ignores NaN; reads out of bounds return what lies there (fill outputs with NaN); programs run one
after another, so races never show; every fp32 product is exact; inline assembly is unknown; code runs that would not
compile (a loop that changes a type, a dot of 8 x 8).
"""

import ast
import importlib
import importlib.util
import os
from typing import Any

import numpy as np


def install() -> str | None:
    """Before the first kernel runs. Returns why it cannot, where it cannot."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    os.environ["TRITON_INTERPRET"] = "1"
    language = importlib.import_module("triton.language")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    if not isinstance(language.cdiv, interpreter.InterpretedFunction):
        return "triton was imported before, to compile"
    if not hasattr(interpreter, "mended"):
        interpreter.mended = True
        for mend in (_Bfloat16, _Folds, _Calls, _Arguments, _Tuning, _Libdevice, _Syntax):
            mend(interpreter)
    return None


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as raw bits -> fp32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """fp32 -> the nearest bfloat16 as raw bits, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    found = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), found)


class _Bfloat16:
    """Each operation of the builder that may see bfloat16: in fp32, its result rounded."""

    def __init__(self, interpreter: Any):
        import triton.language as tl

        self.kind, self.handle, self.tl = tl.bfloat16, interpreter.TensorHandle, tl
        self.interpreter = interpreter
        builder = interpreter.InterpreterBuilder
        self.stock = {name: getattr(builder, name, None) for name in _Bfloat16.__dict__ if not name.startswith("_")}
        for name in ("binary_op", "unary_op", "ternary_op", "cast_impl", "create_fma", "create_dot", "get_bf16"):
            setattr(builder, name, _method(getattr(self, name)))
        builder.create_atomic_rmw = _method(self.create_atomic_rmw)

    def _is(self, held: Any) -> bool:
        return not isinstance(held.dtype, self.tl.pointer_type) and held.dtype.scalar == self.kind

    def _wide(self, held: Any) -> np.ndarray:
        return widen(held.data) if self._is(held) else held.data

    def _made(self, value: np.ndarray) -> Any:
        return self.handle(narrow(value), self.kind)

    def binary_op(self, builder: Any, left: Any, right: Any, op: Any) -> Any:
        if not self._is(left):
            return self.stock["binary_op"](builder, left, right, op)
        value = op(self._wide(left), self._wide(right))
        return self.handle(value, self.kind) if value.dtype == np.bool_ else self._made(value)

    def unary_op(self, builder: Any, held: Any, op: Any) -> Any:
        return self._made(op(self._wide(held))) if self._is(held) else self.stock["unary_op"](builder, held, op)

    def ternary_op(self, builder: Any, one: Any, two: Any, three: Any, op: Any) -> Any:
        if op is np.where or not self._is(three):
            return self.stock["ternary_op"](builder, one, two, three, op)
        return self._made(op(*map(self._wide, (one, two, three))))

    def create_fma(self, builder: Any, x: Any, y: Any, z: Any) -> Any:
        if not self._is(z):
            return self.stock["create_fma"](builder, x, y, z)
        return self._made(self._wide(x) * self._wide(y) + self._wide(z))

    def create_dot(self, builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.handle(self._wide(m), self.tl.float32) if self._is(m) else m for m in (a, b))
        return self.stock["create_dot"](builder, a, b, *rest)

    def cast_impl(self, builder: Any, source: Any, to: Any) -> Any:
        if self._is(source) and to.scalar != self.kind:
            source = self.handle(self._wide(source), self.tl.float32)
            if to.scalar == self.tl.float32:
                return source
        elif to.scalar == self.kind and not self._is(source):
            return self._made(source.data.astype(np.float32))
        return self.stock["cast_impl"](builder, source, to)

    def get_bf16(self, builder: Any, value: float) -> Any:
        return self._made(np.array([value], np.float32))

    def create_atomic_rmw(self, builder: Any, op: Any, pointers: Any, held: Any, mask: Any, *rest: Any) -> Any:
        if not self._is(held):
            return self.stock["create_atomic_rmw"](builder, op, pointers, held, mask, *rest)
        function = {"ADD": np.add, "FADD": np.add, "MAX": np.maximum, "MIN": np.minimum}[str(op).split(".")[-1]]
        before, one, memory = np.zeros_like(held.data), np.ones(1, bool), self.interpreter._interpreter
        places, values, here = np.broadcast_arrays(pointers.data, held.data, mask.data)
        for at in np.ndindex(places.shape):
            if here[at]:
                place, value = np.array([places[at]], np.uint64), np.array([values[at]], np.uint16)
                old = memory.load(place, one, np.zeros(1, np.uint16), np.dtype(np.uint16))
                memory.store(place, narrow(function(widen(old), widen(value))), one)
                before[at] = old[0]
        return self.handle(before, self.kind)


class _Folds:
    """Scans and reductions with a function: on whole arrays, in a number of steps that is the length's logarithm."""

    def __init__(self, interpreter: Any):
        import triton.language as tl

        self.tensor, self.handle = tl.core.tensor, interpreter.TensorHandle
        interpreter.ScanOps.generic_scan = _method(self.scan)
        interpreter.ReduceOps.generic_reduce = _method(self.reduce)

    def _combine(self, function: Any, left: list, right: list, dtypes: list) -> list[np.ndarray]:
        """Arrays travel as scalars of their type: the function sees one number and computes all."""
        pairs = [*zip(left, dtypes, strict=True), *zip(right, dtypes, strict=True)]
        out = function.fn(*[self.tensor(self.handle(array, dtype), dtype) for array, dtype in pairs])
        return [one.handle.data for one in (out if isinstance(out, (tuple, list)) else (out,))]

    def scan(self, ops: Any, inputs: Any) -> list:
        dtypes = [x.dtype.scalar for x in inputs]
        arrays = [np.moveaxis(x.handle.data, ops.axis, 0).copy() for x in inputs]
        step = 1
        while step < len(arrays[0]):
            later = self._combine(ops.combine_fn, [a[:-step] for a in arrays], [a[step:] for a in arrays], dtypes)
            arrays = [
                np.concatenate([a[:step], np.broadcast_to(new, a[step:].shape).astype(a.dtype)])
                for a, new in zip(arrays, later, strict=True)
            ]
            step *= 2
        back = (np.ascontiguousarray(np.moveaxis(a, 0, ops.axis)) for a in arrays)
        return [ops.to_tensor(a, dtype) for a, dtype in zip(back, dtypes, strict=True)]

    def reduce(self, ops: Any, inputs: Any) -> list:
        dtypes, dims = [x.dtype.scalar for x in inputs], inputs[0].handle.data.ndim
        held = [x.handle.data for x in inputs]
        arrays = [a.reshape(-1) if ops.axis is None else np.moveaxis(a, ops.axis, 0) for a in held]
        while (half := len(arrays[0]) // 2) > 0:
            pairs = self._combine(
                ops.combine_fn, [a[0 : 2 * half : 2] for a in arrays], [a[1 : 2 * half : 2] for a in arrays], dtypes
            )
            arrays = [
                np.concatenate([np.asarray(new, a.dtype), a[2 * half :]]) for a, new in zip(arrays, pairs, strict=True)
            ]
        found = [a[0] for a in arrays]
        if ops.keep_dims:
            found = [a.reshape((1,) * dims) if ops.axis is None else np.expand_dims(a, ops.axis) for a in found]
        return [ops.to_tensor(a if a.ndim else a.item(), dtype) for a, dtype in zip(found, dtypes, strict=True)]


class _Calls:
    """The language is patched once a launch and module, its aliases too."""

    def __init__(self, interpreter: Any):
        import triton.language as tl

        self.interpreter, self.is_builtin = interpreter, tl.core.is_builtin
        self.launched: set[int] = set()  # modules patched in this launch
        self.aliased: set[int] = set()
        self.stock_patch, self.stock_launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
        interpreter._patch_lang = self.patch
        interpreter.InterpretedFunction.__call__ = _method(self.call)
        interpreter.GridExecutor.__call__ = _method(self.launch)

    def patch(self, function: Any, *rest: Any) -> Any:
        names = function.__globals__
        if id(names) not in self.aliased:
            self.aliased.add(id(names))
            found = {n: v for n, v in names.items() if callable(v) and self.is_builtin(v)}
            names.update({name: self._interpreted(value) for name, value in found.items()})
        return self.stock_patch(function, *rest)

    def _interpreted(self, builtin: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            return builtin(*args, **options | {"_semantic": self.interpreter.interpreter_semantic})

        return call

    def call(self, function: Any, *args: Any, **options: Any) -> Any:
        key = id(function.fn.__globals__)
        if key not in self.launched:
            self.interpreter._patch_lang(function.fn)
            self.launched.add(key)
        try:
            return function.rewrite()(*args, **options)
        except self.interpreter.InterpreterError:
            raise
        except Exception as error:
            raise self.interpreter.InterpreterError(repr(error)) from error

    def launch(self, grid: Any, *args: Any, **options: Any) -> Any:
        self.launched.clear()
        return self.stock_launch(grid, *args, **options)


class _Arguments:
    """Floats come in as fp32 scalars, as compiled; a tensor of one element is an index and a truth; asserts assert."""

    def __init__(self, interpreter: Any):
        import triton.language as tl

        handle, convert, patch = interpreter.TensorHandle, interpreter._implicit_cvt, interpreter._patch_lang_tensor

        def implicit(argument: Any) -> Any:
            if isinstance(argument, float):
                return tl.tensor(handle(np.array([argument], np.float32), tl.float32), tl.float32)
            return convert(argument)

        def index(tensor: Any) -> int:
            return int(np.asarray(tensor.handle.data).reshape(-1)[0])

        def truth(tensor: Any) -> bool:
            return bool(index(tensor)) if tensor.handle.data.size == 1 else True

        def patched(tensor: Any, *scope: Any) -> None:
            patch(tensor, *scope)
            for name, method in (("__index__", index), ("__bool__", truth)):
                scope[0].set_attr(tensor, name, method) if scope else setattr(tensor, name, method)

        interpreter._implicit_cvt, interpreter._patch_lang_tensor = implicit, patched
        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)


class _Tuning:
    """The first configuration, untimed."""

    def __init__(self, interpreter: Any):
        from triton.runtime.autotuner import Autotuner

        def untimed(*args: Any, **options: Any) -> list[float]:
            return [0.0, 0.0, 0.0]

        Autotuner.do_bench = property(lambda tuner: untimed, lambda tuner, value: None)
        Autotuner._bench = untimed


class _Libdevice:
    """The functions that kernels take from it, by numpy's."""

    def __init__(self, interpreter: Any):
        import triton.language as tl
        from triton.language.extra import libdevice

        def wrapped(function: Any) -> Any:
            def call(x: Any, _semantic: Any = None) -> Any:
                bf16 = x.dtype.scalar == tl.bfloat16
                value = function(widen(x.handle.data) if bf16 else x.handle.data)
                data = narrow(value) if bf16 else value.astype(x.handle.data.dtype)
                return tl.core.tensor(interpreter.TensorHandle(data, x.dtype.scalar), x.type)

            return call

        same = ("tanh", "exp", "exp2", "log", "log2", "log1p", "expm1", "sqrt", "sin", "cos")
        functions = {name: getattr(np, name) for name in same} | {"fast_expf": np.exp, "fast_logf": np.log}
        for name, function in (functions | {"rsqrt": lambda x: 1 / np.sqrt(x)}).items():
            setattr(libdevice, name, wrapped(function))


class _Syntax:
    """A kernel's source as it is rewritten: loop variables are tensors, `and`, `or` and `not` go by element."""

    def __init__(self, interpreter: Any):
        import triton.language as tl

        def both(op: str, *operands: Any) -> Any:
            value = operands[0]()
            for operand in operands[1:]:
                if not isinstance(value, tl.tensor):
                    value = (value and operand()) if op == "and" else (value or operand())
                    continue
                other = operand()
                if isinstance(other, tl.tensor):
                    value = value.logical_and(other) if op == "and" else value.logical_or(other)
                else:
                    value = (other and value) if op == "and" else (other or value)
            return value

        def negated(value: Any) -> Any:
            block = isinstance(value, tl.tensor) and value.handle.data.size > 1
            return value == 0 if block else not value

        class Rewriter(interpreter.ASTTransformer):
            def visit_For(self, node: ast.For) -> ast.AST:
                node = self.generic_visit(node)  # type: ignore[assignment]
                called = node.iter.func if isinstance(node.iter, ast.Call) else None
                name = getattr(called, "attr", getattr(called, "id", ""))
                if name == "range" and isinstance(node.target, ast.Name):
                    text = f"{node.target.id} = interpreter_semantic.to_tensor({node.target.id}, False)"
                    node.body.insert(0, ast.parse(text).body[0])
                return node

            def visit_Assign(self, node: ast.Assign) -> ast.AST:
                node.value = self.visit(node.value)  # 3.7 would not look into it
                return getattr(super(), "visit_Assign", super().generic_visit)(node)

            def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
                node = self.generic_visit(node)  # type: ignore[assignment]
                op = "and" if isinstance(node.op, ast.And) else "or"
                none = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
                operands = [ast.Lambda(args=none, body=value) for value in node.values]
                return ast.Call(ast.Name("_mended_both", ast.Load()), [ast.Constant(op), *operands], [])

            def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
                node = self.generic_visit(node)  # type: ignore[assignment]
                if not isinstance(node.op, ast.Not):
                    return node
                return ast.Call(ast.Name("_mended_not", ast.Load()), [node.operand], [])

        interpreter._mended_both, interpreter._mended_not = both, negated
        interpreter.FunctionRewriter.ast_transformer = Rewriter()


def _method(bound: Any) -> Any:
    """A bound method as a function that a class calls with its own instance first."""

    def call(instance: Any, *args: Any, **options: Any) -> Any:
        return bound(instance, *args, **options)

    return call
