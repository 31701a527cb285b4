"""Preprocessing from typed columns to model inputs. Fitted on training rows and saved as plain JSON."""

from fieldguide.data.preprocessing.image_transform import Pictures, suggest_side
from fieldguide.data.preprocessing.labels import Labels, Standard
from fieldguide.data.preprocessing.table import TablePreparer
from fieldguide.data.preprocessing.tokenizer import Text

__all__ = ["Labels", "Pictures", "Standard", "TablePreparer", "Text", "suggest_side"]
