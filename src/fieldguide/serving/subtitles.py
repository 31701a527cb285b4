"""Transcripts as JSON, plain text and subtitles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")


def format_transcript(record: Mapping[str, Any], form: str, task: str) -> dict[str, Any] | str:
    """Return a prediction record of a recording in one of `FORMATS`."""
    text, segments = str(record.get("text", "")), list_segments(record)
    if form == "json":
        return {"text": text}
    if form == "text":
        return f"{text}\n"
    if form == "verbose_json":
        end = segments[-1]["end"] if segments else 0.0
        return {"task": task, "language": record.get("language") or "", "duration": end, "text": text, "segments": segments}
    lines = ["WEBVTT", ""] if form == "vtt" else []
    for i, segment in enumerate(segments, 1):
        mark = "." if form == "vtt" else ","
        lines += [*([str(i)] if form == "srt" else []), f"{clock(segment['start'], mark)} --> {clock(segment['end'], mark)}"]
        lines += [segment["text"].strip(), ""]
    return "\n".join(lines)


def list_segments(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the phrases of a record with their times; words with times count as one phrase."""
    segments = record.get("segments")
    if segments is None:
        words = record.get("words") or []
        found = [{"start": words[0]["start"], "end": words[-1]["end"], "text": record.get("text", "")}] if words else []
        segments = found
    return [
        {
            "id": i,
            "seek": 0,
            "start": segment["start"],
            "end": segment["end"],
            "text": segment["text"],
            "tokens": [],
            "temperature": segment.get("temperature", 0.0),
            "avg_logprob": segment.get("mean_log_probability", 0.0),
            "compression_ratio": segment.get("compression", 0.0),
            "no_speech_prob": segment.get("no_speech", 0.0),
        }
        for i, segment in enumerate(segments)
    ]


def clock(seconds: float, mark: str) -> str:
    """Return a time as hours, minutes, seconds and milliseconds."""
    total = round(seconds * 1000)
    return f"{total // 3_600_000:02d}:{total // 60_000 % 60:02d}:{total // 1000 % 60:02d}{mark}{total % 1000:03d}"
