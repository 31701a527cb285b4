"""Names of the files of a checkpoint, importable without torch."""

CONFIG_FILE = "config.json"
CONFIG_FILES = (CONFIG_FILE, "params.json", "open_clip_config.json")  # params.json is of Meta's checkpoints
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")
PIPELINE_FILE = "model_index.json"  # of diffusers, which lists the folders of the parts
HUB_PREFIX = "hf:"


def get_head_names(model: type) -> tuple[str, ...]:
    """Return the names of the modules of a network that a checkpoint may lack, or have for other classes.

    A network class lists them as `heads`, or as `head_names` if it has a module of that name.
    """
    return tuple(getattr(model, "head_names", getattr(model, "heads", ())))
