parse_time = read_time  # microseconds
to_seconds = lambda time: int(time) // 1_000_000
