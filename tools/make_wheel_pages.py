"""Writes the pages that `pip install --find-links` reads: one for each label of the wheels, such as cu130.

    gh api --paginate repos/OWNER/NAME/releases --jq '.[].assets[]' | python tools/make_wheel_pages.py site

One page for each, because pip takes the highest version of a page, and 0.1.0+cu130 counts as higher than 0.1.0+cu126.
"""

from __future__ import annotations

import collections
import html
import json
import sys
from collections.abc import Iterable
from pathlib import Path


def pages(assets: Iterable[str]) -> dict[str, str]:
    """From the assets of releases, each a line of JSON, the text of every page by label; without a label: cpu."""
    links = collections.defaultdict(list)
    for asset in map(json.loads, assets):
        name = asset["name"]  # such as curveball_fused-0.1.0+cu130-cp310-abi3-manylinux_2_28_x86_64.whl
        if name.endswith(".whl"):
            label = name.split("-")[1].partition("+")[2] or "cpu"
            checksum = "#" + asset["digest"].replace(":", "=") if asset["digest"] else ""
            link = html.escape(asset["browser_download_url"].replace("+", "%2B") + checksum)
            links[label].append(f'<a href="{link}">{html.escape(name)}</a><br>\n')
    head = "<!DOCTYPE html>\n<title>curveball_fused: {}</title>\n"
    found = {label: head.format(label) + "".join(sorted(links[label])) for label in sorted(links)}
    return found | {"": head.format("wheels") + "".join(f'<a href="{label}/">{label}</a><br>\n' for label in found)}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for label, text in pages(sys.stdin).items():
        page = Path(sys.argv[1], label, "index.html")
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text)


if __name__ == "__main__":
    main()
