"""The collectives of a compiled program, read off its optimised HLO text.

What stands in a loop happens as often as the loop runs. A collective that the compiler has made
asynchronous stands in several places (a start, steps fused into other work, a done) and is one.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_ITEM_BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4, "token": 0}
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|body|to_apply|called_computations|branch_computations)=")
_STARTS = "async-collective-start"
"""How XLA for TPUs names the fusion that sets a collective going, others being its later steps."""


@dataclass(frozen=True)
class Collective:
    """One collective of the program.

    kind: of `KINDS`. times: runs a step. sent: bytes that one device sends each time, by the ring
    algorithm. elements: of the largest whole array that it moves. group: devices that take part
    together. loops: runs of the loops around it, outermost first; 0 stands for a length that could
    not be read, counted as 1. op_name: where in the program it came from. between_slices: whether
    those that take part are of several slices.
    """

    kind: str
    times: int
    sent: float
    elements: int
    group: int
    loops: tuple[int, ...]
    op_name: str
    between_slices: bool = False


@dataclass(frozen=True)
class Total:
    """All collectives of a kind: how many run a step, and the bytes a device sends for them."""

    count: int
    sent: int


@dataclass
class _Instruction:
    name: str
    type: str
    op: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.rest[: _closing(self.rest)])

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%([\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclass
class _Computation:
    name: str
    entry: bool
    instructions: dict[str, _Instruction] = field(default_factory=dict)

    @property
    def root(self) -> _Instruction:
        return next(i for i in self.instructions.values() if i.root)


@dataclass(frozen=True)
class _Pod:
    """The devices of the program, numbered slice after slice."""

    devices: int
    slices: int

    def between_slices(self, group: Sequence[int]) -> bool:
        return len({device * self.slices // self.devices for device in group}) > 1

    def groups(self, rest: str) -> Sequence[Sequence[int]]:
        """Devices that act together, in any of the ways that HLO writes it; some of the groups at
        least, for they are alike. A permutation's are its pairs."""
        listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}", rest)
        if listed:
            return [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed[1])]
        counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
        if counted:
            shape = [int(n) for n in counted[3].split(",")]
            numbers = np.arange(self.devices).reshape(shape)
            if counted[4]:
                numbers = numbers.transpose([int(n) for n in counted[4].split(",")])
            return numbers.reshape(int(counted[1]), int(counted[2])).tolist()
        named = re.search(r"replica_groups=\S*mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
        if named:
            return [_along(re.findall(r"'([^']+)'=(\d+)", named[1]), named[2])]
        return [range(self.devices)]


def _along(axes: list[tuple[str, str]], named: str) -> list[int]:
    """The first device's group along the axes of a mesh, or parts of axes (`'x':(2)4`: of the
    middle one of three parts, after one of 2, the length being 4)."""
    group = np.zeros(1, int)
    for axis, before, length in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named):
        place = [name for name, _ in axes].index(axis)
        size = int(axes[place][1])
        inner = math.prod(int(n) for _, n in axes[place + 1 :])
        stride = inner * (size // (int(before) * int(length)) if length else 1)
        steps = np.arange(int(length) if length else size) * stride
        group = (group[:, None] + steps).reshape(-1)
    return group.tolist()


def totals(found: Sequence[Collective]) -> dict[str, Total]:
    """By kind, those kinds that occur, in the order of `KINDS`."""
    result = {}
    for kind in KINDS:
        own = [c for c in found if c.kind == kind]
        if own:
            sent = sum(c.times * c.sent for c in own)
            result[kind] = Total(sum(c.times for c in own), round(sent))
    return result


def collectives(hlo: str, slices: int = 1) -> list[Collective]:
    """Collectives of an optimised HLO module (`jax.stages.Compiled.as_text()`).

    Those among one device only, which move nothing, are left out. slices: into how many the
    devices, as the program numbers them, fall.
    """
    module = _parse(hlo)
    partitions = re.search(r"num_partitions=(\d+)", hlo)
    pod = _Pod(int(partitions[1]) if partitions else 1, slices)
    entry = next(c for c in module.values() if c.entry)
    return [c for c in _walk(module, entry, (), pod, "") if c.group > 1]


def _parse(hlo: str) -> dict[str, _Computation]:
    module: dict[str, _Computation] = {}
    current: _Computation | None = None
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            current = _Computation(head[2], entry=bool(head[1]))
            module[current.name] = current
        elif current is not None and (found := _LINE.match(line)):
            root, name, type_, op, rest = found.groups()
            current.instructions[name] = _Instruction(name, type_, op, rest, bool(root))
    return module


def _walk(
    module: dict[str, _Computation],
    computation: _Computation,
    loops: tuple[int, ...],
    pod: _Pod,
    caller: str,
) -> Iterator[Collective]:
    """Collectives of a computation and of all that it calls.

    caller: name of the fusion that this computation is the inside of, else empty.
    """
    for instruction in computation.instructions.values():
        kind = instruction.op.removesuffix("-start")
        if kind in KINDS and _begins(caller, instruction):
            yield _collective(computation, instruction, kind, loops, pod, caller)
        if instruction.op == "while":
            body = module[str(instruction.attribute("body"))]
            inside = (*loops, _trips(module, computation, instruction))
            yield from _walk(module, body, inside, pod, "")
            continue
        fused = instruction.name if instruction.op == "fusion" else ""
        for name in _called(instruction):
            yield from _walk(module, module[name], loops, pod, fused)


def _begins(caller: str, instruction: _Instruction) -> bool:
    """Whether a collective begins here, and is not the later step of one that has begun."""
    return not caller or caller.startswith(_STARTS) or "chain_id=" not in instruction.rest


def _called(instruction: _Instruction) -> list[str]:
    if instruction.op in (*KINDS, "all-reduce-start", "reduce", "scatter", "sort", "reduce-window"):
        return []  # What they apply to pairs of numbers.
    names: list[str] = []
    for found in _CALLED.finditer(instruction.rest):
        tail = instruction.rest[found.end() :]
        whole = tail[: tail.index("}")] if tail.startswith("{") else tail.split(",", 1)[0]
        names += _NAME.findall(whole)
    return names


def _collective(
    computation: _Computation,
    instruction: _Instruction,
    kind: str,
    loops: tuple[int, ...],
    pod: _Pod,
    caller: str,
) -> Collective:
    given = [_arrays(computation.instructions[n].type) for n in instruction.operands]
    arrays = [array for operand in given for array in operand]
    size = sum(math.prod(shape) * bits // 8 for bits, shape in arrays)
    groups = pod.groups(instruction.rest)
    group = len(groups[0])
    if caller.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # Written as a reduction of which each device keeps a part.
    others = group - 1
    sent = {
        "all-gather": size * others,
        "all-reduce": 2 * size * others / group,
        "reduce-scatter": size * others / group,
        "all-to-all": size * others / group,
        "collective-permute": size,
    }[kind]
    largest = max((math.prod(shape) for _, shape in arrays), default=0)
    op_name = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(
        kind=kind,
        times=math.prod(max(1, trips) for trips in loops),
        sent=sent,
        elements=largest * group if kind == "all-gather" else largest,
        group=group,
        loops=loops,
        op_name=op_name[1] if op_name else "",
        between_slices=any(map(pod.between_slices, groups)),
    )


def _arrays(type_: str) -> list[tuple[int, tuple[int, ...]]]:
    """Bits of an element, and shape, of each array of a type."""
    return [
        (_bits(dtype), tuple(int(d) for d in shape.split(",") if d))
        for dtype, shape in _ARRAY.findall(type_)
    ]


def _bits(dtype: str) -> int:
    if dtype in _ITEM_BITS:
        return _ITEM_BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 8


def _trips(module: dict[str, _Computation], computation: _Computation, loop: _Instruction) -> int:
    """How often a loop runs: as the compiler says, or by its counter; 0 if neither can be read."""
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"\}', loop.rest)
    if known:
        return int(known[1])
    reader = _Loop(module, computation, loop)
    return reader.trips()


class _Loop:
    """A loop that counts: `while counter < bound`, the counter raised by a constant each time."""

    def __init__(
        self, module: dict[str, _Computation], outside: _Computation, loop: _Instruction
    ) -> None:
        self.condition = module[str(loop.attribute("condition"))]
        self.body = module[str(loop.attribute("body"))]
        self.outside = outside
        self.initial = outside.instructions[loop.operands[0]]

    def trips(self) -> int:
        test = self.condition.root
        if test.op != "compare" or "direction=LT" not in test.rest:
            return 0
        index = self._index(self.condition, test.operands[0])
        if index is None:
            return 0
        start, step = self._carried(index), self._step(index)
        bound = self._value(self.condition, test.operands[1])
        if start is None or bound is None or not step:
            return 0
        return max(0, -(-(bound - start) // step))

    def _step(self, index: int) -> int | None:
        if self.body.root.op != "tuple":
            return None
        raised = self._follow(self.body, self.body.root.operands[index])
        if raised.op != "add":
            return None
        places = [self._index(self.body, operand) for operand in raised.operands]
        if index not in places:
            return None
        return self._value(self.body, raised.operands[1 - places.index(index)])

    def _carried(self, index: int) -> int | None:
        """The constant that stands at `index` of what the loop begins with."""
        if self.initial.op != "tuple":
            return None
        first = self._follow(self.outside, self.initial.operands[index])
        return _constant(first)

    def _value(self, computation: _Computation, name: str) -> int | None:
        """A constant, or what the loop carries unchanged."""
        instruction = self._follow(computation, name)
        index = self._index(computation, name)
        return _constant(instruction) if index is None else self._carried(index)

    def _index(self, computation: _Computation, name: str) -> int | None:
        """Which of the values carried this is; None for anything else."""
        instruction = self._follow(computation, name)
        if instruction.op != "get-tuple-element":
            return None
        if computation.instructions[instruction.operands[0]].op != "parameter":
            return None
        found = re.search(r"index=(\d+)", instruction.rest)
        return int(found[1]) if found else None

    def _follow(self, computation: _Computation, name: str) -> _Instruction:
        instruction = computation.instructions[name]
        while instruction.op in ("copy", "bitcast", "convert") and instruction.operands:
            instruction = computation.instructions[instruction.operands[0]]
        return instruction


def _constant(instruction: _Instruction) -> int | None:
    if instruction.op != "constant":
        return None
    number = re.match(r"(-?\d+)\)", instruction.rest)
    return int(number[1]) if number else None


def _closing(rest: str) -> int:
    """Where the bracket that opens an instruction's operands closes."""
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    return len(rest)
