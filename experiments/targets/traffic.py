"""What does a compiled program launch and move: kernels, bytes, collectives, loop by loop?

A kernel is an instruction of a computation that runs as it stands: a fusion, a library's call, a
copy. It reads its operands and writes its results. Bodies of loops count as often as they run. Of a
conditional all sides count, although one runs; of a loop of unknown length one round counts. Both
are reported.
"""

from collections import Counter
from dataclasses import dataclass, field

from targets.hlo import Array, Computation, Instruction, Module
from targets.work import is_convolution, is_product, operations, window_of

KINDS = (
    "convolutions",
    "matrix products",
    "reductions",
    "elementwise",
    "slice updates",
    "copies",
    "collectives",
    "others",
)
# What launches nothing.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "add-dependency", "opt-barrier", "optimization-barrier"),
}
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "Sharding"}
_COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_REDUCTIONS = {"reduce", "reduce-window", "select-and-scatter", "scatter", "sort"}
_MOVES = {
    *("copy", "transpose", "reshape", "bitcast", "slice", "dynamic-slice", "pad", "concatenate"),
    *("broadcast", "gather", "reverse", "iota", "copy-start"),
}
# Within a fusion an element of their result needs one element of their operand.
_PASSING = {"bitcast", "convert", "copy", "reshape", "transpose"}
_ELEMENTWISE = {
    *("abs", "add", "and", "clamp", "compare", "divide", "exponential", "log", "logistic"),
    *("maximum", "minimum", "multiply", "negate", "not", "or", "power", "rsqrt", "select"),
    *("sign", "sqrt", "subtract", "tanh", "xor"),
}
_UPDATE = "dynamic-update-slice"
_SLICING = {"slice", "dynamic-slice", "gather"}
# Their first half's type is that of what they make.
_RESULT_ALONE = {"all-reduce", "reduce-scatter", "all-to-all"}
_CALLING = {"call", "async-start", "conditional", "while"}


@dataclass
class Traffic:
    """What was counted.

    Attributes:
      kernels, bytes: by kind.
      uncached: of the bytes those that no cache can save, see `count`.
      flops: floating-point operations of convolutions and matrix products.
      collectives, payload: how many by name, and the bytes that each device gives to them.
      conditionals, unknown_loops: how many were met, in loops that often.
      loops: those with a body, outermost first.
    """

    kernels: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)
    uncached: int = 0
    flops: int = 0
    collectives: Counter = field(default_factory=Counter)
    payload: Counter = field(default_factory=Counter)
    conditionals: int = 0
    unknown_loops: int = 0
    loops: list["Loop"] = field(default_factory=list)

    def add(self, other: "Traffic", times: int) -> None:
        """Adds what runs so often; not its loops."""
        for name in ("kernels", "bytes", "collectives", "payload"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += times * value
        for name in ("uncached", "flops", "conditionals", "unknown_loops"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))


@dataclass
class Loop:
    """A loop: where it comes from, how often its body runs (None: unknown), and one round of it."""

    op_name: str
    trips: int | None
    body: Traffic


def count(module: Module, cache: int = 0) -> Traffic:
    """Counts a program.

    Args:
      cache: bytes that the device can keep beside its memory. A kernel that reads or writes an
        array larger than that moves at least the difference: `uncached` are the sums of these.
    """
    return _Counter(module, cache).computation(module.entry)


