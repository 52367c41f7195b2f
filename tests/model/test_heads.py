import copy
import warnings

import peft
import pytest
import torch
import transformers as T
from torch import nn

import ipca
from ipca.model.heads import find_heads
from tests.helpers.models import snapshot

TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
X = torch.cat([torch.arange(24).reshape(2, 12) + 3, torch.full((2, 1), 2)], 1)  # BART wants its <eos>


def bert(**options):
    return T.BertConfig(**TINY, **options)


def distilbert():
    return T.DistilBertConfig(vocab_size=97, dim=32, hidden_dim=48, n_layers=2, n_heads=4, num_labels=2)


def bart():
    sizes = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 1, "d_model": 32}
    return T.BartConfig(vocab_size=97, encoder_attention_heads=4, decoder_attention_heads=4, **sizes)


def t5():
    return T.T5Config(vocab_size=97, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8, decoder_start_token_id=0)


def clip():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return T.CLIPConfig(
        text_config={**sizes, "vocab_size": 97}, vision_config={**sizes, "image_size": 8, "patch_size": 4}
    )


def wav2vec2():
    conv = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    return T.Wav2Vec2Config(**TINY, **conv, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)


HEADS = {
    "bert": (T.BertForSequenceClassification, bert, ["classifier"]),
    "bert tokens": (T.BertForTokenClassification, bert, ["classifier"]),
    "bert choice": (T.BertForMultipleChoice, bert, ["classifier"]),
    "bert answers": (T.BertForQuestionAnswering, bert, ["qa_outputs"]),
    "distilbert": (T.DistilBertForSequenceClassification, distilbert, ["pre_classifier", "classifier"]),
    "deberta": (T.DebertaV2ForSequenceClassification, lambda: T.DebertaV2Config(**TINY), ["pooler", "classifier"]),
    "roberta": (T.RobertaForSequenceClassification, lambda: T.RobertaConfig(**TINY), ["classifier"]),
    "llama": (
        T.LlamaForSequenceClassification,
        lambda: T.LlamaConfig(**TINY, pad_token_id=0),
        ["score"],
    ),
    "bart": (T.BartForSequenceClassification, bart, ["classification_head"]),
    "t5": (T.T5ForQuestionAnswering, t5, ["qa_outputs"]),
    "wav2vec2": (T.Wav2Vec2ForSequenceClassification, wav2vec2, ["projector", "classifier"]),
    "clip": (T.CLIPForImageClassification, clip, ["classifier"]),
    "vit": (T.ViTForImageClassification, lambda: T.ViTConfig(hidden_size=32, num_hidden_layers=1), ["classifier"]),
    "no task": (T.BertForMaskedLM, bert, []),
}


def make(kind):
    torch.manual_seed(0)
    model_class, config, _ = HEADS[kind]
    return model_class(config()).eval()


