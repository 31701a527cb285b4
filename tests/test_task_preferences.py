"""Preference tuning: reading pairs of answers, the objective, which tokens count, and training."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import polars as pl
import pytest
import torch

from damage import checks, finding, refused
from fieldguide import open_run
from fieldguide.automl.finetune import get_learning_rates
from fieldguide.automl.fit import fit
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data import read, samples
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.preferences import CHOSEN, REJECTED
from fieldguide.models.registry import card
from fieldguide.objectives.preference import Preference
from fieldguide.tasks import infer_task, task
from fieldguide.tasks.text.preference_tuning import truncate
from test_models import tiny

KIND = task("preference-tuning")
PAIRS = [{"prompt": f"question {i}?", "chosen": f"a good answer {i}", "rejected": f"no {i}"} for i in range(12)]
USER = lambda text: {"role": "user", "content": text}
ASSISTANT = lambda text: {"role": "assistant", "content": text}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(source, **options):
    """Return the fitted task and its examples."""
    source = source if not isinstance(source, list) else pl.DataFrame(source)
    chosen = KIND.options_from({"vocab_size": 300, **options})
    data = KIND.build_examples(read(source, column_spec=KIND.column_spec), chosen)
    return KIND.fit(data, chosen), data


# ------------------------------------------------------------------------------------------------ reading


def as_messages(i):
    return {"prompt": [USER(f"question {i}?")], "chosen": [ASSISTANT(f"a good answer {i}")], "rejected": [ASSISTANT(f"no {i}")]}


def as_whole(i):
    begin = [{"role": "system", "content": "Be kind."}, USER(f"question {i}?")]
    return {"chosen": [*begin, ASSISTANT(f"a good answer {i}")], "rejected": [*begin, ASSISTANT(f"no {i}")]}


def as_transcript(i):
    begin = f"\n\nHuman: hello\n\nAssistant: hi\n\nHuman: question {i}?\n\nAssistant:"
    return {"chosen": f"{begin} a good answer {i}", "rejected": f"{begin} no {i}"}


FORMS = {"texts": lambda i: PAIRS[i], "messages": as_messages, "whole": as_whole, "transcript": as_transcript}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_formats(form, format, tmp_path):
    rows, path = [FORMS[form](i) for i in range(12)], tmp_path / f"data.{format}"
    if format == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        flat = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
        pl.DataFrame(flat).write_csv(path)
    fitted, data = build(path)
    assert data.rows[CHOSEN].to_list() == [row["chosen"] for row in PAIRS]
    assert data.rows[REJECTED].to_list() == [row["rejected"] for row in PAIRS]
    assert fitted.chat == (form != "texts") and fitted.turns(data)[3][-1][1] == "question 3?"
    roles = {"texts": [""], "messages": ["user"], "whole": ["system", "user"], "transcript": ["user", "assistant", "user"]}
    assert [role for role, _ in fitted.turns(data)[0]] == roles[form]
    assert fitted.column == ("messages" if fitted.chat else "prompt")


def test_task_is_inferred():
    assert infer_task(read(pl.DataFrame([as_whole(i) for i in range(4)])))[0] is KIND
    assert infer_task(read("replies"))[0] is KIND
    with pytest.raises(DataError, match="columns chosen and rejected"):
        KIND.build_examples(
            read(pl.DataFrame([{"prompt": "a", "chosen": "b"}, {"prompt": "c", "chosen": "d"}])), KIND.Options()
        )


DAMAGE = {
    "identical-answers": {"chosen": "no 0 "},
    "no-answer": {"rejected": None},
    "no-prompt": {"prompt": "  "},
    "malformed-messages": {"prompt": '[{"role": "user"'},
}


@pytest.mark.parametrize("check", DAMAGE)
def test_damaged_rows_are_found(check):
    rows = [dict(PAIRS[0], **DAMAGE[check]), *PAIRS[1:]]
    with refused(check, ":1"):
        read(pl.DataFrame(rows), column_spec=KIND.column_spec)
    kept = read(pl.DataFrame(rows), column_spec=KIND.column_spec, allow_bad=True)
    assert len(KIND.build_examples(kept, KIND.Options())) == 11


def test_damaged_conversations_are_found():
    rows = [as_whole(i) for i in range(6)]
    rows[2]["rejected"] = [USER("another question"), ASSISTANT("no")]
    with refused("other-prompts", ":3"):
        read(pl.DataFrame(rows), column_spec=KIND.column_spec)
    rows = [as_whole(i) for i in range(6)]
    rows[1]["chosen"] = [{"role": "robot", "content": "x"}]
    with refused("malformed-messages", ":2"):
        read(pl.DataFrame(rows), column_spec=KIND.column_spec)
    swapped = {"prompt": PAIRS[0]["prompt"], "chosen": PAIRS[0]["rejected"], "rejected": PAIRS[0]["chosen"]}
    data = read(pl.DataFrame([*PAIRS, PAIRS[1], swapped]), column_spec=KIND.column_spec)
    assert finding(data, "opposed-preferences").count == 1 and "duplicate-preference" in checks(data)
    for options, words in (({"loss": "hinge"}, "sigmoid or ipo"), ({"beta": 0}, "above 0"), ({"length": 2}, "at least 4")):
        with pytest.raises(SettingsError, match=words):
            build(PAIRS, **options)


# ------------------------------------------------------------------------------------------------ tokens


def test_only_the_answers_are_scored():
    fitted, data = build([{**row, "rejected": row["rejected"] * (1 + i % 2)} for i, row in enumerate(PAIRS)])
    batch = fitted.batches(data, card("gpt2"), Settings()).make(np.arange(3), None)
    assert batch["tokens"].shape == batch["target"].shape and len(batch["tokens"]) == 6
    for place in range(6):
        target = batch["target"][place]
        scored = target >= 0
        answer = data.rows[CHOSEN if place < 3 else REJECTED][place % 3]
        assert fitted.text.decode(target[scored][:-1].tolist()) == answer and target[scored][-1] == fitted.text.end
        first = int(scored.nonzero()[0])
        prompt = batch["tokens"][place, : first + 1]
        assert fitted.text.decode(prompt[1:].tolist()) == data.rows["prompt"][place % 3]
        assert (target[:first] == -1).all()
    facts = fitted.targets(data)
    assert facts["chosen_tokens"][0] == int((batch["target"][0] >= 0).sum())


def test_template_tokens_before_the_answer_are_not_scored(tmp_path):
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    text = TextTokenizer.fit_exact([row["chosen"] + row["prompt"] for row in PAIRS], size=320, special=special)
    text.template, text.ends = CHATML, (text.token_id("<|im_end|>"),)
    text.save(tmp_path)
    fitted, data = build([as_whole(i) for i in range(12)], tokenizer=str(tmp_path))
    prompts, chosen, _ = fitted.encode_pairs(data)
    assert fitted.text.tokenizer.decode(prompts[0].tolist(), skip_special_tokens=False).endswith("<|im_start|>assistant\n")
    answer = fitted.text.tokenizer.decode(chosen[0].tolist(), skip_special_tokens=False)
    assert answer == "a good answer 0<|im_end|>"
    whole = fitted.text.encode_rendered([fitted.template.template([*as_whole(0)["chosen"]], answer=False)])[0][0]
    assert whole[: len(prompts[0]) + len(chosen[0])].tolist() == [*prompts[0], *chosen[0]]


def test_long_prompts_lose_their_beginning_and_long_answers_their_end():
    prompt, chosen, rejected = np.arange(20), np.arange(100, 110), np.arange(200, 203)
    cut = truncate(prompt, chosen, rejected, 16)
    assert cut[0].tolist() == [0, 13, 14, 15, 16, 17, 18, 19] and cut[1].tolist() == [*range(100, 108)] and len(cut[2]) == 3
    assert [len(x) for x in truncate(prompt, rejected, rejected, 16)] == [13, 3, 3]  # short answers leave their room
    assert [len(x) for x in truncate(prompt[:4], chosen, rejected, 10)] == [4, 6, 3]
    assert truncate(prompt[:4], rejected, rejected, 10)[0].tolist() == [0, 1, 2, 3]
    fitted, data = build([{**row, "prompt": "word " * 30 + row["prompt"]} for row in PAIRS], length=24)
    made = fitted.batches(data, card("gpt2"), Settings()).make(np.arange(4), None)
    assert made["tokens"].shape[1] <= 23 and "longer than 24 tokens" in fitted.notes[0]


# ------------------------------------------------------------------------------------------------ objective


def slow_loss(policy, reference, batch, beta, smoothing, loss):
    """DPO and IPO from probabilities of single tokens."""

    def log_probability(model, row):
        logits = model(batch["tokens"][row : row + 1], None)[0]
        terms = [
            torch.log(logits[i].exp()[t] / logits[i].exp().sum()) for i, t in enumerate(batch["target"][row].tolist()) if t >= 0
        ]
        return sum(terms) / (len(terms) if loss == "ipo" else 1)

    count, terms = len(batch["tokens"]) // 2, []
    for i in range(count):
        ratios = [log_probability(policy, row) - log_probability(reference, row).detach() for row in (i, i + count)]
        h = ratios[0] - ratios[1]
        if loss == "ipo":
            terms.append((h - 1 / (2 * beta)) ** 2)
        else:
            win = 1 / (1 + torch.exp(-beta * h))
            terms.append(-(1 - smoothing) * torch.log(win) - smoothing * torch.log(1 - win))
    return sum(terms) / count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)])
def test_loss_and_gradients_equal_the_equations(loss, smoothing, dtype):
    policy = tiny("gpt2", dtype)
    reference = copy.deepcopy(policy).requires_grad_(False)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tokens = torch.randint(0, policy.config.vocab_size, (6, 9))
    target = torch.where(torch.arange(9) >= torch.tensor([[3], [4], [5]] * 2), tokens.roll(-1, 1), -1)
    target[:3, -1] = -1  # padding
    batch = {"tokens": tokens, "target": target}
    objective = Preference(policy, ("tokens", "mask"), reference, 0.5, smoothing, loss)
    found, wanted = objective(batch)["loss"], slow_loss(policy, reference, batch, 0.5, smoothing, loss)
    ours, theirs = (torch.autograd.grad(x, list(policy.parameters())) for x in (found, wanted))
    close = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-11}
    torch.testing.assert_close(found, wanted, **close)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, **close)
    assert reference not in list(objective.modules()) and all(p.grad is None for p in reference.parameters())
    fitted, _ = build(PAIRS, beta=0.5, loss=loss)
    fitted.smoothing = smoothing
    outputs = {name: x.detach().numpy() for name, x in objective.outputs(batch).items()}
    assert fitted.score(outputs, {})["loss"] == pytest.approx(found.item(), rel=1e-4)


def test_scores():
    fitted, data = build(PAIRS, beta=0.5)
    outputs = {
        "chosen": np.array([-1.0, -2.0, -3.0, -4.0]),
        "rejected": np.array([-2.0, -1.0, -3.0, -9.0]),
        "reference_chosen": np.array([-2.0, -1.0, -3.0, -3.0]),
        "reference_rejected": np.array([-2.0, -1.0, -3.0, -9.0]),
    }
    scores = fitted.score(outputs, {})
    assert scores["accuracy"] == (1 + 0 + 0.5 + 0) / 4 and scores["likelihood_accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert scores["margin"] == pytest.approx(0.5 * (1 - 1 + 0 - 1) / 4)
    assert scores["loss"] == pytest.approx(np.mean([math.log(1 + math.exp(-0.5 * h)) for h in (1, -1, 0, -1)]))
    assert list(fitted.score({name: outputs[name] for name in ("chosen", "rejected")}, {})) == ["likelihood_accuracy"]
    fitted.postprocess(outputs)
    found = {b.name: fitted.score(b.outputs, {})["accuracy"] for b in fitted.baselines(data, data.take(range(4)))}
    assert found == {"longer answer": 1.0, "reference": 0.625}
    assert "length alone" in fitted.find_doubts(fitted.targets(data))[0]


def test_fine_tuning_takes_small_steps():
    assert get_learning_rates("lora", 10**8, KIND.finetune_rate)["lr"] == pytest.approx(
        0.05 * get_learning_rates("lora", 10**8)["lr"]
    )


# ------------------------------------------------------------------------------------------------ fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = {"steps": 50, "evaluate": 25, "batch": 16, "precision": "float32", "lr": 3e-3, "task.vocab_size": 400}
    return fit("replies", model="gpt2-test", out=tmp_path_factory.mktemp("runs") / "replies", settings=settings)


def test_network_learns_the_sample(run):
    assert run.scores["accuracy"] > 0.95 and run.scores["margin"] > 0.1 and run.scores["loss"] < 0.6
    baselines = {b["name"]: b["scores"]["accuracy"] for b in run.record["scores"]["baselines"]}
    assert set(baselines) == {"longer answer", "reference"} and max(baselines.values()) < 0.8
    assert run.record["scores"]["intervals"]["accuracy"][0] > 0.9
    page = (run.path / "report.html").read_text()
    assert all(words in page for words in ("Accuracy by length", "Mean rewards", "Random pairs", "Samples"))


def test_predictions_and_evaluation(run, tmp_path):
    again = open_run(run.path)
    first = again.predict(["Help, the lamp drips!", samples.path("replies")], max_new_tokens=4)
    assert len(first) == 1201 and set(first[0]) == {"input", "text"}
    result = again.evaluate("replies")
    assert result["rows"] == 240 and result["scores"] == {
        "likelihood_accuracy": pytest.approx(run.scores["likelihood_accuracy"])
    }
    with pytest.raises(DataError, match="evaluation needs columns chosen and rejected"):
        run.evaluate(pl.DataFrame({"prompt": ["a b", "c d"], "chosen": ["x", "y"]}))


def test_lora_keeps_the_reference(run, tmp_path):
    """Fine-tuning a run with LoRA: the reference is that run, and at the start nothing is gained over it."""
    settings = {"steps": 2, "batch": 8, "precision": "float32", "finetune": "lora", "lr": 0.0}
    made = fit("replies", weights=run.path, out=tmp_path / "lora", settings=settings)
    assert made.scores["accuracy"] == 0.5 and made.scores["loss"] == pytest.approx(math.log(2), abs=1e-4)
    before = {b["name"]: b["scores"]["accuracy"] for b in made.record["scores"]["baselines"]}
    assert before["reference"] == pytest.approx(run.scores["likelihood_accuracy"])
