"""Tables: our defaults against scikit-learn's MLP (standardised inputs) and histogram gradient boosting.

    python benchmarks/tables.py [--seeds 5] [--only iris wine] [--model tabm-s] [--set epochs=50 ...] [--save]

Every seed splits 80/20 (classes stratified); all see the same rows. Scores are accuracy or R2 on the 20 %: mean and
standard error over seeds, and the paired difference between ours and the better peer.
"""

from __future__ import annotations

import time

import numpy as np
from common import make_parser, parse_options, report
from sklearn import datasets
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fieldguide import FieldguideClassifier, FieldguideRegressor

TABLES = {
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast_cancer": datasets.load_breast_cancer,
    "digits": datasets.load_digits,
    "diabetes": datasets.load_diabetes,
}


def build_models(regression: bool, seed: int, options) -> dict:
    ours = FieldguideRegressor if regression else FieldguideClassifier
    settings = dict(s.split("=", 1) for s in options.set)
    mlp, trees = (
        (MLPRegressor, HistGradientBoostingRegressor) if regression else (MLPClassifier, HistGradientBoostingClassifier)
    )
    made = {"ours": ours(options.model, random_state=seed, minutes=options.minutes, settings=settings)}
    if not options.alone:
        made |= {"mlp": make_pipeline(StandardScaler(), mlp(random_state=seed)), "boosting": trees(random_state=seed)}
    return made


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(TABLES))
    parser.add_argument("--model", default="auto")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--alone", action="store_true", help="do not run the peers")
    options = parse_options(parser)
    rows = []
    for name in options.only:
        X, y = TABLES[name](return_X_y=True)
        regression = name == "diabetes"
        scores, seconds = {}, {}
        for seed in range(options.seeds):
            X_train, X_test, y_train, y_test = train_test_split(
                X, y, test_size=0.2, random_state=seed, stratify=None if regression else y
            )
            for who, estimator in build_models(regression, seed, options).items():
                started = time.perf_counter()
                estimator.fit(X_train, y_train)
                seconds.setdefault(who, []).append(time.perf_counter() - started)
                scores.setdefault(who, []).append(estimator.score(X_test, y_test))
                if who == "ours" and not seed:
                    print(name, estimator.size_, estimator.n_steps_, "steps of", estimator.settings_["batch"])
        mean = {who: np.mean(s) for who, s in scores.items()}
        row = [name, *(f"{mean[w]:.4f} ± {error(s):.4f}" for w, s in scores.items())]
        if not options.alone:
            best = max(("mlp", "boosting"), key=mean.get)
            gap = np.array(scores["ours"]) - scores[best]
            row.append(f"{gap.mean():+.4f} ± {error(gap):.4f} ({best})")
        rows.append([*row, *(f"{np.median(s):.2g}" for s in seconds.values())])
        print("  ".join(rows[-1]), flush=True)
    who = list(scores)
    columns = ["table", *who, *([] if options.alone else ["ours - better peer"]), *(f"{w} s" for w in who)]
    report("Tables: accuracy (R2 for diabetes) and seconds to fit", columns, rows, options.save)


def error(values) -> float:
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


if __name__ == "__main__":
    main()
