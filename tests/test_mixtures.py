"""Mixtures of experts in training: the loss includes load balancing, as in transformers, and all experts are used."""

from __future__ import annotations

import pytest
import torch

from cases import huggingface_decoder
from fieldguide.models.layers.moe_balance import load_balancing_loss
from fieldguide.models.registry import cards, create
from fieldguide.models.transformer.deepseek_v3 import sequence_balance_loss
from fieldguide.objectives import NextToken, Objective, Phase
from fieldguide.training.phases import PhaseModule
from test_models import batch, tiny


def slow(scores, used, real):
    """Compute the loss token by token and expert by expert."""
    scores, rows, experts = scores.double(), [i for i in range(len(scores)) if real[i]], scores.shape[1]
    total = 0.0
    for e in range(experts):
        share = sum(int(sum(int(s > scores[i][e]) for s in scores[i]) < used) for i in rows) / len(rows)
        total += share * sum(float(scores[i].exp()[e] / scores[i].exp().sum()) for i in rows) / len(rows)
    return experts * total


@pytest.mark.parametrize("used", [1, 2, 3])
def test_load_balancing_loss_by_hand(used):
    torch.manual_seed(0)
    scores, real = torch.randn(11, 4, dtype=torch.float64), torch.rand(11) > 0.3
    assert load_balancing_loss(scores, used, real).item() == pytest.approx(slow(scores, used, real), rel=1e-6)
    assert load_balancing_loss(scores, used).item() == pytest.approx(slow(scores, used, torch.ones(11)), rel=1e-6)
    changed = torch.where(real[:, None], scores, 9 * torch.randn(11, 4, dtype=torch.float64))
    assert torch.equal(load_balancing_loss(changed, used, real), load_balancing_loss(scores, used, real))
    assert load_balancing_loss(scores, used, torch.zeros(11, dtype=torch.bool)).isfinite()


def trained(name, model, inputs):
    """Return the batch of an objective and train one step."""
    names = cards()[name].inputs
    said = dict(zip(names, inputs))
    target = torch.where(said["mask"], said["tokens"].roll(-1, 1), -1)
    target[:, -1] = -1
    return PhaseModule(NextToken(model, names), Phase("train", ("model",))), {**said, "target": target}


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_mixtral_loss_equals_transformers(padded):
    model = tiny("mixtral", balancing=0.3).train()
    peer, rename = huggingface_decoder(model)
    peer.double().load_state_dict(rename(model.state_dict()))
    theirs = peer.peer
    tokens, mask = batch("mixtral")
    mask = mask if padded else torch.ones_like(mask)
    step, said = trained("mixtral", model, (tokens, mask))
    found = step(said)
    assert theirs.config.router_aux_loss_coef == 0.3
    labels = torch.full_like(tokens, -100)
    labels[:, 1:] = torch.where(said["target"][:, :-1] >= 0, said["target"][:, :-1], -100)
    want = theirs(input_ids=tokens, attention_mask=mask.long(), labels=labels, output_router_logits=True)
    # There, rows of padding alone count, too, where they stand within a batch; here, too, none does.
    torch.testing.assert_close(found["balance_loss"].double(), want.aux_loss.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["loss"].double(), want.loss.double(), rtol=1e-5, atol=1e-6)
    found["loss"].backward()
    want.loss.backward()
    ours = rename({name: p.grad for name, p in model.named_parameters()})
    for name, p in peer.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-6)


def test_nllb_load_balancing_ignores_padding():
    model = tiny("nllb-moe", balancing=0.3).train()
    inputs = batch("nllb-moe")
    step, said = trained("nllb-moe", model, inputs)
    found = step(said)
    sides = (("encoder", inputs[1]), ("decoder", inputs[3]))
    wanted = [
        slow(block.mlp.scores.detach(), 1, mask.flatten())
        for side, mask in sides
        for block in getattr(model, side)
        if hasattr(block.mlp, "scores")
    ]
    assert len(wanted) == 2 and found["balance_loss"].item() == pytest.approx(sum(wanted) / 2, rel=1e-5)
    plain = step.objective(said)["loss"]
    assert found["loss"].item() == pytest.approx(plain.item() + 0.3 * found["balance_loss"].item(), rel=1e-5)


def test_deepseek_sequence_loss_by_hand():
    torch.manual_seed(0)
    scores, real = torch.randn(3, 7, 6, dtype=torch.float64), torch.rand(3, 7) > 0.3
    total = 0.0
    for row in range(3):
        steps = [t for t in range(7) if real[row, t]]
        share = scores[row].sigmoid()
        for e in range(6):
            load = sum(int(sum(int(s > share[t][e]) for s in share[t]) < 2) for t in steps) * 6 / (2 * len(steps))
            total += load * sum(float(share[t][e] / share[t].sum()) for t in steps) / len(steps) / 3
    assert sequence_balance_loss(scores, 2, real).item() == pytest.approx(total, rel=1e-9)
    whole = sequence_balance_loss(scores, 2, None)
    assert whole == sequence_balance_loss(scores, 2, torch.ones_like(real)) and whole.item() != pytest.approx(total)


