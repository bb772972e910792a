"""How is the text of a compiled program read: computations, instructions, shapes?

The text is XLA's, `compiled.as_text()`. Of an instruction only what is counted elsewhere is kept.
"""

import re
from functools import cached_property
from math import prod
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_COMMENT = re.compile(r"/\*.*?\*/")


class Array(NamedTuple):
    """An array's shape.

    Attributes:
      dtype: as XLA writes it, such as "bf16".
      dims: its sizes.
      space: the number of the memory it lies in; 0 is the device's own, a TPU's 1 is on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        """How many."""
        return prod(self.dims)

    @property
    def bits(self) -> int:
        """Of one element; 0 of what is no number, such as a token."""
        if self.dtype == "pred":
            return 8
        digits = re.search(r"\d+", self.dtype)
        return int(digits[0]) if digits else 0

    @property
    def bytes(self) -> int:
        """As if nothing were padded."""
        return -(-self.elements * self.bits // 8)


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      arrays: what it gives, tuples flattened.
      operands: names in the same computation.
      inside: what stands between its parentheses.
      attributes: the text after its operands.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        """Of all that it gives."""
        return sum(array.bytes for array in self.arrays)

    def attribute(self, pattern: str) -> str | None:
        """What the first group of a regular expression finds in the attributes."""
        found = re.search(pattern, self.attributes)
        return found and found[1]

    @property
    def target(self) -> str:
        """Of a custom call, whom it calls."""
        return self.attribute(r'custom_call_target="([^"]*)"') or ""

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def called(self) -> list[str]:
        """The computations that it runs: a fusion's, a loop's body, a conditional's branches."""
        key = r"(?:calls|body|to_apply|true_computation|false_computation|called_computation)"
        names = re.findall(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", self.attributes):
            names += [name.strip(" %") for name in group.split(",")]
        return names

    @property
    def trips(self) -> int | None:
        """How often a loop's body runs, if the compiler knows it."""
        count = self.attribute(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)')
        return None if count is None else int(count)


class Computation:
    """Instructions by name, in their order; the last one, or the marked one, is the root."""

    def __init__(self, instructions: list[Instruction]):
        """Of at least one instruction."""
        self.instructions = instructions
        self.named = {each.name: each for each in instructions}
        self.root = next((i for i in instructions if i.root), instructions[-1])

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        return {int(i.inside): i for i in self.instructions if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Of each name, who takes it, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self.named}
        for instruction in self.instructions:
            for position, operand in enumerate(instruction.operands):
                found.get(operand, []).append((instruction, position))
        return found

    def given(self, instruction: Instruction) -> list[Instruction]:
        """Whom an instruction takes, each once."""
        names = dict.fromkeys(instruction.operands)
        return [self.named[name] for name in names if name in self.named]


class Module(NamedTuple):
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads a module's text.

    Raises:
      ValueError: it has no entry computation.
    """
    computations, entry, name, lines = {}, None, None, []
    for line in text.splitlines():
        if name is None:
            if header := _COMPUTATION.match(line):
                name, lines = header[2], []
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name], name = Computation(lines), None
        elif (instruction := _instruction(line)) is not None:
            lines.append(instruction)
    if entry not in computations:
        raise ValueError("no entry computation: this is no HLO module's text")
    return Module(computations, entry)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type, such as `(f32[2,3]{1,0}, s32[])`."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _instruction(line):
    begin = _NAME.match(line)
    if begin is None:
        return None
    line = _COMMENT.sub("", line[begin.end() :])
    end = _closed(line, 0) if line.startswith("(") else line.index(" ")
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    close = _closed(line, opcode.end() - 1)
    inside = line[opcode.end() : close - 1]
    # (A constant's inside is its values; a name has a percent sign, or stands alone.)
    names = re.findall(r"%([\w.\-]+)", inside)
    return Instruction(
        begin[2],
        opcode[1],
        arrays(line[:end]),
        tuple(names),
        inside,
        line[close:],
        begin[1] is not None,
    )


def _closed(line, start):
    # The position behind the parenthesis that closes the one at `start`.
    depth = 0
    for position in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[position], 0)
        if not depth:
            return position + 1
    return len(line)
