"""The README tells the truth."""

import pathlib
import re

import pytest

from benchmarks import support

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_support_table_is_what_the_library_says():
    between = r"<!-- support: [^>]*-->\n(.*)\n<!-- end -->"
    assert re.search(between, README, re.DOTALL).group(1) == support.markdown()


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=("fn", "layer")
)
def test_quick_starts_run(code, capsys):
    # Shorter sequences: the examples are about calls, not about size.
    exec(code.replace("4096", "256"), {})


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
