parse_time, to_seconds = lambda value: to_number(value, CONFIG["time"]), lambda time: int(np.rint(time))
