"""Write docs/configuration.md from the configuration's dataclasses and their docstrings.

python scripts/configuration_page.py
"""

from __future__ import annotations

from pathlib import Path

from embed_precompute.config.keys import markdown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """\
# Configuration

Every key of a configuration. `scripts/configuration_page.py` writes this page from the code, and
`embed-precompute run --help-config` prints the same. Each key may be given on the command line too:
`--section.key VALUE`. `NAME` is a name that you choose, such as `t5`. How the four sections hang
together stands in [running](running.md#configuration).

"""


def page() -> str:
    return HEAD + markdown().rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
