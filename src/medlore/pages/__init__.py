"""One self-contained HTML page: settings, tables, pictures and a slice viewer, from plain values.

A page is a title and sections; a section holds pieces. `write_page` turns it into one file that asks for nothing from
outside: style, scripts, pictures and volumes are inside, and its content security policy forbids every request.

Example:
    >>> from medlore.pages import Facts, Page, Section, page_html
    >>> page = Page("a run", (Section("Results", (Facts({"label": "<script>"}),)),))
    >>> "&lt;script&gt;" in page_html(page)
    True
"""

from medlore.pages.pieces import Facts, Interval, Notes, Page, Picture, Piece, Section, Table
from medlore.pages.rendering import page_html, write_page
from medlore.pages.slices import Label, Slices, slices_of

__all__ = [
    "Facts",
    "Interval",
    "Label",
    "Notes",
    "Page",
    "Picture",
    "Piece",
    "Section",
    "Slices",
    "Table",
    "page_html",
    "slices_of",
    "write_page",
]
