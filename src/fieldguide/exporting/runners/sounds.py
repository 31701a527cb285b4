def prepare(row):
    """Return the middle of a recording, as much as the model reads."""
    wave, most = load_wave(row[CONFIG["column"]], CONFIG["rate"]), CONFIG["samples"]
    first = int(0.5 * max(0, len(wave) - most))
    return {"waveform": wave[first : first + most]}


def build_record(outputs, row, item):
    return classify(outputs)
