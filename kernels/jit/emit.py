"""Functions in LLVM's intermediate representation, written as Python that emits them.

A `Function` is open while it is written: what Python does then (loops over registers, choices) happens once; what the
emitted code does later is said with values. A `Value` is a number or a vector of numbers that the code will have:
operators on values emit instructions. `for` loops of Python unroll; `with function.loop(...)` emits a loop.

    with Function(module, "add", ["x", "y", "n"]) as f:
        x, y, n = (f.argument(name) for name in ("x", "y", "n"))
        with f.loop(0, n, 16) as i:
            total = f.load(x + i * 4, vector(F32, 16)) + f.load(y + i * 4, vector(F32, 16))
            f.store(total, x + i * 4)

Addresses are int64 values, in bytes. Integers are signed. Floating sums and products are rounded one by one, in the
order in which they are written: nothing may be reassociated or fused, but for `fma`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeAlias

from llvmlite import ir

F64, F32, F16, BF16 = ir.DoubleType(), ir.FloatType(), ir.HalfType(), ir.IntType(16)
"""bfloat16 is kept as the 16 bits that it is: `widen_bfloat16` and `narrow_to_bfloat16` convert."""
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
POINTER = ir.PointerType()

Number: TypeAlias = "Value | int | float"


def vector(element: Any, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def constant(type: Any, value: float) -> ir.Constant:
    """The number, in every lane."""
    return ir.Constant(type, [value] * type.count if isinstance(type, ir.VectorType) else value)


def is_float(type: Any) -> bool:
    element = type.element if isinstance(type, ir.VectorType) else type
    return element in (F64, F32, F16)


class Value:
    """What the emitted code will have. Operators emit; a Python number becomes a constant of the other's type."""

    def __init__(self, function: Function, value: Any) -> None:
        self._function = function
        self.ir = value

    @property
    def type(self) -> Any:
        return self.ir.type

    def _emit(self, integer: str, floating: str, other: Number, *, swapped: bool = False) -> Value:
        one, two = self.ir, self._function.value(other, self.type).ir
        if swapped:
            one, two = two, one
        builder = self._function.builder
        return Value(self._function, getattr(builder, floating if is_float(self.type) else integer)(one, two))

    def __add__(self, other: Number) -> Value:
        return self._emit("add", "fadd", other)

    def __sub__(self, other: Number) -> Value:
        return self._emit("sub", "fsub", other)

    def __rsub__(self, other: Number) -> Value:
        return self._emit("sub", "fsub", other, swapped=True)

    def __mul__(self, other: Number) -> Value:
        return self._emit("mul", "fmul", other)

    def __truediv__(self, other: Number) -> Value:
        return self._emit("", "fdiv", other)

    def __rtruediv__(self, other: Number) -> Value:
        return self._emit("", "fdiv", other, swapped=True)

    def __floordiv__(self, other: Number) -> Value:
        """Of integers that are not negative."""
        return self._emit("udiv", "", other)

    def __mod__(self, other: Number) -> Value:
        """Of integers that are not negative."""
        return self._emit("urem", "", other)

    def __and__(self, other: Number) -> Value:
        return self._emit("and_", "", other)

    def __or__(self, other: Number) -> Value:
        return self._emit("or_", "", other)

    def __xor__(self, other: Number) -> Value:
        return self._emit("xor", "", other)

    def __lshift__(self, other: Number) -> Value:
        return self._emit("shl", "", other)

    def __rshift__(self, other: Number) -> Value:
        """Zeros come in."""
        return self._emit("lshr", "", other)

    __radd__, __rmul__ = __add__, __mul__

    def _compare(self, how: str, other: Number) -> Value:
        other = self._function.value(other, self.type)
        builder = self._function.builder
        compare = builder.fcmp_ordered if is_float(self.type) else builder.icmp_signed
        return Value(self._function, compare(how, self.ir, other.ir))

    def __lt__(self, other: Number) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Number) -> Value:
        return self._compare("<=", other)

    def __gt__(self, other: Number) -> Value:
        return self._compare(">", other)

    def __ge__(self, other: Number) -> Value:
        return self._compare(">=", other)

    def equals(self, other: Number) -> Value:
        return self._compare("==", other)

    def lane(self, index: int) -> Value:
        return Value(self._function, self._function.builder.extract_element(self.ir, ir.Constant(I32, index)))

    def lanes(self, indices: Sequence[int], other: Value | None = None) -> Value:
        """The lanes at `indices`; those past this vector's are the other's."""
        pick = ir.Constant(vector(I32, len(indices)), list(indices))
        others = ir.Constant(self.type, ir.Undefined) if other is None else other.ir
        return Value(self._function, self._function.builder.shuffle_vector(self.ir, others, pick))

    def half(self, which: int) -> Value:
        width = self.type.count // 2
        return self.lanes(range(which * width, (which + 1) * width))

    def broadcast(self, lanes: int) -> Value:
        """A number -> a vector that has it in every lane."""
        builder, type = self._function.builder, vector(self.type, lanes)
        single = builder.insert_element(ir.Constant(type, ir.Undefined), self.ir, ir.Constant(I32, 0))
        return Value(self._function, single).lanes([0] * lanes)

    def bits(self, type: Any) -> Value:
        """The same bits as another type."""
        return Value(self._function, self._function.builder.bitcast(self.ir, type))

    def to(self, type: Any) -> Value:
        """Convert: integers to wider (with their sign) and narrower ones (the low bits), to float and, towards zero,
        back; floats to wider and narrower ones."""
        builder, own = self._function.builder, self.type
        if is_float(own) and is_float(type):
            wider = _element_bytes(type) > _element_bytes(own)
            return Value(self._function, (builder.fpext if wider else builder.fptrunc)(self.ir, type))
        if is_float(own):
            return Value(self._function, builder.fptosi(self.ir, type))
        if is_float(type):
            return Value(self._function, builder.sitofp(self.ir, type))
        return Value(self._function, (builder.sext if _width(type) > _width(own) else builder.trunc)(self.ir, type))

    def zero_extended(self, type: Any) -> Value:
        return Value(self._function, self._function.builder.zext(self.ir, type))