def test_deepseek_biases_follow_the_load():
    """Experts with less than the mean load become more likely; padding does not count, and evaluation changes nothing."""
    model = tiny("deepseek-v3", bias_speed=0.01)
    tokens, mask = batch("deepseek-v3")
    model(tokens, mask)
    assert not any(layer.bias.any() for layer in model.get_experts())
    model.train()(tokens, mask)
    for layer in model.get_experts():
        changed = layer.bias.clone()
        layer.bias.zero_()  # the choice depends on the biases before
        chosen = [e for row, real in zip(layer.route(layer.scores)[1].tolist(), mask.flatten()) if real for e in row]
        load = torch.tensor([chosen.count(e) for e in range(8)]).double()
        torch.testing.assert_close(changed, 0.01 * torch.sign(load.mean() - load))
    step, said = trained("deepseek-v3", model, (tokens, mask))
    assert step(said)["balance_loss"].isfinite()


@torch.no_grad()
def test_deepseek_biases_keep_all_experts_in_use():
    """With three preferred experts at the start, biases alone spread the tokens."""
    shares = {}
    for speed in (0.0, 0.02):
        torch.manual_seed(0)
        model = create("deepseek-v3-test", bias_speed=speed, balancing=0.0).train()
        used = torch.zeros(8)
        for layer in model.get_experts():
            layer.router.weight.mul_(0.1)[:3, 0] = 1.0
        model.embed.weight[:, 0] += 1.0
        for step in range(80):
            model(torch.randint(30, (8, 10)))
            for layer in model.get_experts() if step >= 60 else ():
                used += layer.route(layer.scores)[1].flatten().bincount(minlength=8)
        shares[speed] = (used / used.sum()).min().item()
    assert shares[0.02] > 0.1 and shares[0.0] == 0, shares


def test_networks_without_experts_have_no_auxiliary_loss():
    step, said = trained("mixtral", create("llama-test").train(), batch("llama"))
    assert set(step(said)) == {"loss"}
    step, said = trained("mixtral", tiny("mixtral", balancing=0.0).train(), batch("mixtral"))
    assert set(step(said)) == {"loss"}


def test_auxiliary_losses_belong_to_the_phase_of_their_network():
    class Asking(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(value))

        def auxiliary_losses(self):
            return {f"at {self.value.item()}": (self.value * 1.0, 0.5)}

    class Two(Objective):
        phases = (Phase("critic", ("critic",)), Phase("train", ("model",)))

        def __init__(self):
            super().__init__()
            self.model, self.critic = Asking(2.0), Asking(4.0)

        def forward(self, batch, phase="train"):
            return {"loss": torch.tensor(10.0)}

    both = Two()
    assert PhaseModule(both, both.phases[0])({}) == {"loss": torch.tensor(12.0), "at 4.0": torch.tensor(4.0)}
    assert PhaseModule(both, both.phases[1])({}) == {"loss": torch.tensor(11.0), "at 2.0": torch.tensor(2.0)}


def test_load_balancing_keeps_all_experts_in_use():
    """The router starts with one preferred expert: without load balancing it keeps most tokens."""
    shares = {}
    for balancing in (0.0, 0.1):
        torch.manual_seed(0)
        model = create("mixtral-test", balancing=balancing).train()
        with torch.no_grad():
            for block in model.blocks:  # what all tokens share points to the first two
                block.mlp.router.weight.zero_()
                block.mlp.router.weight[:2, 0] = 2.0
            model.embed.weight[:, 0] += 1.0
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for i in range(60):
            generator = torch.Generator().manual_seed(i)
            tokens = torch.randint(30, (16, 10), generator=generator)
            tokens[:, 1:] = (tokens[:, :1] + torch.arange(1, 10)) % 30
            step, said = trained("mixtral", model, (tokens, torch.ones_like(tokens, dtype=torch.bool)))
            optimizer.zero_grad()
            losses = step(said)
            losses["loss"].backward()
            optimizer.step()
        chosen = torch.cat([block.mlp.scores.topk(2, 1).indices.flatten() for block in model.blocks])
        used = chosen.bincount(minlength=4)
        shares[balancing] = (used / used.sum()).min().item()
        assert losses["loss"].isfinite()
    assert shares[0.1] > 0.1 > shares[0.0], shares
