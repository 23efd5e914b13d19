"""The tables of a report as Markdown."""

from __future__ import annotations

from .tables import Cell, Table


def as_markdown(table: Table, apart: bool = True) -> str:
    r"""A table as Markdown, small print in parentheses.

    Args:
        table: The table.
        apart: Whether to show its rows of other origin.

    Returns:
        Its lines, without its title.

    Example:
        >>> from craft_peft.glue.report.tables import Cell, Column, Table
        >>> print(as_markdown(Table("t", "T", (Column("method", False), Column("score")), ((Cell("a|b"), Cell("1")),))))
        | method | score |
        |---|--:|
        | a\|b | 1 |
    """
    parts = [_grid(table, table.rows)]
    if table.note:
        parts.append(table.note)
    if table.apart and apart:
        parts += [table.apart_title, _grid(table, table.apart)]
    return "\n\n".join(parts)


def _grid(table: Table, rows: tuple[tuple[Cell, ...], ...]) -> str:
    head = "| " + " | ".join(_escape(column.title) for column in table.columns) + " |"
    rule = "|" + "|".join("--:" if column.is_number else "---" for column in table.columns) + "|"
    return "\n".join([head, rule, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)])


def _cell(cell: Cell) -> str:
    text = _escape(cell.text)
    if cell.mark in ("best", "significant"):
        text = f"**{text}**"
    return f"{text} ({_escape(cell.detail)})" if cell.detail else text


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
