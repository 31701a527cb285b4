def classify(outputs):
    """Return a class with its probability, and those of all classes."""
    p, names, label = outputs["probabilities"], CONFIG["labels"], str(outputs["label"])
    return {
        CONFIG["answer"]: label,
        "probability": float(p[names.index(label)]),
        "probabilities": dict(zip(names, map(float, p))),
    }
