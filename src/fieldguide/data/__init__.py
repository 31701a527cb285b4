"""Data: reading any source into one typed and checked table, splitting it, and preprocessing it for models."""

from fieldguide.data.dataset import Column, Data, FileEntry, Finding, Kind, Manifest, Role
from fieldguide.data.read import read
from fieldguide.data.splits import Splits, split
from fieldguide.data.validation.checks import BadData, check, enforce

__all__ = [
    "BadData",
    "Column",
    "Data",
    "FileEntry",
    "Finding",
    "Kind",
    "Manifest",
    "Role",
    "Splits",
    "check",
    "enforce",
    "read",
    "split",
]
