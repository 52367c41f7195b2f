"""What a model lost: by hand, and beside torch.nn.functional, scikit-learn and SciPy."""

import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

import ipca
from ipca.analysis import accuracy_drop, cross_entropy_rise, embedding_drift, forgetting, kl_to_base
from tests.helpers.models import Plain, snapshot

MEASURES = (cross_entropy_rise, accuracy_drop, kl_to_base)
OPTIONS = {cross_entropy_rise: "loss_of", accuracy_drop: "correct_of", kl_to_base: "logits_of"}


class Table(nn.Module):
    """Gives the logits of the items whose numbers it is asked for."""

    def __init__(self, logits, wrap=lambda logits, labels: logits):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits))
        self.wrap = wrap

    def forward(self, ids, labels=None, attention_mask=None):
        return self.wrap(self.logits[ids], labels)


def of_transformers(shift):
    """An output like those of transformers, with the mean loss of its labels."""

    def wrap(logits, labels):
        if labels is None:
            return SimpleNamespace(logits=logits, loss=None)
        read, wanted = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(read.flatten(0, -2), wanted.flatten()))

    return wrap


def log(*shares):
    """Logits, one row for each item, whose softmax is ``shares``; a constant is added, which changes nothing."""
    return torch.tensor(shares, dtype=torch.float64).log() + 3


BASE, NOW = log([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]), log([0.25, 0.5, 0.25], [0.125, 0.75, 0.125])
ITEMS = torch.arange(2)


def batches(labels, sizes):
    """Pairs of item numbers and labels, in batches of ``sizes``."""
    ids = torch.arange(len(labels)).split(sizes)
    return list(zip(ids, torch.as_tensor(labels).split(sizes), strict=True))


def random_tables(items=37, classes=5):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(items, classes, generator=generator, dtype=torch.float64)
    now = base + 0.5 * torch.randn(items, classes, generator=generator, dtype=torch.float64)
    return now, base, torch.randint(classes, (items,), generator=generator)


def test_two_items_by_hand():
    now, base = Table(NOW), Table(BASE)
    data = [(ITEMS, torch.tensor([0, 1]))]
    # −log p of the labels: ½ → ¼ and ½ → ¾
    assert cross_entropy_rise(now, base, data) == pytest.approx((math.log(2) + math.log(2 / 3)) / 2)
    assert accuracy_drop(now, base, data) == 0.5  # the first is lost
    first = 0.5 * math.log(2) + 0.25 * math.log(1 / 2) + 0
    second = 0.25 * math.log(2) + 0.5 * math.log(2 / 3) + 0.25 * math.log(2)
    assert kl_to_base(now, base, data) == pytest.approx((first + second) / 2)


def test_a_gain_has_the_other_sign():
    now, base, data = Table(BASE), Table(NOW), [(ITEMS, torch.tensor([0, 1]))]
    assert cross_entropy_rise(now, base, data) == pytest.approx((math.log(1 / 2) + math.log(3 / 2)) / 2)
    assert accuracy_drop(now, base, data) == -0.5
    assert kl_to_base(now, base, data) != pytest.approx(kl_to_base(base, now, data))  # it is not symmetric
    assert kl_to_base(now, base, data) > 0


