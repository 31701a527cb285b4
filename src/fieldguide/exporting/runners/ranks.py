class Model(Model):
    def predict(self, rows, batch=BATCH):
        """Return a record for each pair, with its rank among the passages of its query."""
        rows, groups = list(rows), {}
        records = super().predict(rows, batch)
        for row, record in zip(rows, records):
            query = " ".join(to_text(row.get(CONFIG["columns"][0])).lower().split())
            groups.setdefault(query, []).append(record)
        for group in groups.values():
            for rank, record in enumerate(sorted(group, key=lambda one: -one["rank"]), 1):
                record["rank"] = rank
        return records


def build_record(outputs, row, item):  # the rank is the logit until all pairs are known
    return {"score": float(outputs["score"]), "rank": float(outputs["logit"])}
