"""`import bilevel` needs jax, flax and optax only."""

import subprocess
import sys

BLOCKED = (
    "tyro",
    "tensorflow",
    "tensorflow_datasets",
    "matplotlib",
    "jinja2",
    "fsspec",
    "tqdm",
    "tensorboardX",
    "datatrove",
)
SCRIPT = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
import bilevel
assert bilevel.sharding.make_mesh
assert "experiments" not in sys.modules and "bilevel.training" not in sys.modules
"""


def test_import_needs_no_extra() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
