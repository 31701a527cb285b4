from videos import FirstFrames, encode_sample

FRAMES = FirstFrames(HERE)
read_requests = read


def read(path):
    """Yield requests; first frames in a table are relative to its folder."""
    for row in read_requests(path):
        yield {**row, "image": str(Path(path).parent / row["image"])} if row.get("image") else row


class Model(Model):
    def denoise(self, group, rows):
        return FRAMES.load([rows[number].get("image") for number, _ in group]).insert(super().denoise(group, rows))

    def call(self, x, times, label):
        return super().call(*FRAMES.show(x, times), label)
