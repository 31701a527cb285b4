def list_times(first, count):  # if the first is the end of a month, all are
    day = np.datetime64(int(first), "us").astype("M8[D]")
    month = day.astype("M8[M]") + np.arange(count) * int(CONFIG["size"])
    ends, begin = (month + 1).astype("M8[D]") - 1, month.astype("M8[D]")
    days = ends if ends[0] == day else np.minimum(begin + (day - begin[0]), ends)
    return days.astype("M8[us]").astype(np.int64) + int(first) % 86_400_000_000
