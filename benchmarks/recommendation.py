"""SASRec and DeepFM: training steps, and the ranking of all items, against RecBole's.

    pip install --no-deps --target peers recbole colorlog thop texttable psutil
    PYTHONPATH=peers python benchmarks/recommendation.py [--only SASRec] [--save]

SASRec has the sizes of MovieLens-1M: 3,416 items, 32 histories of 50 to 200 of them, 50 wide. RecBole's differs in where it
normalises and has output projections; it learns the last item of a history, and to learn all of them it reads every
beginning of a history as a history. "like for like": ours learns the last item alone, too. "defaults": ours learns all of
them in one go; counted are items learnt. DeepFM has 26 columns of 1,000 categories and the same weights.
"like for like" is float32, clipped, fused AdamW; "defaults" plain AdamW against our recipe.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch
from common import Pair, Run, check_equal, compare, describe_sizes, make_parser, parse_options
from loops import LIKE, read_recipe, repeat_batches, run_inference, run_plain_steps, run_trainer
from torch import Tensor, nn

from fieldguide import create
from fieldguide.objectives import Classification, Supervised
from fieldguide.objectives.next_item import NextItem

try:
    from recbole.model.context_aware_recommender.deepfm import DeepFM
    from recbole.model.sequential_recommender.sasrec import SASRec
    from recbole.utils import FeatureType
except ImportError as error:
    raise SystemExit(f"{error}: install RecBole first (see the top of this file)") from None

ITEMS, LENGTH, HISTORIES, TOP = 3417, 200, 32, 100
COLUMNS, VALUES, ROWS = 26, 1000, 2048
INPUTS = ("items", "mask")


def make_histories() -> dict[str, Tensor]:
    """Return histories padded on the left, as our network reads them; `target` is the item that follows each."""
    chance = torch.Generator().manual_seed(0)
    items = torch.randint(1, ITEMS, (HISTORIES, LENGTH + 1), generator=chance)
    lengths = torch.randint(50, LENGTH + 1, (HISTORIES, 1), generator=chance)
    mask = torch.arange(LENGTH) >= LENGTH - lengths
    read, target = items[:, :-1] * mask, items[:, 1:] * mask
    return {"items": read, "mask": mask, "target": target, "seen": read, "next_item": target[:, -1]}


def pad_right(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch padded on the right, as RecBole reads it."""
    lengths = batch["mask"].sum(1)
    rows = torch.stack([row.roll(int(n)) for row, n in zip(batch["items"], lengths)])
    return {"item_id_list": rows, "item_length": lengths, "item_id": batch["target"][:, -1]}


def sasrec() -> nn.Module:
    settings = {
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "LIST_SUFFIX": "_list",
        "NEG_PREFIX": "neg_",
        "ITEM_LIST_LENGTH_FIELD": "item_length",
        "MAX_ITEM_LIST_LENGTH": LENGTH,
        "n_layers": 2,
        "n_heads": 1,
        "hidden_size": 50,
        "inner_size": 50,
        "hidden_dropout_prob": 0.2,
        "attn_dropout_prob": 0.2,
        "hidden_act": "relu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "loss_type": "CE",
        "device": "cpu",
    }
    return SASRec(settings, SimpleNamespace(num=lambda field: ITEMS))


def train(last: bool, **settings: object) -> Run:
    model, batch = create("sasrec-ml1m"), make_histories()
    if last:
        batch["target"][:, :-1] = 0
    return run_trainer(NextItem(model, INPUTS), repeat_batches(batch), 1, **settings)


def peer(**settings: object) -> Run:
    model = sasrec()
    return run_plain_steps(model, model.calculate_loss, [pad_right(make_histories())], **settings)


def rank_ours() -> Run:
    objective, batch = NextItem(create("sasrec-ml1m"), INPUTS), make_histories()
    return run_inference(objective, lambda: objective.outputs(batch))


def rank_peer() -> Run:
    """Return the best items of each history, without those in it."""
    model, batch = sasrec(), pad_right(make_histories())

    def answer() -> Tensor:
        scores = model.full_sort_predict(batch)
        scores.scatter_(1, batch["item_id_list"], -torch.inf)
        scores[:, 0] = -torch.inf
        return scores.topk(TOP)

    return run_inference(model, answer)


