def describe_score(outputs):
    """Return the score, 1 at the threshold, and the columns with the largest shares of it."""
    score, shares = float(outputs["score"]), outputs["shares"]
    top = {CONFIG["features"][i]: float(shares[i]) for i in np.argsort(-shares)[:3]}
    return {"anomaly": score >= 1, "score": score, "due_to": top}
