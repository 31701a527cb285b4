def build_record(outputs, row, item):
    return {CONFIG["answer"]: float(outputs["value"])} if "value" in outputs else classify(outputs)
