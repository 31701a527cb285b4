from images import SUFFIXES, load_pixels
