"""Encoder-decoder models of text."""

import transformers

from tests.zoo.models.tiny import VOCAB, encoder_decoder, model, tiny


def t5gemma_config():
    parts = {part: tiny("T5GemmaModuleConfig") for part in ("encoder", "decoder")}
    return transformers.T5GemmaConfig(**parts, vocab_size=VOCAB, dropout_rate=0.0, attention_dropout=0.0)


ENCODER_DECODERS = {
    "t5": model("T5ForConditionalGeneration", "T5Config", encoder_decoder, decoder_start_token_id=0),
    "flan_t5": model(
        "T5ForConditionalGeneration",
        "T5Config",
        encoder_decoder,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "mt5": model("MT5ForConditionalGeneration", "MT5Config", encoder_decoder, decoder_start_token_id=0),
    "umt5": model("UMT5ForConditionalGeneration", "UMT5Config", encoder_decoder, decoder_start_token_id=0),
    "longt5": model(
        "LongT5ForConditionalGeneration", "LongT5Config", encoder_decoder, decoder_start_token_id=0, local_radius=4
    ),
    "switch": model(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        encoder_decoder,
        decoder_start_token_id=0,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        expert_capacity=64,
    ),
    "bart": model("BartForConditionalGeneration", "BartConfig", encoder_decoder),
    "mbart": model("MBartForConditionalGeneration", "MBartConfig", encoder_decoder),
    "marian": model("MarianMTModel", "MarianConfig", encoder_decoder, decoder_start_token_id=0),
    "pegasus": model("PegasusForConditionalGeneration", "PegasusConfig", encoder_decoder),
    "m2m_100": model("M2M100ForConditionalGeneration", "M2M100Config", encoder_decoder),
    "nllb_moe": model(
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        encoder_decoder,
        expert_capacity=64,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
    ),
    "led": model(
        "LEDForConditionalGeneration",
        "LEDConfig",
        encoder_decoder,
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    "prophetnet": model(
        "ProphetNetForConditionalGeneration",
        "ProphetNetConfig",
        encoder_decoder,
        num_encoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        ngram=2,
        num_buckets=8,
        relative_max_distance=16,
    ),
    "fsmt": model(
        "FSMTForConditionalGeneration",
        "FSMTConfig",
        encoder_decoder,
        langs=["en", "de"],
        src_vocab_size=VOCAB,
        tgt_vocab_size=VOCAB,
        vocab_size=...,
    ),
    "t5gemma": model("T5GemmaForConditionalGeneration", t5gemma_config, encoder_decoder),
    "encoder_decoder": model(
        "EncoderDecoderModel",
        lambda: transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
            tiny("BertConfig"),
            tiny("BertConfig", add_cross_attention=True, is_decoder=True),
            decoder_start_token_id=1,
            pad_token_id=0,
        ),
        encoder_decoder,
    ),
}