def move(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_is_everything_outside_the_base_model(kind):
    with torch.device("meta"):
        model = HEADS[kind][0](HEADS[kind][1]())
    assert find_heads(model) == HEADS[kind][2]


@pytest.mark.parametrize("kind", ["bert", "bert answers", "distilbert", "deberta", "roberta", "bart"])
def test_a_head_trains_whole_is_saved_and_loads_in_both_readers(kind, tmp_path):
    model, heads = ipca.apply_pc(make(kind), rank=4, progress=False), HEADS[kind][2]
    base = make(kind)
    for name in heads:
        assert {p.requires_grad for p in model.get_submodule(name).parameters()} == {True}
        assert type(model.get_submodule(name)) is type(base.get_submodule(name))
    assert [name for name, _ in ipca.summary(model).modules_to_save] == heads
    assert f"fully trained: {heads[0]} (" in str(ipca.summary(model))
    right = move(model)(input_ids=X)[0]
    ipca.save_adapter(model, tmp_path)
    with torch.no_grad():  # another process draws another head
        for name in heads:
            for p in base.get_submodule(name).parameters():
                p.normal_()
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(input_ids=X)[0]
    assert torch.allclose(stock, right, atol=1e-5)
    assert torch.equal(ipca.load_adapter(base, tmp_path).eval()(input_ids=X)[0], right)


@pytest.mark.parametrize("named", [["classifier"], ["pre_classifier"], ["pre_classifier", "classifier"]])
def test_naming_a_part_of_the_head_trains_all_of_it(named):
    model = ipca.apply_pc(make("distilbert"), rank=4, targets=["q_lin"], modules_to_save=named, progress=False)
    assert [name for name, _ in ipca.summary(model).modules_to_save] == HEADS["distilbert"][2]


def test_a_head_gets_a_window_where_it_is_asked_for():
    model = ipca.apply_pc(make("roberta"), rank=2, targets=["query", "classifier.dense"], progress=False)
    assert isinstance(model.classifier.dense, ipca.nn.LinearPC)
    assert [name for name, _ in ipca.summary(model).modules_to_save] == ["classifier.out_proj"]
    model = ipca.apply_pc(make("roberta"), rank=2, targets=["dense"], progress=False)  # the name of body layers too
    assert type(model.classifier.dense) is nn.Linear
    assert [name for name, _ in ipca.summary(model).modules_to_save] == ["classifier"]
    model = make("distilbert")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"adapt pre_classifier: PEFT would save it whole, with a module in whose name"
    ):
        ipca.apply_pc(model, rank=2, targets=["q_lin", "pre_classifier"], progress=False)
    assert snapshot(model) == before
    model = make("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"adapt classifier: .* but there are only 2"):
        ipca.apply_pc(model, rank=16, targets=["classifier"], progress=False)
    assert snapshot(model) == before


def test_an_excluded_head_stays_as_it_is(tmp_path):
    model = ipca.apply_pc(make("distilbert"), rank=4, exclude=["pre_classifier", "classifier"], progress=False)
    assert not model.classifier.weight.requires_grad
    assert ipca.summary(model).modules_to_save == ()


def test_a_head_that_cannot_train_is_refused_by_name():
    model = make("bert")
    model.classifier.weight = nn.Parameter(torch.ones(2, 32, dtype=torch.int8), requires_grad=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'classifier' has parameters that are no floats .* unless it is excluded"):
        ipca.apply_pc(model, rank=4, progress=False)
    assert snapshot(model) == before


def test_a_second_adapter_leaves_an_adapted_head_alone():
    model = ipca.apply_pc(make("bert"), rank=2, targets=["classifier"], progress=False)
    ipca.apply_pc(model, rank=2, targets=["query"], progress=False)
    assert isinstance(model.classifier, ipca.nn.LinearPC)
    assert ipca.summary(model).modules_to_save == ()


def saved(tmp_path, model):
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_what_from_pretrained_has_drawn_at_random_trains_whole(tmp_path):
    folder = saved(tmp_path, T.Wav2Vec2Model(wav2vec2()))
    model = ipca.apply_pc(T.Wav2Vec2ForCTC.from_pretrained(folder), rank=4, progress=False)
    assert [name for name, _ in ipca.summary(model).modules_to_save] == ["lm_head"]


def test_a_pooler_that_the_checkpoint_lacks_trains_with_the_head(tmp_path):
    folder = saved(tmp_path, T.BertForMaskedLM(bert()))
    model = T.BertForSequenceClassification.from_pretrained(folder)
    assert find_heads(model) == ["classifier", "bert.pooler"]
    right = move(ipca.apply_pc(model, rank=4, targets=["query"], progress=False)).eval()(input_ids=X)[0]
    ipca.save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(7)
    again = T.BertForSequenceClassification.from_pretrained(folder).eval()
    assert torch.equal(ipca.load_adapter(again, tmp_path / "adapter").eval()(input_ids=X)[0], right)


def test_what_was_loaded_resized_or_built_is_not_new(tmp_path):
    model = T.LlamaForCausalLM(T.LlamaConfig(**TINY))
    assert find_heads(model) == []
    model = T.LlamaForCausalLM.from_pretrained(saved(tmp_path, model))
    assert find_heads(model) == []
    model.resize_token_embeddings(105)
    assert find_heads(model) == []


def test_modules_that_peft_would_save_with_a_head_train_too(tmp_path):
    config = T.PoolFormerConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1])
    model = ipca.apply_pc(
        T.PoolFormerForImageClassification(config).eval(), rank=2, targets=[".*conv1"], progress=False
    )
    whole = [name for name, _ in ipca.summary(model).modules_to_save]
    assert {"norm", "classifier"} < set(whole)
    x = torch.randn(1, 3, 32, 32)
    right = move(model)(x).logits
    ipca.save_adapter(model, tmp_path)
    stock = peft.PeftModel.from_pretrained(T.PoolFormerForImageClassification(config), tmp_path).eval()
    assert stock.base_model.model.classifier.modules_to_save.default.weight.equal(model.classifier.weight)
    assert right.isfinite().all()


def test_a_model_whose_only_linear_layer_is_its_head_says_so():
    config = T.PoolFormerConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"no linear layer to adapt beside its head, norm, classifier, which trains"):
        ipca.apply_pc(T.PoolFormerForImageClassification(config), rank=2, progress=False)


def test_parameters_of_the_model_itself_are_named():
    config = T.TapasConfig(**TINY, type_vocab_sizes=[3, 8, 8, 2, 2, 8, 8])
    with pytest.warns(UserWarning, match=r"output_weights, .* of TapasForQuestionAnswering stay frozen"):
        ipca.apply_pc(T.TapasForQuestionAnswering(config), rank=4, targets=["query"], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ipca.apply_pc(make("bert"), rank=4, targets=["query"], progress=False)
