import torch
from executorch.runtime import Runtime


class Session:  # of a graph in `folder`
    def __init__(self, folder, name="model"):
        self.about = CONFIG["graphs"][name]
        self.inputs, self.outputs = ([one["name"] for one in self.about[side]] for side in ("inputs", "outputs"))
        self.program = Runtime.get().load_program(Path(folder) / f"{name}.pte")
        self.call = self.program.load_method("forward").execute

    def run(self, batch):
        """Return the outputs for arrays by name. Batches of more rows than the program takes at once are split."""
        arrays = join_columns(batch, self.about["inputs"])
        most, rows = self.check(arrays)
        places = [one["batch"] for one in self.about["inputs"]]
        parts = []
        for start in range(0, rows, most):
            chosen = np.arange(start, min(start + most, rows))
            taken = [a if place is None else a.take(chosen, place) for a, place in zip(arrays, places)]
            found = self.call([torch.from_numpy(np.ascontiguousarray(a)) for a in taken])
            parts.append([tensor.numpy() for tensor in found])
        joined = [
            values[0] if one["batch"] is None else np.concatenate(values, one["batch"])
            for one, values in zip(self.about["outputs"], zip(*parts))
        ]
        return name_classes(joined, self.about["outputs"])

    def check(self, arrays):
        """Return the number of rows that the program takes at once, and that of the arrays, whose other axes must be in its limits."""
        found = (1, 1)
        for one, array in zip(self.about["inputs"], arrays):
            for (axis, least, most), size in zip(one["axes"], array.shape):
                if axis == "batch":
                    found = most, size
                elif not least <= size <= most:
                    raise ValueError(f"{one['name']}: the axis {axis} is {size}, but this program takes {least} to {most}.")
        return found
