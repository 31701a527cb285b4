from images import load_pixels
from session import Session


class FirstFrames:
    """First frames of videos: they enter every step without noise, at the time of the least noise. `folder` has their encoder."""

    def __init__(self, folder):
        self.encoder, self.known = Session(folder, "encoder"), {}

    def load(self, paths):
        """Read the first frame of each video; None: it is generated, too. Returns itself."""
        encode = lambda path: self.encoder.run({"pixels": load_pixels(path)[0][None]})[0][0]
        self.known = {place: encode(path) for place, path in enumerate(paths) if path}
        return self

    def show(self, x, times):
        """Return what the model reads, and the time of each frame."""
        times = np.repeat(times[:, None], x.shape[1], 1)
        for place in self.known:
            times[place, 0] = CONFIG["first"]["time"]
        return self.insert(x, np.float32(CONFIG["first"]["scale"])), times

    def insert(self, x, scale=1):
        """Return videos with their first frames."""
        x = x.copy()
        for place, frame in self.known.items():
            x[place, 0] = scale * frame
        return x
