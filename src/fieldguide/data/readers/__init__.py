"""Readers, one file per data format. `fieldguide.data.source` describes their interface and finds them."""
