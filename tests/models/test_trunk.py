"""A model in two steps, hidden states and head, equals the model in one."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as tf

from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.models.seq2seq import Seq2SeqLM
from loglik.models.trunk import Trunk, evaluating, relative_difference
from zoo import CAUSAL, IDS, MASKED, MORE_CAUSAL, SEQ2SEQ, SMALL, build

VOCABULARY = 50
IDS_A = torch.tensor([[7, 3, 9, 31, 4, 4, 12, 40, 5]])
IDS_B = torch.tensor([[2, 8, 41, 6, 6, 33, 17, 9, 11]])
EVERY_CAUSAL = {**CAUSAL, **MORE_CAUSAL}
FAMILIES = [
    *(("causal", name) for name in EVERY_CAUSAL),
    *(("seq2seq", name) for name in SEQ2SEQ),
    *(("masked", name) for name in MASKED),
]
# Scale and soft-cap of the head; None where the head is more than a matrix. Everything else is plain.
FORMS = {
    "cohere": (0.3, None),
    "granite": (1 / 3, None),
    "gemma2": (1.0, 3.0),
    "t5": (16**-0.5, None),
    "bert": None,
    "roberta": None,
}


def network(family, name, gain=10.0):
    table = {"causal": EVERY_CAUSAL, "seq2seq": SEQ2SEQ, "masked": MASKED}[family]
    return build(table[name], VOCABULARY, gain=gain)


def inputs(family, ids):
    return {"input_ids": ids, "decoder_input_ids": ids} if family == "seq2seq" else {"input_ids": ids}


def reference(model, family, ids=IDS_A):
    with torch.no_grad():
        return model(**inputs(family, ids)).logits[0].double()


def checked(model, trunk, family="causal", ids=IDS_A):
    """Assert that the trunk's numbers are the model's; repeated rows, a row without target, a subset."""
    logits = reference(model, family, ids)
    log_probs = torch.log_softmax(logits, -1)
    rows = torch.tensor([0, 0, 1, 3, 4, 5, 6, 7, 8])
    targets = torch.tensor([4, 49, 0, 12, int(logits[4].argmax()), 9, 30, 1, 2])
    subset = torch.arange(VOCABULARY) % 3 == 0
    with torch.no_grad():
        hidden = trunk.hidden(**inputs(family, ids))[0]
        got = trunk.log_probs(hidden, targets, rows=rows, subset=subset)
        plain = trunk.log_probs(hidden, logits.argmax(1))
        own = trunk.logits(hidden)
    assert log_probs.std() > 0.1
    torch.testing.assert_close(got.log_probs.double(), log_probs[rows, targets], atol=1e-4, rtol=1e-5)
    assert got.greedy.tolist() == [bool(logits[r, t] >= logits[r].max()) for r, t in zip(rows, targets, strict=True)]
    assert got.log_mass is not None
    torch.testing.assert_close(got.log_mass.double(), log_probs[:, subset].logsumexp(-1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(plain.log_probs.double(), log_probs.amax(1), atol=1e-4, rtol=1e-5)
    assert plain.greedy.all()
    torch.testing.assert_close(own.double(), logits, atol=1e-4, rtol=1e-5)


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_two_steps_equal_one(family, name):
    model = network(family, name)
    trunk = Trunk(model, inputs(family, IDS_B[:, :6]))
    checked(model, trunk, family)
    expected = FORMS.get(name, (1.0, None))
    head = trunk.head
    assert (head is None) == (expected is None)
    if head is not None:
        assert (head.scale, head.softcap) == expected
        assert (head.bias is not None) == (name in ("phi", "gptj"))
    assert hooks(model) == 0


def test_bart_with_a_bias_outside_its_head():
    """`final_logits_bias` is no part of the output layer: the architecture's own head is used."""
    model = network("seq2seq", "bart")
    model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    trunk = Trunk(model, inputs("seq2seq", IDS_B))
    assert trunk.head is None
    checked(model, trunk, "seq2seq")


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "v_proj"], ["q_proj", "lm_head"], ["embed_tokens"]])
def test_adapters(targets):
    """LoRA on the head, elsewhere and on both; its weights change after the trunk was made."""
    model = network("causal", "llama")
    plain = reference(model, "causal")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    trunk = Trunk(adapted, {"input_ids": IDS_B})
    assert (trunk.head is None) == ("lm_head" in targets)
    torch.testing.assert_close(reference(adapted, "causal"), plain, atol=1e-4, rtol=1e-4)
    checked(adapted, trunk)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(generator=generator)
    assert (reference(adapted, "causal") - plain).abs().max() > 0.1
    checked(adapted, trunk)
    with adapted.disable_adapter():
        torch.testing.assert_close(reference(adapted, "causal"), plain, atol=1e-4, rtol=1e-4)
        checked(adapted, trunk)
    assert hooks(adapted) == 0