class _Counter:
    def __init__(self, module, cache):
        self.computations, self.cache = module.computations, cache
        self.reads, self.cut = {}, {}

    def computation(self, name):
        total, computation = Traffic(), self.computations[name]
        for instruction in computation.instructions:
            self.instruction(computation, instruction, total)
        return total

    def instruction(self, computation, instruction, total):
        opcode = instruction.opcode
        if opcode in _FREE or (opcode.endswith(("-done", "-update")) and opcode != _UPDATE):
            return
        if opcode in _CALLING and instruction.called:
            self.called(instruction, total)
            return
        if opcode == "custom-call" and instruction.target in _FREE_CALLS:
            return
        kind = self.kind(instruction)
        sizes = self.moved(computation, instruction)
        total.kernels[kind] += 1
        total.bytes[kind] += sum(sizes)
        total.uncached += sum(max(0, size - self.cache) for size in sizes)
        total.flops += self.flops(computation, instruction)
        base = opcode.removesuffix("-start")
        if base in _COLLECTIVES:
            total.collectives[base] += 1
            total.payload[base] += sum(i.bytes for i in computation.given(instruction))

    def called(self, instruction, total):
        bodies = [self.computation(name) for name in instruction.called]
        times = 1
        if instruction.opcode == "while":
            trips = instruction.trips
            total.unknown_loops += trips is None
            times = 1 if trips is None else trips
            total.loops.append(Loop(instruction.op_name, trips, bodies[0]))
        total.conditionals += instruction.opcode == "conditional"
        for body in bodies:
            total.add(body, times)
            total.loops += body.loops

    def inner(self, instruction):
        # All that a fusion computes, fusions within fusions too.
        for name in instruction.called:
            for each in self.computations[name].instructions:
                yield self.computations[name], each
                if each.opcode == "fusion":
                    yield from self.inner(each)

    def flops(self, computation, instruction):
        found = operations(computation, instruction)
        if instruction.opcode == "fusion":
            found += sum(operations(*each) for each in self.inner(instruction))
        return found

    def kind(self, instruction):
        parts = [instruction]
        if instruction.opcode == "fusion":
            parts = [each for _, each in self.inner(instruction)]
        opcodes = {each.opcode for each in parts}
        if any(map(is_convolution, parts)):
            return "convolutions"
        if any(map(is_product, parts)):
            return "matrix products"
        if any(opcode.removesuffix("-start") in _COLLECTIVES for opcode in opcodes):
            return "collectives"
        if opcodes & _REDUCTIONS:
            return "reductions"
        if self.updates(instruction):
            return "slice updates"
        # (Indices are computed, too, but those are scalars.)
        working = {
            each.opcode
            for each in parts
            if each.opcode not in _FREE and any(array.dims for array in each.arrays)
        }
        if working <= _MOVES:
            return "copies"
        return "others" if opcodes & {"custom-call", "send", "recv"} else "elementwise"

    def updates(self, instruction):
        # Whether all that it gives are slices written into larger arrays.
        if instruction.opcode != "fusion":
            return instruction.opcode == _UPDATE
        inside = self.computations[instruction.called[0]]
        return all(each.opcode == _UPDATE for each in results(inside))

    def moved(self, computation, instruction):
        # The bytes of each operand that is read and of each result that is written.
        if instruction.opcode == "fusion":
            return self.fused(computation, instruction)
        given = computation.given(instruction)
        arrays, opcode = instruction.arrays, instruction.opcode.removesuffix("-start")
        if opcode != instruction.opcode and opcode not in _RESULT_ALONE:
            # Gives what it takes, what it makes, and perhaps a token; a copy the other way round.
            arrays = arrays[:1] if opcode == "copy" else arrays[len(given) : 2 * len(given)]
        if opcode == _UPDATE:
            source, update = (computation.named[name].arrays for name in instruction.operands[:2])
            return in_memory(update) + (in_memory(update) if in_memory(source) else [])
        read = [size for each in given for size in in_memory(each.arrays)]
        if opcode in _SLICING:
            read = [array.bytes for array in arrays] if in_memory(given[0].arrays) else []
        elif is_convolution(instruction) and len(read) == len(given):
            read = skipped(instruction, read)
        return read + in_memory(arrays)

    def fused(self, computation, instruction):
        name = instruction.called[0]
        sizes = []
        seen = set()
        for number, operand in enumerate(instruction.operands):
            source = computation.named.get(operand)
            if source is None or operand in seen or not in_memory(source.arrays):
                continue
            seen.add(operand)
            sizes.append(self.read(name, number))
        inside = self.computations[name]
        written = [self.written(inside, each) for each in results(inside)]
        for size, array in zip(written, instruction.arrays, strict=False):
            sizes += [size] if array.space == 0 else []
        return [size for size in sizes if size]

    def read(self, name, number):
        """How many bytes of its parameter a fused computation reads."""
        key = name, number
        if key not in self.reads:
            inside = self.computations[name]
            parameter = inside.parameters[number]
            whole = parameter.bytes
            wanted = self.wanted(inside, parameter)
            bits = parameter.arrays[0].bits if parameter.arrays else 0
            self.reads[key] = whole if wanted is None else min(whole, -(-wanted * bits // 8))
        return self.reads[key]

    def wanted(self, inside, instruction):
        # How many elements of it are read; None for all.
        regions = self.regions(inside, instruction)
        return None if None in regions else sum(regions.values())

    def regions(self, inside, instruction):
        # What of it is read: elements by what cuts them out; None: all of it. What is computed of
        # all elements, but then cut, is computed there alone.
        key = id(inside), instruction.name
        if key not in self.cut:
            self.cut[key] = self.regions_of(inside, instruction)
        return self.cut[key]

    def regions_of(self, inside, instruction):
        if instruction is inside.root:
            return {None: instruction.arrays[0].elements}
        found = {}
        for user, position in inside.users[instruction.name]:
            own = user.arrays[0].elements if user.arrays else 0
            if user.opcode in _SLICING and position == 0:
                inner = self.regions(inside, user)
                cut = user.attribute(r"slice=(\{[^}]*\})") or user.name
                if None in inner or sum(inner.values()) >= own:
                    found[cut] = own
                else:
                    found |= {(cut, key): size for key, size in inner.items()}
            elif user.opcode in _PASSING or (
                user.opcode in _ELEMENTWISE and own == instruction.arrays[0].elements
            ):
                found |= self.regions(inside, user)
            elif user.opcode == _UPDATE and position == 0 and in_place(inside, user):
                pass
            elif user.opcode == "fusion":
                size = self.read(user.called[0], position)
                found[user.name] = size * 8 // max(1, instruction.arrays[0].bits)
            else:
                return {None: instruction.arrays[0].elements}
        return found

    def written(self, inside, instruction):
        if instruction.opcode == _UPDATE:
            return inside.named[instruction.operands[1]].bytes
        if instruction.opcode == "fusion":
            nested = self.computations[instruction.called[0]]
            return sum(self.written(nested, each) for each in results(nested))
        return instruction.bytes


def results(inside: Computation) -> list[Instruction]:
    """What a fused computation gives, one for each result, reshaping looked through."""
    root = inside.root
    found = inside.given(root) if root.opcode == "tuple" else [root]
    if root.opcode == "tuple":
        found = [inside.named[name] for name in root.operands]
    for number, each in enumerate(found):
        while each.opcode == "bitcast":
            each = found[number] = inside.named[each.operands[0]]
    return found


def in_place(inside: Computation, update: Instruction) -> bool:
    """Whether an update of a slice is a result, so that it writes into what it is given."""
    return any(each is update for each in results(inside))


def in_memory(found: tuple[Array, ...]) -> list[int]:
    """The bytes of the arrays that lie in the device's own memory."""
    return [array.bytes for array in found if array.space == 0 and array.bytes]


def skipped(instruction: Instruction, read: list[int]) -> list[int]:
    """What a convolution reads: a stride wider than its window passes over part of its input."""
    sizes = instruction.attribute(r"window=\{size=([\dx]+)")
    backward = "BackwardInput" in instruction.target
    if sizes is None or backward:
        return read
    share = 1.0
    strides = window_of(instruction)["stride"]
    for size, stride in zip(sizes.split("x"), strides, strict=True):
        share *= min(1.0, int(size) / stride)
    return [round(share * read[0]), *read[1:]]
