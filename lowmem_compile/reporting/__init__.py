"""What lowmem did to a model, as data, as text and as one HTML page."""

from lowmem_compile.reporting.html import render_html, write_html
from lowmem_compile.reporting.model import (
    GraphReport,
    PassRun,
    Report,
    SavedTensor,
    Site,
    TimelinePoint,
)
from lowmem_compile.reporting.text import render_text

__all__ = [
    "GraphReport",
    "PassRun",
    "Report",
    "SavedTensor",
    "Site",
    "TimelinePoint",
    "render_html",
    "render_text",
    "write_html",
]
