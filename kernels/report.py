"""What the kernels take of a GPU, asked of the compiler, without one: `python -m hasten.kernels.report`.

Prints a table in Markdown: for every source and architecture the number of kernels, most registers of a thread, most bytes of static
shared memory, and all bytes that were spilled.
"""

from __future__ import annotations

from hasten.kernels.cubins import SOURCES, Cubins
from hasten.kernels.nvrtc import Compiler

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""Turing, Ampere, Ada, Hopper and Blackwell."""


def table(architectures: tuple[str, ...] = ARCHITECTURES) -> str:
    """The table.

    Raises:
        CompileError: There is no compiler, or it refuses a source.
    """
    compiler = Compiler()
    known = [name for name in architectures if int(name[3:]) in compiler.architectures()]
    lines = [
        f"NVRTC {compiler.version[0]}.{compiler.version[1]}; registers / bytes of shared memory / bytes spilled",
        "",
        f"| source | kernels | {' | '.join(known)} |",
        f"|---|---|{'---|' * len(known)}",
    ]
    for source in SOURCES:
        cells, count = [], 0
        for architecture in known:
            found = Cubins(architecture, compiler=compiler).compile(source).resources().values()
            count = len(found)
            cells.append(f"{max(r.registers for r in found)} / {max(r.shared for r in found)} / {sum(r.spilled for r in found)}")
        lines.append(f"| {source} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
