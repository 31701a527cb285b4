def to_8_bit(array, mode):
    sys.exit(f"the model was trained on images of 8 bits, but this one has the mode {mode}")
