"""One kind of source a file. `fieldguide.data.source` says what a reader is and finds them here."""
