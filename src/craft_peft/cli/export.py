"""`craft-peft export`: an adapter as an ordinary LoRA, for whatever serves LoRA."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import CraftError

EXAMPLE = """\
examples:
  Exact, at the smallest rank that is:
    craft-peft export runs/rte --output rte-lora

  Smaller, with the error that this costs, in bfloat16:
    craft-peft export runs/rte --output rte-lora-16 --rank 16 --dtype bfloat16
"""
DTYPES = ("float32", "bfloat16", "float16")


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser."""
    parser = subparsers.add_parser(
        "export",
        help="write an adapter as an ordinary LoRA",
        description="Write the adapter of a finished run as an ordinary PEFT LoRA folder, with its head. It loads "
        "without this package, in PEFT and in every engine that serves LoRA.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="output folder of a training run")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the LoRA")
    parser.add_argument("--rank", type=int, metavar="R", help="(default: the smallest rank that is exact)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the LoRA matrices (default: as saved)")
    parser.add_argument("--model", metavar="NAME_OR_FOLDER", help="base model, if it is no longer where it was")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CraftError(f"The output {output} is there already and not an empty folder. Give a new one.")
    import torch
    from peft import PeftModel
    from rich.console import Console
    from rich.table import Table

    from ..glue.models import load_trained
    from ..lora_export import to_lora

    trained = load_trained(arguments.folder, arguments.model)
    if not isinstance(trained.model, PeftModel):
        raise CraftError(f"The run in {arguments.folder} has no adapter to export: its method trains the model itself.")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    export = to_lora(trained.model, rank=arguments.rank, dtype=dtype)
    export.save(output)
    trained.tokenizer.save_pretrained(output)
    console = Console()
    if export.total_error > 0:
        table = Table("layer", "relative error", title=f"What rank {export.config.r} leaves out")
        for key, error in export.errors.items():
            table.add_row(key, f"{error:.2%}")
        table.add_section()
        table.add_row("together", f"{export.total_error:.2%}")
        console.print(table)
    exact = "exact" if export.total_error == 0 else f"relative error {export.total_error:.2%}"
    console.print(f"LoRA of rank {export.config.r} ({exact}) for {len(export.errors)} layers: {output}", soft_wrap=True)
    return 0