def _width(type: Any) -> int:
    return int((type.element if isinstance(type, ir.VectorType) else type).width)


class Variable:
    """A place in a register, for values that loops change."""

    def __init__(self, function: Function, initial: Value) -> None:
        self._function = function
        self._type = initial.type
        with function.builder.goto_entry_block():
            self._place = function.builder.alloca(initial.type)
        self.set(initial)

    def get(self) -> Value:
        return Value(self._function, self._function.builder.load(self._place, typ=self._type))

    def set(self, value: Value) -> None:
        self._function.builder.store(value.ir, self._place)


class Function:
    """One function while it is written: `void name(int64 first, ...)`; close it by leaving the `with`."""

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[str]) -> None:
        self.module = module
        self.name = name
        self._function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * len(arguments)), name)
        self._function.attributes.add("nounwind")
        self._arguments = {name: Value(self, arg) for name, arg in zip(arguments, self._function.args, strict=True)}
        self.builder: ir.IRBuilder = ir.IRBuilder(self._function.append_basic_block("entry"))

    def __enter__(self) -> Function:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.builder.ret_void()

    def argument(self, name: str) -> Value:
        return self._arguments[name]

    def value(self, number: Number, type: Any = I64) -> Value:
        """A constant, if it is no value yet."""
        return number if isinstance(number, Value) else Value(self, constant(type, number))

    def numbers(self, type: ir.VectorType) -> Value:
        """0, 1, 2, ... in the lanes."""
        return Value(self, ir.Constant(type, list(range(type.count))))

    def variable(self, initial: Number, type: Any = I64) -> Variable:
        return Variable(self, self.value(initial, type))

    # Memory

    def _pointer(self, address: Value) -> Any:
        return self.builder.inttoptr(address.ir, POINTER)

    def pointer(self, address: Value) -> Value:
        """For an `instruction` that takes one."""
        return Value(self, self._pointer(address))

    def stack(self, num_bytes: int) -> Value:
        """-> the address of memory that is the function's own, at a multiple of 64."""
        with self.builder.goto_entry_block():
            place = self.builder.alloca(ir.ArrayType(I8, num_bytes))
            place.align = 64
            return Value(self, self.builder.ptrtoint(place, I64))

    def load(self, address: Value, type: Any, *, align: int | None = None) -> Value:
        loaded = self.builder.load(self._pointer(address), typ=type)
        loaded.align = align or _element_bytes(type)
        return Value(self, loaded)

    def store(self, value: Value, address: Value, *, align: int | None = None) -> None:
        self.builder.store(value.ir, self._pointer(address)).align = align or _element_bytes(value.type)

    def prefetch(self, address: Value) -> None:
        """For reading, into every level of the cache. Any address will do."""
        numbers = [ir.Constant(I32, number) for number in (0, 3, 1)]
        self._intrinsic("llvm.prefetch.p0", ir.VoidType(), self._pointer(address), *numbers)

    # Flow

    @contextmanager
    def loop(self, start: Number, stop: Number, step: int = 1) -> Iterator[Value]:
        """for (i = start; i < stop; i += step)"""
        start, stop = self.value(start), self.value(stop)
        before = self.builder.block
        head, body, after = (self._function.append_basic_block(name) for name in ("head", "body", "after"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        index = self.builder.phi(I64)
        index.add_incoming(start.ir, before)
        self.builder.cbranch(self.builder.icmp_signed("<", index, stop.ir), body, after)
        self.builder.position_at_end(body)
        yield Value(self, index)
        index.add_incoming(self.builder.add(index, ir.Constant(I64, step)), self.builder.block)
        self.builder.branch(head)
        self.builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.ir):
            yield

    @contextmanager
    def repeat_while(self) -> Iterator[Repeat]:
        """A loop that ends when its body, which is run at least once, says `stop_unless` or `stop_when`."""
        body, after = (self._function.append_basic_block(name) for name in ("body", "after"))
        self.builder.branch(body)
        self.builder.position_at_end(body)
        yield Repeat(self, after)
        self.builder.branch(body)
        self.builder.position_at_end(after)

    def select(self, condition: Value, one: Number, other: Number) -> Value:
        type = next(each.type for each in (one, other) if isinstance(each, Value))
        return Value(self, self.builder.select(condition.ir, self.value(one, type).ir, self.value(other, type).ir))

    def smaller(self, one: Value, other: Number) -> Value:
        other = self.value(other, one.type)
        return self.select(one < other, one, other)

    def larger(self, one: Value, other: Number) -> Value:
        other = self.value(other, one.type)
        return self.select(one < other, other, one)

    # Arithmetic

    def fma(self, one: Value, two: Value, three: Value) -> Value:
        """one · two + three, rounded once."""
        return self._same_type("llvm.fma", one, two, three)

    def maximum(self, one: Value, two: Value) -> Value:
        """Of floats: NaN where one is NaN."""
        return self._same_type("llvm.maximum", one, two)

    def absolute(self, value: Value) -> Value:
        return self._same_type("llvm.fabs", value)

    def nearest(self, value: Value) -> Value:
        """The nearest whole number, ties to even."""
        return self._same_type("llvm.rint", value)

    def square_root(self, value: Value) -> Value:
        return self._same_type("llvm.sqrt", value)

    def tree(self, value: Value, combine: Any) -> Value:
        """A vector of a power of two of lanes -> one number: halves are combined, until one is left."""
        while value.type.count > 1:
            value = combine(value.half(0), value.half(1))
        return value.lane(0)

    def widen_bfloat16(self, value: Value) -> Value:
        """16 bits -> float32."""
        lanes = value.type.count if isinstance(value.type, ir.VectorType) else 0
        wide, floats = (vector(I32, lanes), vector(F32, lanes)) if lanes else (I32, F32)
        return (value.zero_extended(wide) << 16).bits(floats)

    def narrow_to_bfloat16(self, value: Value) -> Value:
        """float32 -> 16 bits, to the nearest, ties to even; NaN stays NaN."""
        lanes = value.type.count if isinstance(value.type, ir.VectorType) else 0
        wide, narrow = (vector(I32, lanes), vector(I16, lanes)) if lanes else (I32, I16)
        bits = value.bits(wide)
        rounded = bits + ((bits >> 16) & 1) + 0x7FFF
        is_nan = Value(self, self.builder.fcmp_unordered("uno", value.ir, value.ir))
        return (self.select(is_nan, self.value(0x7FC00000, wide), rounded) >> 16).to(narrow)

    def exponential(self, value: Value) -> Value:
        """e^x in float32 for x <= 0, within 2 units of the last place; 0 below -87.3. NaN stays NaN.

        x = n · ln 2 + r, |r| <= ln 2 / 2, in two parts of ln 2; e^r by a polynomial of degree 6 (Taylor's); 2^n by the
        exponent's bits.
        """
        floats = value.type
        whole = vector(I32, floats.count) if isinstance(floats, ir.VectorType) else I32
        is_small = value < -87.3
        x = self.select(is_small, self.value(0.0, floats), value)
        n = self.nearest(x * 1.4426950408889634)
        r = self.fma(n, self.value(-0.693145751953125, floats), x)
        r = self.fma(n, self.value(-1.42860682030941723212e-6, floats), r)
        total = self.value(1 / math.factorial(7), floats)
        for power in range(6, -1, -1):
            total = self.fma(total, r, self.value(1 / math.factorial(power), floats))
        scale = ((n.to(whole) + 127) << 23).bits(floats)
        return self.select(is_small, 0.0, total * scale)

    def logarithm(self, value: Value) -> Value:
        """Natural, in float32, of normal positive numbers, within 2 units of the last place of it or of 1.

        x = 2^n · m with m in [√½, √2); ln m = 2 · artanh((m - 1) / (m + 1)), by its series, whose next term is 2e-10 of
        the sum.
        """
        floats = value.type
        whole = vector(I32, floats.count) if isinstance(floats, ir.VectorType) else I32
        # 0x3F3504F3 is √½: n is the exponent of x / √½, and m what is left.
        bits = value.bits(whole) - 0x3F3504F3
        n = self.builder.ashr(bits.ir, constant(whole, 23))
        m = ((bits & 0x7FFFFF) + 0x3F3504F3).bits(floats)
        s = (m - 1.0) / (m + 1.0)
        z = s * s
        total = self.value(1 / 11, floats)
        for power in (9, 7, 5, 3, 1):
            total = self.fma(total, z, self.value(1 / power, floats))
        return self.fma(Value(self, n).to(floats), self.value(math.log(2), floats), s * 2.0 * total)

    # What else there is

    def _same_type(self, name: str, *values: Value) -> Value:
        return self._intrinsic(f"{name}.{_suffix(values[0].type)}", values[0].type, *(value.ir for value in values))

    def _intrinsic(self, name: str, result: Any, *values: Any) -> Value:
        found = self.module.globals.get(name)
        if found is None:
            found = ir.Function(self.module, ir.FunctionType(result, [value.type for value in values]), name)
        return Value(self, self.builder.call(found, values))

    def instruction(self, name: str, result: Any, *values: Value | ir.Constant) -> Value:
        """An instruction of one architecture by its LLVM name, or a function of the C library."""
        return self._intrinsic(name, result, *(value.ir if isinstance(value, Value) else value for value in values))

    def call(self, address: Value, *arguments: Value) -> None:
        """A function like those that are written here."""
        kind = ir.FunctionType(ir.VoidType(), [I64] * len(arguments))
        pointer = self.builder.inttoptr(address.ir, kind.as_pointer())
        self.builder.call(pointer, [argument.ir for argument in arguments])

    # Between threads

    def _shared(self, address: Value) -> Any:
        return self.builder.inttoptr(address.ir, I64.as_pointer())

    def atomic_add(self, address: Value, number: Number) -> Value:
        """-> what was there before."""
        return Value(self, self.builder.atomic_rmw("add", self._shared(address), self.value(number).ir, "seq_cst"))

    def atomic_load(self, address: Value) -> Value:
        return Value(self, self.builder.load_atomic(self._shared(address), "seq_cst", 8))

    def atomic_store(self, number: Number, address: Value) -> None:
        self.builder.store_atomic(self.value(number).ir, self._shared(address), "seq_cst", 8)


class Repeat:
    """The inside of a `repeat_while`."""

    def __init__(self, function: Function, after: Any) -> None:
        self._function = function
        self._after = after

    def stop_when(self, condition: Value) -> None:
        builder = self._function.builder
        go_on = builder.append_basic_block("go_on")
        builder.cbranch(condition.ir, self._after, go_on)
        builder.position_at_end(go_on)


def _element_bytes(type: Any) -> int:
    element = type.element if isinstance(type, ir.VectorType) else type
    if isinstance(element, ir.IntType):
        return max(1, int(element.width) // 8)
    return {F64: 8, F32: 4, F16: 2}[element]


def _suffix(type: Any) -> str:
    element = type.element if isinstance(type, ir.VectorType) else type
    name = {"double": "f64", "float": "f32", "half": "f16"}.get(str(element), str(element))
    return f"v{type.count}{name}" if isinstance(type, ir.VectorType) else name