def make_clicks() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)
    return {
        "numbers": torch.zeros(ROWS, 0),
        "categories": torch.randint(VALUES, (ROWS, COLUMNS), generator=chance),
        "target": torch.randint(2, (ROWS,), generator=chance),
    }


def deepfm() -> nn.Module:
    return create("deepfm", numbers=0, categories=(VALUES,) * COLUMNS)


def build_peer() -> nn.Module:
    fields = [f"c{i}" for i in range(COLUMNS)]
    settings = defaultdict(
        lambda: None,
        LABEL_FIELD="label",
        embedding_size=10,
        device="cpu",
        numerical_features=[],
        mlp_hidden_size=[400, 400, 400],
        dropout_prob=0.5,
    )
    return DeepFM(
        settings,
        SimpleNamespace(
            fields=lambda source: fields, num=lambda field: VALUES, field2type=dict.fromkeys(fields, FeatureType.TOKEN)
        ),
    )


def make_interaction(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"c{i}": column for i, column in enumerate(batch["categories"].unbind(1))} | {"label": batch["target"].float()}


def train_clicks(**settings: object) -> Run:
    return run_trainer(
        Supervised(deepfm(), ("numbers", "categories"), Classification()), repeat_batches(make_clicks()), 1, **settings
    )


def peer_clicks(**settings: object) -> Run:
    model = build_peer()
    return run_plain_steps(model, model.calculate_loss, [make_interaction(make_clicks())], **settings)


def answer_clicks() -> Run:
    model, batch = deepfm(), make_clicks()
    return run_inference(model, lambda: model(batch["numbers"], batch["categories"]).softmax(-1))


def peer_answers_clicks() -> Run:
    model, batch = build_peer(), make_interaction(make_clicks())
    return run_inference(model, lambda: model.predict(batch))


@torch.inference_mode()
def check() -> str:
    ours, peer, batch = deepfm(), build_peer(), make_clicks()
    layers = [layer for layer in peer.mlp_layers.mlp_layers if isinstance(layer, nn.Linear)] + [peer.deep_predict_layer]
    for mine, other in zip([layer for layer in ours.deep if isinstance(layer, nn.Linear)], layers, strict=True):
        mine.load_state_dict(other.state_dict())
    ours.vectors.weight.copy_(peer.token_embedding_table.embedding.weight)
    ours.first.weight.copy_(peer.first_order_linear.token_embedding_table.embedding.weight)
    ours.bias.copy_(peer.first_order_linear.bias)
    same = check_equal("logits", ours.eval()(batch["numbers"], batch["categories"])[:, 1], peer.eval()(make_interaction(batch)))
    return f"SASRec: {describe_sizes(create('sasrec-ml1m'), sasrec())} DeepFM: {describe_sizes(ours, peer)} {same}"


def main() -> None:
    options = parse_options(make_parser(__doc__.splitlines()[0], steps=2))
    torch.manual_seed(0)
    like, items = {"precision": "float32", **LIKE}, int(make_histories()["mask"].sum())
    compare(
        "SASRec, 32 histories, and DeepFM, 2,048 rows",
        "items or rows",
        "RecBole",
        [
            Pair("SASRec, training, like for like", lambda: train(True, **like), lambda: peer(fused=True, **LIKE), HISTORIES),
            Pair(
                "SASRec, training, defaults",
                lambda: train(False, **read_recipe("sasrec-ml1m")),
                lambda: peer(lr=1e-3),
                items,
                others=HISTORIES,
            ),
            Pair("SASRec, ranking of all items", rank_ours, rank_peer, HISTORIES),
            Pair(
                "DeepFM, training, like for like", lambda: train_clicks(**like), lambda: peer_clicks(fused=True, **LIKE), ROWS
            ),
            Pair(
                "DeepFM, training, defaults", lambda: train_clicks(**read_recipe("deepfm")), lambda: peer_clicks(lr=1e-3), ROWS
            ),
            Pair("DeepFM, answers", answer_clicks, peer_answers_clicks, ROWS),
        ],
        options,
        check,
    )


if __name__ == "__main__":
    main()
