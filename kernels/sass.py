"""Read NVIDIA machine code (SASS): instructions with their scheduling hints, loops, and a warp's path.

Every instruction of sm_70 and later encodes its timing as ptxas chose it: the cycles until the warp's next instruction,
which of six scoreboards it sets when its result is ready (write) or its operands are free (read), and which it waits
for. `kernels/predict.py` times programs with these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

_INSTRUCTION = re.compile(
    r"\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P[T\d]+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)"
    r"(?P<operands>[^;]*);?\s*/\* 0x[0-9a-f]{16} \*/"
)
_SECOND_HALF = re.compile(r"\s+/\* 0x(?P<bits>[0-9a-f]{16}) \*/")
_ADDRESS = re.compile(r"0x([0-9a-f]+)\s*$")
_NO_SCOREBOARD = 7


@dataclass(frozen=True)
class Instruction:
    """One machine instruction with its scheduling hints.

    Attributes:
        stall: cycles until the warp's next instruction.
        sets, frees: the scoreboards of its result and of its operands, or None.
        waits: the scoreboards that it waits for.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    stall: int
    sets: int | None
    frees: int | None
    waits: tuple[int, ...]

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def conditional(self) -> bool:
        return self.predicate not in ("", "@PT", "@UPT")

    @cached_property
    def target(self) -> int | None:
        """The address that a branch goes to, or None. A call without return counts: ptxas leaves loops by it."""
        if self.name != "BRA" and not self.opcode.startswith("CALL.REL.NOINC"):
            return None
        found = _ADDRESS.search(self.operands)
        return int(found.group(1), 16) if found else None

    @property
    def access_bytes(self) -> int:
        """The bytes that a memory instruction moves for each thread."""
        for bits in (256, 128, 64):
            if f".{bits}" in self.opcode:
                return bits // 8
        if re.search(r"\.[US]?16\b", self.opcode):
            return 2
        return 1 if re.search(r"\.[US]8\b", self.opcode) else 4


@dataclass(frozen=True)
class LoopCode:
    """A loop in the code: the positions of its first and last instruction (the branch back), and its inner loops."""

    first: int
    last: int
    inner: tuple[LoopCode, ...] = ()

    @property
    def shape(self) -> str:
        """The nesting in brackets. A loop with two inner loops is [[][]]."""
        return f"[{''.join(loop.shape for loop in self.inner)}]"


def parse(text: str) -> tuple[Instruction, ...]:
    """Return the instructions in a listing of `cuobjdump -sass`.

    Raises:
        ValueError: there is no instruction, or one has no second half.
    """
    found: list[Instruction] = []
    first = None
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match:
            if first is not None:
                raise ValueError(f"the instruction at {first['address']} has one line of encoding; expected two")
            first = match
            continue
        second = _SECOND_HALF.match(line)
        if second and first is not None:
            bits = int(second["bits"], 16)
            sets, frees = (bits >> 46) & 7, (bits >> 49) & 7
            found.append(
                Instruction(
                    address=int(first["address"], 16),
                    predicate=(first["predicate"] or "").strip(),
                    opcode=first["opcode"],
                    operands=first["operands"].strip(),
                    stall=(bits >> 41) & 15,
                    sets=None if sets == _NO_SCOREBOARD else sets,
                    frees=None if frees == _NO_SCOREBOARD else frees,
                    waits=tuple(board for board in range(6) if (bits >> (52 + board)) & 1),
                )
            )
            first = None
    if not found:
        raise ValueError(f"the listing has no instruction; expected SASS, got {text[:60]!r}")
    return tuple(found)


def find_loops(code: Sequence[Instruction]) -> tuple[LoopCode, ...]:
    """Return the loops of a program, outermost ones in order of address. A loop is a branch to an earlier address."""
    position = {instruction.address: index for index, instruction in enumerate(code)}
    last_of: dict[int, int] = {}
    for index, instruction in enumerate(code):
        # A branch to itself after a program's end is padding.
        if instruction.target is not None and instruction.target < instruction.address:
            last_of[position[instruction.target]] = index
    spans = sorted(last_of.items(), key=lambda span: (span[0], -span[1]))

    def nest(spans: list[tuple[int, int]]) -> tuple[LoopCode, ...]:
        loops = []
        while spans:
            first, last = spans[0]
            within = [span for span in spans[1:] if span[1] <= last]
            loops.append(LoopCode(first, last, nest(within)))
            spans = [span for span in spans[1:] if span[1] > last]
        return tuple(loops)

    return nest(spans)


