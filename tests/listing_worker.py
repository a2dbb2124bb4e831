"""Disassembles kernels for GPUs together and one by one, in a subprocess where kernels are not interpreted.

Reads a JSON list with a list of targets from standard input. Prints a JSON line for each: the instructions of its
kernels, read together, and as `cuobjdump -sass` prints them one by one. Jumps are relative to the kernel.
"""

import json
import re
import sys

from fused_steer.kernels import aot
from fused_steer.kernels.sass import Instruction, parse


def relative(listing: str) -> list[list]:
    """Return the address, the predicate, the opcode, the operands, the target and the timing of each instruction."""
    code = parse(listing)
    base = code[0].address

    def row(one: Instruction) -> list:
        target = None if one.target is None else one.target - base
        jumps = one.name in ("BRA", "BSSY", "CALL", "RET", "WARPSYNC")
        operands = re.sub(r"\b0x\w+$", "", one.operands) if jumps else one.operands
        timing = [one.stall, one.sets, one.frees, one.waits]
        return [one.address - base, one.predicate, one.opcode, operands, target, timing]

    return [row(one) for one in code]


def compare(target: str) -> dict[str, list]:
    launches = aot.record(aot.Case(64, 576, 8), target)
    cubins = [aot._build(aot.compilation(launch, target)).asm["cubin"] for launch in launches]
    alone = [aot._run_tool(cubin, "cuobjdump", "-sass") for cubin in cubins]
    together = aot._disassemble(cubins, target)
    return {"together": [relative(text) for text in together], "alone": [relative(text) for text in alone]}


if __name__ == "__main__":
    (targets,) = json.load(sys.stdin)
    for target in targets:
        print(json.dumps(compare(target)))
