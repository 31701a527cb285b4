def list_times(first, count):
    day = np.datetime64(int(first), "us").astype("M8[D]")
    return (
        np.busday_offset(day, np.arange(count), roll="forward").astype("M8[us]").astype(np.int64) + int(first) % 86_400_000_000
    )
