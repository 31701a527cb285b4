def list_times(first, count):
    return first + np.arange(count) * int(CONFIG["size"])
