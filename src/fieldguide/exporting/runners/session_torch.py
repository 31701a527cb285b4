import torch


class Session:  # of a graph in `folder`
    def __init__(self, folder, name="model"):
        self.about = CONFIG["graphs"][name]
        self.inputs, self.outputs = ([one["name"] for one in self.about[side]] for side in ("inputs", "outputs"))
        self.call = torch.export.load(Path(folder) / f"{name}.pt2").module()

    def run(self, batch):
        """Return the outputs for arrays by name."""
        with torch.inference_mode():
            found = self.call(*map(torch.from_numpy, join_columns(batch, self.about["inputs"])))
        return name_classes([tensor.numpy() for tensor in found], self.about["outputs"])
