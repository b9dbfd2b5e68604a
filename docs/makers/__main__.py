"""Write the pages that are made from the code, or say which are stale.

python docs/makers            # write
python docs/makers --check    # exit 1, naming them
"""

from __future__ import annotations

import sys
from pathlib import Path

import cli_page
import hardware_page
import licences_page
import recipe_page
import troubleshooting_page

DOCS = Path(__file__).parents[1]
PAGES = {
    "reference/recipe.md": recipe_page.page,
    "reference/cli.md": cli_page.page,
    "hardware.md": hardware_page.page,
    "troubleshooting.md": troubleshooting_page.page,
}


def main() -> None:
    """Write all pages, or compare them with what is there."""
    check = "--check" in sys.argv[1:]
    if "--licences" in sys.argv[1:]:
        (DOCS / "licences.md").write_text(licences_page.page(), encoding="utf-8")
        return
    stale = []
    for name, page in PAGES.items():
        file, text = DOCS / name, page()
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        stale.append(f"docs/{name}")
        if not check:
            file.write_text(text, encoding="utf-8")
    print("\n".join(f"{'stale' if check else 'written'}: {name}" for name in stale) or "all pages are as the code says")
    sys.exit(1 if check and stale else 0)


main()
