cut_values = cut_window


class Cell(float):  # the value of a series, with the whole row
    row = None


def read_value(row, column):
    cell = Cell(read_cell(row, column))
    cell.row = row
    return cell


def cut_window(name, values):
    """Return a window with its covariates: those of the past, those known for past and future, and those of the series."""
    window, length, rows = cut_values(name, values), CONFIG["length"], {time: cell.row for time, cell in values.items()}
    times, moments = window["times"], np.array(sorted(rows))
    begin = list_times(moments[0], 1 + int((moments[-1] - moments[0]) / CONFIG["least"] + 1e-4))
    moments = moments[locate(begin, moments)[1]]
    past = times[np.arange(len(times) - length, len(times)).clip(0)]  # before its start, a series repeats its first step
    both = np.concatenate([past, list_times(times[-1], CONFIG["horizon"] + 1)[1:]])
    place, there = locate(moments, both)
    known = list_known([rows[moments[i].item()] if ok else {} for i, ok in zip(place, there)], both)
    before = [find_last(rows, moments, past, column) for column in CONFIG["covariates"]["past"]]
    inside = [moment for moment in moments if times[0] <= moment <= times[-1]]
    own = [find_last(rows, inside, times[:1], column)[0] for column in CONFIG["covariates"]["static"]]
    own += [np.array([float(name == other) for other in CONFIG["names"]])]
    parts = {"past": np.hstack([np.zeros((length, 0)), *before]), "known": np.hstack([np.zeros((len(both), 0)), *known])}
    parts["static"] = np.concatenate(own)
    return window | {key: np.nan_to_num(part).astype(np.float32) for key, part in parts.items()}
