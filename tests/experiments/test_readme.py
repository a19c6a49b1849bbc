"""The README's example runs as it stands."""

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "README.md"


def test_custom_loop() -> None:
    found = re.search(r"<!-- tested: custom loop -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    start = names["loss"](names["model"].init(names["key"], names["x"])["params"], {}, names["specific"], None)[0]
    end = names["loss"](names["state"].params, {}, names["specific"], None)[0]
    assert end.mean() < 0.5 * start.mean()
