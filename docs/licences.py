"""The licences of the pinned packages, from what the installed ones say of themselves.

python docs/licences.py            # writes docs/licences.md anew
python docs/licences.py --check    # changes nothing; exit status 1 if the page is out of date
"""

import argparse
import re
import sys
from importlib import metadata
from pathlib import Path

PAGE = Path(__file__).with_name("licences.md")
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
HEAD = """\
# Licences

craft-peft is under the Apache License 2.0. These are the licences of the packages that its development environment pins
(`constraints.txt`) and installs, as each package states it; a user of the library installs the first group alone.
`docs/licences.py` writes this page.
"""


def pinned() -> dict[str, str]:
    lines = CONSTRAINTS.read_text().splitlines()
    found = {name: version for line in lines if "==" in line for name, version in [line.split("==")]}
    here = {canonical(part.metadata["Name"]) for part in metadata.distributions()}
    return {name: version for name, version in found.items() if canonical(name) in here}


def licence(name: str) -> str:
    """The expression, else the classifiers, else the first line of the text."""
    about = metadata.metadata(name)
    if about.get("License-Expression"):
        return about["License-Expression"]
    classes = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License :: ")]
    text = (about.get("License") or "").strip().partition("\n")[0]
    return ", ".join(c for c in classes if c != "OSI Approved") or text or "not stated"


def needed(name: str, found: set[str], known: dict[str, str]) -> set[str]:
    """A package and what it needs without extras, of those that are pinned."""
    if name in found:
        return found
    found.add(name)
    for requirement in metadata.requires(name) or []:
        other = re.match(r"[\w.-]+", requirement)
        if "extra ==" not in requirement and other and canonical(other.group()) in known:
            needed(known[canonical(other.group())], found, known)
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def page() -> str:
    versions = pinned()
    known = {canonical(name): name for name in versions}
    library = needed("craft-peft", set(), known) - {"craft-peft"}
    text = HEAD
    for title, chosen in (("The library", True), ("Extras and development", False)):
        rows = sorted((name for name in versions if (name in library) == chosen), key=str.lower)
        text += f"\n## {title}\n\n| package | version | licence |\n|---|---|---|\n"
        text += "".join(f"| {name} | {versions[name]} | {licence(name)} |\n" for name in rows)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page())
        return 0
    if PAGE.read_text() == page():
        return 0
    print(f"{PAGE.name} is out of date: run `python docs/licences.py`")
    return 1


if __name__ == "__main__":
    sys.exit(main())
