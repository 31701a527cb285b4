"""Names of the files of a checkpoint, importable without torch."""

CONFIG_FILE = "config.json"
CONFIG_FILES = (CONFIG_FILE, "params.json", "open_clip_config.json")  # params.json is of Meta's checkpoints
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")
HUB_PREFIX = "hf:"
