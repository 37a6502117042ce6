"""What a compiled kernel does before it waits for the kernels ahead of it, read from its PTX."""

import re

WAIT = "griddepcontrol.wait"
LABEL = re.compile(r"\$[\w$]+")
REGISTER = re.compile(r"%[a-z]+\d+")
PARAMETER = re.compile(r"\b\w+_param_(\d+)\b")
OTHER_MEMORY = (".param", ".shared", ".local", ".const")


def touched_before_the_wait(ptx: str, pointers: dict[int, str]) -> set[str]:
    """Names of the pointers through which global memory is read or written ahead of the wait.

    A register may hold an address of every pointer that went into any value ever written to it, whatever the flow; so
    this errs by naming too many. Prefetches hand nothing to the program and do not count.

    Args:
        pointers: the kernel's pointers by their number among its parameters.

    Raises:
        ValueError: there is not one wait, or a path leads around it.
    """
    lines = instructions(ptx)
    waits = [at for at, line in enumerate(lines) if WAIT in line]
    if len(waits) != 1:
        raise ValueError(f"{len(waits)} waits")
    (wait,) = waits
    labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    for line in lines[:wait]:
        words = opcode_of(line).split(".")
        if words[0] in ("ret", "exit", "brx") or (
            words[0] == "bra" and any(labels[label] > wait for label in LABEL.findall(line))
        ):
            raise ValueError(f"a path leads around the wait: {line}")
    held = pointers_held(lines, pointers)
    found: set[str] = set()
    for line in lines[:wait]:
        if touches_global_memory(line):
            address = line[line.index("[") :]
            names = {name for register in REGISTER.findall(address) for name in held.get(register, ())}
            if not names:
                raise ValueError(f"an address of unknown origin: {line}")
            found |= names
    return found


def instructions(ptx: str) -> list[str]:
    """Instructions and labels of the kernel, one each."""
    body = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\s[^\n]*", "", ptx[ptx.index(".entry") :], flags=re.MULTILINE)
    body = re.sub(r"(\$[\w$]+):", r"\1:;", body[body.index("{") + 1 :])
    # Braces are lists of registers, or the block of inline assembly, which has semicolons.
    body = re.sub(r"\{(?=[^{}]*;)|(?<=;)\s*\}", ";", body)
    return [" ".join(part.split()) for part in body.split(";") if part.strip()]


def opcode_of(line: str) -> str:
    return re.sub(r"^@!?%?\w+ ", "", line).split(" ")[0]


def touches_global_memory(line: str) -> bool:
    opcode = opcode_of(line)
    if "prefetch" in opcode or opcode.startswith("cvta") or any(space in opcode for space in OTHER_MEMORY):
        return ".shared.global" in opcode
    return opcode.split(".")[0] in ("ld", "ldu", "st", "atom", "red", "cp") and "[" in line


def pointers_held(lines: list[str], pointers: dict[int, str]) -> dict[str, set[str]]:
    """Of every register, the pointers that any value in it was made of."""
    held: dict[str, set[str]] = {}
    grown = True
    while grown:
        grown = False
        for line in lines:
            operands = re.sub(r"^@!?%?\w+ ", "", line).partition(" ")[2]
            written, _, given = operands.partition("}" if operands.startswith("{") else ",")
            names = {name for register in REGISTER.findall(given) for name in held.get(register, ())}
            numbers = {int(number) for number in PARAMETER.findall(given)}  # their values, or where these lie
            names |= {name for number, name in pointers.items() if number in numbers}
            for register in REGISTER.findall(written):
                if not names <= held.setdefault(register, set()):
                    held[register] |= names
                    grown = True
    return held