def test_adapter_put_on_the_head_after_the_trunk_was_made():
    model = network("causal", "llama")
    trunk = Trunk(model, {"input_ids": IDS_B})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    checked(model, trunk)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite"])
def test_weights_of_this_moment_count(name):
    """Trained in place, replaced, or a vocabulary resized after the trunk was made."""
    model = network("causal", name)
    trunk = Trunk(model, {"input_ids": IDS_B})
    before = reference(model, "causal")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    assert (reference(model, "causal") - before).abs().max() > 1e-2
    checked(model, trunk)
    if not model.config.tie_word_embeddings:
        model.set_output_embeddings(torch.nn.Linear(16, VOCABULARY, bias=False))
        checked(model, trunk)


def test_scale_of_a_head_that_starts_at_zero():
    make = {
        "zero": lambda v: tf.GraniteForCausalLM(
            tf.GraniteConfig(
                vocab_size=v, **SMALL, logits_scaling=8.0, max_position_embeddings=64, tie_word_embeddings=False, **IDS
            )
        )
    }
    model = build(make["zero"], VOCABULARY)
    torch.nn.init.zeros_(model.lm_head.weight)
    trunk = Trunk(model, {"input_ids": IDS_B})
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(3))
    checked(model, trunk)


@pytest.mark.parametrize("name", ["albert", "electra"])
def test_output_layer_narrower_than_the_hidden_states(name):
    """ALBERT and ELECTRA project before the vocabulary: their own head has to be used."""
    config = {**SMALL, "vocab_size": VOCABULARY, "embedding_size": 8, "max_position_embeddings": 64}
    make = {
        "albert": lambda v: tf.AlbertForMaskedLM(tf.AlbertConfig(**config)),
        "electra": lambda v: tf.ElectraForMaskedLM(tf.ElectraConfig(**config)),
    }
    model = build(make[name], VOCABULARY, gain=10.0)
    trunk = Trunk(model, {"input_ids": IDS_B})
    assert trunk.head is None
    checked(model, trunk, "masked")


@pytest.mark.parametrize("name", ["gemma2", "granite", "phi", "bart"])
def test_gradients_equal_those_of_the_whole_model(name):
    """Through trunk and head in float64: every parameter, tied ones included."""
    family = "seq2seq" if name == "bart" else "causal"
    model = network(family, name).double()
    if name == "bart":
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(4))
    trunk = Trunk(model, inputs(family, IDS_B))
    targets = torch.tensor([4, 49, 0, 12, 3, 9, 30, 1, 2])
    trunk.log_probs(trunk.hidden(**inputs(family, IDS_A))[0], targets).log_probs.sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(**inputs(family, IDS_A)).logits[0]
    assert logits.dtype == torch.float64
    torch.log_softmax(logits, -1)[torch.arange(9), targets].sum().backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, atol=1e-9, rtol=1e-8, msg=key)


