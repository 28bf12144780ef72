"""How a page of results is put together: the answer first, and what is behind it folded away below."""

from __future__ import annotations

from collections.abc import Iterable


def page(parts: Iterable[str]) -> str:
    """The parts as one page in Markdown, apart by blank lines.

    Args:
        parts: headings, paragraphs, lists, tables; empty ones are left out.
    """
    return "\n\n".join(part for part in parts if part) + "\n"


def bullets(lines: Iterable[str]) -> str:
    """A list in Markdown.

    Args:
        lines: the items.
    """
    return "\n".join(f"- {line}" for line in lines)


def folded(title: str, *parts: str) -> str:
    """Parts that open with a click on the title.

    Args:
        title: what they are, in plain text.
        parts: in Markdown; empty ones are left out.
    """
    # GitHub needs the blank lines to read Markdown inside, the documentation site the attribute.
    return "\n\n".join(
        [f'<details markdown="1">\n<summary>{title}</summary>', *(part for part in parts if part), "</details>"]
    )


def markers(name: str) -> tuple[str, str]:
    """What stands before and after a part of a page that other pages quote.

    Args:
        name: of the part.
    """
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def marked_part(name: str, part: str) -> str:
    """A part of a page between its markers.

    Args:
        name: of the part.
        part: in Markdown.
    """
    begin, end = markers(name)
    return f"{begin}\n{part}\n{end}"
