"""`any4 bench report`: recorded results as a page with drawings."""

import argparse
from pathlib import Path

from any4_jax.benchmarks import schema
from any4_jax.benchmarks.report import drawings, report
from any4_jax.cli.errors import WorkError
from any4_jax.cli.output import tell
from any4_jax.whole_file import check_target, write_whole


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", nargs="+", metavar="PATH", help="files that any4 bench --out wrote, or folders of such files"
    )
    parser.add_argument(
        "--out", default="any4-report.html", metavar="FILE.html", help="the page (default: any4-report.html)"
    )
    parser.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> int:
    check_target(args.out)
    files = [
        file for path in map(Path, args.results) for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])
    ]
    if not files:
        raise WorkError(f"{args.results[0]} holds no .json file; give results that any4 bench --out wrote")
    results = {str(file): schema.read(file) for file in files}
    names = {path: Path(path).name for path in results}
    # Files of one name keep their paths.
    by_name = {names[p] if list(names.values()).count(names[p]) == 1 else p: result for p, result in results.items()}
    write_whole(args.out, report(by_name))
    drawn = {name: len(drawings(result)) for name, result in by_name.items()}
    for name, count in drawn.items():
        print(f"{name}: {count or 'no'} drawing{'s' if count != 1 else ''}, {len(by_name[name].rows)} rows")
    print(f"wrote {args.out}")
    tell(lambda: {"page": args.out, "results": {name: {"drawings": count} for name, count in drawn.items()}})
    return 0
