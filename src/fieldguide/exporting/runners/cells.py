from cells import find_last, label, list_known, list_times, locate, read_time
from cells import read_value as read_cell
