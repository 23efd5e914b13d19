"""Fills the generated regions of README.md, of the pages in docs/ and of results/README.md from the result files.

    python docs/build.py            # writes the pages anew
    python docs/build.py --check    # changes nothing; exit status 1 names the pages that are out of date

A region stands between `<!-- generated: NAME -->` and `<!-- end -->`; between them comes what the Jinja template
docs/templates/NAME.md.jinja renders. A template calls `results("craft/*.json")` for the result files under results/
(a list of dictionaries, sorted by file name, each with its `path`) and has the filter `median`; `report("minilm")` is
what `craft-peft report results/minilm` shows, with the filter `markdown` for one of its tables and `report_markdown`
for the whole. Both comments may stand within a line, for a number in a sentence.
"""

import argparse
import contextlib
import functools
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import jinja2

PROJECT = Path(__file__).resolve().parent.parent
REGION = re.compile(r"(<!-- generated: ([\w-]+) -->)(.*?)(<!-- end -->)", re.DOTALL)


def pages(project: Path = PROJECT) -> list[Path]:
    """README.md, every page in docs/ and the list of result files."""
    return [project / "README.md", *sorted((project / "docs").glob("*.md")), project / "results" / "README.md"]


def load_results(project: Path, pattern: str) -> list[dict[str, Any]]:
    """The JSON files under results/ that match a pattern; none is an error, for a table of nothing is a defect."""
    folder = project / "results"
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"no file matches results/{pattern}: correct the template, or put the results there")
    return [{"path": path.relative_to(folder).as_posix(), **json.loads(path.read_text())} for path in paths]


def load_report(project: Path, name: str) -> Any:
    """What `craft-peft report` makes of a folder under results/; imported here, since other pages need no such code."""
    from craft_peft.glue.report.page import make_report

    # From the project's folder, so that the files it names are named the same everywhere.
    with contextlib.chdir(project):
        return make_report([Path("results") / name])


def report_filters() -> dict[str, Any]:
    """The filters that show a report."""

    def as_markdown(table: Any) -> str:
        from craft_peft.glue.report.markdown import as_markdown

        return as_markdown(table)

    def report_markdown(report: Any) -> str:
        from craft_peft.glue.report.page import render_markdown

        return render_markdown(report, title="")

    def task_title(task: str) -> str:
        from craft_peft.glue.report.grouping import task_title

        return task_title(task)

    return {"markdown": as_markdown, "report_markdown": report_markdown, "task_title": task_title}


def filled(page: str, project: Path = PROJECT) -> str:
    """The text of a page with every generated region rendered anew."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(project / "docs" / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["results"] = lambda pattern: load_results(project, pattern)
    environment.globals["report"] = functools.cache(lambda name: load_report(project, name))
    environment.filters |= {"median": statistics.median, **report_filters()}

    def render(match: re.Match[str]) -> str:
        start, name, old, end = match.groups()
        text = environment.get_template(f"{name}.md.jinja").render().strip()
        return f"{start}\n{text}\n{end}" if "\n" in old or "\n" in text else f"{start}{text}{end}"

    return REGION.sub(render, page)


def main() -> int:
    """Writes the pages, or with --check names those that are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a page would change")
    check = parser.parse_args().check
    stale = 0
    for path in pages():
        old = path.read_text()
        new = filled(old)
        if new != old:
            stale += 1
            print(f"{path.relative_to(PROJECT)}: {'out of date, run python docs/build.py' if check else 'written'}")
            if not check:
                path.write_text(new)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