def test_unequal_batches_give_what_scikit_learn_and_scipy_do():
    now, base, labels = random_tables()
    p, q = now.softmax(-1).numpy(), base.softmax(-1).numpy()
    data = batches(labels, [16, 16, 4, 1])
    expected = log_loss(labels, p, labels=range(5)) - log_loss(labels, q, labels=range(5))
    assert cross_entropy_rise(Table(now), Table(base), data) == pytest.approx(expected, rel=1e-9)
    expected = accuracy_score(labels, q.argmax(1)) - accuracy_score(labels, p.argmax(1))
    assert accuracy_drop(Table(now), Table(base), data) == pytest.approx(expected, rel=1e-12)
    assert kl_to_base(Table(now), Table(base), data) == pytest.approx(entropy(q, p, axis=1).mean(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_logits_are_read_in_float32(dtype):
    now, base, labels = random_tables()
    now, base = now.to(dtype), base.to(dtype)
    data = batches(labels, [20, 17])
    rise = F.cross_entropy(now.double(), labels) - F.cross_entropy(base.double(), labels)
    kl = F.kl_div(now.double().log_softmax(1), base.double().softmax(1), reduction="batchmean")
    eps = torch.finfo(torch.float32).eps
    assert cross_entropy_rise(Table(now), Table(base), data) == pytest.approx(float(rise), abs=20 * eps)
    assert kl_to_base(Table(now), Table(base), data) == pytest.approx(float(kl), abs=20 * eps)


def test_ignored_labels_do_not_count():
    now, base, labels = random_tables()
    few = torch.where(torch.arange(37) % 3 == 0, labels, -100)
    for measure in MEASURES:
        expected = measure(Table(now[::3]), Table(base[::3]), batches(labels[::3], [13]))
        assert measure(Table(now), Table(base), batches(few, [20, 17])) == pytest.approx(expected, rel=1e-12)


def tokens(shift):
    """Two sequences of 4 tokens as transformers' models get them; the last token of the second is padding."""
    now, base, labels = random_tables(items=8)
    batch = {
        "ids": torch.arange(8).reshape(2, 4),
        "labels": labels.reshape(2, 4),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    wrap = of_transformers(shift)
    return Table(now, wrap), Table(base, wrap), batch


@pytest.mark.parametrize("measure", MEASURES)
def test_a_masked_language_model_predicts_the_label_at_the_same_position(measure):
    now, base, batch = tokens(shift=False)
    plain = (torch.arange(7), batch["labels"].flatten()[:7])
    expected = measure(Table(now.logits), Table(base.logits), [plain])
    assert measure(now, base, [batch]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_causal_language_model_predicts_the_next_label(measure):
    now, base, batch = tokens(shift=True)
    plain = (torch.tensor([0, 1, 2, 4, 5]), batch["labels"].flatten()[[1, 2, 3, 5, 6]])
    expected = measure(Table(now.logits), Table(base.logits), [plain])
    assert measure(now, base, [batch]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_batch_whose_only_label_nothing_precedes_adds_nothing(measure):
    now, base, batch = tokens(shift=True)
    expected = measure(now, base, [batch])
    first = torch.where(torch.arange(4) == 0, batch["labels"], -100)
    assert base(**{**batch, "labels": first}).loss.isnan()
    assert measure(now, base, [batch, {**batch, "labels": first}]) == expected


def test_padding_on_the_left_predicts_nothing():
    now, base, batch = tokens(shift=True)
    batch["attention_mask"] = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    plain = (torch.tensor([2, 4, 5, 6]), batch["labels"].flatten()[[3, 5, 6, 7]])
    expected = cross_entropy_rise(Table(now.logits), Table(base.logits), [plain])
    assert cross_entropy_rise(now, base, [batch]) == pytest.approx(expected, rel=1e-12)


def test_the_divergence_of_text_without_labels_leaves_padding_out():
    now, base, batch = tokens(shift=True)
    del batch["labels"]
    expected = kl_to_base(Table(now.logits), Table(base.logits), [torch.arange(7)])
    assert kl_to_base(now, base, [batch]) == pytest.approx(expected, rel=1e-12)
    assert kl_to_base(now, base, [(batch, None)]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["causal", "masked"])
def test_a_model_of_transformers(name):
    import transformers

    torch.manual_seed(0)
    if name == "causal":
        config = transformers.GPT2Config(vocab_size=31, n_embd=24, n_layer=2, n_head=2, n_positions=16)
        model, targets = transformers.GPT2LMHeadModel(config), ["mlp.c_fc"]
    else:
        config = transformers.BertConfig(
            vocab_size=31, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
        )
        model, targets = transformers.BertForMaskedLM(config), ["intermediate.dense"]
    ids = torch.randint(31, (3, 9))
    batch = transformers.BatchEncoding({"input_ids": ids, "labels": torch.where(ids % 4 == 0, -100, ids)})
    before = model.eval()(**batch).loss.item()
    ipca.apply_pc(model, rank=3, targets=targets, progress=False)
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.mul_(10)
    after = model(**batch).loss.item()
    assert abs(after - before) > 1e-3
    assert cross_entropy_rise(model, None, [batch]) == pytest.approx(after - before, abs=1e-5)
    assert kl_to_base(model, None, [batch]) > 1e-3


def test_an_encoder_decoder_is_not_masked_by_its_encoders_mask():
    now, base, batch = tokens(shift=False)
    whole = kl_to_base(Table(now.logits), Table(base.logits), [torch.arange(8)])
    for table in (now, base):
        table.config = SimpleNamespace(is_encoder_decoder=True)
    assert kl_to_base(now, base, [batch]) == pytest.approx(whole, rel=1e-12)


def trained(form):
    torch.manual_seed(0)
    plain = Plain().train()
    model = Plain().train()
    model.load_state_dict(plain.state_dict())
    ipca.apply_pc(model, rank=3, form=form, targets=["a", "b"], progress=False)
    untrained = snapshot(model)
    return plain, model, untrained


def train(model):
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("form", ["residual", "intact"])
@pytest.mark.parametrize("measure", MEASURES)
def test_without_a_base_the_model_is_its_own(measure, form):
    plain, model, _ = trained(form)
    data = [(torch.randn(7, 20), torch.randint(5, (7,))), (torch.randn(3, 20), torch.randint(5, (3,)))]
    untrained = measure(model, None, data)
    assert untrained == 0 if form == "intact" else abs(untrained) < 1e-6
    train(model)
    assert measure(model, None, data) == pytest.approx(measure(model, plain, data), abs=1e-6)
    ipca.merge_adapter(model)
    assert measure(model, None, data) == pytest.approx(measure(model, plain, data), abs=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_nothing_is_disturbed(measure):
    plain, model, _ = trained("residual")
    train(model)
    model.b.eval()
    model.drop, plain.drop = nn.Dropout(0.5), nn.Dropout(0.5)  # in training mode
    model.a.register_forward_hook(lambda module, inputs, output: output + torch.randn(()) * 0)  # draws
    data = torch.utils.data.TensorDataset(torch.randn(8, 20), torch.randint(5, (8,)))
    before = snapshot(model), snapshot(plain)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for base in (plain, None):
        measure(model, base, torch.utils.data.DataLoader(data, batch_size=3, shuffle=True))
    assert (snapshot(model), snapshot(plain)) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert all(p.grad is None for p in model.parameters())


def test_an_error_in_the_middle_disturbs_nothing():
    _, model, _ = trained("residual")
    data = [torch.randn(2, 20), "text"]
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(TypeError, match="got a str"):
        kl_to_base(model, None, data)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert not model.a.is_disabled


def test_models_run_in_evaluation_mode_without_gradients():
    seen = []

    class Watched(Table):
        def forward(self, ids):
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(ids)

    kl_to_base(Watched(NOW).train(), Watched(BASE).train(), iter([ITEMS]))
    assert seen == [(False, False)] * 2


def test_other_models_are_read_by_a_function():
    now, base = Table(NOW), Table(BASE)

    def losses(model, batch):
        return -model(batch).log_softmax(-1)[:, 0]

    assert cross_entropy_rise(now, base, [ITEMS], loss_of=losses) == pytest.approx((math.log(2) + math.log(2)) / 2)
    assert cross_entropy_rise(now, base, [ITEMS] * 3, loss_of=lambda m, b: losses(m, b).mean().item()) == pytest.approx(
        math.log(2)
    )
    right = accuracy_drop(now, base, [ITEMS], correct_of=lambda model, batch: model(batch).argmax(-1) == 0)
    assert right == 0.5
    pairs = kl_to_base(now, base, [ITEMS], logits_of=lambda model, batch: model(batch)[:, :2])
    p, q = np.array([[2, 1], [1, 2]]) / 3, np.array([[1, 2], [1, 6]]) / np.array([[3], [7]])
    assert pairs == pytest.approx(entropy(p, q, axis=1).mean())


def test_a_class_that_the_base_rules_out_adds_nothing():
    base, now = torch.tensor([[0.0, 0.0, -math.inf]]), torch.zeros(1, 3)
    assert kl_to_base(Table(now), Table(base), [torch.arange(1)]) == pytest.approx(math.log(1.5), rel=1e-6)
    assert kl_to_base(Table(base), Table(now), [torch.arange(1)]) == math.inf
    assert kl_to_base(Table(base), Table(base), [torch.arange(1)]) == 0


def test_a_diverged_model_is_wrong_and_infinitely_far():
    broken = NOW.clone()
    broken[:, 2] = math.nan
    data = [(ITEMS, torch.tensor([2, 2]))]  # argmax gives the place of the NaN
    good = Table(log([0.1, 0.1, 0.8], [0.1, 0.1, 0.8]))
    assert accuracy_drop(Table(broken), good, data) == 1
    assert math.isnan(cross_entropy_rise(Table(broken), good, data))
    assert math.isnan(kl_to_base(Table(broken), good, data))


def smoothed(logits, labels):
    return SimpleNamespace(logits=logits, loss=torch.tensor(7.0))


def lost(logits, labels):
    return SimpleNamespace(logits=logits, loss=torch.tensor(math.nan))


LABELS = torch.tensor([[0, 1]])


@pytest.mark.parametrize(
    ("model", "base", "data", "error", "words"),
    [
        (Table(NOW), None, [ITEMS], ValueError, "this Table has no adapter; pass the pretrained model"),
        (Table(NOW), Table(BASE), [], ValueError, "nothing counts: there are no batches"),
        (Table(NOW), Table(BASE), [(ITEMS, torch.tensor([-100, -100]))], ValueError, "every label is −100 or masked"),
        (Table(NOW), Table(BASE[:, :2]), [ITEMS], ValueError, r"tensors of \(2, 3\) and \(2, 2\) for the same batch"),
        (Table(NOW), Table(BASE), [(ITEMS, ITEMS, ITEMS)], TypeError, r"a pair \(inputs, labels\) .* got a tuple of 3"),
        (Table(NOW), Table(BASE), [3], TypeError, "got a int"),
        (Table(NOW), Table(BASE), [(ITEMS, torch.zeros(2))], ValueError, r"got a tensor \(2,\) of float32. Pass"),
        (Table(NOW), Table(BASE), [(ITEMS, LABELS)], ValueError, r"integers \(2,\) for logits \(2, 3\); got a tensor"),
        (Table(NOW), Table(BASE), [(ITEMS, [0, 1])], ValueError, "got a list of 2"),
        (Table(NOW), Table(BASE), [(ITEMS, torch.tensor([0, 3]))], ValueError, "from 0 to 2, or -100 .* got 3"),
        (Table(NOW), Table(BASE), [(ITEMS, torch.tensor([-1, 0]))], ValueError, "from 0 to 2, or -100 .* got -1"),
        (Table(NOW), Table(BASE), ITEMS, TypeError, "an iterable of batches, got a Tensor; put one batch into a list"),
        (Table(NOW), Table(BASE), {"ids": ITEMS}, TypeError, "an iterable of batches, got a dict"),
        (
            Table(NOW, lambda *all: all),
            Table(BASE),
            [ITEMS],
            TypeError,
            "Table returned a tuple of 2, not a tensor",
        ),
        (
            Table(NOW, smoothed),
            Table(BASE, smoothed),
            [{"ids": ITEMS[None], "labels": LABELS}],
            ValueError,
            "own loss is 7, but the cross-entropy of its logits is 0.6931, or 1.386 with each position predicting",
        ),
        (
            Table(NOW, lost),
            Table(BASE, lost),
            [{"ids": ITEMS[None], "labels": LABELS}],
            ValueError,
            "own loss is nan, but the cross-entropy of its logits is 0.6931",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(model, base, data, error, words):
    with pytest.raises(error, match=words):
        kl_to_base(model, base, data)


@pytest.mark.parametrize("measure", [cross_entropy_rise, accuracy_drop])
def test_labels_are_needed_to_judge_by_them(measure):
    with pytest.raises(ValueError, match=r"these batches have no labels: pass pairs \(inputs, labels\)"):
        measure(Table(NOW), Table(BASE), [ITEMS])


def test_forgetting_is_both_measures_in_one_pass():
    data = batches([0, 2], 1)
    found = forgetting(Table(NOW), Table(BASE), iter(data))
    assert found.kl == pytest.approx(kl_to_base(Table(NOW), Table(BASE), data), rel=1e-12)
    assert found.loss_rise == pytest.approx(cross_entropy_rise(Table(NOW), Table(BASE), data), rel=1e-12)
    assert found.tokens == 2


class Encoder(nn.Module):
    def __init__(self, states):
        super().__init__()
        self.states = nn.Parameter(torch.as_tensor(states))

    def forward(self, ids, attention_mask=None, output_hidden_states=False):
        return SimpleNamespace(hidden_states=(None, self.states[ids]) if output_hidden_states else None)


def test_embedding_drift_is_one_minus_the_cosine_of_mean_states():
    then = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [0.0, 2.0]]])
    now = torch.tensor([[[0.0, 3.0], [0.0, 1.0]], [[0.0, 1.0], [5.0, 0.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    batch = {"ids": ITEMS, "attention_mask": mask}
    assert embedding_drift(Encoder(now), Encoder(then), [batch]) == pytest.approx(0.5)  # 1 and, masked, 0
    whole = (1 + 1 - 1 / math.sqrt(26)) / 2
    assert embedding_drift(Encoder(now), Encoder(then), [{"ids": ITEMS}]) == pytest.approx(whole)
    maps = [x.mT.reshape(2, 2, 1, 2) for x in (now, then)]  # (items, C, height, width)
    assert embedding_drift(Encoder(maps[0]), Encoder(maps[1]), [{"ids": ITEMS}]) == pytest.approx(whole)
    assert embedding_drift(Encoder(then), Encoder(then.clone()), [batch]) == 0
    with pytest.raises(TypeError, match="a batch is a mapping"):
        embedding_drift(Encoder(now), Encoder(then), [ITEMS])
    silent = Encoder(now)
    silent.forward = lambda **_: SimpleNamespace(hidden_states=None)
    with pytest.raises(TypeError, match="returned no hidden states"):
        embedding_drift(silent, Encoder(then), [batch])


def test_the_loss_that_balances_a_router_is_no_loss_of_tokens():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    balanced = {"num_local_experts": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    config = transformers.MixtralConfig(vocab_size=32, num_key_value_heads=1, **sizes, **balanced)
    model, base = (transformers.MixtralForCausalLM(config) for _ in range(2))
    ids = torch.arange(16).view(2, 8)
    found = forgetting(model, base, [{"input_ids": ids, "labels": ids}])
    with torch.no_grad():
        wanted = [
            F.cross_entropy(each.eval()(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            for each in (model, base)
        ]
    assert found.loss_rise == pytest.approx((wanted[0] - wanted[1]).item(), abs=1e-6)


def test_an_item_of_padding_alone_has_no_embedding():
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
    )
    model = ipca.apply_pc(transformers.BertModel(config), rank=2, progress=False)
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.1)
    ids, mask = torch.arange(24).view(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[1] = 0
    whole = embedding_drift(model, None, [{"input_ids": ids, "attention_mask": mask}])
    kept = embedding_drift(model, None, [{"input_ids": ids[::2], "attention_mask": mask[::2]}])
    assert whole == pytest.approx(kept, rel=1e-5)
    assert whole > 0


def test_labels_of_16_bit_models_are_judged_the_same_in_every_batch():
    """The two ways to judge a new head differ by less than bfloat16 rounds its loss."""
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, num_labels=5
    )
    torch.manual_seed(0)
    base = transformers.BertForTokenClassification(config).eval()
    model = ipca.apply_pc(copy.deepcopy(base).bfloat16(), rank=2, progress=False)
    batches = [{"input_ids": torch.randint(31, (2, 6)), "labels": torch.randint(5, (2, 6))} for _ in range(40)]
    assert forgetting(model, base.bfloat16(), batches).tokens == 40 * 12
    text_model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2)
    ).bfloat16()
    with torch.no_grad():
        text_model.transformer.wte.weight.zero_()  # every token is as likely as every other
    texts = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    adapted = ipca.apply_pc(copy.deepcopy(text_model), rank=2, targets=["c_attn"], progress=False)
    assert forgetting(adapted, text_model, texts).tokens == 40 * 10


def test_an_encoder_decoder_in_a_wrapper_is_masked_as_without_it():
    config = transformers.T5Config(
        vocab_size=31, d_model=16, d_ff=20, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0, pad_token_id=0
    )
    model = ipca.apply_pc(transformers.T5ForConditionalGeneration(config), rank=2, progress=False)
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.1)
    ids, mask = torch.arange(1, 25).view(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[:, 4:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask, "labels": ids.flip(1)}]
    assert forgetting(nn.DataParallel(model), None, batches) == forgetting(model, None, batches)
    assert forgetting(model, None, batches).tokens == 24


@pytest.mark.parametrize("number", [torch.Tensor.mean, lambda losses: losses.mean().item()])
def test_the_default_device_does_not_matter(number):
    model = ipca.apply_pc(Plain(), rank=3, progress=False)
    train(model)
    data = [torch.randn(7, 20)]

    def loss_of(model, batch):
        return number(model(batch).square())

    expected = cross_entropy_rise(model, None, data, loss_of=loss_of)
    with torch.device("meta"):
        assert cross_entropy_rise(model, None, data, loss_of=loss_of) == expected != 0
