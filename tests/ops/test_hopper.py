"""Every kernel compiles for Hopper as it is launched, whatever machine the tests run on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import transmamba.ops
from tests.ops.kernels import needs_triton

SCRIPT = Path(__file__).with_name("compile_kernels.py")
KERNEL = re.compile(r"^@triton\.jit\ndef (\w+_kernel)\(", re.MULTILINE)


@needs_triton
def test_every_kernel_compiles() -> None:
    """In a process of its own, since the kernels of this one belong to the interpreter."""
    root = SCRIPT.parents[2]
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts, waiting = done.stdout.splitlines()
    compiled = {word.partition("=")[0] for word in counts.split()}
    sources = Path(transmamba.ops.__file__).parent.glob("*/kernels.py")
    ours = {name for path in sources for name in KERNEL.findall(path.read_text(encoding="utf-8"))}
    assert len(ours) > 10
    assert compiled == ours  # and the faulty ones were refused
    assert set(waiting.split()) == {"conv_step_kernel", "early_row_kernel", "row_kernel"}
