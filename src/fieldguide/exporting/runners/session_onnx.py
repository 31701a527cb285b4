import onnxruntime


class Session:  # of a graph in `folder`
    def __init__(self, folder, name="model"):
        self.session = onnxruntime.InferenceSession(str(Path(folder) / f"{name}.onnx"))
        self.inputs, self.outputs = ([v.name for v in found()] for found in (self.session.get_inputs, self.session.get_outputs))
        self.run = lambda batch: self.session.run(None, batch)
