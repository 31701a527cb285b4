def prepare(row):
    wave, most = load_wave(row[CONFIG["column"]], CONFIG["rate"]), CONFIG["samples"]
    if len(wave) > most:
        sys.exit(f"{row[CONFIG['column']]} is longer than {most / CONFIG['rate']:.1f} s, which run.py does not split")
    return {"waveform": wave}


def build_record(outputs, row, item):
    """Return the text, how sure the model is, and its words with seconds: runs of one symbol are one, and 0 is none."""
    path, text, words, is_gap = [int(symbol) for symbol in outputs["path"]], "", [], True
    for first, symbol in enumerate(path):
        if symbol <= 0 or (first and path[first - 1] == symbol):
            continue
        end = next((i for i in range(first, len(path)) if path[i] != symbol), len(path))
        begins, ends = (round(frame * CONFIG["seconds"], 3) for frame in (first, end))
        text += CONFIG["symbols"][symbol]
        for part in CONFIG["symbols"][symbol]:
            if part != " " and is_gap:
                words.append({"word": part, "start": begins, "end": ends})
            elif part != " ":
                words[-1].update(word=words[-1]["word"] + part, end=ends)
            is_gap = part == " "
    return {"text": " ".join(text.split()), "sure": float(outputs["sure"]), "words": words}
