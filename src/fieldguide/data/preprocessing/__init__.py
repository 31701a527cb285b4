"""Preprocessing from typed columns to model inputs. Fitted on training rows and saved as plain JSON."""

from fieldguide.data.preprocessing.image_transform import ImageTransform, list_smaller_sides, suggest_side
from fieldguide.data.preprocessing.labels import Labels, Standardizer
from fieldguide.data.preprocessing.table import TablePreparer
from fieldguide.data.preprocessing.tokenizer import TextTokenizer

__all__ = ["ImageTransform", "Labels", "Standardizer", "TablePreparer", "TextTokenizer", "list_smaller_sides", "suggest_side"]