class Walk:
    """The instructions that a warp executes, for a given number of trips of each loop.

    The code does not tell which way a conditional branch goes. The walk falls through (the branch guards a rare case,
    or a loop without trips) unless only the branch's target leads to the next loop with trips. A loop ends after its
    trips. A conditional EXIT ends the program only if it is a loop's exit.
    """

    def __init__(self, code: Sequence[Instruction], trips: dict[LoopCode, int]):
        self._code = code
        self._trips = trips
        self._position = {instruction.address: index for index, instruction in enumerate(code)}
        self._loops = find_loops(code)
        if set(trips) != set(self._all(self._loops)):
            raise ValueError(f"trips are given for {len(trips)} loops; expected one for each loop of the code")

    def __iter__(self) -> Iterator[tuple[int, LoopCode | None]]:
        """Yield positions of instructions in the order of execution, each with its innermost loop."""
        yield from self._run(0, len(self._code), self._loops, None)

    def _all(self, loops: Sequence[LoopCode]) -> Iterator[LoopCode]:
        for loop in loops:
            yield loop
            yield from self._all(loop.inner)

    def _next(self, index: int) -> tuple[int, ...]:
        """Return the positions that may follow the instruction at `index`, the first choice first."""
        instruction = self._code[index]
        if instruction.target is not None:
            target = self._position[instruction.target]
            return (index + 1, target) if instruction.conditional else (target,)
        if instruction.name == "EXIT" and not instruction.conditional:
            return ()
        return (index + 1,)

    def _leads_to(self, start: int, goal: int, end: int, avoided: set[int]) -> bool:
        """Return whether a path forward leads from `start` to `goal` before `end`."""
        pending, seen = [start], set()
        while pending:
            index = pending.pop()
            if index == goal:
                return True
            if index in seen or index in avoided or index > goal or index >= end:
                continue
            seen.add(index)
            pending += [following for following in self._next(index) if following > index]
        return False

    def _run(
        self, index: int, end: int, loops: Sequence[LoopCode], around: LoopCode | None
    ) -> Iterator[tuple[int, LoopCode | None]]:
        """Walk from `index` to before `end`, or to the program's end. `loops` are the loops on the way."""
        wanted = [loop for loop in loops if self._trips[loop]]
        avoided = {loop.first for loop in loops if not self._trips[loop]}
        while index < end:
            loop = wanted[0] if wanted else None
            if loop is not None and index == loop.first:
                wanted.pop(0)
                yield from self._loop(loop)
                index = self._after(loop)
                continue
            yield index, around
            ways = [way for way in self._next(index) if way > index]
            if not ways:
                if loop is not None:
                    raise ValueError(
                        f"the program ends at {self._code[index].address:#x}; expected a way to the loop at "
                        f"{self._code[loop.first].address:#x}, which has {self._trips[loop]} trips"
                    )
                return
            if loop is not None:
                ways = [way for way in ways if self._leads_to(way, loop.first, end, avoided)] or ways
            elif avoided:
                ways = [way for way in ways if way not in avoided] or ways
            index = ways[0]

    def _loop(self, loop: LoopCode) -> Iterator[tuple[int, LoopCode | None]]:
        way_out = self._way_out(loop)
        for trip in range(1, self._trips[loop] + 1):
            done = trip == self._trips[loop]
            for index, inner in self._run(loop.first, loop.last + 1, loop.inner, loop):
                yield index, inner
                if done and index == way_out:
                    break

    def _way_out(self, loop: LoopCode) -> int:
        """Return the instruction that leaves a loop after its last trip: the branch back, or the last earlier exit."""
        if self._code[loop.last].conditional:
            return loop.last
        for index in range(loop.last - 1, loop.first - 1, -1):
            instruction = self._code[index]
            leaves = instruction.target is not None and self._position[instruction.target] > loop.last
            if instruction.conditional and (leaves or instruction.name == "EXIT"):
                return index
        raise ValueError(f"the loop at {self._code[loop.first].address:#x} has no exit; expected a branch or an EXIT")

    def _after(self, loop: LoopCode) -> int:
        """Return the position after a loop."""
        way_out = self._way_out(loop)
        instruction = self._code[way_out]
        if way_out == loop.last:
            return way_out + 1
        return len(self._code) if instruction.target is None else self._position[instruction.target]
