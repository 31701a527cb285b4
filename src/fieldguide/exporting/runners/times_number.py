read_time = float


def list_times(first, count):
    return first + np.arange(count) * CONFIG["size"]


def label(time):
    return f"{time:.15g}"
