"""Preparing: from typed columns to what a network reads. Learnt on training rows, saved as plain JSON."""

from fieldguide.data.prepare.labels import Labels, Standard
from fieldguide.data.prepare.pictures import Pictures, suggest_side
from fieldguide.data.prepare.table import TablePreparer
from fieldguide.data.prepare.text import Text

__all__ = ["Labels", "Pictures", "Standard", "TablePreparer", "Text", "suggest_side"]