@pytest.mark.parametrize(("family", "name"), [("causal", "llama"), ("seq2seq", "t5"), ("masked", "bert")])
def test_the_head_sees_one_position(family, name):
    """No logits of all positions exist: the output layer is handed one hidden state."""
    model = network(family, name)
    trunk = Trunk(model, inputs(family, IDS_B))
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    trunk.hidden(**inputs(family, IDS_A.repeat(4, 1)))
    handle.remove()
    assert seen == [(4, 1)]


@pytest.mark.parametrize("fails", ["hidden", "logits"])
def test_hooks_are_removed_when_a_pass_fails(fails):
    model = network("causal", "llama")
    trunk = Trunk(model, {"input_ids": IDS_B})
    attempt = {
        "hidden": lambda: trunk.hidden(input_ids=torch.tensor([[VOCABULARY + 3]])),
        "logits": lambda: trunk.logits(torch.zeros(2, 5)),
    }
    with pytest.raises((IndexError, RuntimeError)):
        attempt[fails]()
    assert hooks(model) == 0
    checked(model, trunk)


def test_modes_are_restored():
    """Some modules train and some do not; both stay as they are, also after an exception."""
    model = network("causal", "gpt2")
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    Trunk(model, {"input_ids": IDS_B})
    assert [module.training for module in model.modules()] == before
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(IndexError), evaluating(model):
        model(input_ids=torch.tensor([[VOCABULARY + 3]]))
    assert [module.training for module in model.modules()] == before


def test_probing_in_training_mode_sees_no_dropout():
    """The form of the head is found although dropout is on."""
    model = network("causal", "gpt2").train()
    assert model.config.resid_pdrop > 0
    assert Trunk(model, {"input_ids": IDS_B}).head is not None


def test_networks_that_cannot_be_taken_apart():
    """A network without parts has no trunk; its log-probabilities are right all the same."""

    class Whole(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.hidden_network = inner
            self.config = inner.config

        def get_output_embeddings(self):
            return None

        @property
        def device(self):
            return self.hidden_network.device

        def forward(self, **kwargs):
            return self.hidden_network(**kwargs)

    inner = network("causal", "llama")
    with pytest.raises(TypeError, match="Whole does not say what stands before its head"):
        Trunk(Whole(inner), {"input_ids": IDS_B})
    model = CausalLM(Whole(inner))
    assert model.trunk is None
    with pytest.raises(ValueError, match="cannot be taken apart"):
        model.forward_path()
    row = IDS_A[0].tolist()
    with torch.no_grad():
        got = model.log_prob(TokenBatch.from_lists([row])).value
        want = CausalLM(inner).log_prob(TokenBatch.from_lists([row])).value
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_every_model_class_uses_it(family, name):
    """The probes that the model classes make suit their architectures."""
    raw = network(family, name)
    model = {"causal": CausalLM, "seq2seq": Seq2SeqLM}.get(family, lambda m: MaskedLM(m, mask_token_id=4))(raw)
    assert model.trunk is not None


def test_relative_difference():
    one = torch.tensor([1.0, -4.0])
    assert relative_difference(one + 1, one) == pytest.approx(0.25)
    assert relative_difference(one, one) == 0.0
    for bad in (float("nan"), float("inf")):
        assert relative_difference(torch.tensor([bad, 1.0]), one) == float("inf")
        assert relative_difference(one, torch.tensor([bad, 1.0])) == float("inf")


def test_longrope_values_do_not_depend_on_the_batch():
    """Rotary frequencies by the length of the longest row of a pass: rows on either side of the limit do not mix."""
    model = CausalLM(network("causal", "phi3_longrope"))
    rows = [IDS_A[0, :7].tolist(), [*IDS_A[0].tolist(), *IDS_B[0].tolist()]]
    with torch.no_grad():
        alone = [model.log_prob(TokenBatch.from_lists([row])).value for row in rows]
        together = model.log_prob(TokenBatch.from_lists(rows)).value
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)
