"""Data: any source as one typed, checked table; how to split it, and how to prepare it for a network."""

from fieldguide.data.dataset import Column, Data, FileEntry, Finding, Kind, Manifest, Role
from fieldguide.data.doctor import BadData, check, enforce
from fieldguide.data.reading import read
from fieldguide.data.splits import Splits, split

__all__ = ["BadData", "Column", "Data", "FileEntry", "Finding", "Kind", "Manifest", "Role", "Splits", "check",
           "enforce", "read", "split"]
